"""Sentence embeddings of items and conversations, unit rows whose products are cosines.

Three encoders: TF-IDF (offline; words and their weights, nothing learned), a transformers encoder with mean pooling (a
local folder or a hub id), and an embeddings endpoint (an OpenAI-compatible server, for models that transformers cannot
load on its own). TF-IDF rows are sparse, the others dense; whoever multiplies them need not care.
"""

# Shape letters: N rows (texts), D dimensions, B rows of a block, C rows that a block weighs.

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rankgrpo.distill.settings import STELLA
from rankgrpo.errors import EncoderError
from rankgrpo.items.catalog import normalise_title

MAX_TOKENS = 512
ENCODED_AT_ONCE = 32
SENT_AT_ONCE = 64
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


# ------------------------------------------------------------------------------------------------------------- products


def weighted_rows(weight_BC: Tensor, rows_CD: Tensor) -> Tensor:
    """weight_BC @ rows_CD, dense (B, D), for dense and for sparse rows."""
    if rows_CD.is_sparse:
        return torch.sparse.mm(rows_CD.t(), weight_BC.t().contiguous()).t()
    return weight_BC @ rows_CD


def products(query_BD: Tensor, rows_ND: Tensor) -> Tensor:
    """query_BD @ rows_ND.T, dense (B, N), for dense and for sparse rows."""
    if rows_ND.is_sparse:
        return torch.sparse.mm(rows_ND, query_BD.t().contiguous()).t()  # ten times as fast as with a view
    return query_BD @ rows_ND.t()


# --------------------------------------------------------------------------------------------------------------- TF-IDF


@dataclass(frozen=True)
class Tfidf:
    """Word weights learned from documents; made by `Tfidf.fit`.

    A word w of a text weighs (1 + log count) * (log((1 + n) / (1 + df_w)) + 1), with n documents of which df_w hold it;
    rows are scaled to length 1. Words of fewer than `min_df` documents, or of more than `max_df_frac` of them, are left
    out: what a conversation and an item share should say something.
    """

    column: dict[str, int]
    idf_D: Tensor

    @classmethod
    def fit(cls, documents: Sequence[str], *, min_df: int = 2, max_df_frac: float = 0.2) -> Tfidf:
        """Learn the weights from documents. Raises ValueError when no word is left."""
        df = Counter(word for document in documents for word in set(words(document)))
        limit = max(max_df_frac * len(documents), min_df)
        kept = sorted(word for word, count in df.items() if min_df <= count <= limit)
        if not kept:
            raise ValueError(f"no word is in {min_df} or more of the {len(documents)} item texts, TF-IDF has nothing")
        idf = [math.log((1 + len(documents)) / (1 + df[word])) + 1 for word in kept]
        return cls({word: place for place, word in enumerate(kept)}, torch.tensor(idf))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Sparse unit rows (N, D); a text without known words has a row of zeros."""
        places: list[tuple[int, int]] = []
        values: list[Tensor] = []
        for row, text in enumerate(texts):
            counts = Counter(self.column[word] for word in words(text) if word in self.column)
            columns = sorted(counts)
            if columns:
                count_C = torch.tensor([counts[column] for column in columns], dtype=torch.float32)
                values.append(F.normalize((1 + count_C.log()) * self.idf_D[columns], dim=0))
                places += [(row, column) for column in columns]
        index = torch.tensor(places, dtype=torch.long).reshape(-1, 2).t()
        flat = torch.cat(values) if values else torch.zeros(0)
        return torch.sparse_coo_tensor(
            index, flat, (len(texts), len(self.column)), is_coalesced=True, check_invariants=True
        )


def words(text: str) -> list[str]:
    """Words in lower case, typographic apostrophes as plain ones; numbers count as words."""
    return _WORD.findall(normalise_title(text))


# ------------------------------------------------------------------------------------------------------ learned models


def encode_with_transformer(model: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """Mean of the last hidden states over the tokens of each text, unit rows, float32 (N, D) on the CPU.

    Raises EncoderError when transformers cannot load `model` without running code from its repository.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        # False, because transformers asks at the terminal where nothing is said.
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).to(device).eval()
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoder {model!r} cannot be loaded: {str(error).splitlines()[0]}. Give a local folder or a hub id of an "
            "architecture that transformers has. A model that brings code of its own, as stella does, can be served: "
            f'`vllm serve {STELLA} --trust-remote-code --hf-overrides \'{{"architectures": ["GteNewModel"]}}\' --port '
            "8001`, then --encoder http://localhost:8001/v1"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows: list[Tensor | None] = [None] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    with tqdm(total=len(texts), desc="embed", unit="text", dynamic_ncols=True) as bar, torch.inference_mode():
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            places = by_length[start : start + ENCODED_AT_ONCE]
            batch = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            hidden_BTD = encoder(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            for place, row in zip(places, F.normalize(mean_BD, dim=1).cpu(), strict=True):
                rows[place] = row
            bar.update(len(places))
    return torch.stack(rows)


def encode_at_endpoint(url: str, model: str, texts: Sequence[str]) -> Tensor:
    """Unit rows, float32 (N, D), from the `/embeddings` of an OpenAI-compatible server."""
    try:
        import openai
    except ImportError:
        raise EncoderError(
            "an encoder behind an endpoint needs the openai package: pip install 'rankgrpo[teacher]'"
        ) from None

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=6)
    rows = []
    with tqdm(total=len(texts), desc="embed", unit="text", dynamic_ncols=True) as bar:
        for start in range(0, len(texts), SENT_AT_ONCE):
            batch = list(texts[start : start + SENT_AT_ONCE])
            try:
                response = client.embeddings.create(model=model, input=batch, encoding_format="float")
            except openai.OpenAIError as error:
                raise EncoderError(f"{url}: no embeddings from {model!r}: {error}") from None
            rows += [entry.embedding for entry in sorted(response.data, key=lambda entry: entry.index)]
            bar.update(len(batch))
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)
