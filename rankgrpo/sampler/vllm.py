"""Grouped sampling with vLLM inside the trainer's process: one engine a process, colocated on its GPU.

The engine is built from the policy's configuration alone and filled by `load_weights`; it never reads weights from
disk. The G lists of a prompt share its prefix in the cache. During updates the engine can sleep, which gives its memory
to the trainer.

Everything that differs between vLLM 0.25 and 0.33, or that reaches past its public interface, is in the files vllm*.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rankgrpo.errors import SamplingError
from rankgrpo.model.constraint import Constraint
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.base import Rollout, check_prompts, eos_token_ids, fingerprint
from rankgrpo.sampler.vllm_classes import check_replaceable, plain_options, shared_classes
from rankgrpo.sampler.vllm_shards import share_requests, sum_of_shards
from rankgrpo.sampler.vllm_trie import PINNED, check_ids, check_lists, check_seen, processor_class, request_arguments
from rankgrpo.thoughts import list_decoder

OLDEST, NEWEST = (0, 25), (0, 33)
KV_BLOCK = 128  # tokens a block of the key-value cache on CPUs
GIB = 2**30


@dataclass(frozen=True)
class EngineConfig:
    """Size and place of the engine. Example: EngineConfig(max_tokens=3072, rows=256, dtype=torch.bfloat16)"""

    max_tokens: int
    """Longest prompt and list together."""
    rows: int = 256
    """Lists decoded at once."""
    dtype: torch.dtype = torch.float32
    memory: float = 0.4
    """Share of the GPU that weights, activations and key-value cache may take."""
    tensor_parallel: int = 1
    """Processes that share one engine; they must be neighbours."""
    sleep_level: int = 1
    """0 stays awake, 1 parks the weights in main memory, 2 drops them: the next load_weights brings them anyway."""


class VLLMSampler:
    """Sampler over a vLLM engine of its own; `load_weights` must have run before the first `sample`."""

    owns_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        config: EngineConfig,
        parallel: Parallel,
        *,
        allowed_V: Tensor,
        constraint: Constraint | None = None,
    ):
        self.tokenizer, self.config, self.parallel, self.constraint = tokenizer, config, parallel, constraint
        self.eos_ids, self.decode = eos_token_ids(model, tokenizer), list_decoder(tokenizer)
        self.dtype = config.dtype
        self.on_gpu = parallel.device.type == "cuda"
        self.asleep = self.holds_weights = False
        self.vllm = import_vllm()
        if constraint is not None:
            check_ids(constraint, allowed_V)
        check_replaceable(model, parallel.device)
        with shared_classes(model):
            self.llm = start_engine(self.vllm, model.config, config, parallel, constraint)
        (self.engine_model,) = self.llm.apply_model(lambda engine_model: engine_model)
        check_plain_weights(self.engine_model)
        if not bool(allowed_V.all()):
            mask_logits(self.engine_model, (~allowed_V).nonzero().flatten().to(parallel.device))
        self.stored_under = packed_names(self.engine_model)

    def sample(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        seen: Sequence[Sequence[int]] | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions a prompt; with tensor parallelism every process must call it."""
        check_prompts(prompts, seeds)
        seen = check_seen(self.constraint, prompts, seen)
        if self.constraint is not None:
            max_new_tokens = self.constraint.max_tokens  # no list is cut
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        if longest > self.config.max_tokens:
            raise ValueError(f"the engine holds {self.config.max_tokens} tokens a list, prompt included, not {longest}")
        draws = 1 if temperature == 0 else group_size  # vLLM refuses several greedy lists, which would all be equal
        prompts, seeds, seen, mine = share_requests(self.parallel, self.config.tensor_parallel, prompts, seeds, seen)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            self.vllm.SamplingParams(
                n=draws,
                temperature=temperature,
                seed=seed >> 1,  # list g draws from seed + g, which must stay below 2^63
                max_tokens=max_new_tokens,
                stop_token_ids=self.eos_ids,
                logprobs=0,
                detokenize=False,
                extra_args=None if self.constraint is None else request_arguments(items),
            )
            for seed, items in zip(seeds, seen, strict=True)
        ]
        outputs = self.llm.generate(requests, params, use_tqdm=False) if requests else []
        groups = [[self._rollout(completion) for completion in output.outputs] for output in outputs[mine]]
        if self.constraint is not None:
            check_lists(self.constraint, prompts[mine], groups, seen[mine])
        if on_progress is not None:
            on_progress(len(groups))
        return [group * (group_size // draws) for group in groups]

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the engine from (name, whole tensor) pairs, one at a time; what it had cached of prompts is dropped."""
        with torch.no_grad():
            self.llm.apply_model(lambda engine_model: engine_model.load_weights(named))
        if not self.llm.reset_prefix_cache():
            raise SamplingError("vLLM did not drop its prefix cache, which still belongs to the weights before")
        self.holds_weights = True

    @torch.no_grad()
    def fingerprints(self) -> dict[str, int | None]:
        """By stored name, what `fingerprint` makes of the engine's own weights; tensor parallel engines do it together.

        None for what cannot be compared: keys and values that several processes hold alike because there are fewer
        heads of them than processes.
        """
        stored = {name: fingerprint(p.data) for name, p in self.engine_model.named_parameters()}
        own = torch.stack(list(stored.values()))
        if self.config.tensor_parallel == 1:
            return dict(zip(stored, own.tolist(), strict=True))
        return dict(zip(stored, sum_of_shards(self.engine_model, list(stored), own), strict=True))

    def stored_name(self, name: str) -> str:
        """The engine's tensor that holds the model's tensor `name`: q, k and v share one, as do gate and up."""
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        return f"{parent}.{self.stored_under.get(last, last)}.{leaf}" if parent else name

    def sleep(self) -> None:
        """Give the engine's memory to the trainer."""
        if self.on_gpu and self.config.sleep_level and not self.asleep:
            self.llm.sleep(level=self.config.sleep_level)
            self.asleep = True
            self.holds_weights &= self.config.sleep_level < 2

    def wake(self) -> None:
        """Take the memory back; after sleep level 2 the weights are garbage until load_weights."""
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps is not free for the engine
            self.llm.wake_up()
            self.asleep = False

    def _rollout(self, completion) -> Rollout:
        ids = list(completion.token_ids)
        logp = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
        if not all(map(math.isfinite, logp)):
            raise SamplingError("vLLM's logits are not finite: its weights are broken or training has diverged")
        text = self.decode(ids)
        return Rollout(ids, logp, text, finished=ids[-1] in self.eos_ids)


def vllm_installed() -> bool:
    """Is there a package vllm? A mere folder of that name on the path is none."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def require_vllm() -> None:
    """Raise SamplingError when it is not installed."""
    if not vllm_installed():
        raise SamplingError(
            f"rl.sampler = vllm, and vLLM is not installed: pip install 'rankgrpo[vllm]' (vllm=={PINNED}, NVIDIA GPUs; "
            f"for CPUs `make test-vllm` shows how), or set rl.sampler=hf"
        )


def import_vllm() -> ModuleType:
    """The package vllm; SamplingError with the way out when it is missing, broken or of a version nobody tried."""
    # In the engine's own process weights could only be handed over as copies.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads would be bound with it
    require_vllm()
    try:
        import vllm
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise SamplingError(
            f"vLLM is installed and cannot be imported ({_first_line(error)}). {_torch_versions()}, and torchvision, "
            f"torchaudio and torchcodec must be built for that torch too, or be absent"
        ) from error
    found = tuple(int(number) for number in re.findall(r"\d+", vllm.__version__)[:2])
    if not OLDEST <= found <= NEWEST:
        raise SamplingError(
            f"vLLM {vllm.__version__} is not one that rankgrpo knows ({_dotted(OLDEST)} to {_dotted(NEWEST)}): "
            f"pip install vllm=={PINNED}, or set rl.sampler=hf"
        )
    return vllm


def start_engine(
    vllm: ModuleType,
    model_config: PreTrainedConfig,
    config: EngineConfig,
    parallel: Parallel,
    constraint: Constraint | None = None,
) -> Any:
    """An engine with weights that mean nothing yet; SamplingError saying which setting to change when it cannot be."""
    on_gpu = parallel.device.type == "cuda"
    if config.tensor_parallel > 1 and parallel.dp_world % config.tensor_parallel:
        raise SamplingError(
            f"rl.vllm_tp = {config.tensor_parallel} must divide the number of processes, {parallel.dp_world}"
        )
    options: dict[str, Any] = {}
    if on_gpu:
        options |= {"gpu_memory_utilization": config.memory, "enable_sleep_mode": config.sleep_level > 0}
    else:
        keep_weights_plain()
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": cpu_cache_bytes(model_config, config)}
    options |= plain_options(model_config, on_gpu)
    if parallel.dp_world > 1:
        options["distributed_executor_backend"] = "external_launcher"  # processes are torchrun's, not vLLM's
    with tempfile.TemporaryDirectory() as folder:
        model_config.save_pretrained(folder)
        options |= {
            "model": folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # its own neutral defaults: a published one may set top-p or a penalty
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_tokens,
            "max_num_seqs": config.rows,
            "tensor_parallel_size": config.tensor_parallel,
            "logprobs_mode": "processed_logprobs",  # those of the distribution sampled from, temperature included
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        try:
            if constraint is not None:
                options["logits_processors"] = [processor_class(vllm, options, constraint)]
            return vllm.LLM(**options)
        except SamplingError:
            raise
        except (ValueError, RuntimeError, AssertionError) as error:
            raise SamplingError(explain_start(str(error), vllm.__version__, model_config, config, on_gpu)) from error


def explain_start(text: str, version: str, model_config: PreTrainedConfig, config: EngineConfig, on_gpu: bool) -> str:
    """What to change when the engine did not start; `text` is vLLM's own message."""
    shorter = "make lists or prompts shorter (rl.max_new_tokens, data.max_prompt_tokens)"
    if "not supported for now" in text:
        names = ", ".join(model_config.architectures or ["?"])
        return f"vLLM {version} does not know the model architecture {names}; set rl.sampler=hf"
    if "max_model_len" in text and "derived" in text:
        return (
            f"prompt and list may take {config.max_tokens} tokens together, more than the model has positions for: "
            f"{shorter}"
        )
    if on_gpu and ("Free memory on device" in text or "out of memory" in text):
        free, total = torch.cuda.mem_get_info()
        fits = math.floor(100 * (free / total - 0.02)) / 100
        return (
            f"vLLM wants rl.vllm_memory = {config.memory} of the GPU's {total / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
            f"are free beside the trainer: set rl.vllm_memory={max(fits, 0.01)}, or free the GPU, or train on more GPUs"
        )
    if on_gpu and ("KV cache" in text or "cache blocks" in text):
        a_list, total = cache_bytes_a_list(model_config, config), torch.cuda.mem_get_info()[1]
        raised = min(0.95, round(config.memory + 2 * a_list / total + 0.05, 2))
        return (
            f"rl.vllm_memory = {config.memory} leaves vLLM no room for the keys and values of one list "
            f"({a_list / GIB:.2f} GiB): set rl.vllm_memory={raised}, or {shorter}"
        )
    checked = re.search(r"Value error, (.+)", text)  # of its settings; the message begins with a list of fields
    reason = checked[1] if checked else next(iter(text.strip().splitlines()), "no reason given")
    return f"vLLM {version} did not start: {reason}"


def cache_bytes_a_list(model_config: PreTrainedConfig, config: EngineConfig) -> int:
    """Key-value cache of one list of the longest length and its prompt."""
    text = model_config.get_text_config()
    heads, values = text.num_attention_heads, text.to_dict()  # plain values, where layers may differ in a key
    sizes = [values.get(key) for key in ("head_dim", "global_head_dim")]  # Gemma 4 has two
    head_size = max((size for size in sizes if size), default=text.hidden_size // heads)
    shared = values.get("num_key_value_heads") or heads  # GPT-2 and its like have no such key
    a_token = 2 * text.num_hidden_layers * shared * head_size * config.dtype.itemsize
    return a_token * math.ceil(config.max_tokens / KV_BLOCK) * KV_BLOCK


def cpu_cache_bytes(model_config: PreTrainedConfig, config: EngineConfig) -> int:
    """Key-value cache for all rows, or what a quarter of the free memory holds of it."""
    import psutil  # vLLM brings it

    a_list = cache_bytes_a_list(model_config, config)
    available = psutil.virtual_memory().available
    size = min(a_list * config.rows, available // 4)
    if size < 2 * a_list:
        raise SamplingError(
            f"{available / GIB:.1f} GiB of main memory are free, and the keys and values of one list take "
            f"{a_list / GIB:.2f} GiB: free memory, or make lists or prompts shorter (rl.max_new_tokens, "
            f"data.max_prompt_tokens)"
        )
    return size


def keep_weights_plain() -> None:
    """Keep vLLM's CPU layers from packing their weights for the kernels that will read them.

    A packed layer goes on computing with its copy whatever is loaded later; worst with tied embeddings, where the copy
    of the head outlives even vLLM's own reload. Unpacked layers compute with the very tensors that are loaded and
    fingerprinted, like those of a GPU.
    """
    import vllm.model_executor.layers.utils as layer_utils

    def compute_plainly(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    layer_utils.dispatch_cpu_unquantized_gemm = compute_plainly


def check_plain_weights(engine_model: nn.Module) -> None:
    """Raise SamplingError when a layer's weights are not stored as they are loaded."""
    empty = [name for name, parameter in engine_model.named_parameters() if parameter.numel() == 0]
    if empty:
        raise SamplingError(
            f"this vLLM repacks its weights ({empty[0]} and {len(empty) - 1} more), so that they cannot be replaced "
            f"while it runs; set rl.sampler=hf"
        )


def mask_logits(engine_model: nn.Module, banned: Tensor) -> None:
    """Give ids that the tokenizer does not know probability 0, before temperature and sampling.

    vLLM's own ways are per request: `allowed_token_ids` would carry most of the vocabulary with each, and is cut at
    1,024 ids in its newer runner.
    """
    compute_logits = engine_model.compute_logits

    def compute_masked_logits(*args, **kwargs) -> Tensor | None:
        logits = compute_logits(*args, **kwargs)
        return logits if logits is None else logits.index_fill_(-1, banned, float("-inf"))

    engine_model.compute_logits = compute_masked_logits


def packed_names(engine_model: nn.Module) -> dict[str, str]:
    """{"q_proj": "qkv_proj", ...}: modules of the checkpoint and the engine's module that they are parts of."""
    packed = getattr(engine_model, "packed_modules_mapping", {})
    return {part: whole for whole, parts in packed.items() for part in parts}


def _torch_versions() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            wanted = [line for line in importlib.metadata.requires(name) or [] if re.match(r"torch\s*[=<>!(]", line)]
        except importlib.metadata.PackageNotFoundError:
            continue
        version = importlib.metadata.version(name)
        return (
            f"{name} {version} needs {wanted[0] if wanted else 'another torch'}, installed is torch {torch.__version__}"
        )
    return f"Installed is torch {torch.__version__}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
