"""The sampler over vLLM on GPUs, against the source of vLLM's CUDA build: what it calls and what it reads."""

import contextlib
import dataclasses
import inspect
import re
import sys
from types import SimpleNamespace
from unittest import mock

import fake_gpu
import numpy as np
import pytest
import torch
import vllm_source
from test_rehearse_training import GPU, PROMPT, fake_model, on_gpus, tokenizer
from tiny_world import tiny_config, tiny_dataset
from transformers import Qwen2Config

import rankgrpo.sampler.choose as choose
import rankgrpo.sampler.vllm as vllm_module
import rankgrpo.sampler.vllm_trie as vllm_trie
from rankgrpo.errors import SamplingError
from rankgrpo.model.constraint import open_constraint
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.sync import sync_weights
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler, explain_start, start_engine
from rankgrpo.sampler.vllm_classes import check_replaceable, shared_classes
from rankgrpo.sampler.vllm_models import check_architecture
from rankgrpo.sampler.vllm_serve import __getattr__ as served
from rankgrpo.sampler.vllm_trie import SlotLists, processor_class, request_arguments

ALONE = Parallel(0, 1, GPU)
ENGINE = EngineConfig(max_tokens=64, rows=4, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def wheel():
    require_wheel()


def require_wheel() -> None:
    try:
        vllm_source.folder()
    except vllm_source.Unavailable as error:
        pytest.skip(str(error))


class Engine:
    """What vLLM's engine answers; it remembers what it was started with and told."""

    def __init__(self):
        self.options, self.told, self.refusal = {}, [], None
        self.model = fake_model("engine", device=GPU)[0]
        self.model.load_weights = lambda weights: [name for name, _ in weights]
        self.model.compute_logits = lambda hidden: torch.zeros(len(hidden), 4, device=GPU)

    def start(self, vllm, **options):
        """As the source does: what is no argument of LLM goes to EngineArgs, which refuses what it does not know."""
        fields = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
        given = {key: value for key, value in options.items() if key in fields and value is not None}
        given |= options["kwargs"]
        vllm.EngineArgs(**given)
        self.options = given

    def answers(self) -> dict:
        def generate(self, prompts, sampling_params, **rest):
            import vllm
            from vllm.logprobs import Logprob

            eos = tokenizer().eos_token_id
            fields = {"index": 0, "text": "", "cumulative_logprob": 0.0}
            done = [vllm.CompletionOutput(token_ids=[eos], logprobs=[{eos: Logprob(logprob=-0.5)}], **fields)]
            return [SimpleNamespace(outputs=done * params.n) for params in sampling_params]

        def start(self, **given):
            import vllm

            engine.start(vllm, **given)

        def config(self, **given):
            from vllm.config import VllmConfig

            assert isinstance(inspect.getattr_static(VllmConfig, "use_v2_model_runner"), property)
            return SimpleNamespace(use_v2_model_runner=True)

        def asked(self):
            if engine.refusal:
                raise ValueError(engine.refusal)

        engine = self
        return {
            "LLM.__init__": start,
            "EngineArgs.create_engine_config": config,
            "EngineArgs.create_model_config": asked,
            "get_current_vllm_config_or_none": lambda: None,
            "RLOfflineMixin.apply_model": lambda self, func: [func(engine.model)],
            "LLM.apply_model": lambda self, func: [func(engine.model)],
            "LLM.generate": generate,
            "LLM.reset_prefix_cache": lambda self, **rest: True,
            "LLM.sleep": lambda self, level, mode: engine.told.append(level),
            "LLM.wake_up": lambda self, tags: engine.told.append("wake"),
            "RLOfflineMixin.sleep": lambda self, level, mode: engine.told.append(level),
            "RLOfflineMixin.wake_up": lambda self, tags: engine.told.append("wake"),
            "get_tp_group": lambda: SimpleNamespace(device_group=None),
        }


@contextlib.contextmanager
def engine():
    """An engine, on GPUs, with vLLM installed as far as anybody can tell."""
    # What reads the numbers of a mask is tested on CPUs.
    unread = mock.patch.object(vllm_module, "check_ids", lambda constraint, allowed_V: None)
    with on_gpus(), unread, mock.patch.object(vllm_module, "vllm_installed", lambda: True):
        one = Engine()
        with vllm_source.package(one.answers()):
            yield one


def open_sampler(config=ENGINE, parallel=ALONE, constraint=None):
    model, _ = fake_model("policy", device=GPU)
    allowed_V = torch.ones(model.config.vocab_size, dtype=torch.bool, device=GPU)
    return model, VLLMSampler(model, tokenizer(), config, parallel, allowed_V=allowed_V, constraint=constraint)


def test_options_and_arguments_of_the_engine():
    """Every option is one that the engine takes, with a value of those it allows; a processor finds its interface."""
    constraint = open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=3, forbid="repeats+seen")
    with engine() as one:
        open_sampler(constraint=constraint)
        assert one.options["gpu_memory_utilization"] == 0.4 and one.options["enable_sleep_mode"] is True
        assert [made.__mro__[1] for made in one.options["logits_processors"]] == [SlotLists]
        assert "kv_cache_memory_bytes" not in one.options or one.options["kv_cache_memory_bytes"] is None
        options = one.options
    with fake_gpu.processes(world=2, local=2), engine() as one:
        open_sampler(EngineConfig(max_tokens=64, tensor_parallel=2, sleep_level=0), Parallel(0, 2, GPU))
        assert one.options["tensor_parallel_size"] == 2 and one.options["enable_sleep_mode"] is False
        options |= {"distributed_executor_backend": one.options["distributed_executor_backend"]}
    for key, (module, name) in {
        "logprobs_mode": ("vllm.config.model", "LogprobsMode"),
        "distributed_executor_backend": ("vllm.config.parallel", "DistributedExecutorBackend"),
        "dtype": ("vllm.config.model", "ModelDType"),
    }.items():
        assert options[key] in vllm_source.allowed_values(module, name), f"{key} = {options[key]!r}"
    assert f'"{options["load_format"]}"' in vllm_source.text_of("vllm.model_executor.model_loader")
    assert f'"{options["generation_config"]}"' in vllm_source.text_of("vllm.config.model")


def test_sampling_sync_sleep_and_wake():
    with engine() as one:
        model, sampler = open_sampler()
        sync_weights(sampler, model)
        assert sampler.holds_weights
        sampler.stored_under = vllm_module.packed_names(
            SimpleNamespace(packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
        )
        assert sampler.stored_name("a.q_proj.weight") == "a.qkv_proj.weight"
        groups = sampler.sample([PROMPT, PROMPT], group_size=2, seeds=[3, 5], max_new_tokens=4)
        assert [[rollout.logp for rollout in group] for group in groups] == [[[-0.5]] * 2] * 2
        assert len(sampler.sample([PROMPT], group_size=2, seeds=[3], max_new_tokens=4, temperature=0)[0]) == 2
        sampler.sleep()
        sampler.wake()
        assert one.told == [1, "wake"]
        vllm_module.mask_logits(one.model, torch.tensor([1], device=GPU))
        assert one.model.compute_logits(torch.zeros(2, 3, device=GPU)).device == GPU


def test_what_the_sampler_reads_of_an_answer():
    with engine():
        import vllm

        parameters = inspect.signature(vllm.RequestOutput.__init__).parameters
        assert "outputs" in parameters
        for mode in ("num_kv_head_replicas",):
            assert f"self.{mode} =" in vllm_source.text_of("vllm.model_executor.layers.linear")
        assert "device_group: ProcessGroup" in vllm_source.text_of("vllm.distributed.parallel_state")
        assert "packed_modules_mapping" in vllm_source.text_of("vllm.model_executor.models.qwen2")


def test_the_model_is_asked_about_before_a_run():
    with engine() as one:
        model, _ = fake_model("policy", device=GPU)
        check_architecture(model, GPU)
        one.refusal = "Model architectures ['LlamaForCausalLM'] are not supported for now."
        with pytest.raises(SamplingError, match="does not know the model architecture"):
            check_architecture(model, GPU)


def test_weights_that_an_engine_keeps_in_another_form():
    for names, device, message in ((("A_log", "D"), GPU, "Mamba"), (("experts",), torch.device("cpu"), "experts")):
        layer = torch.nn.Module()
        for name in names:
            setattr(layer, name, torch.nn.Parameter(torch.zeros(1, 1, 1)))
        with pytest.raises(SamplingError, match=message):
            check_replaceable(torch.nn.ModuleDict({"experts": layer}), device)


def test_a_class_that_vllm_rewrites_goes_on_serving_the_trainer():
    with engine():
        model, _ = fake_model("policy", device=GPU)
        kind = type(model.model)
        model.model.__class__ = rewritten = type(kind.__name__, (kind,), {})
        with shared_classes(model):
            rewritten.__init__ = rewritten.__call__ = None
        assert isinstance(rewritten(model.config), kind)
        model(torch.zeros(1, 2, dtype=torch.long, device=GPU))


def test_the_run_chooses_it():
    config = tiny_config("rl.sampler=auto", "model.autocast=bfloat16")
    with engine(), mock.patch.object(choose, "vllm_installed", lambda: True):
        assert choose.choose_sampler("auto", GPU) == "vllm"
        model, _ = fake_model("policy", device=GPU)
        allowed_V = torch.ones(model.config.vocab_size, dtype=torch.bool, device=GPU)
        policy = SimpleNamespace(model=model, tokenizer=tokenizer(), allowed_V=allowed_V, constraint=None)
        first, again = (choose.open_sampler(policy, config, ALONE) for _ in range(2))
        assert first is again and first.config.dtype == torch.bfloat16
    choose._engines.clear()


def test_an_engine_of_two_processes():
    """Its requests are those of both, and a fingerprint is the sum over both."""
    with fake_gpu.processes(world=2, local=2), engine():
        parallel = vllm_module.Parallel(0, 2, GPU)
        from rankgrpo.runtime.distributed import start_parallel
        from rankgrpo.sampler.vllm_shards import sum_of_shards

        assert start_parallel() == parallel
        with mock.patch.object(Parallel, "gather", lambda self, texts: [texts, texts]):
            _, sampler = open_sampler(EngineConfig(max_tokens=64, tensor_parallel=2), parallel)
            assert len(sampler.sample([PROMPT], group_size=2, seeds=[3], max_new_tokens=4)) == 1
        assert None not in sampler.fingerprints().values()
        from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

        def layer(kind, **fields):
            made = object.__new__(kind)
            made.__dict__.update(fields)
            return made

        modules = {"qkv": layer(QKVParallelLinear, num_kv_head_replicas=2), "o": layer(RowParallelLinear)}
        own = torch.zeros(2, dtype=torch.int64, device=GPU)
        assert sum_of_shards(SimpleNamespace(get_submodule=modules.get), ["qkv.weight", "o.weight"], own) == [None, 1]


def test_lists_held_to_the_catalog_by_slots():
    """The newer runner's processor: ids copied from the device, an event, and the mask written there."""
    constraint = open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=3, forbid="repeats+seen")
    first = int(constraint.start([]).allowed()[0])
    with engine(), fake_gpu.fake_tensors(number=first):
        import vllm
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

        def record(kind, **fields):
            return kind(**{name: fields.get(name) for name in inspect.signature(kind).parameters})

        kind = processor_class(vllm, {"model": "a"}, constraint)
        both = SimpleNamespace(np=np.array([first - 1, first - 2]), gpu=torch.zeros(2, dtype=torch.int32, device=GPU))
        ids = SimpleNamespace(gpu=torch.zeros(2, first + 2, dtype=torch.int32, device=GPU))
        states = record(LogitsProcRequestState, all_token_ids=ids, prompt_len=both, total_len=both)
        processor = kind(SimpleNamespace(), states)
        for slot in (0, 1):
            assert processor.add_request(slot, vllm.SamplingParams(extra_args=request_arguments([])))
        assert not processor.add_request(5, vllm.SamplingParams())
        processor.apply_staged_writes()
        logits = torch.zeros(3, len(tokenizer()), device=GPU)
        context = record(LogitsContext, idx_mapping_np=np.array([0, 1, 7]))
        assert processor.apply(logits, context) is logits
        for name in ("RowCatalog", "SlotCatalog"):
            assert served(name).__name__ == name
        with pytest.raises(AttributeError, match="no attribute 'Other'"):
            served("Other")


def test_held_lists_are_checked_on_the_way_out():
    """The sampler's own checks of what an engine returned: a list that is none of the catalog, and one that was cut."""
    constraint = open_constraint(tiny_dataset().catalog, tokenizer(), num_ranks=3, forbid="repeats+seen")
    with engine():
        _, sampler = open_sampler(EngineConfig(max_tokens=4096), constraint=constraint)
        with pytest.raises(SamplingError, match="did not keep to the catalog"):
            sampler.sample([PROMPT], group_size=1, seeds=[3], max_new_tokens=4, seen=[[5]], on_progress=len)
        with pytest.raises(ValueError, match="seen items of each prompt"):
            sampler.sample([PROMPT], group_size=1, seeds=[3], max_new_tokens=4, seen=[])
        ids = constraint.trie.list_ids([0, 1, 2])
        for whole in (True, False):
            rollout = vllm_trie.Rollout(ids, [0.0] * len(ids), "", finished=whole)
            with contextlib.nullcontext() if whole else pytest.raises(SamplingError, match="cut a list short"):
                vllm_trie.check_lists(constraint, [PROMPT], [[rollout]], [[]])
        allowed_V = SimpleNamespace(cpu=lambda: SimpleNamespace(numpy=lambda: np.zeros(len(tokenizer()), bool)))
        with pytest.raises(SamplingError, match="need ids that are masked"):
            vllm_trie.check_ids(constraint, allowed_V)


def test_an_engine_that_cannot_be_used():
    with fake_gpu.gpus(), pytest.raises(SamplingError, match="not installed"):
        vllm_module.require_vllm()
    with engine() as one:
        import vllm

        with mock.patch.object(vllm, "__version__", "0.99.0"), pytest.raises(SamplingError, match="not one that"):
            vllm_module.import_vllm()
        with mock.patch.dict(sys.modules, {"vllm": None}), pytest.raises(SamplingError, match="cannot be imported"):
            vllm_module.import_vllm()
        with pytest.raises(SamplingError, match="must divide"):
            open_sampler(EngineConfig(max_tokens=64, tensor_parallel=2))
        _, sampler = open_sampler()
        with pytest.raises(ValueError, match="the engine holds 64 tokens"):
            sampler.sample([PROMPT], group_size=1, seeds=[3], max_new_tokens=64)
        sampler.llm.reset_prefix_cache = lambda: False
        with pytest.raises(SamplingError, match="did not drop its prefix cache"):
            sampler.load_weights([])
        one.model.empty = torch.nn.Parameter(torch.empty(0, device=GPU))
        with pytest.raises(SamplingError, match="repacks its weights"):
            vllm_module.check_plain_weights(one.model)
        entry = SimpleNamespace(token_ids=[1], logprobs=[{1: SimpleNamespace(logprob=float("nan"))}])
        with pytest.raises(SamplingError, match="not finite"):
            sampler._rollout(entry)


def test_an_interface_that_is_another():
    """Each difference between vLLM's processors and those written for it is found, and told."""
    slots = vllm_trie.SlotLists
    other = [
        ({"add_requests": slots.add_request}, {}, "has no method add_requests"),
        ({"add_request": lambda self, row: None}, {}, "takes"),
        ({"add_request": slots.add_request}, {}, "asks for .'apply'."),
    ]
    with engine():
        import vllm
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

        for methods, records, message in other:
            assert re.search(message, vllm_trie.describe_difference(type("Own", (), methods), LogitsProcessor, records))
        records = {vllm.SamplingParams: {"no_such_field"}}
        assert "has no ['no_such_field']" in vllm_trie.describe_difference(slots, LogitsProcessor, records)
        with mock.patch.object(vllm_trie, "CONTEXT_FIELDS", {"no_such_field"}):
            with pytest.raises(SamplingError, match="logits processors are not those of"):
                vllm_trie.on_base(vllm, slots, None)


def test_why_it_did_not_start():
    """What a GPU's engine says when memory is short, in its own words, becomes the setting to change."""
    model_config = Qwen2Config(
        num_attention_heads=14, hidden_size=896, num_hidden_layers=24, num_key_value_heads=2, architectures=["A"]
    )
    texts = {
        "Free memory on device": ("v1/worker", "rl.vllm_memory=0.84"),
        "No available memory for the cache blocks": ("v1/core", "rl.vllm_memory=0.45"),
        "is larger than the available KV cache": ("v1/core", "rl.vllm_memory=0.45"),
        "are not supported for now": ("model_executor/models", "rl.sampler=hf"),
        "derived max_model_len": ("config", "data.max_prompt_tokens"),
    }
    for text, (place, advice) in texts.items():
        files = (vllm_source.folder() / "vllm" / place).glob("*.py")
        assert any(text in file.read_text(encoding="utf-8") for file in files), f"vllm/{place} no longer says {text!r}"
        said = f"max_model_len: {text}" if "derived" in text else text
        with fake_gpu.gpus():
            assert advice in explain_start(said, "0.32.0", model_config, ENGINE, True)
    assert "rl.vllm_memory" not in explain_start("Value error, something else", "0.32.0", model_config, ENGINE, True)
    broken = SimpleNamespace(LLM=mock.Mock(side_effect=ValueError("Free memory on device")), __version__="0.32.0")
    with fake_gpu.gpus(), pytest.raises(SamplingError, match="are free beside the trainer"):
        start_engine(broken, model_config, ENGINE, ALONE)
