"""What `report` returns: which fraction of the neurons was used, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..guard import GuardReport


@dataclass(frozen=True)
class LayerReport:
    """One patched MLP since the patch (or the last reset).

    density: active neurons / f over the governed tokens, NaN if there were none; tokens: positions
    that obeyed the method; dense_tokens: positions that ran with all neurons (prompts, fallbacks,
    padding included); refreshes: sets chosen, one per sequence and prompt; guard: the true CETT and
    recall of what a router chose, where the method has one and its guard is on; added_bytes: memory
    that the method keeps beside the weights; estimated: share of the neurons of which the router's
    own estimate was taken, in governed tokens; share: bytes read per governed token, those of
    added_bytes included, of the dense MLP's weights in the model's dtype.
    """

    index: int
    name: str
    f: int
    density: float
    tokens: int
    dense_tokens: int
    refreshes: int
    guard: GuardReport | None = None
    added_bytes: int = 0
    share: float = math.nan
    estimated: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """The compiled decode step since the patch (or the last reset).

    layers: decoder layers that it runs, 0 where there is none, and reason says why; tokens: decoded
    by it; left: forwards of few tokens behind a cache that went through the layers' own forwards,
    by reason.
    """

    layers: int
    tokens: int
    left: dict[str, int]
    reason: str = ""

    def __str__(self) -> str:
        if not self.layers:
            return f"decode: through the layers' own forwards ({self.reason})"
        line = f"decode: {self.layers} layers in one call, {self.tokens} tokens"
        for reason, count in self.left.items():
            line += f"; {count} forwards not so: {reason}"
        return line


@dataclass(frozen=True)
class BudgetReport:
    """What a model patched with a budget was tuned to.

    budget: nats of KL per token that were allowed; kl, error: on `tokens` tokens of held-out text,
    and its standard error; seconds, dense_seconds: of one token in all MLPs, as predicted from
    measurements on this machine; layers: how many are sparse, since the others gain no time.
    """

    budget: float
    kl: float
    error: float
    tokens: int
    seconds: float
    dense_seconds: float
    layers: int

    def __str__(self) -> str:
        if not self.layers:
            return (
                f"budget: {self.budget:.4g} nats buy no time in any layer here, so that all "
                "neurons are computed"
            )
        return (
            f"budget: KL {self.kl:.4f} +- {self.error:.4f} of {self.budget:.4g} nats on "
            f"{self.tokens} held-out tokens; {self.layers} sparse layers, MLPs predicted "
            f"{self.dense_seconds / self.seconds:.2f}x as fast ({1e3 * self.dense_seconds:.2f} to "
            f"{1e3 * self.seconds:.2f} ms a token)"
        )


@dataclass(frozen=True)
class Report:
    """The patched layers and the method's description; `str()` gives a table.

    projections: linear layers beside the MLPs that run with the project's own GEMV; step: the
    compiled decode step; budget: what it was tuned to, if it was.
    """

    method: str
    layers: tuple[LayerReport, ...]
    projections: int = 0
    step: StepReport = StepReport(0, 0, {}, "not asked for")
    budget: BudgetReport | None = None

    @property
    def density(self) -> float:
        """Realised density: the mean over governed tokens and layers; NaN if there were none."""
        tokens = sum(layer.tokens for layer in self.layers)
        if tokens == 0:
            return math.nan
        used = sum(layer.density * layer.tokens for layer in self.layers if layer.tokens)
        return used / tokens

    @property
    def estimated(self) -> float:
        """Mean share of neurons whose activation was a router's estimate; NaN like `density`."""
        tokens = sum(layer.tokens for layer in self.layers)
        return sum(x.estimated * x.tokens for x in self.layers) / tokens if tokens else math.nan

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    @property
    def cett(self) -> float:
        """Mean of the CETT that guards measured, over tokens and layers; NaN where none did."""
        return self._measured("cett")

    @property
    def recall(self) -> float:
        """Mean of the recall that guards measured, over tokens and layers; NaN where none did."""
        return self._measured("recall")

    @property
    def added_bytes(self) -> int:
        """Memory that the method adds to the model's."""
        return sum(layer.added_bytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Bytes read per governed token, of the dense MLPs' weights; NaN if there were none.

        1 / share is the speed-up of the MLPs at one row if both run at the memory's bandwidth.
        """
        tokens = sum(layer.tokens for layer in self.layers)
        if tokens == 0:
            return math.nan
        return sum(layer.share * layer.tokens for layer in self.layers if layer.tokens) / tokens

    def _measured(self, name: str) -> float:
        guards = [layer.guard for layer in self.layers if layer.guard and layer.guard.tokens]
        tokens = sum(guard.tokens for guard in guards)
        return sum(getattr(g, name) * g.tokens for g in guards) / tokens if tokens else math.nan

    def cost(self) -> str:
        """Memory and the speed that the bytes read allow, in one sentence."""
        most = f"{1 / self.share:.2f}" if self.share else "inf"
        return (
            f"{self.added_bytes / 2**20:.2f} MiB added, {100 * self.share:.1f} % of the MLPs' "
            f"bytes read per token: the MLPs are {most}x as fast where memory is the limit"
        )

    def __str__(self) -> str:
        guarded = not math.isnan(self.cett)
        tiers = any(layer.estimated for layer in self.layers)
        lines = [
            self.method,
            f"{'layer':>5}  {'neurons':>7}  {'density':>7}  "
            + (f"{'estimated':>9}  " if tiers else "")
            + f"{'tokens':>7}  {'dense':>7}  {'refreshes':>9}"
            + (f"  {'CETT':>6}  {'recall':>7}" if guarded else ""),
        ]
        for layer in self.layers:
            line = (
                f"{layer.index:>5}  {layer.f:>7}  {_percent(layer.density):>7}  "
                + (f"{_percent(layer.estimated):>9}  " if tiers else "")
                + f"{layer.tokens:>7}  {layer.dense_tokens:>7}  {layer.refreshes:>9}"
            )
            if guarded and layer.guard is not None:
                line += f"  {layer.guard.cett:>6.3f}  {_percent(layer.guard.recall):>7}"
            lines.append(line)
        mean = f"{'mean':>5}  {'':>7}  {_percent(self.density):>7}"
        if tiers:
            mean += f"  {_percent(self.estimated):>9}"
        if guarded:
            mean += f"{'':>29}  {self.cett:>6.3f}  {_percent(self.recall):>7}"
        lines.append(mean)
        if self.share < 1:
            lines.append(self.cost())
        if self.projections:
            lines.append(f"{self.projections} linear layers beside the MLPs by moyu_ext's own GEMV")
        if self.budget is not None:
            lines.append(str(self.budget))
        lines.append(str(self.step))
        return "\n".join(lines)


def _percent(density: float) -> str:
    return "-" if math.isnan(density) else f"{100 * density:.1f} %"
