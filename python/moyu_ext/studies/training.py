"""When does over-activation appear? Identical tiny models trained from scratch.

Llamas over bytes (d 64, f 176, 3 layers) that differ in `hidden_act` alone: for one seed the same
initial weights and the same batches. While they learn: held-out loss, sparsity at CETT 0.2
(calibrated anew each time), share of activations that are exactly zero, and the gradient of
positive activations, whose expectation section 3.1 says is positive. A run is kept on disk at every
point that is measured, so an interrupted study goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import write_atomically
from ..calibration.calibrate import calibrate
from ..evaluation.statistics import crossed_bootstrap
from .activation_gradients import pulls
from .activity import neuron_norms
from .report import Report
from .setting import CETT, Setting, Subject, subject_of

ACTIVATIONS = {"ReLU": "relu", "SwiGLU": "silu", "GELU": "gelu", "ReLU²": "relu2"}
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
LENGTH = 128  # bytes of a row
ROWS = 8  # of a batch
POINTS = (0, 10, 25, 50, 100, 200, 300)
RATE = 3e-3
_WARM_UP = 20
CURVES = ("loss", "sparsity", "zeros", "gradient")


class Bytes:
    """A tokenizer: the bytes of a text."""

    def encode(self, text: str) -> list[int]:
        """Ids 0-255."""
        return list(text.encode())


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    points = tuple(p for p in POINTS if p <= setting.size(POINTS[-1], 10))
    seeds = range(setting.seed, setting.seed + setting.size(3, 2))
    train = _bytes(setting.documents(train=True))
    texts = setting.documents()
    folder = report.directory / "training_runs"
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for name, activation in ACTIVATIONS.items():
        report.models[name] = {"activation": activation, **SHAPE}
        curves[name] = []
        for seed in seeds:
            setting.log(f"training {name}, seed {seed}")
            curves[name].append(train_one(activation, seed, train, texts, points, folder))
    _report(setting, report, curves, points)
    for file in folder.glob("*.pt"):
        file.unlink()
    folder.rmdir()


def _bytes(texts: list[str]) -> Tensor:
    return torch.tensor(list("\n".join(texts).encode()))


def untrained(activation: str, seed: int) -> Any:
    """The model before its first step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(hidden_act=activation, **SHAPE)).float().eval()


def train_one(
    activation: str,
    seed: int,
    train: Tensor,
    texts: list[str],
    points: tuple[int, ...],
    folder: Path,
) -> list[dict[str, Any]]:
    """What is measured at each of `points` (steps); taken up where `folder` has this run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{activation}_{seed}.pt"
    learnt = hashlib.sha256(train.numpy().tobytes()).hexdigest()
    content = [activation, seed, points, SHAPE, LENGTH, ROWS, RATE, learnt, texts]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    model = untrained(activation, seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.1)
    step, found = 0, []
    saved = _load(file, key)
    if saved is not None:
        step, found = saved["step"], saved["found"]
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
    while True:
        if step in points and len(found) == points.index(step):
            found.append(measured(subject_of(activation, model, Bytes()), texts) | {"step": step})
            state = {
                "key": key,
                "step": step,
                "found": found,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(file, buffer.getvalue())
        if step >= points[-1]:
            return found
        _step(model, optimiser, train, seed, step, points[-1])
        step += 1


def _load(file: Path, key: str) -> dict[str, Any] | None:
    """The run as it was saved, if it is this one."""
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None  # none yet, or a half-written one: start anew
    return saved if saved.get("key") == key else None


def _step(
    model: Any, optimiser: torch.optim.Optimizer, train: Tensor, seed: int, step: int, last: int
) -> None:
    # Seeded by the step, so that a run that goes on sees the batches it would have seen.
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(len(train) - LENGTH - 1, (ROWS,), generator=generator)
    rows = torch.stack([train[s : s + LENGTH + 1] for s in starts.tolist()])
    rate = RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / last)
    for group in optimiser.param_groups:
        group["lr"] = rate
    with torch.enable_grad():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    optimiser.zero_grad()


def measured(subject: Subject, texts: list[str]) -> dict[str, Any]:
    """One point: held-out loss (nats per byte), sparsity at CETT 0.2, share of exact zeros, and
    the mean gradient where a > 0 relative to its mean size, for each text."""
    whole = _bytes(texts)
    rows = whole[: len(whole) // LENGTH * LENGTH].view(-1, LENGTH)[: 2 * ROWS]
    with torch.no_grad():
        logits = subject.model(input_ids=rows, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    thresholds = calibrate(
        subject.model, Bytes(), texts, cett=CETT, sequential=False, progress=False, max_tokens=1024
    )
    return {
        "loss": loss,
        "sparsity": 1 - thresholds.density,
        "zeros": (neuron_norms(subject, rows) == 0).double().mean().item(),
        "gradient": pulls(subject.model, subject.sites, rows[:8])["positive"].mean(1).tolist(),
    }


def _report(
    setting: Setting,
    report: Report,
    curves: dict[str, list[list[dict[str, Any]]]],
    points: tuple[int, ...],
) -> None:
    values = {
        name: {
            curve: torch.tensor([[point[curve] for point in seed] for seed in seeds])
            for curve in CURVES
        }
        for name, seeds in curves.items()
    }  # each [seeds, points], "gradient" [seeds, points, texts]
    report.numbers["steps"] = list(points)
    report.numbers["curves"] = values
    rows = []
    for name, found in values.items():
        for place, step in enumerate(points):
            gradient = crossed_bootstrap(found["gradient"][:, place], setting.seed)
            cells = [_spread(found[curve][:, place]) for curve in CURVES[:3]]
            rows.append([name, step, *cells, str(gradient)])
    seeds = len(next(iter(values.values()))["loss"])
    report.table(
        "Models that differ in their activation, while they learn",
        ["model", "step", "held-out loss", "sparsity at CETT 0.2", "exact zeros",
         "mean gradient where a > 0"],
        rows,
        f"{seeds} seeds: mean (lowest to highest). Loss in nats per byte. Gradient in units of its "
        "mean size, with 95 % bootstrap interval over seeds and texts; the theory predicts "
        "positive values.",
    )  # fmt: skip
    _figure(report, values, points)
    _claims(setting, report, values, points)


def _figure(report: Report, values: dict[str, Any], points: tuple[int, ...]) -> None:
    caption = "Loss, sparsity at CETT 0.2 and gradient of positive activations while models learn"
    labels = ("held-out loss, nats per byte", "sparsity at CETT 0.2", "gradient where a > 0")
    with report.figure("curves", caption, 11, 3.8) as figure:
        axes = figure.subplots(1, 3)
        for ax, curve, label in zip(axes, ("loss", "sparsity", "gradient"), labels, strict=True):
            for i, (name, found) in enumerate(values.items()):
                y = found[curve] if curve != "gradient" else found[curve].mean(-1)
                ax.plot(points, y.mean(0).tolist(), "o-", color=f"C{i}", label=name, markersize=3)
                low, high = y.min(0).values.tolist(), y.max(0).values.tolist()
                ax.fill_between(points, low, high, color=f"C{i}", alpha=0.2)
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xlabel("step (band: all seeds)")
            ax.set_ylabel(label)
        axes[2].axhline(0, color="grey", linewidth=0.8)
        axes[0].legend(fontsize=8)


def _claims(
    setting: Setting, report: Report, values: dict[str, Any], points: tuple[int, ...]
) -> None:
    sparsity = {name: found["sparsity"] for name, found in values.items()}
    grown = {n: (s[:, -1] - s[:, 0]).sign() for n, s in sparsity.items()}
    half = {n: _half_way(s.mean(0), points) for n, s in sparsity.items()}
    text = "; ".join(
        f"{n} {s[:, 0].mean():.3f} before, {s[:, -1].mean():.3f} after {points[-1]} steps, half of "
        f"the change by step {half[n]}"
        for n, s in sparsity.items()
    )
    report.numbers["half of the change in sparsity by step"] = half
    report.judged(
        "section 3.1",
        "training causes sparsity: it is higher after training than before",
        f"sparsity at CETT 0.2: {text}",
        {n: int(s[0]) if len(s.unique()) == 1 else 0 for n, s in grown.items()},
    )
    relu, swiglu = sparsity["ReLU"], sparsity["SwiGLU"]
    ends = [bool((relu[:, at] > swiglu[:, at].max()).all()) for at in (0, -1)]
    report.claim(
        "section 3.1",
        "SwiGLU cannot produce more sparsity than ReLU",
        f"ReLU {_spread(relu[:, -1])}, SwiGLU {_spread(swiglu[:, -1])}, GELU "
        f"{_spread(sparsity['GELU'][:, -1])}, ReLU² {_spread(sparsity['ReLU²'][:, -1])} at the "
        f"end; before training ReLU {_spread(relu[:, 0])}, SwiGLU {_spread(swiglu[:, 0])}"
        + (": the order is there before any gradient is" if ends[0] else ""),
        "holds" if ends[1] else "fails",
    )
    for name, where in (("before training", slice(0, 1)), ("in training", slice(1, None))):
        signs = {
            n: crossed_bootstrap(found["gradient"][:, where].mean(1), setting.seed)
            for n, found in values.items()
        }
        text = "mean in units of its size: " + "; ".join(f"{n} {i}" for n, i in signs.items())
        claim = f"the gradient of positive activations is positive in expectation, {name}"
        report.judged("section 3.1", claim, text, {n: i.sign for n, i in signs.items()})
    # Paired: one seed's models share their first weights, their batches and the texts.
    pulls_of = {n: found["gradient"][:, 1:].mean(1) for n, found in values.items()}
    gap = crossed_bootstrap(pulls_of["ReLU"] - pulls_of["SwiGLU"], setting.seed)
    report.judged(
        "section 3.1",
        "ReLU's positive activations are pushed down more than SwiGLU's",
        f"mean gradient over training, ReLU less SwiGLU, paired by seed and text: {gap}",
        {"all": gap.sign},
    )


def _half_way(curve: Tensor, points: tuple[int, ...]) -> int:
    """The first point at which half of the change from first to last is made."""
    share = (curve - curve[0]) / (curve[-1] - curve[0])
    return next((s for s, x in zip(points, share.tolist(), strict=True) if x >= 0.5), points[-1])


def _spread(seeds: Tensor) -> str:
    return f"{seeds.mean():.3f} ({seeds.min():.3f} to {seeds.max():.3f})"
