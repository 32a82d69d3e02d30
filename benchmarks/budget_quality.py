"""What `patch(model, budget=...)` keeps and saves: KL on text of another kind, and time.

    python benchmarks/budget_quality.py MODEL TEXT [--budget 0.01 0.05] [--bits 0 8] [--csv FILE]

MODEL is a Hugging Face directory (tools/real_models.py makes two), TEXT a file of plain text, whose
windows of 64 tokens of prompt and 192 scored ones are taken evenly; the budget is tuned on what the
model writes. bits: 0 for the weights as they are (in --dtype), else packed, and then against the
packed model's own answers. A row says what `tune` found (KL on its held-out text, predicted KL,
seconds), the KL on TEXT with a 95 % bootstrap interval over windows, agreement and rise of
perplexity there, the shares of neurons, and milliseconds: of all MLPs, dense, as predicted and as
measured by turns, and of a whole token by turns, with all neurons and with the budget.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from moyu_ext.calibration.continuation import continuation_logits
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps, record_inputs
from moyu_ext.patching.sparse_mlp import SparseMLP
from transformers import AutoModelForCausalLM, AutoTokenizer

import moyu_ext

CONTEXT, SCORED = 64, 192
COLUMNS = (
    *("model", "weights", "budget", "tune_seconds", "tuned_kl", "predicted_kl", "text", "tokens"),
    *("kl", "kl_low", "kl_high", "agreement", "perplexity_rise", "sparse_layers", "exact"),
    *("estimated", "mlp_ms_dense", "mlp_ms_predicted", "mlp_ms", "token_ms_dense", "token_ms"),
    "machine",
)


def windows(tokenizer, text: str, count: int) -> torch.Tensor:
    """ids [count, CONTEXT + SCORED], taken evenly from the text."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    length = CONTEXT + SCORED
    starts = torch.linspace(0, len(ids) - length, count).long()
    rows = torch.stack([ids[s : s + length] for s in starts])
    if tokenizer.bos_token_id is not None:
        rows[:, 0] = tokenizer.bos_token_id
    return rows


def log_probabilities(model, rows: torch.Tensor) -> list[torch.Tensor]:
    """Of the scored tokens but the first, which the prompt predicts."""
    parts = rows.split(4)
    return [continuation_logits(model, part, CONTEXT)[:, 1:].log_softmax(-1) for part in parts]


def compare(before, after, rows: torch.Tensor) -> tuple[float, float, float, float, float]:
    """Mean KL, its interval, agreement, rise of perplexity."""
    kl, same, gain = [], [], []
    for p, q, target in zip(before, after, rows[:, CONTEXT + 1 :].split(4), strict=True):
        kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
        where = target.unsqueeze(-1)
        gain.append(p.gather(-1, where) - q.gather(-1, where))
    each = torch.cat(kl).double().numpy()
    draws = numpy.random.default_rng(0).integers(0, len(each), (2000, len(each)))
    low, high = numpy.quantile(each[draws].mean(1), [0.025, 0.975])
    rise = float(torch.cat(gain).double().mean().expm1())
    return float(each.mean()), float(low), float(high), float(torch.cat(same).mean()), rise


def decode(model, ids: torch.Tensor, tokens: int = 24) -> float:
    """Milliseconds of a greedy token."""
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        times = []
        for _ in range(tokens):
            ids = out.logits[:, -1:].argmax(-1)
            past = passing(model, cache_of(out))
            begin = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, **past)
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def mlp_milliseconds(model, inputs: list[torch.Tensor]) -> float:
    """Of one token in all MLPs of a patched model, by their rules."""
    mlps = [m for m in model.modules() if isinstance(m, SparseMLP)]
    times = []
    with torch.no_grad():
        for _ in range(11):
            begin = time.perf_counter()
            for mlp, x in zip(mlps, inputs, strict=True):
                mlp.rule.apply(x, mlp.weights)
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def mlp_inputs(model, row: torch.Tensor) -> list[torch.Tensor]:
    """One token's input of each MLP."""
    found: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        record_inputs(
            model,
            find_mlps(model),
            lambda _, x: found.append(x.reshape(-1, x.shape[-1])[-1:].contiguous()),
        ),
    ):
        model(input_ids=row[None], use_cache=False)
    return found


def measure(model, tokenizer, rows, before, budget: float) -> tuple:
    """What a budget costs and saves."""
    begin = time.perf_counter()
    tuned = moyu_ext.tune(model, budget=budget)
    seconds = time.perf_counter() - begin
    inputs = mlp_inputs(model, rows[0])
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    tokens: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(3):
        for name, method in (("dense", None), ("sparse", tuned.method())):
            moyu_ext.patch(model, method)
            times[name].append(mlp_milliseconds(model, inputs))
            tokens[name].append(decode(model, rows[:1, :CONTEXT]))
            moyu_ext.unpatch(model)
    moyu_ext.patch(model, tuned.method())
    found = compare(before, log_probabilities(model, rows), rows)
    report = moyu_ext.report(model)
    moyu_ext.unpatch(model)
    dense, sparse = (statistics.median(times[name]) for name in ("dense", "sparse"))
    ratio = tuned.seconds / tuned.dense_seconds
    whole = [statistics.median(tokens[name]) for name in ("dense", "sparse")]
    return tuned, seconds, found, report, (dense, dense * ratio, sparse), whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--bits", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default="float32", help="of the weights as they are")
    parser.add_argument("--windows", type=int, default=22)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = windows(tokenizer, args.text.read_text(), args.windows)
    out = sys.stdout if args.csv is None else args.csv.open("a")
    writer = csv.writer(out, lineterminator="\n")
    if args.csv is None or args.csv.stat().st_size == 0:
        writer.writerow(COLUMNS)
    for bits in args.bits:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        if bits:
            model = moyu_ext.pack(model, bits)
        before = log_probabilities(model, rows)
        for budget in args.budget:
            tuned, seconds, found, report, mlp, whole = measure(
                model, tokenizer, rows, before, budget
            )
            row = (
                *(args.model.name, f"{bits} bits" if bits else args.dtype, budget),
                *(f"{seconds:.0f}", f"{tuned.kl:.5f}", f"{tuned.predicted:.5f}"),
                *(args.text.name, len(rows) * (SCORED - 1)),
                *(f"{value:.5f}" for value in found),
                *(sum(layer.price > 0 for layer in tuned.layers), f"{report.density:.3f}"),
                *(f"{report.estimated:.3f}", *(f"{value:.2f}" for value in (*mlp, *whole))),
                tuned.machine,
            )
            writer.writerow(row)
            out.flush()
            print(dict(zip(COLUMNS, row, strict=True)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
