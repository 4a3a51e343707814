"""Whole steps of TRL's GRPOTrainer, for peers.py: its own `train()`, timed by phase.

What differs from a user's run: prompts go in as token ids, no id ends a list, so that all have max_completion_length
tokens, the head's branch for GPUs may be switched on, and after each step the other trainer has its turn. Gradient
checkpointing, which TRL has on by default, is off: it would cost TRL a quarter of its update.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from rankgrpo.model.attention import ordinary_attention


@contextmanager
def head_of_a_gpu() -> Iterator[None]:
    """TRL's head drops all but the lists' tokens first, as it does where Triton runs."""
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


class PeerTrainer(GRPOTrainer):
    """GRPOTrainer on given prompts, which keeps the seconds of its phases."""

    def __init__(self, model, tokenizer, prompts: list[list[int]], reward: Callable, args: GRPOConfig):
        self.given = prompts
        data = Dataset.from_dict({"prompt": [str(p) for p in range(len(prompts))], "place": list(range(len(prompts)))})
        super().__init__(model, reward, args, train_dataset=data, processing_class=tokenizer)
        self.eos_token_ids = [len(tokenizer)]  # no such id: no list ends before the others
        self.phases = {"sample": (0.0, 0.0), "score": (0.0, 0.0)}

    def _tokenize_prompts(self, prompts: list):
        return [self.given[int(prompt)] for prompt in prompts], None, {}

    def _generate(self, prompts: list):
        began = now()
        result = super()._generate(prompts)
        self.phases["sample"] = since(began)
        return result

    def _generate_and_score_completions(self, inputs):
        began = now()
        self.batch = super()._generate_and_score_completions(inputs)
        self.phases["score"] = minus(since(began), self.phases["sample"])
        return self.batch


def make_trainer(model, tokenizer, prompts, reward, *, group_size: int, list_tokens: int, rows: int, steps: int, lr):
    """A trainer over a copy of `model` whose step is all prompts, `rows` lists a micro-batch."""
    with ordinary_attention(model):
        own = copy.deepcopy(model)
    logging.set_verbosity_error()
    num_lists = len(prompts) * group_size
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=num_lists // rows,
            num_generations=group_size,
            max_completion_length=list_tokens,
            generation_kwargs={"eos_token_id": len(tokenizer)},
            gradient_checkpointing=False,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            save_strategy="no",
            logging_steps=1000,
            report_to=[],
            disable_tqdm=True,
        )
        return PeerTrainer(own, tokenizer, prompts, reward, args)


def best_rows(make: Callable[[int], PeerTrainer], sizes: list[int], lists_only: bool) -> tuple[int, dict[int, float]]:
    """The micro-batch with the fastest forward and backward over one sampled batch, and processor seconds of each.

    make: `make_trainer` by rows.
    """
    with head_of_a_gpu() if lists_only else nullcontext():
        trainer = make(max(sizes))
        trainer.model.train()
        inputs = [trainer.train_dataset[p] for p in range(len(trainer.given)) for _ in range(trainer.num_generations)]
        batch = trainer._generate_and_score_completions(inputs)
        spent: dict[int, float] = {}
        for rows in [sizes[0], *sizes]:  # the first one warms up
            trainer.current_gradient_accumulation_steps = len(inputs) // rows
            began = now()
            for first in range(0, len(inputs), rows):
                part = {
                    name: value[first : first + rows] if torch.is_tensor(value) and value.ndim else value
                    for name, value in batch.items()
                }
                trainer.compute_loss(trainer.model, part).backward()
            spent[rows] = since(began)[1]
            trainer.model.zero_grad()
    return min(spent, key=spent.get), spent


@dataclass
class Turns(TrainerCallback):
    """Times the steps of a PeerTrainer and gives the other trainer a turn after each.

    around: of every step its context, entered before and left after it (a profiler).
    """

    trainer: PeerTrainer
    turn: Callable[[int], None]
    around: Callable[[int], object]

    def __post_init__(self):
        self.steps: list[dict[str, tuple[float, float]]] = []

    def on_step_begin(self, args, state, control, **_):
        self.context = self.around(state.global_step)
        self.context.__enter__()
        self.began = now()

    def on_step_end(self, args, state, control, **_):
        total = since(self.began)
        self.context.__exit__(None, None, None)
        phases = dict(self.trainer.phases)
        phases["update"] = minus(minus(total, phases["sample"]), phases["score"])
        self.steps.append(phases)
        self.turn(state.global_step - 1)


def take_turns(trainer: PeerTrainer, turn, around, *, lists_only: bool) -> list[dict[str, tuple[float, float]]]:
    """Train to the end; after step i `turn(i)`. Returns by step the wall and processor seconds of its phases."""
    turns = Turns(trainer, turn, around)
    trainer.add_callback(turns)
    with head_of_a_gpu() if lists_only else nullcontext():
        trainer.train()
    return turns.steps


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    return minus(now(), began)


def minus(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] - other[0], one[1] - other[1]
