"""What a run can be set to: every key, its default and its limits. `config_file` reads and writes them.

An impossible value raises ConfigError, which names the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from rankgrpo.errors import ConfigError
from rankgrpo.reward_terms import reward_terms


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {message}")


def _require_positive(section: object, name: str, *keys: str) -> None:
    for key in keys:
        _require(getattr(section, key) > 0, f"{name}.{key}", "must be positive")


@dataclass(frozen=True)
class ModelConfig:
    name: str = "tiny"
    """Preset (see `rankgrpo models`), local folder in Hugging Face format, or hub id."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Compute type of the matrix products; parameters and optimizer state stay float32."""
    gradient_checkpointing: bool = False
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Head and loss of the update: auto = triton on a GPU that has it, torch elsewhere."""
    hidden: int = 256
    """Size of the tiny preset, as are layers, ffn, heads, kv_heads and vocab; other models ignore these."""
    layers: int = 4
    ffn: int = 768
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 8192

    def __post_init__(self):
        _require_positive(self, "model", "hidden", "layers", "ffn", "heads", "kv_heads", "vocab")
        _require(self.heads % self.kv_heads == 0, "model.kv_heads", f"must divide model.heads = {self.heads}")


@dataclass(frozen=True)
class AdapterConfig:
    """Small matrices trained in place of the model's weights, in the warm start and in reinforcement learning, each of
    which begins with new ones and ends with a whole model."""

    kind: Literal["none", "lora", "dora"] = "none"
    rank: int = 16
    alpha: float = 16.0
    """The adapter is scaled by alpha / rank, with rslora by alpha / sqrt(rank)."""
    rslora: bool = False
    targets: str = "linear"
    """linear = every Linear layer of the attention and the MLP; or names with commas between, such as q_proj,v_proj."""

    def __post_init__(self):
        _require_positive(self, "adapter", "rank", "alpha")
        _require(all(self.target_list), "adapter.targets", "must be linear, or names with commas between")

    @property
    def target_list(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",")]


@dataclass(frozen=True)
class DataConfig:
    path: str = "demo"
    """`demo`, or a folder with train.jsonl, validation.jsonl, test.jsonl and catalog.jsonl or catalog.csv."""
    max_prompt_tokens: int = 512
    """A longer conversation loses its oldest turns, never the instruction."""
    num_train: int = 0
    """Training samples taken from the data set, or made by the demo; 0 is all of them (the demo's own default)."""
    num_ranks: int = 20
    """Length K of the list asked for."""

    def __post_init__(self):
        _require_positive(self, "data", "max_prompt_tokens", "num_ranks")
        _require(self.num_train >= 0, "data.num_train", "must not be negative")


@dataclass(frozen=True)
class TeacherConfig:
    """EASE (Steck 2019), the offline teacher of the warm start, unless it learns from demonstrations of its own."""

    demonstrations: str = ""
    """Folder of demonstrations-train.jsonl and demonstrations-validation.jsonl (`rankgrpo distill` writes one); the
    other keys of this section are then not used."""
    l2: float = 50.0
    popularity_weight: float = 2e-4
    num_folds: int = 5
    """A training conversation's list comes from a model fitted without that dialog; 0 fits one model on all."""
    data_frac: float = 1.0
    """Share of the training dialogs that the teacher is fitted on and the warm start learns from, 0.25 in the paper;
    reinforcement learning sees all."""
    short_requests: int = 0
    """Extra demonstrations a training sample: one-line requests that name a few items of its dialog."""

    def __post_init__(self):
        _require(self.l2 > 0, "teacher.l2", "must be positive")
        _require(self.num_folds != 1 and self.num_folds >= 0, "teacher.num_folds", "must be 0, or 2 and more")
        _require(self.short_requests >= 0, "teacher.short_requests", "must not be negative")
        _require(0 < self.data_frac <= 1, "teacher.data_frac", "must be in (0, 1]")

    def num_demonstrations(self, num_samples: int) -> int:
        """How many EASE makes for so many samples: one of each, and its short requests."""
        return num_samples * (1 + self.short_requests)


@dataclass(frozen=True)
class SftConfig:
    enabled: bool = True
    """False starts reinforcement learning from the untrained model (R1-zero)."""
    num_steps: int = 0
    """Optimizer steps; 0 takes them from num_epochs and the size of the data."""
    num_epochs: float = 2.0
    """Passes over the demonstrations."""
    batch_size: int = 64
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_frac: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    token_budget: int = 16384
    """Tokens of one micro-batch: prompts once, lists after them."""
    eval_every: int = 100
    eval_samples: int = 64
    save_every: int = 100
    keep_last: int = 2

    def __post_init__(self):
        _require_positive(self, "sft", "num_epochs", "batch_size", "lr", "token_budget")
        _require_positive(self, "sft", "eval_every", "save_every", "keep_last")
        _require(self.num_steps >= 0, "sft.num_steps", "must not be negative")
        _require(0 <= self.warmup_frac < 1, "sft.warmup_frac", "must be in [0, 1)")


@dataclass(frozen=True)
class RlConfig:
    num_steps: int = 0
    """Batches of rollouts; 0 takes them from num_epochs and the size of the data."""
    num_epochs: float = 1.0
    """Passes over the training conversations."""
    prompts_per_step: int = 32
    group_size: int = 8
    unit: Literal["rank", "token", "list"] = "rank"
    """What has a ratio of its own: rank = Rank-GRPO, token = GRPO, list = GSPO."""
    returns: Literal["exp_inf", "exp", "log"] = "exp_inf"
    """Return of a rank (Eq. 8, 9); units token and list use DCG@K of the whole list."""
    gamma: float = 2.0
    """Discount base of returns = exp."""
    reward: str = "relevance"
    """What a list earns, a weighted sum of parts such as `relevance + 0.1 * in_catalog` (see rankgrpo/reward_terms.py).
    A part of your own is `package.module:function`; the file reward_parts.py has its signature."""
    reduction: Literal["rank", "token"] = "rank"
    """rank = Eq. 6; token = the released code's token mean."""
    token_mean: Literal["list", "batch", "max"] = "list"
    """Of unit = token: list = GRPO (a mean a list), batch = DAPO (all tokens), max = Dr. GRPO (max_new_tokens)."""
    unlikeliness: float = 0.0
    """Cut of the reward of what the policy found likely ("Rewarding the Unlikely", there 0.25): by rank among the
    group's hits, or with units token and list by list."""
    scale_by_std: bool = True
    """False only centres rewards (Dr. GRPO)."""
    clip_low: float = 0.06
    clip_high: float = 0.08
    kl_coef: float = 1e-3
    """Weight of the k3 KL to the SFT model; 0 drops the reference and skips groups without gradient."""
    updates_per_batch: int = 1
    """mu: optimizer steps on one batch of rollouts."""
    overflow_penalty: float = -0.1
    early_eos_penalty: float = -0.1
    full_list_bonus: float = 0.0
    """The released code adds 0.1 here; the paper has none."""
    repeat_penalty: float = 0.0
    """Advantage of a rank that repeats an earlier item, less the group's mean at that rank; the paper has none."""
    year_tolerance: int = 0
    lr: float = 1e-6
    schedule: Literal["constant", "cosine", "two-phase"] = "constant"
    second_phase_at: float = 0.5
    """Fraction of the steps after which schedule = two-phase continues at second_phase_lr."""
    second_phase_lr: float = 1e-7
    warmup_frac: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    adam_eps: float = 1e-8
    """A weight whose gradient stays well below this hardly moves, where Adam would give noise a full step."""
    grad_clip: float = 1.0
    max_new_tokens: int = 256
    temperature: float = 1.0
    token_budget: int = 16384
    sampler: Literal["auto", "hf", "vllm"] = "auto"
    """auto = vllm on an NVIDIA GPU where it is installed, hf (transformers) elsewhere."""
    sampler_rows: int = 256
    """Lists decoded at once."""
    vllm_memory: float = 0.4
    """Share of a GPU for vLLM: its copy of the weights and its cache of keys and values."""
    vllm_tp: int = 1
    """Processes (GPUs) that share one vLLM engine; above 1 for models too large for one GPU."""
    vllm_sleep: Literal[0, 1, 2] = 1
    """While the weights are updated vLLM 0 = keeps its memory, 1 = parks its weights in main memory, 2 = drops them."""
    mismatch_alarm: float = 1.1
    """Mean exp|trainer's - sampler's log-prob| of the sampled tokens above which a run stops, and says which weights
    differ."""
    mismatch_correction: Literal["none", "truncate", "mask"] = "none"
    """Weighs every unit (rl.unit) by its geometric-mean ratio trainer / sampler, truncated at mismatch_cap, or drops
    units whose ratio is beyond it."""
    mismatch_cap: float = 2.0
    eval_every: int = 25
    eval_samples: int = 200
    save_every: int = 25
    keep_last: int = 2

    def __post_init__(self):
        _require_positive(self, "rl", "num_epochs", "prompts_per_step", "updates_per_batch", "lr", "temperature")
        _require_positive(self, "rl", "max_new_tokens", "token_budget", "sampler_rows")
        _require_positive(self, "rl", "eval_every", "save_every", "keep_last")
        _require(self.num_steps >= 0, "rl.num_steps", "must not be negative")
        _require_positive(self, "rl", "vllm_tp")
        _require(0 < self.vllm_memory < 1, "rl.vllm_memory", "must be between 0 and 1")
        _require(self.mismatch_alarm > 1, "rl.mismatch_alarm", "must be above 1, the value of no mismatch")
        _require(self.mismatch_cap >= 1, "rl.mismatch_cap", "must be at least 1")
        _require(0 < self.clip_low <= 1, "rl.clip_low", "must be in (0, 1]")
        _require(self.clip_high > 0, "rl.clip_high", "must be positive")
        _require(self.kl_coef >= 0, "rl.kl_coef", "must not be negative")
        _require(self.gamma > 1, "rl.gamma", "must be above 1")
        _require(0 <= self.unlikeliness < 1, "rl.unlikeliness", "must be in [0, 1)")
        try:
            reward_terms(self.reward)
        except ValueError as error:
            raise ConfigError(f"rl.reward: {error}") from None
        _require(self.group_size > 1, "rl.group_size", "must be at least 2: an advantage compares the lists of a group")
        _require(
            self.unit == "rank" or self.repeat_penalty == 0,
            "rl.repeat_penalty",
            "belongs to ranks: needs rl.unit = rank",
        )
        _require(
            self.unit == "token" or self.token_mean == "list",
            "rl.token_mean",
            "belongs to tokens: needs rl.unit = token",
        )
        _require(
            self.unit == "rank" or self.reduction == "rank",
            "rl.reduction",
            "token needs rl.unit = rank (released code)",
        )


@dataclass(frozen=True)
class EvalConfig:
    split: Literal["validation", "test"] = "test"
    num_samples: int = 0
    """Samples of the split that are scored, from its beginning; 0 is all."""
    temperature: float = 0.0
    """Of the lists that are scored, in validation too; 0 is greedy, as in the paper."""
    draws: int = 1
    """Lists a conversation whose scores are averaged, so that a model is not judged by the luck of one draw; needs a
    temperature. Validation has one."""
    lists: int = 1
    """Above 1: also sample so many lists a conversation at rl.temperature and score their union, up to all of them."""
    list_samples: int = 0
    """Samples that get eval.lists lists, from the beginning of the split; 0 is all."""

    def __post_init__(self):
        _require(self.num_samples >= 0, "eval.num_samples", "must not be negative")
        _require(self.lists >= 1, "eval.lists", "must be at least 1")
        _require(self.list_samples >= 0, "eval.list_samples", "must not be negative")
        _require(self.temperature >= 0, "eval.temperature", "must not be negative")
        _require(self.draws >= 1, "eval.draws", "must be at least 1")
        _require(self.draws == 1 or self.temperature > 0, "eval.draws", "above 1 needs eval.temperature > 0")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of torchrun share a model. A run may go on under other values, and with other processes."""

    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """none: every process holds the whole model. full: parameters, gradients and optimizer state are split over all
    processes. hybrid: split inside a node, copied between nodes. auto: none on one process and on CPUs, full on the
    GPUs of one node, hybrid on several nodes of several GPUs."""
    cpu_offload: bool = False
    """Keep the split parameters and the optimizer in host memory; slower, for a model that does not fit otherwise."""

    def __post_init__(self):
        _require(not (self.cpu_offload and self.shard == "none"), "parallel.cpu_offload", "needs a split model")


@dataclass(frozen=True)
class Config:
    seed: int = 3407
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def with_steps(config: Config, num_train: int, num_demonstrations: int | None = None) -> Config:
    """`config` with the steps that its epochs mean for `num_train` training samples and their demonstrations.

    num_demonstrations: by default about those that EASE makes.
    """
    sft, rl = config.sft, config.rl
    if num_demonstrations is None:
        num_demonstrations = config.teacher.num_demonstrations(round(config.teacher.data_frac * num_train))
    sft_steps = sft.num_steps or math.ceil(sft.num_epochs * num_demonstrations / sft.batch_size)
    rl_steps = rl.num_steps or math.ceil(rl.num_epochs * num_train / rl.prompts_per_step)
    return replace(config, sft=replace(sft, num_steps=sft_steps), rl=replace(rl, num_steps=rl_steps))
