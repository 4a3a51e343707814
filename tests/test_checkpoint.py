import errno
import json
import os

import pytest
import torch
from tiny_world import ALONE
from torch import nn

from rankgrpo.errors import SaveError
from rankgrpo.files.atomic import TEMPORARY
from rankgrpo.runtime import checkpoint as ckpt
from rankgrpo.runtime.optim import make_optimizer


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def trained(seed: int, steps: int):
    model = small_model(seed)
    optimizer = make_optimizer(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_resumed_training_is_bit_identical(tmp_path):
    whole, whole_optimizer = trained(0, 3)
    ckpt.save_checkpoint(tmp_path, 3, whole, whole_optimizer, {"best": {"ndcg": 0.1}}, keep_last=2, parallel=ALONE)
    advance(whole, whole_optimizer, range(3, 6))

    resumed = small_model(99)
    optimizer = make_optimizer(resumed, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    state = ckpt.load_checkpoint(ckpt.latest_checkpoint(tmp_path, ALONE), resumed, optimizer)
    assert state == {"step": 3, "best": {"ndcg": 0.1}}
    advance(resumed, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_keeps_the_newest(tmp_path):
    model, optimizer = trained(0, 1)
    for step in (1, 2, 10, 11):
        ckpt.save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2, parallel=ALONE)
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared(tmp_path):
    model, optimizer = trained(0, 1)
    ckpt.save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=2, parallel=ALONE)
    (tmp_path / f"{TEMPORARY}step-00000002").mkdir()
    (tmp_path / f"{TEMPORARY}step-00000002" / "model.safetensors").write_bytes(b"half")
    assert ckpt.latest_checkpoint(tmp_path, ALONE).name == "step-00000001"
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    ckpt.save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1, parallel=ALONE)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="the disk is full.*same command"):
        ckpt.save_checkpoint(tmp_path, 2, model, optimizer, {}, keep_last=1, parallel=ALONE)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    ckpt.load_checkpoint(tmp_path / "step-00000001", model, optimizer)


def test_damaged_checkpoint_says_what_to_do(tmp_path):
    model, optimizer = trained(0, 1)
    path = ckpt.save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1, parallel=ALONE)
    (path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ckpt.CheckpointError, match="delete this folder"):
        ckpt.load_checkpoint(path, model, optimizer)


def test_a_part_that_is_missing_is_named(tmp_path):
    model, optimizer = trained(0, 1)
    path = ckpt.save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1, parallel=ALONE)
    (path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ckpt.CheckpointError, match="cannot be read.*shard-00001.*delete this folder"):
        ckpt.load_checkpoint(path, model, optimizer)


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = trained(0, 1)
    path = ckpt.save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1, parallel=ALONE)
    with pytest.raises(ckpt.CheckpointError, match="another model.*bias"):
        ckpt.load_checkpoint(path, nn.Linear(5, 4), optimizer)
    wider = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ckpt.CheckpointError, match=r"another model; 3 .*0.bias: \(4,\) here, \(6,\) in the model"):
        ckpt.load_checkpoint(path, wider, optimizer)


def test_no_pickle_in_a_checkpoint(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, *trained(0, 1), {}, keep_last=1, parallel=ALONE)
    assert {file.name for file in path.iterdir()} == {"shard-00001-model-00001-of-00001.safetensors", "state.json"}
    json.loads((path / "state.json").read_text())
