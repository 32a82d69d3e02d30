"""Why activations shrink in training: the paper's equations 1-6, tested.

A last layer f = V a with activations a, cross entropy l(f, y) and y independent of V. Equation 4:

    dl/da_i = <softmax(V a), v_i> - <v_i, y>

Claimed: for a_i > 0 its expectation over V is positive, less so with SwiGLU than with ReLU, and
"thus causes sparsity". For entries of V that are N(0, s^2) integration by parts gives more:

    E[dl/da_i] = s^2 a_i E[1 - sum_m softmax_m(V a)^2]

so the expected pull is towards zero from either side, in proportion to a_i, whatever function made
a_i. The study checks both, breaks each assumption in turn, and measures real models, untrained and
trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.statistics import Interval, mean_interval
from .activation_gradients import of_models
from .report import Report
from .setting import Setting

CLASSES = 32
NEURONS = 16
SCALE = 0.5  # standard deviation of the entries of V
LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # values of the activation looked at
_BATCH = 20_000


def closed_form(v: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """Equation 4 for every neuron. v [n, K, f], a [n, f], y [n, K] -> [n, f]."""
    p = torch.softmax(torch.einsum("nkf,nf->nk", v, a), -1)
    return torch.einsum("nkf,nk->nf", v, p - y)


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    _identities(setting, report)
    _expectation(setting, report)
    _activation_functions(setting, report)
    _broken(setting, report)
    of_models(setting, report)


def _identities(setting: Setting, report: Report) -> None:
    """Equation 4 against autograd in float64, for both readings of p; equation 6 by quadrature."""
    g = setting.generator(1)
    n = 200
    v = torch.randn(n, CLASSES, NEURONS, generator=g, dtype=torch.float64) * SCALE
    y = torch.softmax(torch.randn(n, CLASSES, generator=g, dtype=torch.float64), -1)
    p = torch.randn(n, NEURONS, generator=g, dtype=torch.float64).abs().requires_grad_()
    up = torch.randn(n, NEURONS, generator=g, dtype=torch.float64).abs()
    errors: dict[str, float] = {}
    for name, act in (
        ("activation", lambda p: p),
        ("relu", F.relu),
        ("silu", F.silu),
        ("swiglu", lambda p: F.silu(p) * up),
    ):
        a = act(p)
        logits = torch.einsum("nkf,nf->nk", v, a)
        loss = -(y * torch.log_softmax(logits, -1)).sum()
        (auto,) = torch.autograd.grad(loss, p)
        form = closed_form(v, a.detach(), y)
        errors[name] = ((auto - form).norm() / auto.norm()).item()
    report.numbers["equation_4_relative_error"] = errors
    exact = max(errors["activation"], errors["relu"]) < 1e-12
    report.claim(
        "eq. 2-4",
        "the gradient of cross entropy for a positive activation is <softmax, v_i> - <v_i, y>",
        f"relative error against autograd in float64: {errors['relu']:.1e} for ReLU; "
        f"{errors['silu']:.2f} for Swish and {errors['swiglu']:.2f} for SwiGLU if p is what enters "
        f"them, {errors['activation']:.1e} if p is what leaves them",
        "holds only if" if exact else "fails",
        "p is the activation itself: eq. 2 drops the factor sigma'(p), which is 1 for ReLU alone",
    )
    # Equation 6 for one Gaussian weight: both sides, and the growth in p that the text relies on.
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    w = SCALE * x
    sides = []
    for level in (0.0, *LEVELS):
        left = w * torch.exp(level * w) / (torch.exp(level * w) + CLASSES - 1)
        right = w / (1 + (CLASSES - 1) * torch.exp(-level * w))
        sides.append([torch.trapezoid(s * density, x).item() for s in (left, right)])
    gap = max(abs(a - b) for a, b in sides)
    values = [b for _, b in sides]
    grows = all(b > a for a, b in itertools.pairwise(values))
    report.numbers["equation_6"] = {"p": [0.0, *LEVELS], "value": values, "gap_of_sides": gap}
    report.claim(
        "eq. 6",
        "the first term's expectation is zero at p = 0 and grows with p",
        f"sides differ by {gap:.1e}; {values[0]:.1e} at p = 0, {values[-1]:.3f} at p = 4, "
        f"{'growing throughout' if grows else 'not growing throughout'}. What grows is the "
        "gradient; the text says the loss",
        "holds" if grows and gap < 1e-12 else "fails",
    )


@dataclass(frozen=True)
class Case:
    """One set of assumptions: how V [n, K, f], a [n, f] and y [n, K] are drawn; neuron 0 is the
    one looked at."""

    name: str
    breaks: str
    v: Callable[[int, torch.Generator], Tensor]
    a: Callable[[int, torch.Generator], Tensor]
    y: Callable[[Tensor, Tensor, torch.Generator], Tensor]


def gaussian(n: int, g: torch.Generator) -> Tensor:
    """V as assumed."""
    return torch.randn(n, CLASSES, NEURONS, generator=g, dtype=torch.float64) * SCALE


def positive(level: float) -> Callable[[int, torch.Generator], Tensor]:
    """Activations max(0, N(0, 1)), neuron 0 at `level`."""

    def draw(n: int, g: torch.Generator) -> Tensor:
        a = torch.randn(n, NEURONS, generator=g, dtype=torch.float64).clamp_min(0)
        a[:, 0] = level
        return a

    return draw


def random_class(v: Tensor, a: Tensor, g: torch.Generator) -> Tensor:
    """One-hot y, independent of V."""
    classes = torch.randint(CLASSES, (len(v),), generator=g)
    return F.one_hot(classes, CLASSES).double()


def expected_gradient(case: Case, samples: int, g: torch.Generator) -> tuple[Interval, float]:
    """E[dl/da_0] with its 99 % interval, and E[1 - sum softmax^2]."""
    grads, spread = [], []
    for start in range(0, samples, _BATCH):
        n = min(_BATCH, samples - start)
        v = case.v(n, g)
        a = case.a(n, g)
        y = case.y(v, a, g)
        p = torch.softmax(torch.einsum("nkf,nf->nk", v, a), -1)
        grads.append(torch.einsum("nk,nk->n", v[:, :, 0], p - y))
        spread.append(1 - p.square().sum(-1))
    return mean_interval(torch.cat(grads)), torch.cat(spread).mean().item()


def _expectation(setting: Setting, report: Report) -> None:
    samples = setting.size(100_000, 20_000)
    rows, measured, theory = [], [], []
    for i, level in enumerate((-1.0, *LEVELS)):
        case = Case("", "", gaussian, positive(level), random_class)
        interval, spread = expected_gradient(case, samples, setting.generator(10 + i))
        predicted = SCALE**2 * level * spread
        rows.append([level, interval.mean, f"[{interval.low:.4f}, {interval.high:.4f}]", predicted])
        measured.append(interval)
        theory.append(predicted)
    report.table(
        "Expected gradient of an activation under the paper's assumptions",
        ["activation a_i", "E[dl/da_i]", "99 % interval", "s^2 a_i E[1 - |softmax|^2]"],
        rows,
        f"{samples} draws of V ~ N(0, {SCALE}^2), {CLASSES} classes, {NEURONS} neurons.",
    )
    report.numbers["expected_gradient"] = [
        {"a": level, "mean": m.mean, "low": m.low, "high": m.high, "theory": t}
        for level, m, t in zip((-1.0, *LEVELS), measured, theory, strict=True)
    ]
    inside = sum(m.low <= t <= m.high for m, t in zip(measured, theory, strict=True))
    good = all(m.sign > 0 for m in measured[1:])
    report.claim(
        "eq. 4-6",
        "for a positive activation the expected gradient is positive",
        f"E > 0 at all of a = {LEVELS[0]}...{LEVELS[-1]} (99 % intervals), as large as "
        f"integration by parts says ({inside} of {len(theory)} inside the interval). At a = -1 it "
        f"is {measured[0].mean:.3f}: negative values are pulled up as strongly",
        "holds" if good else "fails",
    )
    with report.figure("expected", "Expected gradient against the activation's value") as figure:
        ax = figure.subplots()
        x = [-1.0, *LEVELS]
        ax.errorbar(
            x,
            [m.mean for m in measured],
            [m.mean - m.low for m in measured],
            fmt="o",
            label="measured, 99 % interval",
        )
        ax.plot(x, theory, label="s² a E[1 - |softmax|²]")
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set_xlabel("activation")
        ax.set_ylabel("E[gradient]")
        ax.legend()


def _activation_functions(setting: Setting, report: Report) -> None:
    """p0 = Swish(x theta)(x tau) against p1 = ReLU(x theta): x theta and x tau non-negative, as
    assumed, at several scales of x tau, and then of either sign."""
    samples = setting.size(40_000, 2_000)
    rows: list[tuple[float | str, float, str, str, float]] = []
    signs: list[int] = []
    scales: tuple[float | str, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, "1, either sign")
    for i, scale in enumerate(scales):
        g = setting.generator(30 + i)
        gate = torch.randn(samples, NEURONS, generator=g, dtype=torch.float64)
        up = torch.randn(samples, NEURONS, generator=g, dtype=torch.float64)
        if isinstance(scale, float):
            gate, up = gate.abs(), up.abs() * scale
        swiglu = F.silu(gate) * up
        gate = F.relu(gate)
        below = (swiglu < gate).double().mean().item()
        grads = []
        for a in (gate, swiglu):
            at = torch.zeros(samples, dtype=torch.float64)
            for start in range(0, samples, _BATCH):
                part = a[start : start + _BATCH]
                v = gaussian(len(part), g)
                at[start : start + _BATCH] = closed_form(v, part, random_class(v, part, g)).mean(-1)
            grads.append(mean_interval(at))
        ratio = grads[1].mean / grads[0].mean
        rows.append((scale, below, str(grads[0]), str(grads[1]), ratio))
        signs = [m.sign for m in grads]
    report.table(
        "ReLU against SwiGLU: non-negative features, then features of either sign",
        ["scale of x tau", "share with p0 < p1", "E grad ReLU", "E grad SwiGLU", "ratio"],
        rows,
    )
    report.numbers["relu_against_swiglu"] = [
        {"scale": r[0], "share_below": r[1], "ratio": r[4]} for r in rows
    ]
    *rows, last = rows
    report.claim(
        "eq. 5 (no negative features)",
        "without the assumption that features are not negative, activations still shrink",
        f"features of either sign: E grad over all neurons is {last[2]} for ReLU and {last[3]} for "
        "SwiGLU, whose activations are as often negative as positive, so that the mean cannot "
        "shrink; each one's size still does, as the table of expected gradients shows",
        "holds" if signs == [1, 1] else "holds only if" if signs[0] > 0 else "fails",
        "the activation is ReLU (in the mean over neurons)"
        if signs == [1, 0]
        else ""
        if signs == [1, 1] or signs[0] <= 0
        else "the activation is ReLU",
    )
    report.claim(
        "eq. 5-6",
        "p0 = Swish(x theta)(x tau) < p1 = ReLU(x theta), so SwiGLU's expected gradient is smaller",
        f"p0 < p1 for {100 * rows[2][1]:.0f} % of neurons where x tau has scale 1 and for "
        f"{100 * rows[-1][1]:.0f} % at scale 4; expected gradient of SwiGLU over ReLU's: "
        + ", ".join(f"{r[4]:.2f} at {r[0]}" for r in rows),
        _smaller([r[4] for r in rows]),
        "sigmoid(x theta) * (x tau) < 1, which nothing in the derivation bounds",
    )


def _smaller(ratios: list[float]) -> str:
    """The verdict on SwiGLU's gradients being smaller, from those over ReLU's at each scale."""
    smaller = [ratio < 1 for ratio in ratios]
    return "holds" if all(smaller) else "holds only if" if any(smaller) else "fails"


def _calibrated(v: Tensor, a: Tensor, g: torch.Generator) -> Tensor:
    p = torch.softmax(torch.einsum("nkf,nf->nk", v, a), -1)
    return F.one_hot(torch.multinomial(p, 1, generator=g).squeeze(1), CLASSES).double()


def _arg_max(v: Tensor, a: Tensor, g: torch.Generator) -> Tensor:
    return F.one_hot(torch.einsum("nkf,nf->nk", v, a).argmax(-1), CLASSES).double()


def _first_class(v: Tensor, a: Tensor, g: torch.Generator) -> Tensor:
    return F.one_hot(torch.zeros(len(v), dtype=torch.long), CLASSES).double()


def _with_class_means(n: int, g: torch.Generator) -> Tensor:
    means = torch.zeros(CLASSES, 1, dtype=torch.float64)
    means[0] = 1.0
    return gaussian(n, g) + means


def _opposed(n: int, g: torch.Generator) -> Tensor:
    v = gaussian(n, g)
    v[:, :, 1] = -v[:, :, 0]
    return v


def _with_stronger_opponent(n: int, g: torch.Generator) -> Tensor:
    a = positive(1.0)(n, g)
    a[:, 1] = 2.0
    return a


def _scaled(draw: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> Callable[..., Tensor]:
    return lambda n, g: SCALE * draw((n, CLASSES, NEURONS), g)


def _uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=g, dtype=torch.float64) - 0.5) * 12**0.5


def _skewed(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).exponential_(generator=g) - 1


def _two_values(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=g).double() * 2 - 1


CASES = (
    Case("as assumed", "nothing", gaussian, positive(1.0), random_class),
    Case("uniform V", "nothing", _scaled(_uniform), positive(1.0), random_class),
    Case("skewed V", "nothing", _scaled(_skewed), positive(1.0), random_class),
    Case("V of +-s", "nothing", _scaled(_two_values), positive(1.0), random_class),
    Case(
        "mean 1 for all of V",
        "E[V] = 0",
        lambda n, g: gaussian(n, g) + 1,
        positive(1.0),
        random_class,
    ),
    Case("mean 1 for one class, any y", "E[V] = 0", _with_class_means, positive(1.0), random_class),
    Case("mean 1 for the true class", "E[V] = 0", _with_class_means, positive(1.0), _first_class),
    Case("y drawn from the model", "y independent of V", gaussian, positive(1.0), _calibrated),
    Case("y = the model's first choice", "y independent of V", gaussian, positive(1.0), _arg_max),
    Case("a_i = -1", "no negative features", gaussian, positive(-1.0), random_class),
    Case(
        "v_j = -v_i with a_j = 2 a_i",
        "independent entries",
        _opposed,
        _with_stronger_opponent,
        random_class,
    ),
)


def _broken(setting: Setting, report: Report) -> None:
    samples = setting.size(100_000, 5_000)
    rows, signs = [], {}
    for i, case in enumerate(CASES):
        interval, _ = expected_gradient(case, samples, setting.generator(50 + i))
        sign = {1: "positive", 0: "zero within the interval", -1: "negative"}[interval.sign]
        signs[case.name] = interval.sign
        rows.append([case.name, case.breaks, interval.mean, str(interval), sign])
    report.table(
        "Each assumption broken in turn (activation a_i = 1 unless said)",
        ["case", "breaks", "E[dl/da_i]", "mean and 99 % interval", "sign"],
        rows,
    )
    report.numbers["broken_assumptions"] = [
        {"case": r[0], "breaks": r[1], "mean": r[2], "sign": signs[str(r[0])]} for r in rows
    ]
    trained = (signs["y drawn from the model"], signs["y = the model's first choice"])
    report.claim(
        "section 3.1",
        "any training by negative gradients reduces positive activations in expectation",
        f"y drawn from the model's own distribution: sign {trained[0]}; from its first choice: "
        f"{trained[1]}; mean of V on the true class: {signs['mean 1 for the true class']}; "
        f"dependent columns: {signs['v_j = -v_i with a_j = 2 a_i']}; other zero-mean "
        "distributions: " + ", ".join(str(signs[n]) for n in ("uniform V", "skewed V", "V of +-s")),
        "holds only if" if min(trained) <= 0 else "holds",
        "y does not depend on V, that is before training: where the model is calibrated the "
        "expectation is zero, and where V points to the truth it is negative",
    )
