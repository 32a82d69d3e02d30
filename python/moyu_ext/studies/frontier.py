"""Where dynamic activation pays: bytes a token against KL, beside plain quantisation.

For each number of bits of the weights, all neurons and tiers at several shares of the rows; CATS,
TDA and TEAL's rule on the weights as they are; and, where llama-quantize and a GGUF file of the
model are found, llama.cpp's formats of the same weights. KL of the whole model on text that nothing
was fitted to, in the regime of generation.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.continuation import continuation_logits
from ..calibration.router_fit import between, fit_routers
from ..calibration.sensitivity import sample_layers
from ..evaluation.agreement import patched
from ..evaluation.inputs import input_thresholds, masked_inputs
from ..methods.base import Method
from ..methods.qrida import QRIDA
from ..methods.tda import TDA
from ..models.families import find_mlps, record_inputs
from ..models.fingerprint import fingerprint
from ..models.packed import pack
from ..packing.rows import format_of
from ..patching.patch import report as usage
from ..shadow.store import Shadows
from .parts import once
from .report import Report
from .setting import Setting, Subject

BITS = (8, 6, 5, 4, 3)
SHARES = (0.7, 0.5, 1 / 3, 0.2)  # of the rows of exact neurons that are read
DENSITIES = (0.7, 0.5)  # of the other rules
FORMATS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
QUANTIZE = "MOYU_LLAMA_QUANTIZE"
_PLAIN_BITS = 16.0
_VERSION = 1
_DRAWS = 2000
# Of text that packed rows are fitted to: some 5,000 tokens, in minutes.
_FIT_TEXTS, _FIT_CHARACTERS = 12, 1800

Point = dict[str, Any]


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        points = _Measure(setting, subject, report.directory).points()
        report.numbers[subject.name] = points
        _table(report, subject, points)
        _picture(report, subject, points)
    _claims(report)
    report.note(
        "bits: of the MLPs' weights, all in: rows read by the share of them, with scales and "
        "offsets, and a router's records; in brackets where the router is counted without its "
        "padding, which it does not have where the hidden size is a multiple of 256. Plain weights "
        "count as 16 bits. Packed models pack all linear layers and the head at 8 bits; their KL "
        "is that of the whole model, as llama.cpp's is."
    )


class _Measure:
    """All points of one model."""

    def __init__(self, setting: Setting, subject: Subject, directory: Path) -> None:
        self.setting, self.subject, self.directory = setting, subject, directory
        self.context = setting.size(64, 16)
        self.length = self.context + setting.size(192, 32)
        self.rows = setting.rows(subject, self.length, setting.size(22, 3))
        self.fit = setting.rows(subject, self.length, setting.size(19, 3), train=True)
        self.dense: list[Tensor] = []

    def points(self) -> list[Point]:
        found = [self._once("bf16", partial(self._tiers, self.subject.model, "bf16"))]
        found.append(self._once("rules", self._rules))
        for bits in BITS[:: self.setting.size(1, 3)]:
            found.append(self._once(f"{bits} bits", partial(self._packed, bits)))
        source = self._gguf()
        if source is not None:
            found += [self._once(name, partial(self._llama, source, name)) for name in FORMATS]
        return [point for part in found for point in part]

    def _once(self, part: str, measure: Callable[[], list[Point]]) -> list[Point]:
        self.setting.log(f"{self.subject.name}: {part}")
        key = self.setting.describe() | {
            "study": "frontier",
            "part": part,
            "model": self.subject.fingerprint,
            "version": _VERSION,
        }
        found: list[Point] = once(self.directory, key, lambda: {"points": measure()})["points"]
        return found

    def _log_probabilities(self, model: nn.Module) -> Iterator[Tensor]:
        for part in self.rows.split(4):
            yield continuation_logits(model, part, self.context)[:, 1:].log_softmax(-1)

    def _point(
        self, model: nn.Module, group: str, label: str, method: Method | None, bits: float
    ) -> Point:
        """KL of one model under a method (None: its own forward), and MLP bits a weight."""
        if not self.dense:
            self.dense = list(self._log_probabilities(self.subject.model))
        kl, same, gain = [], [], []
        parts = self.rows[:, self.context + 1 :].split(4)
        with patched(model, method):
            for before, after, target in zip(
                self.dense, self._log_probabilities(model), parts, strict=True
            ):
                kl.append(F.kl_div(after, before, reduction="none", log_target=True).sum(-1))
                same.append(before.argmax(-1) == after.argmax(-1))
                where = target.unsqueeze(-1)
                gain.append((before.gather(-1, where) - after.gather(-1, where)).squeeze(-1))
            used = None if method is None else usage(model)
        rows = torch.cat(kl).double().mean(1)
        draws = torch.randint(len(rows), (_DRAWS, len(rows)), generator=self.setting.generator())
        low, high = rows[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        point: Point = {
            "group": group,
            "label": label,
            "bits": bits,
            "kl": rows.mean().item(),
            "low": low,
            "high": high,
            "agreement": torch.cat(same).double().mean().item(),
            "rise": math.expm1(torch.cat(gain).double().mean().item()),
            "tokens": torch.cat(kl).numel(),
        }
        if used is not None and used.added_bytes:
            sites = find_mlps(self.subject.model)
            weights = sum(site.weights().matrices * site.d * site.f for site in sites)
            read = used.density + used.estimated / sites[0].weights().matrices
            padded = 8 * used.added_bytes / weights
            shadows = getattr(method, "shadows", None)
            assert shadows is not None
            point["exact"], point["estimated"] = used.density, used.estimated
            point["bits"] = bits * read + padded
            point["unpadded"] = bits * read + padded * _unpadded(shadows)
        return point

    def _tiers(self, model: nn.Module, name: str, bits: float = _PLAIN_BITS) -> list[Point]:
        """Tiers by price at each share, and at one of them by rank, equal in all layers."""
        sites = find_mlps(model)
        look = self.setting.size(3, 1)
        parts = (self.fit[look:], self.fit[:look])
        both = [
            sample_layers(model, sites, part, self.context, self.setting.seed) for part in parts
        ]
        with torch.no_grad():
            layers, costs, prices = fit_routers(sites, both[0], both[1], 0.05, 3)
        del both
        shadows = Shadows(tuple(layers), fingerprint(model), fitted=True)
        points = []
        for share in SHARES[:: self.setting.size(1, 3)]:

            def read(price: float) -> float:
                each = [between(prices, cost, price) for cost in costs]
                return sum(cost.exact + cost.estimated / 3 for cost in each) / len(each)

            price = _solve(read, share, prices)
            method = QRIDA(price=price, shadows=shadows, guard="off")
            label = f"{name}, tiers, {share:.2f} of the rows"
            points.append(self._point(model, f"{name}, tiers", label, method, bits))
        equal = QRIDA(exact=0.4, estimated=0.3, shadows=shadows, guard="off")
        label = f"{name}, tiers by rank, 0.50 of the rows in every layer"
        points.append(self._point(model, f"{name}, tiers by rank", label, equal, bits))
        return points

    def _packed(self, bits: int) -> list[Point]:
        fitted = {}
        if bits < 8:
            texts = [text[:_FIT_CHARACTERS] for text in self.setting.documents(train=True)]
            fitted = {"tokenizer": self.subject.tokenizer, "texts": texts[:_FIT_TEXTS]}
        model = pack(copy.deepcopy(self.subject.model), bits, **fitted)
        weights = find_mlps(model)[0].weights()
        each = 8 * format_of(weights.up, weights.d).row_bytes(weights.d) / weights.d
        points = [self._point(model, "packed", f"{bits} bits, all neurons", None, each)]
        if bits >= 4:
            points += self._tiers(model, f"{bits} bits", each)
        return points

    def _rules(self) -> list[Point]:
        """Other rules on the weights as they are, thresholds from quantiles of the fit rows."""
        subject, points = self.subject, []
        quantiles = self._quantiles()
        for density in DENSITIES:
            at = f"{density:.1f}"
            for score, group, known in (("gate", "CATS", 1), ("product", "TDA", 2)):
                epsilon = [layer[score][density] for layer in quantiles]
                method = TDA(epsilon, score=score)
                point = self._point(subject.model, group, f"{group} at {at}", method, _PLAIN_BITS)
                with patched(subject.model, method):
                    next(self._log_probabilities(subject.model))
                    used = usage(subject.model).density
                point["bits"] = _PLAIN_BITS * (known + (3 - known) * used) / 3
                points.append(point)
            cuts = input_thresholds(subject.model, self.fit[:4], 1 - density)
            with masked_inputs(subject.model, cuts, self.context, self.length) as kept:
                point = self._point(subject.model, "TEAL", f"TEAL at {at}", None, _PLAIN_BITS)
            point["bits"] = _PLAIN_BITS * kept.density
            points.append(point)
        return points

    def _quantiles(self) -> list[dict[str, dict[float, float]]]:
        """Per layer, what keeps each of DENSITIES of gate scores and of norms."""
        inputs: list[Tensor] = []

        def keep(index: int, x: Tensor) -> None:
            inputs.append(x.detach().reshape(-1, x.shape[-1]))

        found = []
        with torch.no_grad():
            with record_inputs(self.subject.model, self.subject.sites, keep):
                self.subject.model(input_ids=self.fit[:4], use_cache=False)
            for site, x in zip(self.subject.sites, inputs, strict=True):
                w = site.weights()
                gate, a = w.activations(x)
                scores = {"gate": gate.abs(), "product": a.abs() * w.column_norms()}
                found.append(
                    {
                        name: {d: _quantile(values, 1 - d) for d in DENSITIES}
                        for name, values in scores.items()
                    }
                )
        return found

    def _gguf(self) -> Path | None:
        """A GGUF file beside the model's directory, where llama-quantize can be run."""
        folder = Path(getattr(self.subject.model.config, "_name_or_path", ""))
        source = folder.parent / f"{folder.name}.gguf"
        return source if _quantize() is not None and source.is_file() else None

    def _llama(self, source: Path, name: str) -> list[Point]:
        from transformers import AutoModelForCausalLM

        program = _quantize()
        assert program is not None
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "model.gguf"
            command = [program, "--allow-requantize", str(source), str(target), name]
            subprocess.run(command, check=True, capture_output=True)
            bits = _gguf_bits(target)
            model = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=target.name, dtype=torch.float32
            ).eval()
            return [self._point(model, "llama.cpp", name, None, bits)]


def _quantize() -> str | None:
    return os.environ.get(QUANTIZE) or shutil.which("llama-quantize")


def _gguf_bits(path: Path) -> float:
    """Bits a weight of the MLPs' matrices in a GGUF file."""
    from gguf import GGUFReader

    tensors = [t for t in GGUFReader(path).tensors if ".ffn_" in t.name and "norm" not in t.name]
    return 8.0 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def _unpadded(shadows: Shadows) -> float:
    """A shadow's bytes without padding over those with it."""
    layer = shadows.layers[0]
    bits = layer.bits_gate + layer.bits_up
    matrices = 2 if layer.gated else 1
    plain = layer.d * bits / 8 + 2 * matrices * layer.d / 256
    costs = 0 if layer.costs is None else layer.costs.nbytes / len(layer.data)
    return (plain + costs) / (layer.data.shape[1] + costs)


def _quantile(values: Tensor, place: float) -> float:
    flat = values.flatten()
    return float(flat.kthvalue(max(1, round(place * flat.numel()))).values)


def _solve(read: Callable[[float], float], share: float, prices: Sequence[float]) -> float:
    """The price at which this share of the rows is read."""
    low, high = math.log(prices[0]), math.log(prices[-1])
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if read(math.exp(middle)) > share else (low, middle)
    return math.exp(high)


def _table(report: Report, subject: Subject, points: list[Point]) -> None:
    rows = []
    for point in sorted(points, key=lambda p: -p["bits"]):
        bits = f"{point['bits']:.2f}"
        if "unpadded" in point:
            bits += f" ({point['unpadded']:.2f})"
        rows.append(
            [
                point["label"],
                bits,
                f"{point['kl']:.4f} ({point['low']:.4f} to {point['high']:.4f})",
                f"{100 * point['agreement']:.1f} %",
                f"{100 * point['rise']:+.1f} %",
            ]
        )
    report.table(
        f"Bits against KL, {subject.name}",
        ["weights and rule", "MLP bits a weight", "KL, nats (95 %)", "agreement", "perplexity"],
        rows,
        f"{points[0]['tokens']} scored tokens.",
    )


def _picture(report: Report, subject: Subject, points: list[Point]) -> None:
    title = f"Bits read per MLP weight against KL, {subject.name}"
    with report.figure(subject.name, title) as figure:
        axes = figure.subplots()
        groups = dict.fromkeys(p["group"] for p in points)
        for group in groups:
            mine = sorted((p for p in points if p["group"] == group), key=lambda p: p["bits"])
            x = [p["bits"] for p in mine]
            axes.errorbar(
                x,
                [p["kl"] for p in mine],
                yerr=[
                    [max(0.0, p["kl"] - p["low"]) for p in mine],
                    [max(0.0, p["high"] - p["kl"]) for p in mine],
                ],
                marker="o" if group != "llama.cpp" else "s",
                markersize=4,
                linewidth=1,
                linestyle="--" if group == "llama.cpp" else "-",
                label=group,
            )
        best = frontier(points)
        axes.plot([p["bits"] for p in best], [p["kl"] for p in best], color="black", linewidth=3,
                  alpha=0.2, label="frontier")  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("bits read per weight of the MLPs, all in")
        axes.set_ylabel("KL, nats a token")
        axes.legend(fontsize=7)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points than which none reads fewer bits and loses less, by bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p["bits"], p["kl"])):
        if not best or point["kl"] < best[-1]["kl"]:
            best.append(point)
    return best


def below(point: Point, line: Sequence[Point]) -> bool | None:
    """Whether a point lies below the line through others (KL by its logarithm); None outside it."""
    ordered = sorted(line, key=lambda p: p["bits"])
    for a, b in pairwise(ordered):
        if a["bits"] <= point["bits"] <= b["bits"]:
            place = (point["bits"] - a["bits"]) / max(b["bits"] - a["bits"], 1e-9)
            kl = math.log(a["kl"]) + place * (math.log(b["kl"]) - math.log(a["kl"]))
            return bool(math.log(max(point["kl"], 1e-12)) < kl)
    return None


def _claims(report: Report) -> None:
    line = "the line through llama.cpp's Q3_K_M, Q4_K_M and Q6_K"
    _beside_llama(report, f"packed rows in tiers lie below {line}", "bits")
    _beside_llama(
        report, f"they do, counting routers without their padding: below {line}", "unpadded"
    )
    signs, said = {}, []
    for name, points in report.numbers.items():
        best = {id(p) for p in frontier([p for p in points if p["group"] != "llama.cpp"])}
        on = [p for p in points if id(p) in best and "tiers" in p["group"]]
        signs[name] = 1 if on else -1
        said.append(f"{name}: {_named(on)}")
    report.judged("ours", "tiers are on the frontier of our own formats", "; ".join(said), signs)


def _beside_llama(report: Report, claim: str, field: str) -> None:
    """Judge a claim on packed rows in tiers by bits as this field counts them."""
    signs, said = {}, []
    for name, points in report.numbers.items():
        line = [p for p in points if p["label"] in ("Q3_K_M", "Q4_K_M", "Q6_K")]
        if len(line) < 2:
            continue
        tiers = [p | {"bits": p[field]} for p in points if p["group"].endswith("bits, tiers")]
        verdicts = [(p, below(p, line)) for p in tiers]
        if any(verdict is not None for _, verdict in verdicts):
            good = [p for p, verdict in verdicts if verdict]
            signs[name] = 1 if good else -1
            said.append(f"{name}: {_named(good)}")
    if signs:
        report.judged("ours", claim, "; ".join(said), signs)


def _named(points: Sequence[Point]) -> str:
    shown = [f"{p['label']} ({p['bits']:.2f} bits, KL {p['kl']:.4f})" for p in points]
    return ", ".join(shown) or "none"
