"""The update of TRL's GRPOTrainer on given rollouts, as a provider of update.py.

The trainer is built on a copy of the model and its own `compute_loss` runs: its padding, its forward pass, its loss and
its metrics, which with one update a batch is what a training step does between generation and the optimizer. Advantages
go in a token each, so that the gradient is that of the other providers and can be compared with theirs.
"""

from __future__ import annotations

import copy
import tempfile
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from rankgrpo.model.attention import ordinary_attention
from rankgrpo.model.packing import Group


def make_trainer(model: torch.nn.Module) -> GRPOTrainer:
    """A trainer over a copy of `model`, in its ordinary attention."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    with ordinary_attention(model):
        own = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            per_device_train_batch_size=8,
            num_generations=8,
            gradient_checkpointing=False,
            # A plain sum over tokens: its normaliser is `num_items_in_batch`, given as 1 below.
            loss_type="dapo",
            beta=0.0,
            report_to=[],
        )
        trainer = GRPOTrainer(
            model=own,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 8}),
            processing_class=tokenizer,
        )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_step(
    trainer: GRPOTrainer,
    groups: list[Group],
    weights: list[list[Tensor]],
    num_rows: int,
    *,
    trim: bool,
    lists_only: bool,
) -> float:
    """Forward and backward of all rollouts, `num_rows` at a time; the gradient is that of sum(weight * log-prob).

    trim=False pads every row to the longest prompt and list of the batch, as the trainer does. trim=True pads to the
    longest of the micro-batch, which the trainer does not offer. lists_only=True switches on the branch of its head
    that drops other positions first, which TRL takes where Triton runs.
    """
    if lists_only:
        with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
            return trl_step(trainer, groups, weights, num_rows, trim=trim, lists_only=False)
    device = trainer.model.device
    rows = [
        (torch.tensor(group.prompt_ids), torch.tensor(ids), weight)
        for group, group_weights in zip(groups, weights, strict=True)
        for ids, weight in zip(group.completion_ids, group_weights, strict=True)
    ]
    longest = (max(len(p) for p, _, _ in rows), max(len(c) for _, c, _ in rows))
    total = 0.0
    for start in range(0, len(rows), num_rows):
        prompts, lists, advantages = zip(*rows[start : start + num_rows], strict=True)
        left, right = longest if not trim else (max(map(len, prompts)), max(map(len, lists)))
        inputs = {
            "prompt_ids": _pad(prompts, "left", left),
            "prompt_mask": _pad([torch.ones_like(ids) for ids in prompts], "left", left),
            "completion_ids": _pad(lists, "right", right),
            "completion_mask": _pad([torch.ones_like(ids) for ids in lists], "right", right),
            "advantages": -_pad(advantages, "right", right),
            "num_items_in_batch": torch.ones(()),
        }
        loss = trainer.compute_loss(trainer.model, {name: tensor.to(device) for name, tensor in inputs.items()})
        loss.backward()
        total += float(loss.detach())
    return total


def _pad(rows: list[Tensor], side: str, length: int) -> Tensor:
    padded = pad(list(rows), padding_value=0, padding_side=side)
    extra = (length - padded.size(1), 0) if side == "left" else (0, length - padded.size(1))
    return torch.nn.functional.pad(padded, extra)
