"""What a method is: a configuration that, bound to one layer's weights, gives that layer's rule.

A method answers two questions: when its active set is known (`plan`, `level`) and how it is chosen
(the rule). `SparseMLP` asks those and never looks at a method's name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import ArtifactError, ConfigurationError
from ..guard import LayerGuard
from ..models.weights import MlpWeights


@dataclass(frozen=True)
class Compiled:
    """What the compiled decode step needs to run one layer's MLP under a rule, without Python.

    plan: "given" (all neurons, or a set that the sequence has), "gate" or "product" (a threshold
    on the way: scale float32 [f] or None, epsilon float32 [1]) or "shadow" (records and bits of
    gate and up, scale: norms float32 [f], errors float32 [2, f] and epsilon, the price; or epsilon,
    a threshold; or the top k, and how many of the next are estimated: their scores times inverse
    float32 [f]). counts: whether the step counts
    active neurons for the report.
    """

    plan: str
    scale: Tensor | None = None
    epsilon: Tensor | None = None
    records: Tensor | None = None
    bits: tuple[int, int] = (0, 0)
    k: int = 0
    estimated: int = 0
    inverse: Tensor | None = None
    errors: Tensor | None = None
    counts: bool = True


class Tiers(NamedTuple):
    """Which neurons of rows are computed and which estimated, bool [rows, f], and the estimates,
    float32 [rows, f], 0 for all others."""

    exact: Tensor
    estimated: Tensor | None = None
    values: Tensor | None = None


class LayerRule(ABC):  # noqa: B024
    """What the rules of one layer have in common, of whatever level."""

    added_bytes: int = 0
    """What the rule keeps beside the weights and reads at each token: a shadow, a router."""

    def compiled(self) -> Compiled | None:
        """How the compiled decode step runs it; None where it takes Python."""
        return None


class TokenRule(LayerRule):
    """The rule of one layer that judges each token by itself; it keeps no state of sequences."""

    guard: LayerGuard | None = None
    """Measures what the rule drops, where the rule is an estimate."""

    @abstractmethod
    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        """x [rows, d] -> (output [rows, d], active neurons per row int32 [rows], or in tiers [2,
        rows]: computed and estimated), by operator."""

    @abstractmethod
    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        """The same choice in plain PyTorch, for forwards where all neurons are computed anyway.

        x: [rows, d]; gate: act(W_gate x) [rows, f]; product: a(x) [rows, f] (both are a(x) where
        the MLP is ungated), in the model's dtype. Returns bool [rows, f].
        """

    def judge(self, x: Tensor, gate: Tensor, product: Tensor) -> Tiers:
        """`active`, and the rest where the rule estimates some activations."""
        return Tiers(self.active(x, gate, product))

    def chosen(self, x: Tensor, weights: MlpWeights) -> Tensor:
        """The neurons that `apply` computes for x [rows, d], bool [rows, f]: for checks."""
        return self.active(x, *weights.to_float32().activations(x.float()))


class PredictedRule(TokenRule):
    """A rule that names each token's neurons from the MLP's input alone, before the MLP."""

    @abstractmethod
    def choose(self, x: Tensor) -> Tensor:
        """x [rows, d] -> active, bool [rows, f]."""

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        """See `TokenRule`."""
        active = self.choose(x)
        return weights.given(x, *compact(active)), active.sum(-1, dtype=torch.int32)

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        """See `TokenRule`."""
        return self.choose(x)


class SequenceRule(LayerRule):
    """The rule of one layer that fixes one set per sequence from a running sum over its prompt."""

    def compiled(self) -> Compiled | None:
        """See `LayerRule`: the set is the sequence's, and counted where it is chosen."""
        return Compiled("given", counts=False)

    @abstractmethod
    def statistic(self, a: Tensor) -> Tensor:
        """Activations a [n, f] -> what each token adds to the running sum, float32 [n, f], >= 0."""

    @abstractmethod
    def choose(self, running_sum: Tensor, tokens: Tensor | int) -> Tensor:
        """Running sum [..., f] over `tokens` tokens (broadcastable) -> active, bool [..., f]."""


class AdaptiveRule(SequenceRule):
    """The rule of one layer that judges each token in the light of its sequence so far."""

    def compiled(self) -> Compiled | None:
        """See `LayerRule`."""
        return None

    @abstractmethod
    def active(self, x: Tensor, running_sum: Tensor, tokens: Tensor) -> Tensor:
        """x [..., d], running sum [..., f] over `tokens` [..., 1] tokens -> active, bool [..., f].

        The leading axes are broadcastable.
        """

    def choose(self, running_sum: Tensor, tokens: Tensor | int) -> Tensor:
        """All neurons: there is no set that holds for a whole sequence."""
        return torch.ones_like(running_sum, dtype=torch.bool)


Rule = TokenRule | SequenceRule


class Method(ABC):
    """Configuration of a method: a frozen dataclass, checked when it is made.

    `name`: the registry's key. `level`: "none", "token" or "sequence". `prefill`: whether a
    token-level rule also governs the tokens of multi-token forwards. `min_prompt`: tokens a
    sequence-level method wants to see before it chooses. `refresh`: a sequence-level method's every
    so many-th decoded token is computed with all neurons and enters the statistic (None: none).
    """

    name: ClassVar[str]
    level: ClassVar[str]
    prefill = False
    min_prompt = 8
    refresh: int | None = None

    @property
    @abstractmethod
    def plan(self) -> str:
        """When the set is known: "dense", "given", "gate" or "product" (see design, section 2)."""

    @abstractmethod
    def bind(self, index: int, weights: MlpWeights) -> Rule:
        """The rule of layer `index`; called once per layer when the model is patched."""

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:  # noqa: B027
        """Raise ConfigurationError (ArtifactError for another model's thresholds) if the method
        does not fit a model with this many MLPs and this fingerprint of its weights."""


def compact(active: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sets bool [rows, f] -> what the `given` plan takes: the union's indices int32 [f] and count
    int32 [1], and which row uses which, uint8 [rows, f] (None for one row)."""
    mask = None if active.shape[0] == 1 else active.to(torch.uint8)
    values = active[0].float() if mask is None else mask.amax(0).float()
    indices, count = ops.threshold_compact(values, values.new_full((1,), 0.5))
    return indices, count, mask


def check_count(name: str, value: int) -> None:
    """Raise ConfigurationError unless value is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}; expected an integer >= 1")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigurationError unless value is one of `allowed`."""
    if value not in allowed:
        raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def plain(value: Any) -> Any:
    """Numbers and lists of Python for those of numpy and torch; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_density(value: Any) -> float:
    """The density as a number of Python. Raises ConfigurationError unless it is one in (0, 1]."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1:
        raise ConfigurationError(
            f"density is {value!r}; expected a number in (0, 1], the fraction of neurons to keep"
        )
    return number


def epsilons(thresholds: Any) -> list[float]:
    """The thresholds as numbers: one (for every layer) or one per layer.

    `thresholds` is a number, a sequence, 1-D array or tensor of numbers, or an object with
    `.epsilon` (such as `Thresholds`). Raises ConfigurationError for anything else, for NaN and for
    values below 0.
    """
    values = plain(getattr(thresholds, "epsilon", thresholds))
    if isinstance(values, (int, float)):
        values = [values]
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"thresholds is {thresholds!r}; expected Thresholds from calibrate(), a number, or "
            "one number per layer"
        ) from error
    if not numbers:
        raise ConfigurationError("thresholds is empty; expected one number per layer")
    for i, number in enumerate(numbers):
        if math.isnan(number) or number < 0:
            raise ConfigurationError(
                f"epsilon of layer {i} is {number}; expected a number >= 0 (0 keeps every neuron)"
            )
    return numbers


def describe(thresholds: Any) -> str:
    """The thresholds in a few characters, for repr."""
    values = epsilons(thresholds)
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"<{len(values)} layers, {min(values):.4g}..{max(values):.4g}>"


def check_thresholds(
    thresholds: Any, score: str, layers: int, fingerprint: Callable[[], str]
) -> None:
    """Raise ConfigurationError unless the thresholds are for this score and number of layers,
    ArtifactError where they were calibrated on another model."""
    made_for = getattr(thresholds, "score", None)
    if made_for is not None and made_for != score:
        raise ConfigurationError(
            f"thresholds were calibrated for score={made_for!r}, the method uses score={score!r}; "
            "calibrate again with the method that you patch with"
        )
    count = len(epsilons(thresholds))
    per_layer = not isinstance(plain(getattr(thresholds, "epsilon", thresholds)), (int, float))
    if per_layer and count != layers:
        raise ConfigurationError(
            f"thresholds have {count} layers, the model has {layers} MLPs; pass one epsilon per "
            "layer (also when only some layers are patched), or a single number for all"
        )
    expected = getattr(thresholds, "fingerprint", None)
    if isinstance(expected, str) and expected:
        actual = fingerprint()
        if actual != expected:
            raise ArtifactError(
                f"thresholds were calibrated on another model: their fingerprint is {expected}, "
                f"this model's is {actual}; calibrate this model"
            )


def epsilon_of(thresholds: Any, index: int, device: torch.device) -> Tensor:
    """The threshold of layer `index` as float32 [1] on `device`."""
    values = epsilons(thresholds)
    value = values[0] if len(values) == 1 else values[index]
    return torch.tensor([value], dtype=torch.float32, device=device)
