"""The linear layers beside the MLPs (attention's, the head): few rows by the project's own GEMV.

At one row a linear layer is a read of its weight, and the matmuls of torch are built for many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigurationError, PatchStateError
from ..models.families import DTYPES, MlpSite
from ..models.packed import is_packed
from .sparse_mlp import StandIn

# Rows at a time, by device. On an H100 the MLP over all neurons, which has the same loop, was
# faster than cuBLAS up to four rows (1.12x, 1.10x, 1.04x at 1, 2, 4) and slower at eight (0.84x).
ROWS = {"cpu": ops.MAX_ROWS, "cuda": 4}


class Projection(StandIn):
    """A torch.nn.Linear, x [..., k] -> [..., n]: up to ROWS rows by `gather_gemv`.

    The same product with float32 sums; more rows, or a device without the operator, run as before.
    """

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, [..., n]; PatchStateError in training mode."""
        if self.training:
            raise PatchStateError(
                "a patched model only infers, and this linear layer is in training mode; call "
                "model.eval(), or moyu_ext.unpatch(model) to train"
            )
        weight = self.weight
        most = ROWS.get(weight.device.type, 0)
        if (
            not 0 < x.numel() <= most * weight.shape[1]
            or x.dtype != weight.dtype
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return F.linear(x, weight, self.bias)
        out = ops.gather_gemv(x.contiguous(), weight, None, None, self.bias)
        return ops.inference_only(out.to(x.dtype))

    def use_huge_pages(self) -> None:
        """Move the weight to huge pages where the system has them."""
        ops.use_huge_pages(self.weight)


def find_projections(model: nn.Module, sites: list[MlpSite]) -> list[tuple[nn.Module, str]]:
    """(parent, name) of each plain linear layer beside the MLPs `sites`.

    Left out, and so left as they are: subclasses of torch.nn.Linear, layers with a forward of
    their own or accelerate's hooks, and weights that are no contiguous floats in memory (quantised,
    distributed, meta). Raises ConfigurationError where none is left.
    """
    taken = {id(site.linear(name)) for site in sites for name in site.family.linears}
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) not in taken and _is_plain(child)
    ]
    if not found and not is_packed(model):  # packed layers run by our GEMV anyway
        raise ConfigurationError(
            f"projections=True, but {type(model).__name__} has no plain torch.nn.Linear beside its "
            "MLPs (quantised, offloaded or adapted layers are left as they are); leave it out"
        )
    return found


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):
        return False
    if "forward" in module.__dict__:  # somebody's own
        return False
    weight = module.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type in ROWS
        and weight.dtype in DTYPES
        and weight.is_contiguous()
    )
