"""Which router a 3-bit copy of gate and up makes: KL with the dense model, by rule and rounding.

    python benchmarks/router_quality.py MODEL TEXT FIT_TEXT [--csv FILE] [--only NAME ...]

The copy ("shadow") gives estimates g^, u^ and a^ = act(g^) u^. Of the neurons, a share `exact` is
computed exactly, a share `estimated` contributes a^ times its exact row of down, the others
nothing: exact + estimated / 3 of the weights are read. Windows and columns are packed_quality.py's,
but in one float32 forward without kernels: columns before the scored ones are dense, in the others
every layer follows the rule. Shadows are fitted to dense inputs on FIT_TEXT.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from moyu_ext.packing.rounding import quantise
from moyu_ext.packing.rows import Format
from moyu_ext.shadow import build, feedback
from moyu_ext.shadow.reference import round_input
from packed_quality import COLUMNS as PACKED_COLUMNS
from packed_quality import CONTEXT, SCORED, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

COLUMNS = ("model", "text", "variant", "bits_a_weight", "exact", "estimated", *PACKED_COLUMNS[6:])
FIRST = CONTEXT - 1  # the column whose logits judge the first scored token
SKIPPED = 16  # the first inputs of a fit window are like no others (attention sinks)
FACTOR_TOKENS = 640  # for prices and corrections: few parameters, and they are slow
READ: list[tuple[float, float]] = []  # shares exact and estimated, by forward and layer
BEST = "threshold per neuron"


@dataclass(frozen=True)
class Variant:
    choose: str = "size"  # how tiers are filled, see `Router.tiers`
    correct: str = ""  # what is fitted to the estimated tier, see `Router.correct`
    bits: tuple[int, int] = (3, 3)  # of gate and up
    group: int = 256
    nested: bool = False  # the shadow is the high 3 bits of 6-bit packed codes


VARIANTS = {
    "base": Variant(),
    "error": Variant("error"),
    "threshold": Variant("threshold"),
    BEST: Variant(BEST),
    "bias": Variant(correct="bias"),
    "factor per neuron": Variant(correct="factor"),
    "gate 4 up 2": Variant(bits=(4, 2)),
    "gate 2 up 4": Variant(bits=(2, 4)),
    "2 bits in 64": Variant(bits=(2, 2), group=64),
    f"2 bits in 64, {BEST}": Variant(BEST, bits=(2, 2), group=64),
    "groups of 128": Variant(group=128),
    "nested in 6 bits": Variant(group=32, nested=True),
    f"nested, {BEST}": Variant(BEST, group=32, nested=True),
}


class Mlp:
    """The weights of a gated MLP in float32, its inputs on the fit text, and its router."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.gate, self.up = module.gate_proj.weight, module.up_proj.weight
        self.down_t = module.down_proj.weight.t().contiguous()
        self.weight = self.down_t.square().sum(1)
        (self.f, self.d), self.act = self.up.shape, module.act_fn
        self.inputs: list[Tensor] = []
        self.router: Router | None = None
        self.shadow: tuple = (None,)  # how it is rounded, W^ of gate, W^ of up
        module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """x [windows, columns, d]; without a router dense, and its inputs are kept."""
        a = self.act(x @ self.gate.t()).mul_(x @ self.up.t())
        if self.router is None:
            self.inputs.append(x[:, SKIPPED:].flatten(0, 1))
            return a @ self.down_t
        ruled = self.router.output(x[:, FIRST:].flatten(0, 1), a[:, FIRST:].flatten(0, 1))
        return torch.cat([a[:, :FIRST] @ self.down_t, ruled.view(len(x), -1, self.d)], 1)


def rounded_to(w: Tensor, bits: int, v: Variant, order: Tensor, factor: Tensor) -> Tensor:
    """W^: what `feedback.quantise_for` would give for groups of any size."""
    (f, d), top = w.shape, 2**bits - 1
    if v.nested:  # each high code in the middle of the eight codes that share it
        codes = quantise(w, Format(6, v.group))
        value = (codes.codes.view(f, -1, v.group) >> 3).float() * 8 + 3.5
        value = value * codes.scales.float()[..., None] + codes.offsets.float()[..., None]
        return value.flatten(1)[:, :d]
    real = (torch.arange(d + -d % v.group) < d).view(-1, v.group)
    scale = build._fit(F.pad(w, (0, -d % v.group)).view(f, -1, v.group), bits, real)[1].float()
    step = (feedback._WIDEN * scale).bfloat16().float().repeat_interleave(v.group, 1)[:, :d]
    code = torch.empty_like(w)
    code[:, order] = feedback._round(w.t()[order], step.t()[order], factor, top).t()
    return (code - top / 2) * step


class Router:
    """The rule of one layer, with everything that is fitted at one point."""

    def __init__(self, mlp: Mlp, v: Variant, exact: float, estimated: float) -> None:
        self.mlp, self.v, x = mlp, v, mlp.inputs[0]
        self.k_exact, self.k_both = round(exact * mlp.f), round((exact + estimated) * mlp.f)
        moment = feedback.damped_moment(x)  # as if the mean of x^2 were 1
        rounding = (v.bits, v.group, v.nested)
        if mlp.shadow[0] != rounding:  # slow, and the same for many routers
            inputs, pair = feedback.elimination(moment), (mlp.gate, mlp.up)
            rounded = [rounded_to(w, b, v, *inputs) for w, b in zip(pair, v.bits, strict=True)]
            mlp.shadow = (rounding, *rounded)
        self.gate, self.up = mlp.shadow[1:]
        self.spread = []  # the mean squares of g^ - g and u^ - u
        for error in (self.gate - mlp.gate, self.up - mlp.up):
            each = (error @ moment * error).sum(1) * x.square().mean()
            # One per neuron in 8 bits: a few per cent do not matter to a choice.
            own = (each / each.mean()).to(torch.float8_e4m3fn).float()
            self.spread.append(each.mean() * (own if "neuron" in v.choose else 1))
        self.factor, self.bias, self.price = torch.ones(()), torch.zeros(()), None
        x = x[:: max(1, len(x) // FACTOR_TOKENS)]
        if v.choose.startswith("threshold"):
            first, full = worth(*self.gains(x)[1:])
            rows = torch.cat([first, full, full]).flatten()
            self.price = rows.kthvalue(round((1 - exact - estimated / 3) * len(rows)) + 1).values
        if v.correct:
            self.correct(x)

    def gains(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a^ of x [rows, d], and of each neuron the squared size s and squared error e expected of
        what it adds to the output: s = (a^ c)^2, e = ((act'(g^) u^ dg)^2 + (act(g^) du)^2) c^2,
        c the norm of its row of down, dg^2 and du^2 from `spread`."""
        rounded, act = round_input(x), self.mlp.act
        g, u = rounded @ self.gate.t(), rounded @ self.up.t()
        active = act(g)
        slope = (act(g + 0.01) - active) / 0.01
        error = (slope * u).square_().mul_(self.spread[0])
        error = error.add_(active.square() * self.spread[1]).mul_(self.mlp.weight)
        estimate = active * u
        return estimate, estimate.square() * self.mlp.weight, error

    def tiers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a^, and who is exact and who estimated of x [rows, d]. "size": the largest s are exact,
        the next ones estimated. "error": the largest e are exact. "threshold": each row of weights
        is read that is worth the price, which makes the share read the same over the fit text."""
        estimate, size, error = self.gains(x)
        if self.price is not None:
            first, full = worth(size, error)
            return estimate, full >= self.price, (first >= self.price) & (full < self.price)
        score = size if self.v.choose == "size" else error
        exact = score >= score.topk(self.k_exact).values[:, -1:]
        rest = size.masked_fill(exact, math.inf)
        return estimate, exact, (rest >= rest.topk(self.k_both).values[:, -1:]) & ~exact

    def output(self, x: Tensor, a: Tensor) -> Tensor:
        """Of x [rows, d], whose exact activations are a [rows, f]."""
        estimate, exact, estimated = self.tiers(x)
        READ.append((exact.float().mean().item(), estimated.float().mean().item()))
        value = torch.where(exact, a, estimate * estimated * self.factor)
        return value @ self.mlp.down_t + self.bias

    def correct(self, x: Tensor) -> None:
        """Fit a bias to the mean of what the output lacks, or a factor of each neuron's estimates
        by least squares over the tokens where it is in that tier."""
        a = self.mlp.act(x @ self.mlp.gate.t()) * (x @ self.mlp.up.t())
        estimate, exact, estimated = self.tiers(x)
        estimate = estimate * estimated
        if self.v.correct == "bias":
            self.bias = torch.where(exact, 0, a - estimate).mean(0) @ self.mlp.down_t
        else:
            with_a, square = (estimate * a).sum(0), estimate.square().sum(0)
            prior = 0.05 * square.mean()  # neurons that were seldom in the tier keep to 1
            self.factor = (with_a + prior) / (square + prior)


def worth(size: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Error avoided per row of weights: an estimate saves s for one row, an exact value e more for
    two rows more, or s + e for all three where that is more a row."""
    at_once, together = error > 2 * size, (size + error) / 3
    return torch.where(at_once, together, size), torch.where(at_once, together, error / 2)


def bits_a_weight(v: Variant, f: int, d: int) -> float:
    """Codes, scales (offsets too where nested), corrections in 16 bits and spreads in 8."""
    scales = 16 * (2 if v.nested else 1) * math.ceil(d / v.group) / d
    numbers = {"factor": f, "bias": d}.get(v.correct, 0) + (f if "neuron" in v.choose else 0)
    return sum(v.bits) / 2 + scales + 16 * numbers / (2 * f * d)


def logits(model, ids: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of each window's scored tokens, [SCORED, vocabulary]."""
    for some in ids[:, :-1].split(6):
        for state in model.model(input_ids=some, use_cache=False)[0][:, FIRST:]:
            yield model.lm_head(state).log_softmax(-1)


def compare(p: Tensor, q: Tensor, target: Tensor) -> list[float]:
    """Of a window: mean KL, agreement, and mean log-likelihoods."""
    kl, same = (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)
    likely = [t.gather(-1, target[:, None]) for t in (p, q)]
    return [float(t.float().mean()) for t in (kl, same, *likely)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "text", "fit_text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--csv", type=Path, default="/dev/stdout", help="rows are appended")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192, help="of FIT_TEXT")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--points", nargs="+", default=["0.4,0.3", "0.2,0.4"])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.set_grad_enabled(False)
    ids = windows(tokenizer, args.text.read_text(), args.windows)
    mlps = [Mlp(layer.mlp) for layer in model.model.layers]
    fit = windows(tokenizer, args.fit_text.read_text(), args.tokens // (CONTEXT + SCORED))
    for rows in fit.split(8):
        model.model(input_ids=rows, use_cache=False)
    for mlp in mlps:
        mlp.inputs = [torch.cat(mlp.inputs)]
    dense = list(logits(model, ids))
    writer = csv.writer(args.csv.open("a", buffering=1), lineterminator="\n")
    if args.csv.stat().st_size == 0:
        writer.writerow(COLUMNS)
    for name in args.only:
        for point in args.points:
            for mlp in mlps:
                mlp.router = Router(mlp, VARIANTS[name], *map(float, point.split(",")))
            READ.clear()
            windowed = zip(dense, logits(model, ids), ids[:, CONTEXT:], strict=True)
            scores = numpy.array([compare(*window) for window in windowed])
            draws = numpy.random.default_rng(0).integers(0, len(scores), (2000, len(scores)))
            interval = numpy.quantile(scores[draws, 0].mean(1), [0.025, 0.975])
            kl, agreement, before, after = scores.mean(0)
            shares = (bits_a_weight(VARIANTS[name], mlps[0].f, mlps[0].d), *numpy.mean(READ, 0))
            found = (kl, *interval, agreement, numpy.exp(before - after) - 1)
            row = [args.model.name, args.text.name, name, *(f"{x:.3f}" for x in shares)]
            row += [len(ids), len(ids) * SCORED, *(f"{x:.5f}" for x in found)]
            writer.writerow(row)


if __name__ == "__main__":
    main()
