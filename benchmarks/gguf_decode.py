"""A real model from its GGUF file, beside llama.cpp with the same file: tokens in turn.

    python benchmarks/gguf_decode.py FILE --llama-bench PROGRAM [--csv FILE] [--new 64] [--rounds 5]

tools/real_models.py fetches two such files. Ours is generate, greedy, behind a short prompt: the
time of a token is the difference of a long and a short generation over that of their lengths.
llama.cpp's is llama-bench's (decoding from an empty cache, without a sampler). Before rows are
written, the patched model's logits of a decode step are compared with those through its layers' own
forwards. Bytes are those of the weights that a token reads, as ours lie in memory.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from moyu_ext.benchmarking.check import verify_step
from moyu_ext.benchmarking.llama_cpp import find_llama_bench
from moyu_ext.benchmarking.machine import Bandwidth, Machine
from moyu_ext.benchmarking.rows import check_csv, make_row, quantile, write_csv
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.packing.layer import PackedLinear

import moyu_ext

PROMPT = "The history of the city begins with"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    return parser.parse_args()


def token_us(model, ids: torch.Tensor, count: int) -> float:
    """Microseconds of one more token in generate."""
    times = []
    for new in (2, 2 + count):
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / count * 1e6


def llama_us(program: Path, file: Path, count: int) -> float:
    command = [str(program), "-m", str(file), "-p", "0", "-n", str(count), "-r", "1", "-ngl", "0"]
    command += ["-t", str(torch.get_num_threads()), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (result,) = json.loads(done.stdout)
    return 1e6 / result["avg_ts"]


@torch.inference_mode()
def step_logits(model, ids: torch.Tensor) -> torch.Tensor:
    cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
    return model(input_ids=ids[:, -1:], use_cache=True, **passing(model, cache)).logits


def main() -> None:
    args = arguments()
    program = find_llama_bench(args.llama_bench)
    if args.csv:
        check_csv(args.csv)
    machine, bandwidth = Machine.look(), Bandwidth()
    model, tokenizer = moyu_ext.load(args.file)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    read = sum(m.weight.nbytes for m in model.modules() if isinstance(m, PackedLinear))
    plain = step_logits(model, ids)
    times = {"unpatched": [], "dense": [], "llama.cpp": []}
    for turn in range(args.rounds + 1):
        bandwidth.sample()
        unpatched = token_us(model, ids, max(8, args.new // 4))
        moyu_ext.patch(model, moyu_ext.Dense())
        if turn == 0:  # everything warms up
            error = verify_step("dense", step_logits(model, ids), plain)
        ours = token_us(model, ids, args.new)
        used = moyu_ext.report(model).step
        moyu_ext.unpatch(model)
        theirs = llama_us(program, args.file, args.new)
        if turn:
            for name, value in zip(times, (unpatched, ours, theirs), strict=True):
                times[name].append(value)
    print(used)
    gbps = max(bandwidth.gbps, *(read / quantile(t, 0.5) / 1e3 for t in times.values()))
    rows = [
        make_row(
            name="generate" if name != "llama.cpp" else "llama-bench",
            device=machine.label,
            dtype="gguf",
            geometry=args.file.stem,
            method=name,
            plan="dense",
            rows=1,
            density=1.0,
            microseconds=measured,
            dense_microseconds=times["unpatched"],
            bytes=read,
            bandwidth_gbps=gbps,
            dense_impl="transformers eager, packed",
            max_rel_err=error if name == "dense" else float("nan"),
        )
        for name, measured in times.items()
    ]
    for row in rows:
        print(f"{row.method:10s} {1e6 / row.median_us:7.1f} tokens/s {row.gbps:6.1f} GB/s")
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
