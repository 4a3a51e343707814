"""What a run can be set to: every key, its default and its limits. `config_file` reads and writes them.

Every section is frozen, and checked whenever one is made, by `dataclasses.replace` too: a value that cannot be raises
ConfigError, which names the key.
"""

from __future__ import annotations

import math
from dataclasses import field, replace
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rankgrpo.files.reward_terms import PARTS, reward_terms
from rankgrpo.files.sections import BrokenRule, section
from rankgrpo.files.tracking import TrackConfig
from rankgrpo.files.values import (
    Betas,
    Fraction,
    Share,
    Text,
    check_cutoffs,
    check_folds,
    check_item,
    check_json_object,
    check_names,
)

__all__ = ["PARTS", "Config", "reward_terms", "with_steps"]


def _reward(value: str) -> str:
    reward_terms(value)
    return value


@section
class ModelConfig:
    name: Text = "tiny"
    """Preset (see `rankgrpo models`), local folder in Hugging Face format, or hub id."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Compute type of the matrix products; parameters and optimizer state stay float32."""
    gradient_checkpointing: bool = False
    attention: Literal["auto", "shared", "dense"] = "auto"
    """shared: each prompt once, before its lists. dense: every list with its prompt, through the model's own forward.
    auto: shared where that is exact, else dense, and the run says so."""
    verify: bool = True
    """Compare packs, sampler and the model's own forward on a short example whenever a model is opened."""
    new_tokens: Text = ""
    """Tokens added to the model: a file with one a line, or a column of the catalog, whose `<...>` parts they are."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Head and loss of the update: auto = triton on a GPU that has it, torch elsewhere."""
    hidden: PositiveInt = 256
    """Size of the tiny preset, as are layers, ffn, heads, kv_heads and vocab: no other model reads them."""
    layers: PositiveInt = 4
    ffn: PositiveInt = 768
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    vocab: PositiveInt = 8192

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.heads % self.kv_heads:
            raise BrokenRule(f"must divide model.heads = {self.heads}", "kv_heads", "heads")
        return self


@section
class AdapterConfig:
    """Small matrices trained in place of the model's weights, in the warm start and in reinforcement learning, each of
    which begins with new ones and ends with a whole model."""

    kind: Literal["none", "lora", "dora"] = "none"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    """The adapter is scaled by alpha / rank, with rslora by alpha / sqrt(rank)."""
    rslora: bool = False
    targets: Annotated[Text, AfterValidator(check_names)] = "linear"
    """linear = every Linear layer of the attention and the MLP; or names with commas between, such as q_proj,v_proj."""

    @property
    def target_list(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",")]


@section
class DataConfig:
    path: Text = "demo"
    """`demo`, or a folder with train.jsonl, validation.jsonl, test.jsonl and catalog.jsonl or catalog.csv."""
    item: Annotated[Text, AfterValidator(check_item)] = "{title} ({year})"
    """How an item is written as one line, from columns of the catalog: `{title}`, `{title} by {author}`, `{sid}`. Years
    have rules of their own under the default; every other format needs no year."""
    max_prompt_tokens: PositiveInt = 512
    """A longer conversation loses its oldest turns, never the instruction."""
    num_train: NonNegativeInt = 0
    """Training samples taken from the data set, or made by the demo; 0 is all of them (the demo's own default)."""
    num_ranks: PositiveInt = 20
    """Length K of the list asked for."""
    prompt: Text = ""
    """Text of the prompt, or its file; empty: the paper's. rankgrpo/data/prompt.py has the placeholders."""
    system_prompt: Text = ""
    """Text of a system prompt; empty: none."""
    chat_template_kwargs: Annotated[Text, AfterValidator(check_json_object)] = "{}"
    """Further arguments of the model's chat template, in JSON: `{"enable_thinking": false}`."""
    item_noun: Text = ""
    """What an item is called in prompts; empty: movie under the default data.item, else item."""
    item_nouns: Text = ""
    """Several of them; empty: item_noun with an s."""
    gain: Literal["linear", "exp2"] = "linear"
    """What a hit of weight w earns in rewards and NDCG, where the ground truth has weights: w, or 2^w - 1."""


@section
class TeacherConfig:
    """EASE (Steck 2019), the offline teacher of the warm start, unless it learns from demonstrations of its own."""

    demonstrations: Text = ""
    """Folder of demonstrations-train.jsonl and demonstrations-validation.jsonl (`rankgrpo distill` writes one); the
    other keys of this section are then not used."""
    l2: PositiveFloat = 50.0
    popularity_weight: float = 2e-4
    num_folds: Annotated[NonNegativeInt, AfterValidator(check_folds)] = 5
    """A training conversation's list comes from a model fitted without that dialog; 0 fits one model on all."""
    data_frac: Share = 1.0
    """Share of the training dialogs that the teacher is fitted on and the warm start learns from, 0.25 in the paper;
    reinforcement learning sees all."""
    short_requests: NonNegativeInt = 0
    """Extra demonstrations a training sample: one-line requests that name a few items of its dialog."""

    def num_demonstrations(self, num_samples: int) -> int:
        """How many demonstrations EASE makes for so many samples: one for each, and those of its short requests."""
        return num_samples * (1 + self.short_requests)


@section
class SftConfig:
    enabled: bool = True
    """False starts reinforcement learning from the untrained model (R1-zero)."""
    num_steps: NonNegativeInt = 0
    """Optimizer steps; 0 takes them from num_epochs and the size of the data."""
    num_epochs: PositiveFloat = 2.0
    """Passes over the demonstrations."""
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_frac: Fraction = 0.05
    weight_decay: float = 0.0
    betas: Betas = (0.9, 0.95)
    grad_clip: float = 1.0
    token_budget: PositiveInt = 16384
    """Tokens of one micro-batch: prompts once, lists after them."""
    constrain: Literal["none", "catalog"] = "none"
    """catalog: a demonstration's likelihood is that among the lists of the catalog; needs rl.constrain = catalog."""
    eval_every: PositiveInt = 100
    eval_samples: int = 64
    save_every: PositiveInt = 100
    keep_last: PositiveInt = 2


@section
class RlConfig:
    num_steps: NonNegativeInt = 0
    """Batches of rollouts; 0 takes them from num_epochs and the size of the data."""
    num_epochs: PositiveFloat = 1.0
    """Passes over the training conversations."""
    prompts_per_step: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    """Lists a prompt: an advantage compares the lists of a group, so at least 2."""
    hard_group_size: NonNegativeInt = 0
    """Lists of a conversation whose rl.group_size lists all earned the same: it gets new ones, up to this; 0 = off."""
    live_groups: NonNegativeInt = 0
    """Groups with a gradient that a step is to have, on all processes together: further rounds of prompts_per_step
    conversations follow until there are so many, and only these groups count; 0 = one round, in which all count."""
    max_rounds: PositiveInt = 4
    """Rounds a step at most under live_groups."""
    unit: Literal["rank", "token", "list"] = "rank"
    """What has a ratio of its own: rank = Rank-GRPO, token = GRPO, list = GSPO."""
    returns: Literal["exp_inf", "exp", "log"] = "exp_inf"
    """Return of a rank (Eq. 8, 9); units token and list use DCG@K of the whole list."""
    gamma: Annotated[float, Field(gt=1)] = 2.0
    """Discount base of returns = exp."""
    reward: Annotated[Text, AfterValidator(_reward)] = "relevance"
    """What a list earns, a weighted sum of parts such as `relevance + 0.1 * in_catalog` (`PARTS`). A part of your own
    is `package.module:function`; rankgrpo/rollouts/parts.py has its signature."""
    reduction: Literal["rank", "token"] = "rank"
    """rank = Eq. 6; token = the released code's token mean."""
    token_mean: Literal["list", "batch", "max"] = "list"
    """What unit = token divides by: list = GRPO (a mean a list), batch = DAPO (all tokens), max = Dr. GRPO
    (max_new_tokens)."""
    unlikeliness: Fraction = 0.0
    """Cut of the reward of what the policy found likely ("Rewarding the Unlikely", there 0.25): by rank among the
    group's hits, or with units token and list by list."""
    scale_by_std: bool = True
    """False only centres rewards (Dr. GRPO)."""
    normalise: Literal["sum", "parts"] = "sum"
    """What the advantage normalises in the group: the sum of the reward's parts, or each part, then summed (GDPO)."""
    surrogate: Literal["clip", "cispo", "sapo", "dppo"] = "clip"
    """How a unit whose ratio has moved is held: clip = Eq. 6; cispo keeps its gradient at the clipped ratio; sapo lets
    it fade (sapo_tau); dppo drops it once its mean probability has moved by dppo_delta. All agree with mu = 1."""
    sapo_tau: Betas = (1.0, 1.05)
    """How fast sapo fades, for advantages above 0 and for the others."""
    dppo_delta: Share = 0.15
    clip_low: Share = 0.06
    clip_high: PositiveFloat = 0.08
    kl_coef: NonNegativeFloat = 1e-3
    """Weight of the k3 KL to the SFT model; 0 drops the reference and skips groups without gradient."""
    updates_per_batch: PositiveInt = 1
    """mu: optimizer steps on one batch of rollouts."""
    constrain: Literal["none", "catalog"] = "none"
    """catalog: lists are held to the catalog wherever they are sampled, and trained on under the same probabilities.
    They then have exactly K lines, so the penalties for stopping early and for overflow have nothing to do."""
    forbid: Literal["repeats", "repeats+seen", "none"] = "repeats"
    """What lists held to the catalog must not name, beside what is not in it."""
    count_forced: bool = False
    """Where lists are held to the catalog, True counts tokens that it forces in |y_k| too, as the paper counts all.
    They carry no probability, and pull the ratio of an item to 1 by a factor that depends on its title."""
    overflow_penalty: float = -0.1
    early_eos_penalty: float = -0.1
    full_list_bonus: float = 0.0
    """The released code adds 0.1 here; the paper has none."""
    repeat_penalty: float = 0.0
    """Advantage of a rank that repeats an earlier item, less the group's mean at that rank; the paper has none."""
    year_tolerance: int = 0
    lr: PositiveFloat = 1e-6
    schedule: Literal["constant", "cosine", "two-phase"] = "constant"
    second_phase_at: float = 0.5
    """Fraction of the steps after which schedule = two-phase continues at second_phase_lr."""
    second_phase_lr: float = 1e-7
    warmup_frac: float = 0.0
    weight_decay: float = 0.0
    betas: Betas = (0.9, 0.99)
    adam_eps: float = 1e-8
    """A weight whose gradient stays well below this hardly moves, where Adam would give noise a full step."""
    grad_clip: float = 1.0
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    token_budget: PositiveInt = 16384
    sampler: Literal["auto", "hf", "vllm"] = "auto"
    """auto = vllm on an NVIDIA GPU where it is installed, hf (transformers) elsewhere."""
    sampler_rows: PositiveInt = 256
    """Lists decoded at once."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU for vLLM: its copy of the weights and its cache of keys and values."""
    vllm_tp: PositiveInt = 1
    """Processes (GPUs) that share one vLLM engine; above 1 for models too large for one GPU."""
    vllm_sleep: Literal[0, 1, 2] = 1
    """While the weights are updated vLLM 0 = keeps its memory, 1 = parks its weights in main memory, 2 = drops them."""
    overlap: bool = False
    """Sample the batch of the next step while this one trains, from the weights it began with; on CPUs, with the hf
    sampler in a process of its own."""
    mismatch_alarm: Annotated[float, Field(gt=1)] = 1.1
    """Mean exp|trainer's - sampler's log-prob| of the sampled tokens above which a run stops, and says which weights
    differ."""
    mismatch_correction: Literal["none", "truncate", "mask"] = "none"
    """Weighs every unit (rl.unit) by its geometric-mean ratio trainer / sampler, truncated at mismatch_cap, or drops
    units whose ratio is beyond it."""
    mismatch_cap: Annotated[float, Field(ge=1)] = 2.0
    eval_every: PositiveInt = 25
    eval_samples: int = 200
    save_every: PositiveInt = 25
    keep_last: PositiveInt = 2
    log_lists: NonNegativeInt = 2000
    """Sampled lists that are kept in rl/rollouts.jsonl for the report and `rankgrpo show`, of steps spread evenly over
    the run; 0 keeps none."""
    stop_on_failure: bool = False
    """End with an error, not a warning, when a run learns nothing or comes apart; checkpoints stay."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.hard_group_size and self.hard_group_size <= self.group_size:
            raise BrokenRule(f"must be above rl.group_size = {self.group_size}", "hard_group_size", "group_size")
        if self.hard_group_size and self.vllm_tp > 1:
            raise BrokenRule(
                "needs rl.vllm_tp = 1: engines that are shared sample together", "hard_group_size", "vllm_tp"
            )
        if self.overlap and self.sampler == "vllm":
            raise BrokenRule(
                "needs rl.sampler = hf: an engine on GPUs cannot sample beside training", "overlap", "sampler"
            )
        if self.overlap and self.mismatch_correction == "truncate":
            raise BrokenRule(
                "truncate needs rl.overlap = false: with it old log-probs are the sampler's, so the ratio of the loss "
                "is that weight already; mask drops what has moved too far",
                "mismatch_correction",
                "overlap",
            )
        if self.unit != "rank" and self.repeat_penalty != 0:
            raise BrokenRule("belongs to ranks: needs rl.unit = rank", "repeat_penalty", "unit")
        if self.unit != "token" and self.token_mean != "list":
            raise BrokenRule("belongs to tokens: needs rl.unit = token", "token_mean", "unit")
        if self.unit != "rank" and self.reduction != "rank":
            raise BrokenRule("token needs rl.unit = rank (released code)", "reduction", "unit")
        return self


@section
class EvalConfig:
    split: Literal["validation", "test"] = "test"
    cutoffs: Annotated[Text, AfterValidator(check_cutoffs)] = "5,10,15,20"
    """Ranks k of Recall@k and NDCG@k, with commas between; those above data.num_ranks are left out, and it is added."""
    num_samples: NonNegativeInt = 0
    """Samples of the split that are scored, from its beginning; 0 is all."""
    temperature: NonNegativeFloat = 0.0
    """Temperature of the lists that are scored, in validation too; 0 is greedy, as in the paper."""
    draws: PositiveInt = 1
    """Lists a conversation whose scores are averaged, so that a model is not judged by the luck of one draw; needs a
    temperature. Validation has one."""
    lists: Annotated[int, Field(ge=1)] = 1
    """Above 1, the evaluation also samples so many lists a conversation at rl.temperature and scores their union, up to
    all of them."""
    list_samples: NonNegativeInt = 0
    """Samples that get eval.lists lists, from the beginning of the split; 0 is all."""
    constrain: Literal["run", "none", "catalog"] = "run"
    """What lists are held to when they are scored after training or shown: run = as rl.constrain. Validation during
    training does not follow it: the model that is kept is the best at what is trained, whatever it is then used for."""
    free_samples: NonNegativeInt = 64
    """Where lists are held to the catalog: validation also draws a free list for so many samples, and logs how many of
    its lines are in the catalog and how many repeat, so that a policy that drifts shows."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.draws > 1 and self.temperature == 0:
            raise BrokenRule("above 1 needs eval.temperature > 0", "draws", "temperature")
        return self

    @property
    def ranks(self) -> tuple[int, ...]:
        """The numbers of `cutoffs`, in order."""
        return tuple(sorted(map(int, self.cutoffs.split(","))))


@section
class ParallelConfig:
    """How the processes of torchrun share a model. A run may go on under other values, and with other processes."""

    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """none: every process holds the whole model. full: parameters, gradients and optimizer state are split over all
    processes. hybrid: split inside a node, copied between nodes. auto: none on one process and on CPUs, full on the
    GPUs of one node, hybrid on several nodes of several GPUs."""
    cpu_offload: bool = False
    """Keep the split parameters and the optimizer in host memory; slower, for a model that does not fit otherwise."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.cpu_offload and self.shard == "none":
            raise BrokenRule("needs a split model", "cpu_offload", "shard")
        return self


@section
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
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def shown_constrain(self) -> Literal["none", "catalog"]:
        """What eval.constrain means: what scored and shown lists are held to."""
        return self.rl.constrain if self.eval.constrain == "run" else self.eval.constrain


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
