"""docs/models.md, from what the tests of the families hold: `python tests/models_page.py > docs/models.md`."""

from __future__ import annotations

import torch
from model_families import COMPOSED, VARIANTS, make_config
from test_families import DENSE, OWN_CACHE, REFUSED, ROW_BY_ROW, UNCACHED
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from vllm_families import ALIKE, BOUND, NOT_STARTED, READ_ONLY, UNLIKE
from vllm_families import TRIED_WITH as VLLM_TRIED_WITH

from rankgrpo.config import AdapterConfig
from rankgrpo.errors import ConfigError
from rankgrpo.model.adapter import kinds_of, left_out, not_adapted, target_names

TRIED_WITH = "transformers 5.19.0 and torch 2.13.0"
ABOUT = f"""# Models

`MODEL` takes any folder or hub id in Hugging Face format whose model transformers generates text with. When a
model is opened, its packs, its sampler and its own plain forward are compared on short examples and on some that are
longer than any length in its configuration at which it may begin to compute otherwise, as far as the run can reach; the
fastest way that is exact is taken; what nothing computes exactly is refused in one line ([settings](settings.md),
`model.verify`, `model.attention`). In bfloat16 the median token of a prompt's lists has to agree within six times what
rounding does to it, because a router may decide otherwise at a single token.

- **packed**: each prompt once, before its lists. A recurrent layer begins a list with the state that its prompt
  left, a convolution with the prompt's last inputs.
- **dense**: every list with its prompt, through the model's own forward; **a row at a time** where rows of a
  batch change each other.
- **grouped**: our sampler, each prompt read once. **own cache**: transformers' generate with the model's own
  cache, which reads a prompt once a list. generate hands over positions, for Bamba by itself counts from 0 after a
  cache ([finding](../findings/bamba_counts_from_zero.sh)). **no cache**: the list is read anew for every token, for
  models whose cache does not give their own forward ([finding](../findings/cached_steps_without_the_floor.sh)).
- **refused**: PhiMoE draws its experts at random in training. A rope of type dynamic remembers the longest text it has
  seen ([finding](../findings/dynamic_rope_remembers_longer_texts.sh)); runs that cannot pass max_position_embeddings
  train with it like with any other. A model that reads ahead (BERT without `is_decoder`, CPM-Ant, whose prompt is read
  in both directions) would learn a token from itself.
- **Adapters**: the Linear layers that `adapter.targets=linear` reaches, by the ends of their names. Routed experts
  that are one parameter have none, nor has a layer whose weight belongs to several layers, or is read by the code
  around it, or that returns something else than its product (Llama 4's router): with adapters merged that would be
  another model than the one that was trained. A run names them. A shared expert has adapters, where peft by itself may
  leave it without
  ([finding](../findings/all_linear_leaves_the_shared_expert.sh)).

The table is of small random models, with {TRIED_WITH} on a CPU in float32: log-probs within 1e-4 (Qwen3.5 with
experts or as a multimodal checkpoint 2e-4, which is what its scan differs by between chunk sizes), gradients
within 1e-3, and an export that transformers reads back to the same logits. `pytest -m families
tests/test_families.py` repeats it; `python tests/models_page.py` writes this page. swa16 and 512 are windows,
comp_ is the multimodal checkpoint, whose text model is trained.

What is not in it is not trusted either: `pytest -m families tests/test_other_models.py` opens every other decoder that
transformers makes a small model of, and variants of the table with settings drawn at random, and holds each to the
same unless the guard refuses it.
"""
VLLM = f"""
## vLLM

An export is a folder that vLLM reads as it is. With {VLLM_TRIED_WITH}, an engine was started on the export of each of
these, and the log-probs of lists that it samples compared with those that training computes:

- **Within {BOUND:g}, and again after an update was sent to the engine**: {", ".join(ALIKE)}.
- **Within {BOUND:g}, but no update can be sent**: {", ".join(READ_ONLY)}. vLLM keeps the decay of Mamba layers in
  another form, and on a CPU a packed copy of routed experts. Such models train with `rl.sampler=hf`; with vLLM a run
  refuses Mamba layers everywhere and routed experts on a CPU. On a GPU routed experts are held to vLLM's Triton
  kernels, for others rearrange them.
- **Otherwise than transformers**: {"; ".join(f"{name}, {why}" for name, why in UNLIKE.items())}.
- **Not started**: {"; ".join(f"{name} ({why})" for name, why in NOT_STARTED.items())}.
- **Open**: lfm2, which vLLM computes up to 0.7 nats otherwise from the first token on; why is not known.
- **Not tried**: Qwen3.5 and the multimodal checkpoints, for which vLLM imports torchvision, and all others.

`pytest -m "families or not families" tests/vllm_engine/test_exports.py`, in the environment of `make test-vllm`,
repeats it. Whether vLLM knows a model at all, vLLM itself is asked: of a folder by `rankgrpo run --check`, of a hub id
when the run begins.
"""


def page() -> str:
    rows = ["| Model | Training | Sampler | Adapters |", "|---|---|---|---|"]
    for name in VARIANTS:
        if name in REFUSED:
            rows.append(f"| {name} | refused | | |")
            continue
        training = "dense" if name in DENSE else "dense, a row at a time" if name in ROW_BY_ROW else "packed"
        sampler = "no cache" if name in UNCACHED else "own cache" if name in OWN_CACHE else "grouped"
        rows.append(f"| {name} | {training} | {sampler} | {adapted(name)} |")
    packed = len(VARIANTS) - len(DENSE | ROW_BY_ROW | REFUSED)
    count = f"{len(VARIANTS)} variants: {packed} packed, {len(DENSE | ROW_BY_ROW)} dense, {len(REFUSED)} refused.\n"
    return "\n".join([ABOUT, count, *rows]) + "\n" + VLLM


def adapted(name: str) -> str:
    """What adapters reach in a variant, from its configuration."""
    kind = AutoModelForImageTextToText if VARIANTS[name][0] in COMPOSED else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(make_config(name))
    try:
        ends = dict.fromkeys(layer.rpartition(".")[2] for layer in target_names(model, AdapterConfig("lora")))
    except ConfigError:
        return "none, no Linear layer"
    without = ["the routed experts"] if not_adapted(model) else []
    without += dict.fromkeys(".".join(kind.split(".")[-2:]) for kind in kinds_of(left_out(model)))
    return ", ".join(ends) + (f"; not {', '.join(without)}" if without else "")


if __name__ == "__main__":
    print(page(), end="")
