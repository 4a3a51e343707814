"""Train with RankGRPOTrainer and keep what each optimizer step was made of: rollouts, weights before it, gradients.

python run_trl.py FOLDER '{"accumulation": 1, ...}'      alone or under torchrun
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from toy import K, hits, prompts
from transformers import TrainerCallback
from trl import GRPOConfig

from rankgrpo.rollouts.integrations.trl import RankGRPOTrainer

RANK = int(os.environ.get("RANK", "0"))


class Recorder(RankGRPOTrainer):
    recorded: list

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "unit_advantage")
        rows = {name: output[name].clone() for name in names}
        self.recorded.append(rows | {"groundtruth": [example["groundtruth"] for example in inputs]})
        return output


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        self.steps.append({"before": before, "gradient": {name: p.grad.clone() for name, p in named.items()}})


def main(folder: Path, options: dict) -> None:
    watch = Gradients()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=options["lists"] // world // options["accumulation"],
        gradient_accumulation_steps=options["accumulation"],
        num_iterations=options["iterations"],
        num_generations=options["group"],
        max_completion_length=14,
        max_steps=options["steps"],
        learning_rate=options["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=options.get("max_grad_norm", 0.0),
        beta=options["beta"],
        use_bias_correction_kl=False,
        epsilon=0.06,
        epsilon_high=0.08,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=3,
    )
    trainer = Recorder(
        str(folder / "model"),
        hits,
        K,
        args,
        train_dataset=Dataset.from_list(prompts(12)),
        callbacks=[watch],
    )
    trainer.recorded = []
    trainer.train()
    torch.save({"rollouts": trainer.recorded, "steps": watch.steps}, folder / f"recorded-{RANK}.pt")
    if RANK == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
