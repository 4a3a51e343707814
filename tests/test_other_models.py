"""Models outside the table of `model_families`, and settings drawn at random: nothing wrong passes the guard.

Each is refused in one line or as its own forward: `pytest -m families tests/test_other_models.py`, some minutes.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from against_eager import CONFIG, assert_as_its_own_forward, reload, save
from model_families import MLA, VARIANTS, make_config
from test_families import REFUSED
from tiny_world import ALONE
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankgrpo.errors import UserError
from rankgrpo.model.policy import open_policy
from rankgrpo.sampler import verify
from rankgrpo.sampler.verify import verify_policy

OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {kind for kind, _ in VARIANTS.values()})
# What these call otherwise than the table's, or need beside it.
SIZES: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "longcat_flash": MLA | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "moe_topk": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
MOST_PARAMETERS = 30_000_000  # of a model whose keys have other names than those that `model_families` makes small
NUM_DRAWS = 70
ATOL = 3e-4  # nats: settings drawn at random make some models wider than those of the table
# Switches of what a forward returns, and of kernels; and numbers of initial weights and of noise in training.
KEPT = set(
    "use_cache output_attentions output_hidden_states return_dict is_encoder_decoder is_decoder add_cross_attention "
    "use_mamba_kernels output_router_logits".split()
)
NOT_DRAWN = (
    "eps", "initializer", "dropout", "drop", "pdrop", "range", "time_step", "coef", "jitter", "init_"
)  # fmt: skip
ROPES = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "default", "partial_rotary_factor": 0.5},
)

pytestmark = pytest.mark.families


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A variant of the table and settings to change: switches turned, factors scaled, other ropes and windows."""
    random = Random(seed)
    name = random.choice(sorted(VARIANTS))
    known = make_config(name).get_text_config().to_dict()
    switches = [key for key, value in known.items() if type(value) is bool and key not in KEPT]
    factors = [key for key, v in known.items() if type(v) is float and not any(word in key for word in NOT_DRAWN)]
    changes: dict[str, Any] = {}
    for key in random.sample(switches, min(len(switches), random.choice([0, 1, 1, 2]))):
        changes[key] = not known[key]
    for key in random.sample(factors, min(len(factors), random.choice([0, 1, 1]))):
        changes[key] = known[key] * random.choice([0.3, 0.5, 2.0])
    rope = known.get("rope_parameters")
    if random.random() < 0.4 and isinstance(rope, dict) and "rope_type" in rope:
        changes["rope_parameters"] = rope | random.choice(ROPES)
        if changes["rope_parameters"]["rope_type"] == "dynamic":
            changes["max_position_embeddings"] = random.choice([32, 2048])
    if "sliding_window" in known and random.random() < 0.3:
        changes["sliding_window"] = random.choice([None, 5, 16, 40])
    return name, changes


def assert_exact_or_refused(name: str, folder: Path, left_out: str | None = None) -> str | None:
    """The variant `name` of VARIANTS; returns why it was refused, None if it is exact.

    Skipped where transformers itself makes no small model of it or cannot run it.
    """
    verify._said.clear()
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(make_config(name)).parameters())
    except Exception:  # noqa: BLE001  (some do not open on the meta device, and are small; the next lines tell)
        size = 0
    if size > MOST_PARAMETERS:
        pytest.skip(f"its keys have other names: {size / 1e6:.0f} million parameters")
    try:
        save(name, folder / "model")
        with torch.no_grad():
            reload(folder / "model")(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    except Exception as error:  # noqa: BLE001  (transformers' own, of any kind)
        pytest.skip(f"transformers makes no small model of it that runs: {type(error).__name__}: {str(error)[:200]}")
    try:
        policy = verify_policy(open_policy(folder / "model", CONFIG.model, ALONE.device), CONFIG)
    except UserError as refusal:
        assert "\n" not in str(refusal)
        print(f"REFUSED {name}: {refusal}")
        return str(refusal)
    assert_as_its_own_forward(
        policy,
        folder / "model",
        folder / "export",
        atol=ATOL,
        sampled_atol=ATOL,
        as_drawn=policy.paths.decoding == "uncached",
        left_out=left_out,
    )
    return None


@pytest.mark.parametrize("kind", OTHERS)
def test_another_decoder(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, kind, (kind, SIZES.get(kind, {})))
    assert_exact_or_refused(kind, tmp_path)


@pytest.mark.parametrize("seed", range(NUM_DRAWS))
def test_settings_drawn_at_random(seed, tmp_path, monkeypatch):
    name, changes = drawn(seed)
    kind, own = VARIANTS[name]
    print(f"{name} with {changes}")
    monkeypatch.setitem(VARIANTS, "drawn", (kind, own | changes))
    refusal = assert_exact_or_refused("drawn", tmp_path, left_out=".visual." if name == "comp_qwen3_5" else None)
    dynamic = changes.get("rope_parameters", {}).get("rope_type") == "dynamic"
    assert refusal is None or dynamic or name in REFUSED
