"""The figures that the GPU must show, beside what the rows of a folder say; see gpu_check.sh.

python tools/gpu_targets.py benchmarks/results
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

Row = dict[str, str]


def rows_of(folder: Path, name: str) -> list[Row]:
    file = folder / name
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        table = list(csv.DictReader(lines))
    # One card's rows: those of the card that was measured last.
    return [row for row in table if row.get("device") == table[-1].get("device")]


def last(
    table: list[Row], density: float | None = None, within: float = 0.0005, **wanted: str
) -> Row | None:
    """The latest row with these cells, at this density."""
    for row in reversed(table):
        if any(row[key] != value for key, value in wanted.items()):
            continue
        if density is None or abs(float(row["density"]) - density) <= within:
            return row
    return None


def number(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row is not None and row[column] else None


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def figures(folder: Path) -> list[tuple[str, float | None, float, Callable[[float, float], bool]]]:
    """(what, measured or None, target, whether the target is met)."""
    kernels = rows_of(folder, "cuda_mlp.csv")
    moyu = rows_of(folder, "cuda_moyu.csv")
    decode = rows_of(folder, "cuda_decode.csv")
    half = {"dtype": "float16", "rows": "1"}
    seven = last(kernels, 0.3288, geometry="4096x11008", plan="given", **half)
    eight = last(kernels, 0.5416, geometry="4096x14336", plan="given", **half)
    ours = last(moyu, 0.3288, geometry="llama-2-7b", plan="given", **half)
    peer = last(moyu, 0.3288, geometry="llama-2-7b", plan="input-mask", **half)
    shadow = [
        last(moyu, 0.33, 0.002, geometry="llama-2-7b", plan=plan, **half)  # thresholds come near it
        for plan in ("shadow-2", "shadow-eps-2")
    ]
    compact = last(kernels, name="threshold_compact", geometry="11008")
    generate = [
        (f"{lengths} {mode}, {method}",
         last(decode, method=method, name=f"generate-{lengths}-{mode}", dtype="float16"), target)
        for mode in ("static", "deferred", "loop")
        for lengths, method, target in (
            ("1024+1024", "stda", 1.6), ("1024+1024", "stda+projections", 1.6),
            ("1024+128", "srida", 1.45), ("1024+128", "srida+projections", 1.45),
        )
    ]  # fmt: skip

    def at_least(value: float, target: float) -> bool:
        return value >= target

    def at_most(value: float, target: float) -> bool:
        return value <= target

    speedup = "speedup_vs_dense"
    return [
        ("MLP 4096x11008, density 0.3288, over cuBLAS", number(seven, speedup), 2.5, at_least),
        ("MLP 4096x14336, density 0.5416, over cuBLAS", number(eight, speedup), 1.6, at_least),
        ("the first one, share of copy bandwidth", number(seven, "fraction_of_bandwidth"), 0.80,
         at_least),
        ("over the Triton masked GEMV", over(number(peer, "median_us"), number(ours, "median_us")),
         1.3, at_least),
        ("threshold_compact, f = 11008, us", number(compact, "median_us"), 5.0, at_most),
        ("qRIDA 2 bits, density 0.33, top k", number(shadow[0], speedup), 2.0, at_least),
        ("qRIDA 2 bits, density 0.33, threshold", number(shadow[1], speedup), 2.0, at_least),
        *((f"LLaMA-2-7B {what}", number(row, speedup), target, at_least)
          for what, row, target in generate),
    ]  # fmt: skip


def main() -> None:
    for what, value, target, met in figures(Path(sys.argv[1])):
        if value is None:
            print(f"{what:48s} not measured  target {target}")
        else:
            word = "met" if met(value, target) else "MISSED"
            print(f"{what:48s} {value:12.3f}  target {target}  {word}")


if __name__ == "__main__":
    main()
