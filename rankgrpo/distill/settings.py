"""Settings of `rankgrpo distill`; the command line is made from this class, its docstrings are the help texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from rankgrpo.distill.llm import Endpoint
from rankgrpo.items.format import FILM_TEMPLATE

if TYPE_CHECKING:
    from rankgrpo.data.prompt import PromptFormat

EASE = "ease"
STELLA = "NovaSearch/stella_en_400M_v5"


@dataclass(frozen=True)
class DistillConfig:
    data: str = "demo"
    """`demo`, or a folder with train/validation/test.jsonl and catalog.jsonl or .csv"""
    item: str = FILM_TEMPLATE
    """How an item is written, from columns of the catalog: `{title} by {author}`"""
    item_noun: str = ""
    """What an item is called in questions (default: movie for films, else item)."""
    item_nouns: str = ""
    """Several of them (default: item_noun with an s)."""
    out: Path | None = None
    """Output folder (default: runs/distill-DATA); the same command continues it, another reuses what it can."""
    teacher: str = EASE
    """`ease` (offline), or the address of an OpenAI-compatible server, such as http://localhost:8000/v1"""
    model: str = ""
    """Name of the teacher's model at that address."""
    num_train: int = 0
    """Training conversations used, drawn by the seed; 0 is all. The paper takes a quarter."""
    num_items: int = 20
    """Length of a demonstration."""
    num_listed: int = 0
    """Length of the list that the teacher is asked for; 0 is 20 for a model and 100 for EASE, which costs nothing."""
    short_requests: int = 0
    """Extra demonstrations a training conversation: one-line requests that name a few of its items."""

    metadata: Literal["auto", "teacher", "catalog"] = "auto"
    """Text about each item: asked of the teacher, or the catalog's genres and plot; auto asks unless that is EASE."""
    encoder: str = "tfidf"
    """`tfidf`, a transformers encoder (folder, hub id or `stella`), or the address of an embeddings server."""
    encoder_model: str = STELLA
    """Model of an embeddings server."""
    mentions: bool = True
    """Embed a conversation together with the texts about the items it names; the paper embeds it alone."""

    remap: bool = True
    """Scores over the whole catalog, from text similarity (Eq. 10); off: only what the teacher listed."""
    item_weight: float | None = None
    """Weight of the similarity to listed items (default: the paper's 1; 0 for EASE, whose lists are in the catalog)."""
    context_weight: Annotated[float, arg(name="lambda")] = 1.0
    """Weight of the similarity to the conversation (the paper's lambda)."""

    reflect: bool = True
    """A judge rates the best candidates (Eq. 11); needs a model as teacher or as judge."""
    judge: str = ""
    """Address of the judge's server (default: the teacher's)."""
    judge_model: str = ""
    """Name of the judge's model (default: the teacher's)."""
    num_judged: int = 100
    """Candidates that are rated."""
    gamma: float = 0.5
    """What a point of rating adds to a score."""

    adjust: bool = True
    """A weight and a bias for each item, learned from the training ground truth (Eq. 12 and 13)."""
    num_candidates: int | None = None
    """w and b are fitted, and lists chosen, among so many best items; 0 is the whole catalog (default: as in the paper,
    the whole; 100 for EASE)."""
    lambda_w: float | None = None
    """Penalty on (w - 1)^2 (default: the paper's 0.01; 10000 for EASE, whose lists know the training data already)."""
    lambda_b: float | None = None
    """Penalty on b^2 (default: the paper's 0.01; 30 for EASE)."""
    scale: float | None = None
    """Factor on the scores before they are adjusted (default: 1; 6 for EASE)."""
    num_folds: int = 5
    """A training conversation is listed, and adjusted, by models fitted without its dialog; 0 fits one on all."""

    concurrency: int = 8
    """Calls in flight."""
    requests_per_minute: int = 0
    """Rate limit; 0 is none."""
    max_attempts: int = 6
    """Attempts a call, with exponential back-off."""
    timeout: float = 120.0
    """Seconds an attempt may take."""
    temperature: float = 0.0
    """Sampling temperature of the teacher and of the judge."""
    extra: str = "{}"
    """Further fields of every request, in JSON: '{"chat_template_kwargs": {"enable_thinking": false}}'"""
    price_in: float = 0.0
    """Price of a million tokens read, for the estimate."""
    price_out: float = 0.0
    """Price of a million tokens written."""
    estimate: bool = False
    """Only say what the calls would cost."""
    seed: int = 3407
    """Deals the folds, draws --num-train and the short requests."""

    def __post_init__(self) -> None:
        for name in ("num_items", "num_judged", "lambda_w", "lambda_b", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        for name in (
            *("num_train", "num_listed", "short_requests", "num_candidates", "context_weight", "gamma", "seed"),
            *("requests_per_minute", "temperature", "price_in", "price_out"),
        ):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
        if self.num_folds < 0 or self.num_folds == 1:
            raise ValueError(f"--num-folds must be 0, or 2 and more, got {self.num_folds}")
        for name, address, model in (("teacher", self.teacher, self.model), ("judge", self.judge, self.judge_model)):
            if address and address != EASE and not is_address(address):
                raise ValueError(f"--{name} {address!r} is neither `ease` nor an address (http://... or https://...)")
            if is_address(address) and not (model or self.model):
                raise ValueError(f"--{name} {address} needs the name of a model there: --model NAME")
        try:
            extra = json.loads(self.extra)
        except json.JSONDecodeError as error:
            raise ValueError(f"--extra is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ValueError(f"--extra must be a JSON object, got {self.extra}")
        if self.metadata == "teacher" and not self.has_model:
            raise ValueError("--metadata teacher needs a model as teacher; EASE knows no texts")

    @property
    def prompt(self) -> PromptFormat:
        """How conversations are put to the teacher."""
        from rankgrpo.data.prompt import prompt_of_nouns  # torch is not far behind it, and `--help` does not need it

        return prompt_of_nouns(self.item, self.item_noun, self.item_nouns)

    @property
    def has_model(self) -> bool:
        """Whether the teacher is a language model."""
        return is_address(self.teacher)

    @property
    def listed(self) -> int:
        """Items asked of the teacher."""
        return self.num_listed or (20 if self.has_model else 100)

    @property
    def weights(self) -> tuple[float, float]:
        """(item_weight, context_weight)"""
        default = 1.0 if self.has_model else 0.0
        return default if self.item_weight is None else self.item_weight, self.context_weight

    @property
    def candidates(self) -> int:
        """Items among which w and b are fitted; 0 is the catalog."""
        default = 0 if self.has_model else 100
        number = default if self.num_candidates is None else self.num_candidates
        return max(number, self.num_items) if number else 0

    @property
    def logit_scale(self) -> float:
        """Factor on the scores before they are adjusted."""
        default = 1.0 if self.has_model else 6.0
        return default if self.scale is None else self.scale

    @property
    def penalties(self) -> tuple[float, float]:
        """(lambda_w, lambda_b)"""
        defaults = (0.01, 0.01) if self.has_model else (10_000.0, 30.0)
        weight, bias = (
            default if value is None else value
            for value, default in zip((self.lambda_w, self.lambda_b), defaults, strict=True)
        )
        return weight, bias

    @property
    def asks_metadata(self) -> bool:
        return self.has_model and self.metadata != "catalog"

    def teacher_endpoint(self) -> Endpoint:
        """The server that the teacher is asked at. Raises ValueError for EASE."""
        return self._endpoint(self.teacher, self.model)

    def judge_endpoint(self) -> Endpoint | None:
        """The server that the judge is asked at; None when there is nobody to judge."""
        address = self.judge or (self.teacher if self.has_model else "")
        return self._endpoint(address, self.judge_model or self.model) if address else None

    def _endpoint(self, address: str, model: str) -> Endpoint:
        if not is_address(address):
            raise ValueError(f"{address!r} is no address of a server")
        return Endpoint(
            address,
            model,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            max_attempts=self.max_attempts,
            timeout_s=self.timeout,
            temperature=self.temperature,
            extra=json.loads(self.extra),
        )


def is_address(text: str) -> bool:
    """Whether a word of the command line is the address of a server."""
    return text.startswith(("http://", "https://"))


def content_key(*parts: Any) -> str:
    """A hash of settings and inputs: what a stage's file was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return asdict(value)
