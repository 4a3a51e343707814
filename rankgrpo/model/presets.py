"""Models: presets, where each comes from, how one is made, loaded and exported.

A model is a folder in Hugging Face format (config.json, safetensors, tokenizer) or an id on the Hugging Face hub.
`make_init` makes the two presets that are not on the hub, `load_policy` opens any of them with the ids for padding and
for the end of an answer put right, `save_policy` writes a folder that `AutoModelForCausalLM.from_pretrained` reads.
Code and pickles that come with a model are never run. Sharding, autocast and attention patches are the caller's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from rankgrpo.data.prompt import PromptFormat
from rankgrpo.data.samples import Dataset
from rankgrpo.errors import ModelError
from rankgrpo.files.atomic import atomic_folder
from rankgrpo.model.export import model_class, save_policy
from rankgrpo.model.new_tokens import add_new_tokens
from rankgrpo.model.plain_tokenizer import COMPLETE_FILES
from rankgrpo.model.recipe import RECIPE_FILE, check_recipe, make_recipe
from rankgrpo.model.smollm2 import PACKAGE, convert_smollm2
from rankgrpo.model.tiny import TinyConfig, make_tiny, train_tokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
HUB_IGNORED = ["original/*", "onnx/*", "consolidated*"]  # the same weights in other formats
# A padding token other than EOS, in order of preference; the first is Llama 3's, the second Qwen's and SmolLM2's.
HARMONY_ENDS = ("<|return|>", "<|call|>", "<|end|>")
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]", "<unk>")


@dataclass(frozen=True, slots=True)
class Preset:
    """A model and where it comes from. Example: Preset("qwen2.5-0.5b", "hub", "Qwen/Qwen2.5-0.5B-Instruct", "...")"""

    name: str
    origin: Literal["scratch", "package", "hub", "folder"]
    """Where it comes from: scratch or package, of which `make_init` writes a folder; hub or folder, which `load_policy`
    opens at `location`."""
    location: str
    """Hub id, folder or package; empty for scratch."""
    about: str


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("tiny", "scratch", "", "Llama architecture, 3 to 5M parameters and a tokenizer made from the data; CPU"),
        Preset("smollm2-135m", "package", PACKAGE, "SmolLM2-135M-Instruct out of a Python package; CPU or GPU"),
        Preset("qwen2.5-0.5b", "hub", "Qwen/Qwen2.5-0.5B-Instruct", "GPU"),
        Preset("llama3.2-1b", "hub", "meta-llama/Llama-3.2-1B-Instruct", "GPU; the hub asks to accept a licence"),
        Preset("llama3.2-3b", "hub", "meta-llama/Llama-3.2-3B-Instruct", "GPU; the hub asks to accept a licence"),
    )
}


def resolve_model(name_or_path: str | os.PathLike[str]) -> Preset:
    """The preset of this name, or one made up for a folder or a hub id (`owner/model`).

    A preset's name wins over a folder of the same name (write ./tiny for the folder). Raises ModelError for a name that
    is none of these, listing the presets, and for a folder that does not hold a model.
    """
    name = os.fspath(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    folder = Path(name).expanduser()
    if folder.exists():
        _check_folder(folder)
        return Preset(name, "folder", str(folder), "local folder")
    if HUB_ID.fullmatch(name):
        return Preset(name, "hub", name, "model of the Hugging Face hub")
    if os.sep in name:
        raise ModelError(f"{name}: no such folder; MODEL takes a preset ({', '.join(PRESETS)}), a folder or a hub id")
    raise ModelError(
        f"unknown model {name!r}. Presets: {', '.join(PRESETS)}. Or give a folder in Hugging Face format "
        "(MODEL=/path/to/folder) or a hub id (MODEL=owner/model)"
    )


def make_init(
    name: str,
    dataset: Dataset,
    out_dir: str | os.PathLike[str],
    *,
    seed: int,
    tiny: TinyConfig | None = None,
    num_ranks: int = 20,
    prompt: PromptFormat | None = None,
    new_tokens: Sequence[str] = (),
) -> str:
    """Make the model a run starts from; returns what `load_policy` opens.

    `tiny` (random weights, tokenizer of `dataset`'s train split) and `smollm2-135m` (converted) are written to
    `out_dir`, whole or not at all; for the others the folder or hub id itself comes back and nothing is written, unless
    `new_tokens` are added. A second call with the same arguments finds the folder and leaves it. Raises ModelError when
    `out_dir` holds anything else.
    """
    preset = resolve_model(name)
    from_elsewhere = preset.origin in ("hub", "folder")
    if from_elsewhere and not new_tokens:
        return preset.location
    out_dir = Path(out_dir)
    tiny = tiny or TinyConfig()
    if from_elsewhere:
        recipe: dict[str, Any] = {"source": preset.location}
    else:
        recipe = make_recipe(preset.name, preset.location, dataset, seed, tiny, num_ranks, prompt)
    if new_tokens:
        recipe |= {"new_tokens": hashlib.sha256("\n".join(new_tokens).encode()).hexdigest()}
    if out_dir.exists() and any(out_dir.iterdir()):
        check_recipe(out_dir, recipe)
        return str(out_dir)
    if preset.origin == "scratch":
        model, tokenizer = make_tiny(
            dataset, tiny, seed=seed, num_ranks=num_ranks, prompt=prompt, new_tokens=new_tokens
        )
    else:
        model, tokenizer = load_policy(preset.location) if from_elsewhere else convert_smollm2()
        add_new_tokens(model, tokenizer, new_tokens)
    _set_stop_tokens(model, tokenizer, name)
    with atomic_folder(out_dir) as temporary:
        save_policy(model, tokenizer, temporary)
        (temporary / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return str(out_dir)


def load_policy(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a folder, a hub id or a hub preset: (model in float32 and evaluation mode, tokenizer).

    The tokenizer's EOS is the token that ends an answer in its chat template, its padding token differs from it where
    the vocabulary allows, and the model's generation config holds these ids and nothing else: a published one may set a
    repetition penalty or top-p, under which sampled log-probabilities would not be the model's.

    Raises ModelError when the model is neither here nor to be had from the hub, has no chat template or no safetensors,
    or has fewer rows in its head than its tokenizer has ids.
    """
    preset = resolve_model(name_or_path)
    if preset.origin in ("scratch", "package"):
        raise ModelError(f"{preset.name} is made for a run, not loaded by name; give the folder that make_init wrote")
    folder = preset.location if preset.origin == "folder" else _download(preset)
    try:
        with _no_progress_bars():
            tokenizer = _read_tokenizer(folder)
            check_round_trip(tokenizer, preset.location)
            model = model_class(folder).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be read ({_first_line(error)})") from error
    untie_differing_head(model)
    num_rows = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ModelError(
            f"{preset.location}: the tokenizer has {len(tokenizer)} ids, the model's head {num_rows} rows; this is the "
            "tokenizer of another model"
        )
    _set_stop_tokens(model, tokenizer, preset.location)
    with suppress(ValueError):  # not every architecture has it
        model.set_attn_implementation("sdpa")
    return model.to(device), tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raise ModelError for a tokenizer that does not give a list back as it was written."""
    text = "Heat (1995)\nRonin (1998)\n2001: A Space Odyssey (1968)\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if read != text:
        raise ModelError(
            f"{source}: its tokenizer reads {text[:24]!r} back as {read[:24]!r}, so no list can be written with it; "
            "set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast, or take the original's files"
        )


def untie_differing_head(model: PreTrainedModel) -> None:
    """Say in the configuration that the head is its own where the file has another than the embedding.

    transformers then computes with the file's head whatever tie_word_embeddings says; what is exported and what a
    sampler is made from must say the same.
    """
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def open_tokenizer(name_or_path: str, dataset: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights; `tiny` makes its own of the data set. Raises ModelError."""
    if name_or_path in PRESETS and PRESETS[name_or_path].origin == "scratch":
        return train_tokenizer(dataset, TinyConfig().vocab)
    return load_tokenizer(PRESETS[name_or_path].location if name_or_path in PRESETS else name_or_path)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, its EOS that of the chat template. Raises ModelError."""
    try:
        tokenizer = _read_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no tokenizer can be read there ({_first_line(error)})") from error
    check_round_trip(tokenizer, source)
    if tokenizer.chat_template:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    return tokenizer


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id, as its file says.

    For some model types (qwen2 is one) AutoTokenizer takes a class of its own choice, with its own pre-tokenizer and
    normaliser, where the file is complete and names no class: texts then have other tokens than they were written with.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    named = get_tokenizer_config(source, trust_remote_code=False).get("tokenizer_class")
    if named in COMPLETE_FILES and type(tokenizer) is not PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(source)
    return tokenizer


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that closes an answer in the tokenizer's chat template; its EOS where the template has none.

    The file's own EOS cannot be trusted: base and converted models often name the end of a document there.
    Raises ModelError when there is no chat template, or neither token.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; take the Instruct variant of the model, or "
            "put a chat_template.jinja into its folder"
        )
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    closing = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("answer")[2].lstrip()
    first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    added = tokenizer.added_tokens_decoder
    if first and first[0] in added and added[first[0]].special:
        return first[0]
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer says what ends an answer"
        )
    return tokenizer.eos_token_id


def _set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        others = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = others[0] if others else tokenizer.eos_token
    published = model.generation_config.eos_token_id if model.generation_config is not None else None
    others = published if isinstance(published, list) else [published]
    ids = tokenizer.get_vocab()
    # A list in the final channel ends with any message's end; a published file names those of an answer alone.
    others = [*others, *(ids[end] for end in HARMONY_ENDS if "<|channel|>" in ids and end in ids)]
    eos_ids = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *others) if i is not None))
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=getattr(model.config.get_text_config(), "bos_token_id", None),  # not every family has the key
        eos_token_id=eos_ids if len(eos_ids) > 1 else eos_ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no config.json, so this is not a model folder in Hugging Face format; it needs config.json, "
            "model.safetensors and tokenizer.json"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no safetensors weights. Weights in pickle files (pytorch_model.bin) are not read: convert them "
            "with model.save_pretrained of transformers"
        )


def _download(preset: Preset) -> str:
    """The hub's folder of the model, from the cache where it is complete; one question to the hub, no pickles."""
    try:
        folder = snapshot_download(preset.location, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except OSError as error:
        raise ModelError(
            f"{preset.name}: cannot get {preset.location} from the Hugging Face hub or cache ({_first_line(error)}). "
            f"On a machine with network run `hf download {preset.location} --local-dir FOLDER`, then give that folder: "
            "MODEL=/path/to/folder"
        ) from error
    _check_folder(Path(folder))
    return folder


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Reading and writing weights takes seconds; its bars would tear those of the run apart."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
