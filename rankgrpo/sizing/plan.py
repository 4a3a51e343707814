"""`rankgrpo plan`: does a run fit, and how long is a step? Arithmetic before anything is loaded or rented.

Memory is counted tensor by tensor for one GPU, at the longest prompts and lists that the settings allow. Seconds are
the step's floating-point operations and bytes over rates that are assumptions (`Rates`), not measurements: change them
to what your machine does. Nothing here touches a device or needs weights; a model is its sizes.
"""

# Shape letters: P prompts, G lists a prompt; D hidden, V vocabulary.
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from rankgrpo.config import Config
from rankgrpo.sampler.rows import step_rows
from rankgrpo.sizing.architecture import Architecture
from rankgrpo.sizing.disk import disk_line
from rankgrpo.sizing.overlap import overlap_lines

GB = 1e9
RESERVED = 4 * GB
"""Context, communication buffers and fragmentation of a GPU: an allowance, not a count."""
ENGINE_RESERVED = 3 * GB
"""What vLLM takes beside weights and cache (activations, CUDA graphs): an allowance, not a count."""
TORCH_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run. Example: Machine(gpus=4, gpu_memory=80)"""

    gpus: int
    gpu_memory: float
    """Memory of one GPU in GB (10^9 bytes)."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpu_memory <= 0:
            raise ValueError(f"gpus must be at least 1 and gpu_memory positive, got {self.gpus} and {self.gpu_memory}")


@dataclass(frozen=True)
class Rates:
    """Assumptions behind the seconds. The GPU's two are an H100's data sheet; the others are round guesses."""

    prompt_tokens: float = 700
    """A usual prompt; memory is counted at data.max_prompt_tokens."""
    list_tokens: float = 230
    """A usual list of 20 titles; memory is counted at rl.max_new_tokens."""
    peak_tflops: float = 989
    """bfloat16 matrix products of one GPU."""
    bandwidth_gbs: float = 3350
    """Memory bandwidth of one GPU."""
    train_mfu: float = 0.25
    """Share of the peak that forward and backward reach."""
    prefill_mfu: float = 0.4
    decode_efficiency: float = 0.5
    """Share of the bandwidth that decoding reaches."""
    decode_overhead_ms: float = 4.0
    """Milliseconds of one decoding step beside reading weights and cache."""
    sync_gbs: float = 50
    """Rate at which weights reach the sampler."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) > 0:
                raise ValueError(f"{f.name} must be positive, got {getattr(self, f.name)}")


@dataclass(frozen=True)
class Plan:
    """What `make_plan` counted, for one GPU; bytes and seconds by part."""

    model: str
    arch: Architecture
    config: Config
    machine: Machine
    rates: Rates
    state: Mapping[str, float]
    """Bytes that stay through a step: parameters, gradients, optimizer, reference."""
    update: Mapping[str, float]
    """Bytes beside the state while the policy is updated."""
    engine: Mapping[str, float]
    """Bytes that vLLM needs for weights, cache and the rest."""
    seconds: Mapping[str, float]

    @property
    def capacity(self) -> float:
        return self.machine.gpu_memory * GB - RESERVED

    @property
    def engine_share(self) -> float:
        return self.config.rl.vllm_memory * self.machine.gpu_memory * GB

    @property
    def update_peak(self) -> float:
        """Bytes at the peak of the update; an engine that never sleeps keeps its share."""
        awake = self.engine_share if self.config.rl.vllm_sleep == 0 else 0.0
        return sum(self.state.values()) + sum(self.update.values()) + awake

    @property
    def sampling_peak(self) -> float:
        """Bytes while vLLM samples: its share, and the state without gradients."""
        return sum(self.state.values()) - self.state["gradients"] + self.engine_share

    @property
    def fits(self) -> bool:
        return (
            max(self.update_peak, self.sampling_peak) <= self.capacity
            and sum(self.engine.values()) <= self.engine_share
        )


def make_plan(model: str, arch: Architecture, config: Config, machine: Machine, rates: Rates | None = None) -> Plan:
    """Count a run of this model under these settings, its lists at rl.max_new_tokens."""
    rates = rates or Rates()
    if config.rl.prompts_per_step % machine.gpus:
        raise ValueError(
            f"rl.prompts_per_step {config.rl.prompts_per_step} must be a multiple of the number of GPUs {machine.gpus}"
        )
    return Plan(
        model=model,
        arch=arch,
        config=config,
        machine=machine,
        rates=rates,
        state=state_bytes(arch, config, machine.gpus),
        update=update_bytes(arch, config, machine.gpus),
        engine=engine_bytes(arch, config, machine.gpus),
        seconds=step_seconds(arch, config, machine.gpus, rates),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def is_split(config: Config, gpus: int) -> bool:
    """Whether FSDP2 splits the model over the GPUs of a node."""
    return gpus > 1 and config.parallel.shard != "none"


def state_bytes(arch: Architecture, config: Config, gpus: int) -> dict[str, float]:
    """float32 parameters, gradients and Adam's two moments of those trained, and a reference when kl_coef > 0.

    With adapters nothing else is trained, and the reference is the same model with its adapters off.
    """
    share = 1 / gpus if is_split(config, gpus) else 1
    on_gpu = 0 if config.parallel.cpu_offload else share
    adapters = arch.adapter_parameters(config.adapter)
    trained = adapters or arch.num_parameters
    return {
        "parameters": 4 * (arch.num_parameters + adapters) * on_gpu,
        "gradients": 4 * trained * on_gpu,
        "optimizer": 8 * trained * on_gpu,
        "reference": 4 * arch.num_parameters * on_gpu * (config.rl.kl_coef > 0 and not adapters),
    }


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest forward pass: the token budget, or one group, which is never split, at full length."""
    return max(config.rl.token_budget, config.data.max_prompt_tokens + config.rl.group_size * config.rl.max_new_tokens)


def update_bytes(arch: Architecture, config: Config, gpus: int) -> dict[str, float]:
    """Working weights, activations of one micro-batch, and the head, at the peak of a backward pass."""
    bfloat16, split = config.model.autocast == "bfloat16", is_split(config, gpus)
    tokens, compute = micro_batch_tokens(config), 2 if bfloat16 else 4
    trained = config.adapter.kind == "none"
    # FSDP computes wholly in bfloat16; autocast leaves the weights and the residual stream float32.
    stream = 2 if bfloat16 and split else 4
    return {
        "working weights": working_weight_bytes(arch, compute, split=split, bfloat16=bfloat16, trained=trained),
        "activations": activation_bytes(
            arch, tokens, stream=stream, compute=compute, checkpointing=config.model.gradient_checkpointing
        ),
        "backward": tokens * (2 * arch.ffn * compute + 2 * arch.hidden * stream),
        "head": head_bytes(arch, stream, trained=trained),
    }


def working_weight_bytes(arch: Architecture, compute: int, *, split: bool, bfloat16: bool, trained: bool) -> float:
    """Weights in the type of the matrix products.

    Split: two blocks and the rest are gathered at once, with the gradients of one block and of the rest, and what is
    summed of them in float32, unless only adapters are trained. Whole: autocast keeps a bfloat16 copy of every matrix.
    """
    if not split:
        return 2 * arch.num_parameters if bfloat16 else 0
    rest = arch.num_parameters - arch.layers * arch.block_parameters
    gradients = compute * (arch.block_parameters + rest) + 4 * max(arch.block_parameters, rest)
    return compute * (2 * arch.block_parameters + rest) + gradients * trained


def activation_bytes(arch: Architecture, tokens: int, *, stream: int, compute: int, checkpointing: bool) -> float:
    """What a forward pass keeps for backward. With checkpointing: every block's input, and one block in full.

    stream, compute: bytes of an element of the residual stream, and of the inputs of matrix products.
    """
    block = tokens * block_activation_bytes(arch, stream, compute)
    ends = tokens * arch.hidden * (4 + 2 * stream)  # the last norm, and the hidden states that the head reads
    inputs = tokens * arch.hidden * stream * arch.layers
    return ends + (inputs + block if checkpointing else arch.layers * block)


def block_activation_bytes(arch: Architecture, stream: int, compute: int) -> float:
    """What one block keeps of one token.

    Two norms: their float32 input, the normalised and the scaled output. Attention: queries, keys, values, output, a
    float32 normaliser a head. MLP: gate, its activation, up, their product.
    """
    norms = 2 * arch.hidden * (4 + stream + compute)
    attention = compute * (2 * arch.query_size + 2 * arch.key_size) + 4 * arch.heads
    return norms + attention + 4 * arch.ffn * compute


def head_bytes(arch: Architecture, weights: int, *, trained: bool) -> float:
    """The gradient of the head's weight, in its own type (bytes an element), and the logits of one chunk, thrice."""
    return weights * arch.vocab * arch.hidden * trained + 3 * 4 * TORCH_CHUNK_ELEMENTS


def engine_bytes(arch: Architecture, config: Config, gpus: int) -> dict[str, float]:
    """vLLM's bfloat16 weights, and keys and values of all lists decoded at once at full length, prompts shared."""
    rl = config.rl
    compute = 2 if config.model.autocast == "bfloat16" else 4
    lists = step_rows(config, gpus)
    tokens = math.ceil(lists / rl.group_size) * config.data.max_prompt_tokens + lists * rl.max_new_tokens
    return {
        "weights": compute * arch.num_parameters / rl.vllm_tp,
        "keys and values": tokens * 2 * arch.layers * arch.key_size * compute / rl.vllm_tp,
        "engine": ENGINE_RESERVED,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Time


def group_forward_flops(arch: Architecture, prompt: float, length: float, group_size: int) -> float:
    """Operations of one group, its prompt once: matrix products of the blocks, attention, and the head on the lists."""
    tokens = prompt + group_size * length
    pairs = prompt**2 / 2 + group_size * (length * prompt + length**2 / 2)
    attention = 4 * arch.query_size * arch.layers * pairs
    head = 2 * arch.vocab * arch.hidden * group_size * length
    return 2 * arch.layers * arch.block_matrix_parameters * tokens + attention + head


def step_seconds(arch: Architecture, config: Config, gpus: int, rates: Rates) -> dict[str, float]:
    """Expected seconds of one step by phase, every GPU doing its share."""
    rl, peak = config.rl, rates.peak_tflops * 1e12
    prompts = rl.prompts_per_step / gpus
    forward = prompts * group_forward_flops(arch, rates.prompt_tokens, rates.list_tokens, rl.group_size)
    # A backward is two forwards, one for the inputs and one for the weights; checkpointing computes the forward again.
    passes = 2 + (config.adapter.kind == "none") + config.model.gradient_checkpointing
    compute = 2 if config.model.autocast == "bfloat16" else 4
    lists = prompts * rl.group_size
    cached = lists * (rates.prompt_tokens + rates.list_tokens / 2) * 2 * arch.layers * arch.key_size * compute
    rounds = math.ceil(lists / rl.sampler_rows)  # decoding steps read the weights once a round
    read = rounds * compute * arch.num_parameters + cached
    decode = read / (rates.bandwidth_gbs * GB * rates.decode_efficiency) + rounds * rates.decode_overhead_ms / 1e3
    prefill = prompts * group_forward_flops(arch, rates.prompt_tokens, 0, rl.group_size)
    return {
        "sample": prefill / (peak * rates.prefill_mfu) + rates.list_tokens * decode,
        "reference": forward / (peak * rates.train_mfu) if rl.kl_coef > 0 else 0.0,
        "update": rl.updates_per_batch * passes * forward / (peak * rates.train_mfu),
        "sync": compute * arch.num_parameters / (rates.sync_gbs * GB),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Verdict


def advice(plan: Plan) -> list[str]:
    """Settings that would make a run fit, the cheapest first; empty when it fits."""
    if plan.fits:
        return []
    found = []
    if (engine := _engine_advice(plan)) is not None:
        line, changes = engine
        found.append(f"{' '.join(f'rl.{name}={value:g}' for name, value in changes.items())}: {line}")
        if _changed(plan, replace(plan.config, rl=replace(plan.config.rl, **changes))).fits:
            return found
    found += [line for line, config in _remedies(plan.config) if _helps(plan, config)]
    gpus = _enough_gpus(plan)
    if gpus is not None:
        found.append(f"{gpus} GPUs, parameters split over them")
    return found or ["a larger GPU: no setting of these makes it fit"]


def _engine_advice(plan: Plan) -> tuple[str, dict[str, float]] | None:
    """Why vLLM's share is too small for the engine, or too large beside the training state, and better values in rl."""
    need, share, memory = sum(plan.engine.values()), plan.engine_share, plan.machine.gpu_memory * GB
    left = share - plan.sampling_peak + plan.capacity  # what the training state leaves for a share
    smaller, larger = math.floor(100 * left / memory) / 100, math.ceil(100 * need / memory) / 100
    if need <= share:
        if plan.sampling_peak > plan.capacity and smaller * memory >= need:
            return f"{share / GB:.1f} GB for vLLM leave too little for the training state", {"vllm_memory": smaller}
        return None
    if larger <= smaller:
        return f"vLLM needs {need / GB:.1f} GB, its share is {share / GB:.1f} GB", {"vllm_memory": larger}
    rl, cache = plan.config.rl, plan.engine["keys and values"]
    lists = step_rows(plan.config, plan.machine.gpus)
    rows = math.floor(lists * (smaller * memory - need + cache) / cache) // rl.group_size * rl.group_size
    if rows > 0:
        return "keys and values of fewer lists at once", {"sampler_rows": rows, "vllm_memory": smaller}
    return None


def _remedies(config: Config) -> list[tuple[str, Config]]:
    rl, group = config.rl, config.data.max_prompt_tokens + config.rl.group_size * config.rl.max_new_tokens
    changes = [
        (
            "model.gradient_checkpointing=true",
            replace(config, model=replace(config.model, gradient_checkpointing=True)),
        ),
        (f"rl.token_budget={group}", replace(config, rl=replace(rl, token_budget=group))),
        ("adapter.kind=lora", replace(config, adapter=replace(config.adapter, kind="lora"))),
        ("rl.vllm_sleep=1", replace(config, rl=replace(rl, vllm_sleep=1))),
        ("rl.kl_coef=0 (no reference model)", replace(config, rl=replace(rl, kl_coef=0.0))),
        ("parallel.shard=full", replace(config, parallel=replace(config.parallel, shard="full"))),
        (
            "parallel.shard=full parallel.cpu_offload=true (slower)",
            replace(config, parallel=replace(config.parallel, shard="full", cpu_offload=True)),
        ),
    ]
    return [(name, changed) for name, changed in changes if changed != config]


def _changed(plan: Plan, config: Config) -> Plan:
    return make_plan(plan.model, plan.arch, config, plan.machine, plan.rates)


def _helps(plan: Plan, config: Config) -> bool:
    """Whether a change alone makes the training fit, or else saves a tenth of what is too much."""
    changed = _changed(plan, config)
    before = max(plan.update_peak, plan.sampling_peak) - plan.capacity
    after = max(changed.update_peak, changed.sampling_peak) - plan.capacity
    return before > 0 and after < 0.9 * before


def _enough_gpus(plan: Plan) -> int | None:
    """The next number of GPUs, by doubling up to a node of 8, on which the same settings fit."""
    gpus = plan.machine.gpus * 2
    while gpus <= 8 and plan.config.rl.prompts_per_step % gpus == 0:
        if make_plan(plan.model, plan.arch, plan.config, Machine(gpus, plan.machine.gpu_memory), plan.rates).fits:
            return gpus
        gpus *= 2
    return None


def render(plan: Plan) -> str:
    """The plan as text: memory by part, seconds by phase, the assumptions, the verdict."""
    rl, arch, machine = plan.config.rl, plan.arch, plan.machine
    split = "split over all" if is_split(plan.config, machine.gpus) else "whole on each"
    lines = [
        f"{plan.model}: {arch.num_parameters / 1e6:,.1f}M parameters on {machine.gpus} x {machine.gpu_memory:g} GB, "
        f"{split}",
        *(["weights counted; activations and seconds as of a dense decoder of its sizes"] if arch.is_counted else []),
        f"{rl.prompts_per_step} prompts x {rl.group_size} lists a step, up to {plan.config.data.max_prompt_tokens} + "
        f"{rl.max_new_tokens} tokens; {micro_batch_tokens(plan.config)} tokens a forward pass",
        "",
        "GB of one GPU",
        *_rows(plan.state, GB, 1),
        *_rows({f"update: {name}": value for name, value in plan.update.items()}, GB, 1),
        *_rows({f"vLLM: {name}": value for name, value in plan.engine.items()}, GB, 1),
        *_rows({"peak of the update": plan.update_peak, "peak of sampling": plan.sampling_peak}, GB, 1),
        *_rows({"there is": plan.capacity}, GB, 1),
        f"  (vLLM's share, rl.vllm_memory={rl.vllm_memory:g}, is {plan.engine_share / GB:.1f}; "
        f"{RESERVED / GB:g} of every GPU are set aside)",
        "",
        disk_line(arch, plan.config),
        "",
        *overlap_lines(arch, plan.config, plan.engine["keys and values"]),
        "seconds a step, expected",
        *_rows(plan.seconds | {"in all": sum(plan.seconds.values())}, 1, 2),
        *_whole_run(plan),
        "  assumed, not measured: "
        + ", ".join(f"{f.name}={getattr(plan.rates, f.name):g}" for f in fields(plan.rates)),
        "",
    ]
    if plan.fits:
        return "\n".join([*lines, "It fits."])
    return "\n".join(
        [*lines, "It does not fit. What would help, alone or together:", *(f"  {line}" for line in advice(plan))]
    )


def _whole_run(plan: Plan) -> list[str]:
    steps = plan.config.rl.num_steps
    hours = steps * sum(plan.seconds.values()) / 3600
    return [f"  {steps} steps: {hours:.1f} hours, validation not counted"] if steps else []


def _rows(parts: Mapping[str, float], unit: float, digits: int) -> list[str]:
    return [f"  {name:26}{value / unit:10.{digits}f}" for name, value in parts.items()]
