"""A model's folder in Hugging Face format: written so that transformers and vLLM read it, and which class reads it."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from rankgrpo.errors import ModelError

FILE_BYTES = 2**32  # of one safetensors file of an export


def model_class(folder: str) -> type:
    """The automatic class of the folder's model: multimodal checkpoints that hold a text model are opened whole.

    Raises ModelError for what is no language model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    raise ModelError(f"{folder}: {config.model_type} is no model that transformers generates text with; take another")


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    parameters: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write config, tokenizer and safetensors weights into `folder`, for `from_pretrained` to read.

    The weights are the parameters, tied ones once, and the buffers that a file of the model has, in the form of the
    family's published files. `parameters` are written in place of the model's own, and read a layer at a time. Not
    atomic: wrap it in `files.atomic_folder` where a reader must never see half of it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    own = model.named_parameters() if parameters is None else parameters
    _write_weights(folder, as_published(model, chain(own, stored_buffers(model))))
    tokenizer.save_pretrained(folder)


def stored_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model's file, as the routers' biases of DeepSeek V3 and GLM 4.5 do."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def as_published(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names and in the pieces of the family's published files, as transformers' own
    `save_pretrained` has them: its Mixtral, for one, holds in one parameter what files hold expert by expert, and vLLM
    reads files. What is made of several tensors is made of one layer's, so memory holds a layer at a time.
    """
    for _, layer in groupby(tensors, key=lambda named: re.match(r"(.*?\.\d+\.)?", named[0])[0] or named[0]):
        yield from revert_weight_conversion(model, dict(layer)).items()


def _write_weights(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or files of FILE_BYTES with their index; memory holds one file's tensors at a time."""
    file_of_name: dict[str, Path] = {}
    files: list[Path] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        file = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))  # written private to the user otherwise
        file_of_name.update(dict.fromkeys(held, file))
        files.append(file)
        held.clear()

    for name, tensor in parameters:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > FILE_BYTES:
            write()
            size = 0
        own = tensor.detach().cpu().contiguous()
        is_part = own.untyped_storage().nbytes() > num_bytes  # of a tensor that would be kept as long
        held[name] = own.clone() if is_part else own
        size, total = size + num_bytes, total + num_bytes
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file.name for name, file in file_of_name.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
