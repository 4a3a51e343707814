"""What goes wrong between processes is told in one message."""

import socket
from contextlib import nullcontext

import pytest
import torch
from tiny_world import ALONE, tiny_config

from rankgrpo import cli
from rankgrpo.errors import BusyError, ConfigError, ParallelError, TrainingError
from rankgrpo.files.atomic import only_one
from rankgrpo.runtime.distributed import Parallel, make_sharding, start_parallel


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ParallelError, match=f"cannot meet at 127.0.0.1:{port}.*If the port is in use"):
            start_parallel()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("failure", [None, TrainingError("the loss is nan", everywhere=True)])
def test_the_command_line_leaves_the_process_group_before_python_ends(tmp_path, monkeypatch, failure):
    def command(**_) -> None:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if failure is not None:
            raise failure

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(cli.app, "cli", command)
    with nullcontext() if failure is None else pytest.raises(SystemExit, match="the loss is nan"):
        cli.main()
    assert not torch.distributed.is_initialized()


def test_what_a_lone_process_cannot_do():
    assert make_sharding(tiny_config().parallel, ALONE) is None
    with pytest.raises(ConfigError, match="parallel.shard: 'full' .*use torchrun"):
        make_sharding(tiny_config("parallel.shard=full").parallel, ALONE)
    with pytest.raises(ConfigError, match="parallel.cpu_offload: .*parallel.shard = full or hybrid"):
        make_sharding(tiny_config("parallel.cpu_offload=true").parallel, ALONE)
    with pytest.raises(ConfigError, match="parallel.cpu_offload: needs a split model"):
        tiny_config("parallel.cpu_offload=true", "parallel.shard=none")


def test_auto_leaves_a_model_whole_on_cpus():
    assert make_sharding(tiny_config().parallel, Parallel(0, 2, torch.device("cpu"))) is None


def test_a_run_folder_at_work_is_refused_and_free_again_afterwards(tmp_path):
    with only_one(tmp_path / "run"):
        with pytest.raises(BusyError, match="another process is at work"), only_one(tmp_path / "run", patience_s=0.2):
            pass
    with only_one(tmp_path / "run", patience_s=0.0):
        pass
