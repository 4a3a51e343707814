"""Whether vLLM has a model's architecture, asked before a run begins: no weights are read and no engine is started."""

from __future__ import annotations

import tempfile

import torch
from transformers import PreTrainedModel

from rankgrpo.errors import SamplingError
from rankgrpo.sampler.vllm import EngineConfig, explain_start, import_vllm
from rankgrpo.sampler.vllm_classes import check_replaceable


def check_architecture(model: PreTrainedModel, device: torch.device) -> None:
    """Raise SamplingError, saying what to set, for a model that vLLM refuses by its configuration, or whose weights
    cannot be replaced in an engine on `device`.

    vLLM answers by its list of architectures, or by its backend for transformers' own classes. What shows only in an
    engine, `start_engine` reports.
    """
    vllm = import_vllm()
    check_replaceable(model, device)
    shortest = EngineConfig(max_tokens=1)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        asked = vllm.EngineArgs(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=1)
        try:
            asked.create_model_config()
        except (ValueError, RuntimeError, AssertionError) as error:
            raise SamplingError(explain_start(str(error), vllm.__version__, model.config, shortest, False)) from error
