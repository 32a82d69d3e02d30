"""What the compiled decode step asks of a patch: each MLP's plan, and whether it may run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..methods.base import Compiled, Method, TokenRule
from ..models.families import MlpSite
from ..models.weights import MlpWeights
from .passes import Context
from .sparse_mlp import SparseMLP


class PatchedMlps:
    """The MLPs of a patched model, see `decoding.step.Governor`."""

    def __init__(
        self, sites: Sequence[MlpSite], mlps: Sequence[SparseMLP], method: Method, context: Context
    ) -> None:
        self.sites = sites
        self.by_index = {mlp.site.index: mlp for mlp in mlps}
        self.method = method
        self.context = context

    def plan(self, index: int) -> tuple[Compiled, MlpWeights, Tensor, Tensor, Tensor] | None:
        """See `Governor`."""
        mlp = self.by_index.get(index)
        plan = None if mlp is None else mlp.rule.compiled()
        if mlp is None or plan is None:
            return None
        weights = mlp.weights if mlp.weights is not None else mlp.read_weights()
        return plan, weights, mlp.active, mlp.estimated, mlp.tokens

    def module(self, index: int) -> Any:
        """See `Governor`."""
        return self.sites[index].module

    def ready(self, rows: int) -> bool | None:
        """See `Governor`."""
        current = self.context.current
        if current is None or current.govern is not None or self.context.scoring:
            return None
        if not (current.decode or self.method.prefill):
            return None
        guards = []
        for mlp in self.by_index.values():
            if mlp.training:
                return None  # the MLP says what is wrong
            guard = getattr(mlp.rule, "guard", None)
            if guard is not None:
                guards.append(guard)
        if not all(guard.waits(rows) for guard in guards):
            return False
        for guard in guards:
            guard.pass_by(rows)
        return True

    def sets(self) -> tuple[list[tuple[int, int, int]], list[Tensor]] | None:
        """See `Governor`."""
        current = self.context.current
        if current is None or current.state is None:
            return None
        found, keep = [(0, 0, 0)] * len(self.sites), []
        for index, mlp in self.by_index.items():
            if isinstance(mlp.rule, TokenRule):
                continue
            layer = current.state.layers[mlp.slot]
            mask = 0
            if current.batch > 1:
                rows = layer.mask
                if current.length > 1:
                    rows = rows.repeat_interleave(current.length, 0)
                    keep.append(rows)
                mask = rows.data_ptr()
            found[index] = (layer.indices.data_ptr(), layer.count.data_ptr(), mask)
        return found, keep
