"""What packing costs in quality: KL and top-1 agreement with the dense model, by bits and group.

    python benchmarks/packed_quality.py MODEL TEXT [--csv FILE] [--bits 8 4] [--group 64 32]

MODEL is a Hugging Face directory (tools/real_models.py makes two), TEXT a file of plain text, whose
windows of 64 tokens of context and 192 scored ones are taken evenly. Scored tokens go through the
model in steps of 8, as decoding does, so that the kernels' own rounding counts too. A row says the
bits a weight of all packed layers, the mean KL(dense || packed) in nats per token with a 95 %
bootstrap interval over windows, agreement of the most likely token and the rise of perplexity.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from moyu_ext.models.cache import passing
from moyu_ext.packing.layer import PackedLinear
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import moyu_ext

CONTEXT, SCORED, STEP = 64, 192, 8
COLUMNS = (
    *("model", "text", "bits", "group", "rounding", "bits_a_weight", "windows", "tokens"),
    *("kl", "kl_low", "kl_high", "agreement", "perplexity_rise"),
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


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of each window's scored tokens, float32 [SCORED, vocabulary]."""
    for row in ids:
        cache = DynamicCache(config=model.config)
        model(input_ids=row[None, : CONTEXT - 1], logits_to_keep=1, **passing(model, cache))
        parts = [
            model(input_ids=row[None, at : at + STEP], **passing(model, cache)).logits[0].float()
            for at in range(CONTEXT - 1, CONTEXT + SCORED - 1, STEP)
        ]
        yield torch.cat(parts)[:SCORED]


def compare(dense: list[torch.Tensor], model, ids: torch.Tensor) -> list[tuple[float, ...]]:
    """Per window: mean KL, agreement, and the mean log-likelihoods of the dense and this model."""
    found = []
    for before, after, row in zip(dense, logits(model, ids), ids, strict=True):
        p, q = before.float().log_softmax(-1), after.log_softmax(-1)
        target = row[CONTEXT : CONTEXT + SCORED, None]
        found.append(
            (
                float((p.exp() * (p - q)).sum(-1).mean()),
                float((p.argmax(-1) == q.argmax(-1)).float().mean()),
                float(p.gather(-1, target).mean()),
                float(q.gather(-1, target).mean()),
            )
        )
    return found


def bits_a_weight(model) -> float:
    """Bytes of all packed layers over their weights, in bits."""
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    return 8 * sum(m.weight.nbytes for m in layers) / weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3])
    parser.add_argument("--group", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--fit", type=Path, help="fit the rounding to this text (not TEXT)")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    ids = windows(tokenizer, args.text.read_text(), args.windows)
    dense = list(logits(load(), ids))
    out = sys.stdout if args.csv is None else args.csv.open("a")
    writer = csv.writer(out, lineterminator="\n")
    if args.csv is None or args.csv.stat().st_size == 0:
        writer.writerow(COLUMNS)
    rounding = "nearest" if args.fit is None else f"fitted to {args.fit.name}"
    fit = {} if args.fit is None else {"tokenizer": tokenizer, "texts": args.fit}
    for bits in args.bits:
        for group in args.group:
            model = moyu_ext.pack(load(), bits, group, **fit)
            scores = numpy.array(compare(dense, model, ids))
            draws = numpy.random.default_rng(0).integers(0, len(scores), (2000, len(scores)))
            low, high = numpy.quantile(scores[draws, 0].mean(1), [0.025, 0.975])
            kl, agreement, before, after = scores.mean(0)
            row = (
                *(args.model.name, args.text.name, bits, group),
                *(rounding, f"{bits_a_weight(model):.3f}"),
                *(len(ids), len(ids) * SCORED, f"{kl:.6f}", f"{low:.6f}", f"{high:.6f}"),
                *(f"{agreement:.4f}", f"{numpy.exp(before - after) - 1:.4f}"),
            )
            writer.writerow(row)
            out.flush()
            print(dict(zip(COLUMNS, row, strict=True)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
