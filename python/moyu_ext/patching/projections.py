"""The linear layers beside the MLPs (attention's, the head): few rows by the project's own GEMV.

At one row a linear layer is a read of its weight, and the matmuls of torch are built for many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigurationError, PatchStateError
from .families import DTYPES, MlpSite
from .sparse_mlp import StandIn, inference_only

DEVICES = ("cpu", "cuda")


class Projection(StandIn):
    """A torch.nn.Linear, x [..., k] -> [..., n]: up to ops.MAX_ROWS rows by `gather_gemv`.

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
        few = 0 < x.numel() <= ops.MAX_ROWS * weight.shape[1]
        if (
            not few
            or x.dtype != weight.dtype
            or weight.device.type not in DEVICES
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return F.linear(x, weight, self.bias)
        out = ops.gather_gemv(x.contiguous(), weight, None, None, self.bias)
        return inference_only(out.to(x.dtype))

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
    if not found:
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
        and weight.device.type in DEVICES
        and weight.dtype in DTYPES
        and weight.is_contiguous()
    )
