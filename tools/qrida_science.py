"""The numbers behind docs/qrida.md: python tools/qrida_science.py STUDY --data DIR --out DIR.

Studies: `ranking` (perplexity of top-k sets by who ranks the neurons), `recall` (of the exact
top-k, by bits and layer), `rounding` (shadows fitted to text, by kind of text), `choice` (top-k
against thresholds at equal density), `budget` (bytes at an equal rise of perplexity, by `tune`),
`guard` (CETT on shifted text, with and without).
Everything is scored in the regime of generation: a prompt of 64 tokens runs dense, 192 tokens are
scored under the rule, every layer sparse. Reads the models and texts of the data folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moyu_ext.calibration.text import write_own
from moyu_ext.calibration.tune import tune
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.guard import LayerGuard
from moyu_ext.methods.base import Method, Rule, TokenRule
from moyu_ext.patching.families import MlpWeights, find_mlps, record_inputs
from moyu_ext.reference import ACTIVATIONS
from moyu_ext.shadow.build import build_shadow
from moyu_ext.shadow.reference import choose, shadow_scores
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moyu_ext
from moyu_ext import QRIDA, SRIDA, TDA, Shadows

CONTEXT, CONTINUATION = 64, 192
DENSITIES = (0.5, 0.33, 0.2)
BITS = [4, 3, 2, 1, (2, 1), (1, 2), (3, 1), (3, 2), (2, 3), (4, 2)]
TEXTS = {
    "mix4m_silu": ("stories", "cnndm"),
    "mix4m_relu": ("stories", "cnndm"),
    "stories260K": ("tinystories",),
}
# (layer, weights) -> (x [n, d], act(gate) [n, f], a [n, f]) -> scores [n, f], largest kept
Ranking = Callable[[int, MlpWeights], Callable[[Tensor, Tensor, Tensor], Tensor]]


_OWN: dict[str, list[str]] = {}


class Setting:
    """A model, its tokenizer, and rows of held-out and calibration ids of one text."""

    def __init__(self, data: Path, model: str, text: str, windows: int) -> None:
        folder = data / "models" / model
        self.model_name, self.text = model, text
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        length = CONTEXT + CONTINUATION
        self.rows = ids_of(data, self.tokenizer, text, (windows + 16) * length)
        self.rows = self.rows.view(-1, length)
        self.held_out, self.other = self.rows[:windows], self.rows[windows:]
        self.dense = self.perplexity(None)

    def perplexity(self, method: Method | None) -> float:
        if method is None:
            return self._score()
        moyu_ext.patch(self.model, method)
        try:
            return self._score()
        finally:
            self.density = moyu_ext.report(self.model).density
            moyu_ext.unpatch(self.model)

    def _score(self) -> float:
        return generation_perplexity(
            self.model, self.held_out, context=CONTEXT, continuation=CONTINUATION
        ).perplexity

    def row(self, **values: Any) -> dict[str, Any]:
        return {"model": self.model_name, "text": self.text, **values}


def ids_of(data: Path, tokenizer: Any, text: str, count: int) -> Tensor:
    path = data / "train_mix" / "heldout" / f"{text}.txt"
    if text == "tinystories":
        path = data / "text" / "tinystories.train_head_2MiB.txt"
    if text == "chinese":
        lines = (data / "chinese" / "gaokao-chinese.jsonl").read_text().splitlines()
        content = "\n".join(json.loads(line)["passage"] for line in lines)
    else:
        content = path.read_text()
    ids = torch.tensor(tokenizer.encode(content[: 12 * count], verbose=False))
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens, {count} are needed: pass --windows")
    return ids[:count]


@dataclass(frozen=True, eq=False)
class Ranked(Method):
    """The top round(density * f) neurons per token by any score."""

    density: float
    ranking: Ranking

    name = "ranked"
    level = "token"

    @property
    def plan(self) -> str:
        return "given"

    def bind(self, index: int, weights: MlpWeights) -> Rule:
        return _Top(self.ranking(index, weights), max(1, round(self.density * weights.f)))


class _Top(TokenRule):
    def __init__(self, score: Callable[[Tensor, Tensor, Tensor], Tensor], k: int) -> None:
        self.score, self.k = score, k

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("for scoring only")

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        score = self.score(x, gate, product)
        return choose(score.expand(len(x), -1), None, self.k)


def exact(index: int, w: MlpWeights) -> Any:
    c = w.column_norms()
    return lambda x, gate, a: a.abs() * c


def cats(index: int, w: MlpWeights) -> Any:
    return lambda x, gate, a: gate.abs()


def shadow(bits_gate: int, bits_up: int) -> Ranking:
    def ranking(index: int, w: MlpWeights) -> Any:
        s = build_shadow(w, bits_gate, bits_up)
        c = w.column_norms()
        return lambda x, gate, a: shadow_scores(
            x, s.data, c, w.gate_bias, w.up_bias, s.gated, s.bits_gate, s.bits_up, w.activation
        )

    return ranking


def fitted(shadows: Shadows) -> Ranking:
    def ranking(index: int, w: MlpWeights) -> Any:
        s, c = shadows.layer(index, w), w.column_norms()
        return lambda x, gate, a: shadow_scores(
            x, s.data, c, w.gate_bias, w.up_bias, s.gated, s.bits_gate, s.bits_up, w.activation
        )

    return ranking


def own_text(setting: Setting, tokens: int = 8192) -> list[str]:
    """What the model writes itself, once per model."""
    if setting.model_name not in _OWN:
        rows = write_own(setting.model, setting.tokenizer, tokens, 256, 0)
        _OWN[setting.model_name] = setting.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return _OWN[setting.model_name]


def svd(share: float) -> Ranking:
    """Gate and up of a rank whose bf16 factors take `share` of the MLP's bf16 bytes."""

    def ranking(index: int, w: MlpWeights) -> Any:
        rank = max(1, round(share * 3 * w.f * w.d / (2 * (w.f + w.d))))

        def low(m: Tensor) -> Tensor:
            u, s, v = torch.linalg.svd(m.detach().float(), full_matrices=False)
            return (u[:, :rank] * s[:rank]) @ v[:rank]

        gate, up, c = low(w.gate), low(w.up), w.column_norms()  # type: ignore[arg-type]
        act = ACTIVATIONS[w.activation]
        return lambda x, _, a: (act(F.linear(x, gate)) * F.linear(x, up)).abs() * c

    return ranking


def signs(index: int, w: MlpWeights) -> Any:
    """SparseInfer: how many products of gate and x are positive, from their sign bits alone."""
    gate = w.gate.detach().sign()  # type: ignore[union-attr]
    return lambda x, _, a: F.linear(x.sign(), gate) + w.d  # from 0, so that ranks are well defined


def calibrated(setting: Setting) -> dict[str, Ranking]:
    """Rules that need statistics of other text of the same kind."""
    sites = find_mlps(setting.model)
    up_rms = [torch.zeros(site.f) for site in sites]
    norm_rms = [torch.zeros(site.f) for site in sites]

    def see(index: int, x: Tensor) -> None:
        w = sites[index].weights()
        x = x.reshape(-1, w.d)
        up = F.linear(x, w.up)
        a = up * ACTIVATIONS[w.activation](F.linear(x, w.gate))  # type: ignore[arg-type]
        up_rms[index] += up.square().sum(0)
        norm_rms[index] += a.square().sum(0) * w.column_norms() ** 2

    with torch.no_grad(), record_inputs(setting.model, sites, see):
        setting.model(input_ids=setting.other, use_cache=False)

    def weighted(index: int, w: MlpWeights) -> Any:
        scale = up_rms[index].sqrt() * w.column_norms()
        return lambda x, gate, a: gate.abs() * scale

    def static(index: int, w: MlpWeights) -> Any:
        return lambda x, gate, a: norm_rms[index]

    return {"gate x c x rms(up), calibrated": weighted, "static set": static}


def shadow_share(bits_gate: int, bits_up: int) -> float:
    """Bytes of a shadow over those of the MLP in bf16, for a d that is a multiple of 256."""
    return (bits_gate + bits_up + 2 * 16 / 256) / 48


def study_ranking(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in models:
        for text in TEXTS[name]:
            setting = Setting(data, name, text, windows)
            rankings: dict[str, tuple[Ranking, Callable[[float], float]]] = {
                "exact norm (TDA)": (exact, lambda r: (2 + r) / 3),
                "gate (CATS)": (cats, lambda r: (1 + 2 * r) / 3),
                "gate signs (SparseInfer)": (signs, lambda r: r + 1 / 48),
            }
            for label, ranking in calibrated(setting).items():
                gate_first = label.startswith("gate")
                rankings[label] = (
                    ranking,
                    (lambda r: (1 + 2 * r) / 3) if gate_first else (lambda r: r),
                )
            for bits in (4, 2, 1):
                share = shadow_share(bits, bits)
                rankings[f"SVD, bytes of {bits} bits"] = (
                    svd(share),
                    lambda r, share=share: r + share,  # type: ignore[misc]
                )
            for bits in BITS:  # type: ignore[assignment]
                pair = bits if isinstance(bits, tuple) else (bits, bits)
                share = shadow_share(*pair)
                rankings[f"shadow {pair[0]}/{pair[1]}"] = (
                    shadow(*pair),
                    lambda r, share=share: r + share,  # type: ignore[misc]
                )
            for number in (1, 2, 3):
                shadows = Shadows.build(setting.model, number, setting.tokenizer, own_text(setting))
                share = shadow_share(number, number)
                rankings[f"shadow {number}/{number}, fitted to own text"] = (
                    fitted(shadows),
                    lambda r, share=share: r + share,  # type: ignore[misc]
                )
            for density in DENSITIES:
                for label, (ranking, cost) in rankings.items():
                    add(rows, setting, label, density, Ranked(density, ranking), cost(density))
                for score in ("contribution", "griffin"):
                    label = f"prompt-chosen (sRIDA, {score})"
                    add(rows, setting, label, density, SRIDA(density, score), density)
    return rows


def add(
    rows: list[dict[str, Any]],
    setting: Setting,
    label: str,
    density: float,
    method: Method,
    share: float,
) -> None:
    value = setting.perplexity(method)
    increase = value / setting.dense - 1
    rows.append(
        setting.row(
            method=label,
            density=density,
            realised=setting.density,
            bytes=share,
            dense=setting.dense,
            perplexity=value,
            increase=increase,
            tokens=setting.held_out.shape[0] * CONTINUATION,
        )
    )
    print(
        f"{setting.model_name:12} {setting.text:11} {label:32} {density:.2f} "
        f"bytes {share:.3f} {100 * increase:+7.2f} %",
        flush=True,
    )


def study_recall(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    """Recall of the exact top-k (precision is the same: both sets have k neurons), and of the set
    that an exact threshold at the same mean density gives."""
    rows = []
    for name in models:
        for text in TEXTS[name]:
            setting = Setting(data, name, text, max(4, windows // 4))
            sites = find_mlps(setting.model)
            inputs: dict[int, Tensor] = {}

            def keep(index: int, x: Tensor, inputs: dict[int, Tensor] = inputs) -> None:
                inputs[index] = x[:, CONTEXT:].reshape(-1, x.shape[-1]).detach()

            with torch.no_grad(), record_inputs(setting.model, sites, keep):
                setting.model(input_ids=setting.held_out, use_cache=False)
            own = {
                n: Shadows.build(setting.model, n, setting.tokenizer, own_text(setting))
                for n in (1, 2, 3)
            }
            for site in sites:
                w, x = site.weights(), inputs[site.index]
                with torch.no_grad():
                    gate = ACTIVATIONS[w.activation](F.linear(x, w.gate))  # type: ignore[arg-type]
                    a = gate * F.linear(x, w.up)
                    truth = exact(site.index, w)(x, gate, a)
                    candidates: dict[str, Ranking] = {
                        f"shadow {b}/{u}": shadow(b, u)
                        for b, u in (
                            bits if isinstance(bits, tuple) else (bits,) * 2 for bits in BITS
                        )
                    }
                    candidates |= {"gate (CATS)": cats, "gate signs (SparseInfer)": signs}
                    candidates["SVD, bytes of 2 bits"] = svd(shadow_share(2, 2))
                    for number, shadows in own.items():
                        candidates[f"shadow {number}/{number}, fitted to own text"] = fitted(
                            shadows
                        )
                    for label, ranking in candidates.items():
                        score = ranking(site.index, w)(x, gate, a)
                        for density in DENSITIES:
                            values = agreement(truth, score, density)
                            rows.append(
                                setting.row(
                                    method=label, layer=site.index, density=density, **values
                                )
                            )
            for label in (
                "shadow 4/4",
                "shadow 2/2",
                "shadow 2/2, fitted to own text",
                "gate (CATS)",
            ):
                found = [
                    r["recall"]
                    for r in rows
                    if (r["model"], r["text"], r["method"], r["density"])
                    == (name, text, label, 0.33)
                ]
                print(name, text, label, "recall per layer", [f"{v:.3f}" for v in found])
    return rows


def agreement(truth: Tensor, score: Tensor, density: float) -> dict[str, float]:
    k = max(1, round(density * truth.shape[1]))
    want, got = choose(truth, None, k), choose(score, None, k)
    # Neurons that are exactly 0 add nothing: a ReLU layer may have fewer than k others.
    matters = want & (truth > 0)
    kept = (truth.square() * got).sum(1) / (truth.square() * want).sum(1).clamp_min(1e-30)
    cut = truth.flatten().kthvalue(round((1 - density) * truth.numel())).values
    above = truth >= cut
    level = score.flatten().kthvalue(round((1 - density) * score.numel())).values
    said = score >= level
    return {
        "recall": float((want & got).sum() / want.sum()),
        "recall_nonzero": float((matters & got).sum() / matters.sum().clamp_min(1)),
        "energy": float(kept.mean()),
        "threshold_recall": float((above & said).sum() / above.sum()),
        "threshold_precision": float((above & said).sum() / said.sum()),
    }


def study_rounding(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    """Shadows fitted to text: by the kind of text, on stories held out."""
    rows: list[dict[str, Any]] = []
    for name in models:
        setting = Setting(data, name, TEXTS[name][0], windows)
        decode = setting.tokenizer.batch_decode
        texts: dict[str, list[str] | None] = {"none": None, "own": own_text(setting)}
        texts["same kind"] = decode(setting.other.repeat(1, 1))
        if name != "stories260K":
            kinds = [ids_of(data, setting.tokenizer, k, 11 * 256) for k in ("c4", "xsum", "code")]
            texts["c4, xsum, code"] = decode(torch.cat(kinds).view(-1, 256))
        for label, content in texts.items():
            for bits in (1, 2, 3):
                tokenizer = None if content is None else setting.tokenizer
                shadows = Shadows.build(setting.model, bits, tokenizer, content)
                for density in DENSITIES:
                    share = density + shadow_share(bits, bits)
                    title = f"shadow {bits}/{bits}, fitted to: {label}"
                    method = QRIDA(density, shadows=shadows, guard="off")
                    add(rows, setting, title, density, method, share)
    return rows


def study_choice(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    """Top-k against thresholds calibrated on other text of the same kind; 2 bits, and exact."""
    rows: list[dict[str, Any]] = []
    share = shadow_share(2, 2)
    for name in models:
        for text in TEXTS[name]:
            setting = Setting(data, name, text, windows)
            for density in (0.5, 0.42, 0.36, 0.33, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05):
                add(rows, setting, "top-k, 2 bits", density, QRIDA(density), density + share)
            texts = setting.tokenizer.batch_decode(setting.other)
            for target in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
                for label, method in (("2 bits", QRIDA(bits=2)), ("exact", "tda")):
                    thresholds = moyu_ext.calibrate(
                        setting.model,
                        setting.tokenizer,
                        texts,
                        cett=target,
                        method=method,
                        progress=False,
                    )
                    use = QRIDA(thresholds) if label == "2 bits" else TDA(thresholds)
                    add(rows, setting, f"CETT {target}, {label}", thresholds.density, use, 0.0)
                    rows[-1]["bytes"] = (
                        rows[-1]["realised"] + share
                        if label == "2 bits"
                        else (2 + rows[-1]["realised"]) / 3
                    )
                    rows[-1]["cett"] = target
    return rows


def study_budget(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    """Bytes that each method needs at perplexity + 1 % (and 0.3, 3 %), thresholds by `tune`."""
    rows: list[dict[str, Any]] = []
    methods: dict[str, dict[str, Any]] = {
        "QRIDA, bits chosen": {"bits": [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4)]},
        "QRIDA, 2 bits": {"bits": [(2, 2)]},
        "TDA, product": {"method": "tda"},
        "TDA, gate (CATS)": {"method": TDA(0.0, score="gate")},
    }
    for name in models:
        for text in TEXTS[name]:
            setting = Setting(data, name, text, windows)
            texts = setting.tokenizer.batch_decode(setting.rows)
            for limit in (0.003, 0.01, 0.03):
                for label, arguments in methods.items():
                    try:
                        tuned = tune(
                            setting.model,
                            setting.tokenizer,
                            texts,
                            max_perplexity_increase=limit,
                            max_tokens=setting.rows.numel(),
                            **arguments,
                        )
                    except moyu_ext.ConfigurationError as error:
                        rows.append(setting.row(method=label, limit=limit, error=str(error)))
                        print(setting.model_name, text, label, limit, error, flush=True)
                        continue
                    layers = tuned.thresholds.layers
                    share = sum(_bytes(label, layer.density) for layer in layers) / len(layers)
                    for layer, bits in zip(layers, tuned.thresholds.bits, strict=False):
                        share += shadow_share(*bits) / len(layers) if layer.density < 1 else 0.0
                    rows.append(
                        setting.row(
                            method=label,
                            limit=limit,
                            increase=tuned.increase,
                            error_of_increase=tuned.error,
                            density=tuned.thresholds.density,
                            bytes=share,
                            layers=[layer.density for layer in layers],
                            bits=tuned.thresholds.bits,
                            frontier=[dataclasses.asdict(p) for p in tuned.frontier],
                        )
                    )
                    print(
                        f"{setting.model_name:12} {text:11} {label:20} limit {limit:.3f} "
                        f"density {tuned.thresholds.density:.3f} bytes {share:.3f} "
                        f"{100 * tuned.increase:+.2f} %",
                        flush=True,
                    )
    return rows


def _bytes(label: str, density: float) -> float:
    """Of the MLP's weights, with d large; the shadow comes on top."""
    known = {"TDA, product": 2, "TDA, gate (CATS)": 1}.get(label, 0)
    return (known + (3 - known) * density) / 3


def study_guard(data: Path, windows: int, models: list[str]) -> list[dict[str, Any]]:
    """CETT of every token where thresholds from stories meet other text, decoded token by token."""
    rows = []
    for name in models:
        setting = Setting(data, name, TEXTS[name][0], 4)
        model = setting.model
        texts = setting.tokenizer.batch_decode(setting.other)
        thresholds = moyu_ext.calibrate(
            model, setting.tokenizer, texts, cett=0.2, method=QRIDA(bits=2), progress=False
        )
        others = ("code", "cnndm", "chinese") if name != "stories260K" else ()
        for text in (TEXTS[name][0], *others):
            ids = ids_of(data, setting.tokenizer, text, windows * 256).view(-1, 256)
            dense = _decode(model, ids)
            for mode, every in (("watch", 64), ("hold", 64), ("hold", 16)):
                moyu_ext.patch(model, QRIDA(thresholds, guard=mode, guard_every=every))
                every_token = [_watch_all(mlp.rule) for mlp in patched_mlps(model)]
                loss = _decode(model, ids)
                measured = torch.stack([torch.tensor(found) for found in every_token])
                guards = [layer.guard for layer in moyu_ext.report(model).layers]
                density = moyu_ext.report(model).density
                moyu_ext.unpatch(model)
                settled = measured[:, 10 * 64 :]
                rows.append(
                    setting.row(
                        on=text,
                        guard=mode,
                        every=every,
                        target=0.2,
                        tokens=measured.shape[1],
                        cett=float(settled.mean()),
                        cett_all=float(measured.mean()),
                        layers=settled.mean(1).tolist(),
                        seen=sum(g.cett for g in guards if g) / len(guards),
                        recall=sum(g.recall for g in guards if g) / len(guards),
                        density=density,
                        increase=math.exp(loss - dense) - 1,
                    )
                )
                if text == TEXTS[name][0]:
                    rows[-1]["on"] = f"{text} (calibrated on)"
                row = rows[-1]
                print(
                    f"{name:12} {row['on']:24} {mode} {every:3} CETT {row['cett']:.3f} "
                    f"(the guard saw {row['seen']:.3f}) layers {min(row['layers']):.3f}.."
                    f"{max(row['layers']):.3f} density {density:.3f} "
                    f"{100 * row['increase']:+.2f} %",
                    flush=True,
                )
    return rows


def patched_mlps(model: Any) -> list[Any]:
    return [site.entry for site in find_mlps(model)]


def _watch_all(rule: Any) -> list[float]:
    """Let the rule note the true CETT of every token beside what its guard does."""
    found: list[float] = []
    apply = rule.apply
    meter = LayerGuard(1, rule.router.weights.f, torch.device("cpu"), None, None)

    def watched(x: Tensor, weights: MlpWeights) -> Any:
        scores = rule.router.scores(x)
        meter.reset()
        meter.measure(x, weights, rule.router.norms, choose(scores, rule.epsilon, rule.k))
        found.append(meter.report().cett)
        return apply(x, weights)

    rule.apply = watched
    return found


def _decode(model: Any, rows: Tensor, prompt: int = 16) -> float:
    """Mean loss of the tokens behind the prompts, one forward each as in generation."""
    losses = []
    for row in rows:
        out = model(input_ids=row[None, :prompt], use_cache=True)
        for t in range(prompt, len(row)):
            losses.append(F.cross_entropy(out.logits[:, -1].float(), row[t : t + 1]).item())
            out = model(input_ids=row[None, t : t + 1], past_key_values=out.past_key_values)
    return sum(losses) / len(losses)


STUDIES: dict[str, Callable[[Path, int, list[str]], list[dict[str, Any]]]] = {
    "ranking": study_ranking,
    "recall": study_recall,
    "rounding": study_rounding,
    "choice": study_choice,
    "budget": study_budget,
    "guard": study_guard,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=[*STUDIES])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/qrida"))
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--models", nargs="*", default=list(TEXTS))
    args = parser.parse_args()
    start = time.time()
    with torch.no_grad():
        rows = STUDIES[args.study](args.data, args.windows, args.models)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"torch": torch.__version__, "windows": args.windows, "rows": rows}
    path = args.out / f"{args.study}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} rows in {path} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
