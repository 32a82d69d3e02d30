"""What a study runs on: models by name, text by domain, sizes, a seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import embedded
from ..calibration.calibrate import calibrate
from ..calibration.thresholds import Thresholds
from ..errors import ConfigurationError
from ..evaluation.corpus import DATA_VARIABLE, SHIPPED, Corpus
from ..models.families import MlpSite, find_mlps
from ..models.fingerprint import fingerprint
from ..models.text import encode, windows
from ..shadow.store import Shadows
from . import written

TWINS = ("stories_silu", "stories_relu")
CETT = 0.2  # the paper's target
_ALL = 1 << 30


@dataclass(frozen=True)
class Subject:
    """A loaded model with what the studies ask of it."""

    name: str
    model: Any
    tokenizer: Any
    sites: list[MlpSite]
    fingerprint: str

    @property
    def activation(self) -> str:
        """Of its MLPs: a key of `reference.ACTIVATIONS`."""
        return self.sites[0].activation

    def describe(self) -> dict[str, Any]:
        """What a result has to say of the model."""
        site = self.sites[0]
        return {
            "activation": self.activation,
            "gated": site.weights().gated,
            "layers": len(self.sites),
            "d": site.d,
            "f": site.f,
            "fingerprint": self.fingerprint,
            "dtype": str(site.weights().dtype).removeprefix("torch."),
        }


@dataclass
class Setting:
    """Where a study reads and how much it does.

    models: names (see `find_model`); none: the study's defaults. data, texts: see `Corpus`; where
    both are missing, the text is that of `written`.
    quick: sizes for a look or a test rather than for a verdict.
    bench: a file of rows from `moyu bench decode --json`, for Table 3.
    """

    models: Sequence[str] = ()
    data: Path | None = None
    texts: Sequence[Path] = ()
    seed: int = 0
    quick: bool = False
    bench: Path | None = None
    log: Callable[[str], None] = lambda text: None
    _loaded: dict[str, Subject] = field(default_factory=dict, repr=False)
    _thresholds: dict[str, Thresholds] = field(default_factory=dict, repr=False)
    _shadows: dict[str, Shadows] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.corpus = Corpus(self.data, self.texts)
        self.data = self.corpus.data

    def describe(self) -> dict[str, Any]:
        """What results have to say of the setting, and depend on; no paths."""
        text = self.corpus.describe() if self.given else f"{SHIPPED}, and text made from a seed"
        digest = self.corpus.digest()
        return {"seed": self.seed, "quick": self.quick, "text": text, "text_digest": digest}

    @property
    def given(self) -> bool:
        """Whether a data folder or files were given."""
        return bool(self.texts) or self.data is not None

    def domains(self) -> list[str]:
        """Names of the domains of text, the main one first."""
        return self.corpus.domains() if self.given else list(written.DOMAINS)

    def documents(self, domain: str | None = None, train: bool = False) -> list[str]:
        """Texts of a domain (the main one by default): to measure on, or with `train` to calibrate
        and train on. Raises ConfigurationError for a domain without text."""
        if self.given:
            return self.corpus.documents(domain, train)
        name = domain or self.domains()[0]
        if name not in written.DOMAINS:
            raise ConfigurationError(
                f"no text of domain {name!r}; at hand: {', '.join(self.domains())}. Pass --text "
                "FILE, or --data DIR"
            )
        return written.documents(name, train, self.size(48, 8), self.seed)

    def need_data(self, what: str) -> Path:
        """The data folder. Raises ConfigurationError that names `what` where there is none."""
        if self.data is None:
            raise ConfigurationError(
                f"{what} is in the data folder: pass --data DIR, or set {DATA_VARIABLE}"
            )
        return self.data

    def size(self, full: int, quick: int) -> int:
        """`full`, or `quick` for a quick look."""
        return quick if self.quick else full

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh generator on the CPU, seeded."""
        return torch.Generator().manual_seed(self.seed + 1000 * offset)

    def names(self) -> list[str]:
        """The models asked for; by default the embedded twins, and stories260K with the data."""
        third = "stories260K"
        there = self.data is not None and (self.data / "models" / third).is_dir()
        return list(self.models) or [*TWINS, *([third] if there else [])]

    def subjects(self) -> Iterator[Subject]:
        """The models of `names`, loaded one by one."""
        for name in self.names():
            yield self.subject(name)

    def subject(self, name: str) -> Subject:
        """One model in float32 on the CPU, in eval mode, loaded once."""
        if name not in self._loaded:
            self.log(f"loading {name}")
            self._loaded[name] = load_subject(find_model(name, self.data))
        return self._loaded[name]

    def rows(
        self,
        subject: Subject,
        length: int,
        count: int,
        domain: str | None = None,
        train: bool = False,
        human: bool = False,
    ) -> Tensor:
        """Ids [count, length] of a domain: first windows of its texts, then second ones, ...

        human: without the texts that models write (see `written`).

        Raises ConfigurationError where the domain has too little text.
        """
        whole: list[list[int]] = []
        shipped = human and not self.given
        documents = embedded.heldout() if shipped else self.documents(domain, train)
        ids: list[list[int]] = []
        for number, text in enumerate(documents, 1):
            ids.append(encode(subject.tokenizer, text))
            if len(ids[-1]) >= length:
                whole.append(ids[-1][:length])
            if len(whole) == count or number == len(documents):
                break
        if len(whole) < count:
            whole = [row for row in windows(ids, _ALL, length) if len(row) == length]
        if len(whole) < count:
            raise ConfigurationError(
                f"domain {domain or self.domains()[0]!r} gives {len(whole)} rows of "
                f"{length} tokens, {count} are needed; pass more text (--text FILE), or --data DIR"
            )
        return torch.tensor(whole[:count])

    def own_shadows(self, subject: Subject) -> Shadows:
        """Of 2 bits, fitted to text that the model writes."""
        if subject.name not in self._shadows:
            self.log(f"fitting shadows to what {subject.name} writes")
            self._shadows[subject.name] = Shadows.fit(
                subject.model, 2, max_tokens=self.size(4096, 512), seed=self.seed, progress=False
            )
        return self._shadows[subject.name]

    def thresholds(self, subject: Subject) -> Thresholds:
        """One epsilon per layer at CETT 0.2, every layer seeing the dense model's activations,
        calibrated on training text of the main domain."""
        if subject.name not in self._thresholds:
            self.log(f"calibrating {subject.name}")
            self._thresholds[subject.name] = calibrate(
                subject.model,
                subject.tokenizer,
                self.documents(train=True),
                cett=CETT,
                sequential=False,
                progress=False,
                max_tokens=self.size(4096, 512),
            )
        return self._thresholds[subject.name]


def find_model(name: str, data: Path | None = None) -> str:
    """What transformers loads for a name: an embedded model, `models/<name>` of the data folder, a
    directory, or a hub id (the name itself)."""
    if name in embedded.names():
        return str(embedded.path(name))
    if data is not None and (data / "models" / name / "config.json").is_file():
        return str(data / "models" / name)
    return name


def load_subject(path: str) -> Subject:
    """A model and its tokenizer in float32 on the CPU, in eval mode.

    Raises ConfigurationError where that is nothing that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers, safetensors, tokenizers: each has its own family
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigurationError(
            f"cannot load a model from {path!r} ({type(error).__name__}: {reason}); expected a "
            f"name of an embedded model ({', '.join(TWINS)}), a Hugging Face directory, or a hub id"
        ) from error
    model.eval()
    return subject_of(os.path.basename(os.path.normpath(path)), model, tokenizer)


def subject_of(name: str, model: nn.Module, tokenizer: Any) -> Subject:
    """A model that is loaded already."""
    return Subject(name, model, tokenizer, find_mlps(model), fingerprint(model))
