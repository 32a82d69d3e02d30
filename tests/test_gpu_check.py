"""tools/gpu_check.sh and its list of targets, as far as they go without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moyu_ext.benchmarking import COLUMNS

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    common = {"dtype": "float16", "rows": 1, "density": 0.3288, "fraction_of_bandwidth": 0.5}
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({**common, **row} for row in rows)


def targets(folder: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "tools" / "gpu_targets.py"), str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_targets_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    empty = targets(tmp_path)
    assert len(empty) == 19 and all("not measured" in line for line in empty)
    given = {"plan": "given", "method": "set"}
    write(
        tmp_path,
        "cuda_mlp.csv",
        [
            {"name": "threshold_compact", "geometry": "11008", "median_us": 4.0},
            {**given, "geometry": "4096x11008", "speedup_vs_dense": 2.0},
            {**given, "geometry": "4096x11008", "speedup_vs_dense": 2.6},  # the latest counts
            {**given, "geometry": "4096x11008", "speedup_vs_dense": 9.0, "density": 0.5},
            {**given, "geometry": "4096x14336", "speedup_vs_dense": 1.5, "density": 0.5416},
        ],
    )
    moyu = {"geometry": "llama-2-7b"}
    write(
        tmp_path,
        "cuda_moyu.csv",
        [
            {**moyu, "plan": "given", "median_us": 30.0},
            {**moyu, "plan": "input-mask", "median_us": 45.0},
            {**moyu, "plan": "shadow-eps-2", "density": 0.3301, "speedup_vs_dense": 2.1},
        ],
    )
    decode = {"geometry": "llama-2-7b", "name": "generate-1024+1024-loop"}
    write(
        tmp_path,
        "cuda_decode.csv",
        [
            {**decode, "method": "stda", "speedup_vs_dense": 1.5},
            {**decode, "method": "stda+projections", "speedup_vs_dense": 1.7},
            {
                **decode,
                "method": "srida",
                "name": "generate-1024+128-static",
                "speedup_vs_dense": 1.5,
            },
        ],
    )
    lines = targets(tmp_path)
    assert [line for line in lines if line.startswith("LLaMA") and "not measured" not in line] == [
        "LLaMA-2-7B 1024+128 static, srida                       1.500  target 1.45  met",
        "LLaMA-2-7B 1024+1024 loop, stda                         1.500  target 1.6  MISSED",
        "LLaMA-2-7B 1024+1024 loop, stda+projections             1.700  target 1.6  met",
    ]
    words = [" ".join(line.split()[-4:]) for line in lines]
    assert words[:5] == [
        "2.600 target 2.5 met", "1.500 target 1.6 MISSED", "0.500 target 0.8 MISSED",
        "1.500 target 1.3 met", "4.000 target 5.0 met",
    ]  # fmt: skip
    assert words[6] == "2.100 target 2.0 met" and words[5] == "not measured target 2.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh")],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "MOYU_RESULTS": str(tmp_path / "rows"),
            "MOYU_WORK": str(tmp_path / "work"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and "torch finds no GPU" in done.stderr
    assert list((tmp_path / "rows").iterdir()) == []
