"""How a method's next-token distributions differ from the dense model's, token by token.

The sensitive measure of quality: where a small model's task accuracy is at chance, the divergence
from dense still orders methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import continuation
from ..errors import ConfigurationError
from ..methods.base import Method
from ..models.text import device
from ..patching.patch import patch, report, unpatch


@dataclass(frozen=True)
class Comparison:
    """A method against dense on continuations; tensors are per text, float64 [rows].

    loss, dense_loss: mean negative log likelihood (nats); agreement: see `agreement`; kl: mean
    KL(dense || method) in nats; density: realised; share: bytes read per token, of the dense MLPs'
    (see `Report`).
    """

    loss: Tensor
    dense_loss: Tensor
    agreement: Tensor
    kl: Tensor
    density: float
    share: float

    @property
    def perplexity(self) -> float:
        """Of all texts under the method."""
        return _exp(self.loss)

    @property
    def dense_perplexity(self) -> float:
        """Of all texts under the dense model."""
        return _exp(self.dense_loss)

    @property
    def change(self) -> float:
        """Relative change of perplexity, 0.05 for 5 % worse."""
        return math.expm1((self.loss.mean() - self.dense_loss.mean()).item())


def _exp(losses: Tensor) -> float:
    loss = losses.mean().item()
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def patched(model: Any, method: Method | None) -> Iterator[None]:
    """Within the block the model is patched (not for None), afterwards it is as it was."""
    if method is None:
        yield
        return
    patch(model, method)
    try:
        yield
    finally:
        unpatch(model)


def continuation_logits(model: Any, rows: Tensor, context: int) -> Tensor:
    """Logits that predict columns `context`... of rows [n, length], as generation would have them:
    float32 [n, length - context, vocabulary] on the CPU. The model may be patched or not."""
    parts = continuation.split_rows(rows)
    return torch.cat(
        [continuation.continuation_logits(model, part, context).cpu() for part in parts]
    )


def choices(model: Any, rows: Tensor, context: int) -> Tensor:
    """The likeliest token for each of the columns `context`... of rows [n, length], given those
    before it: int64 [n, length - context]. The model may be patched or not."""
    return continuation_logits(model, rows, context).argmax(-1)


def agreement(ours: Tensor, dense: Tensor) -> Tensor:
    """Share of positions where a method's likeliest token is dense's: choices [n, m] -> [n].

    The first position is left out: the prompt decides it, which is dense under every method. NaN
    where there is no other.
    """
    return (ours == dense)[:, 1:].double().mean(1)


def compare(
    model: nn.Module, method: Method, rows: Tensor, context: int, dense: Tensor | None = None
) -> Comparison:
    """Score the columns behind `context` of rows [n, length] dense and under the method.

    The first of them is predicted by the prompt's last token, dense, as in `generate`. dense: the
    model's own `continuation_logits`, where they are at hand; without them they are computed.
    The model comes unpatched and is left so.

    Raises ConfigurationError for a context that leaves nothing to score.
    """
    if not 1 <= context < rows.shape[1]:
        raise ConfigurationError(
            f"context is {context}; expected between 1 and {rows.shape[1] - 1}, so that rows of "
            f"{rows.shape[1]} tokens have something to score"
        )
    if dense is None:
        dense = continuation_logits(model, rows, context)
    with patched(model, method):
        ours = continuation_logits(model, rows, context)
        used = report(model)
    return from_logits(dense, ours, rows[:, context:].cpu(), used.density, used.share)


def from_logits(
    dense: Tensor, ours: Tensor, targets: Tensor, density: float, share: float
) -> Comparison:
    """The comparison from logits [n, m, vocabulary] that predict targets [n, m]."""
    reference, found = dense.log_softmax(-1), ours.log_softmax(-1)
    kl = F.kl_div(found, reference, reduction="none", log_target=True).sum(-1)
    return Comparison(
        loss=_nll(found, targets),
        dense_loss=_nll(reference, targets),
        agreement=agreement(ours.argmax(-1), dense.argmax(-1)),
        kl=kl.double().mean(1),
        density=density,
        share=share,
    )


def _nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().mean(1)


def dense_text(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """Prompts [n, p] continued greedily by the dense model: [n, p + new_tokens].

    Compared on this text, `agreement` is the share of generated tokens that the method would have
    generated too. The end-of-text token is not a stop, so that all rows are of one length.
    """
    place = device(model)
    with torch.no_grad():
        out: Tensor = model.generate(
            input_ids=prompts.to(place),
            attention_mask=torch.ones_like(prompts, device=place),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
    return out.cpu()
