"""Benchmarks at toy sizes: what they write is checked, complete and honest about failure."""

import csv
import json
import math
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moyu_ext.benchmarking import GEOMETRIES, BenchmarkError, Geometry, Machine, method_at
from moyu_ext.benchmarking import machine as machines
from moyu_ext.benchmarking.cases import PLANS
from moyu_ext.benchmarking.mlp import _layer_count, _Timing
from moyu_ext.benchmarking.probes import recorded
from moyu_ext.benchmarking.random_model import random_model, weight_bytes
from moyu_ext.benchmarking.rows import make_row, quantile
from moyu_ext.benchmarking.weights import Filler
from moyu_ext.cli import app
from moyu_ext.errors import ConfigurationError
from moyu_ext.methods import RODA
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.models.fingerprint import fingerprint
from moyu_ext.routers.router import LayerRouter, Router
from torch import Tensor
from typer.testing import CliRunner

from moyu_ext import benchmarking, ops, patch, reference, report, unpatch

LLAMA = Geometry("tiny", 64, 192, 3, 4, 2, 211)
OPT = Geometry(
    "tiny-opt", 64, 256, 3, 4, 4, 211, gated=False, activation="relu", biased=True, tied=True
)
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "busy_share", lambda seconds: 0.0)


def measure(size: Geometry | str, dtype: torch.dtype, **options: Any) -> Any:
    settings: dict[str, Any] = {"repeats": 2, "layers": 3, "bandwidth_bytes": 1 << 16}
    return benchmarking.measure_mlp(size, dtype, **{**settings, **options})


def measure_decode(size: Geometry, names: list[str], dtype: torch.dtype, **options: Any) -> Any:
    methods = [method_at(name, 1.0 if name == "dense" else 0.33) for name in names]
    settings: dict[str, Any] = {"prompt_tokens": 20, "new_tokens": 2, "rounds": 1}
    return benchmarking.measure_decode(
        size, methods, dtype, bandwidth_bytes=1 << 16, **{**settings, **options}
    )


def test_columns_are_those_of_the_design() -> None:
    assert ",".join(benchmarking.COLUMNS) == (
        "name,device,dtype,geometry,method,plan,rows,density,median_us,p20_us,p80_us,bytes,gbps,"
        "bandwidth_gbps,fraction_of_bandwidth,speedup_vs_dense,dense_impl,max_rel_err,torch,commit"
    )


# ---- one MLP ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", ["111,300", OPT])
def test_every_plan_gives_checked_rows(size: Geometry | str, dtype: torch.dtype) -> None:
    plans = [*list(PLANS)[:5], "shadow-2", "shadow-3", "scores-1", "scores-4"]
    result = measure(size, dtype, plans=plans, densities=[1.0, 0.3], rows=[1, 3])
    got = [(row.rows, row.plan) for row in result.rows]
    one = ["dense", "dense-neuron-major", *2 * ["given"], *2 * ["gate"], *2 * ["product"]]
    one += [*2 * ["shadow-2"], *2 * ["shadow-3"], "scores-1", "scores-4"]
    assert got == [(n, plan) for n in (1, 3) for plan in one]
    for row in result.rows:
        assert 0 <= row.max_rel_err < 0.02
        assert row.p20_us <= row.median_us <= row.p80_us
        assert math.isclose(row.gbps, row.bytes / row.median_us / 1e3)
        assert math.isclose(row.fraction_of_bandwidth, row.gbps / row.bandwidth_gbps)
        dense = next(r for r in result.rows if r.plan == "dense" and r.rows == row.rows)
        assert math.isclose(row.speedup_vs_dense, dense.median_us / row.median_us)
        if row.plan in ("given", "gate", "product", "shadow-2", "shadow-3"):
            assert row.density == 1.0 or abs(row.density - 0.3) < 0.05
    assert result.bandwidth_by_reader.keys() == machines._READERS.keys()


def test_bytes_are_what_a_plan_must_read() -> None:
    rows = measure("64,200", torch.bfloat16, plans=["given", "gate", "product"], densities=[0.5])
    matrix = 64 * 200 * 2
    # Matrices read in full, and those of which the active rows are read.
    parts = {"dense": (3, 0), "given": (0, 3), "gate": (1, 2), "product": (2, 1)}
    for row in rows.rows:
        whole, active = parts[row.plan]
        assert abs(row.bytes - (whole + active * row.density) * matrix) <= 0.01 * matrix
    shadowed = measure("64,200", torch.bfloat16, plans=["shadow-2", "scores-2"], densities=[0.5])
    record = 192  # two matrices of one block: 2 * 64 bytes of codes, 2 * 2 of scales, to a line
    assert [row.bytes for row in shadowed.rows[1:]] == [
        200 * record + 3 * matrix // 2,
        200 * record,
    ]


def test_rows_have_sets_of_their_own() -> None:
    filler = Filler(torch.float32)
    layers = [benchmarking.mlp.mlp_layer(benchmarking.geometry("32,100"), filler)]
    case = PLANS["given"](layers, filler.draw(3, 32, deviation=1.0), 0.3, 0)
    first, second, third = case.active[0]
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert [int(a.sum()) for a in case.active[0]] == [30, 30, 30]


@pytest.mark.parametrize(
    ("plan", "operator"),
    [("given", "sparse_mlp"), ("product", "threshold_mlp"), ("shadow-2", "shadow_mlp"),
     ("scores-2", "shadow_scores")],
)  # fmt: skip
def test_a_wrong_result_gives_no_row(
    monkeypatch: pytest.MonkeyPatch, plan: str, operator: str
) -> None:
    right = getattr(ops, operator)

    def wrong(*args: Any) -> Any:
        got = right(*args)
        out = got if isinstance(got, Tensor) else got[0]
        out[..., 7] += 0.05 * out.abs().max()
        return got

    monkeypatch.setattr(ops, operator, wrong)
    with pytest.raises(BenchmarkError, match=f"{plan} at density"):
        measure("64,200", torch.float32, plans=[plan], densities=[0.5])


def test_a_wrong_set_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.threshold_mlp
    monkeypatch.setattr(
        ops, "threshold_mlp", lambda *a: (right(*a)[0], torch.tensor([99], dtype=torch.int32))
    )
    with pytest.raises(BenchmarkError, match=r"\[99\]"):
        measure("64,200", torch.float32, plans=["gate"], densities=[0.5])


def test_the_baseline_comes_before_every_case_on_other_weights() -> None:
    calls: list[tuple[str, int]] = []

    def case(name: str) -> Any:
        return SimpleNamespace(call=lambda k: calls.append((name, k)), layers=range(5))

    timing = _Timing([case("dense"), case("a"), case("b")])
    for repeat in range(6):
        timing.round(warm_up=repeat == 0)
    assert [name for name, _ in calls] == 6 * ["dense", "a", "dense", "b"]
    assert [k for _, k in calls] == [n % 5 for n in range(24)]
    assert [len(times) for times in timing.microseconds] == [10, 5, 5]


@pytest.mark.parametrize("cases", [1, 2, 5, 7, 15])
def test_every_case_meets_every_layer(cases: int) -> None:
    count = _layer_count(270, 1200, cases)
    assert count * 270 >= 1200
    for i in range(cases):
        assert {(2 * i + 1 + 2 * cases * r) % count for r in range(count)} == set(range(count))


BAD = {
    "plan": ({"plans": ["down"]}, "plan is 'down'"),
    "density above one": ({"densities": [1.5]}, "density is 1.5"),
    "density zero": ({"densities": [0.0]}, "density is 0.0"),
    "no repeats": ({"repeats": 0}, "0; expected an integer"),
    "no rows": ({"rows": [0]}, "0; expected an integer"),
    "geometry": ({"size": "llama-9"}, "geometry is 'llama-9'"),
    "half a geometry": ({"size": "64"}, "geometry is '64'"),
    "dtype": ({"dtype": torch.float64}, "dtype is torch.float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigurationError, match=message):
        measure(**{"size": "64,200", "dtype": torch.float32, **changes})


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_status", lambda file, field: 1 << 20)
    with pytest.raises(ConfigurationError, match="GB of memory"):
        measure("512,2048", torch.float32)
    with pytest.raises(ConfigurationError, match="GB of memory"):
        random_model(LLAMA)


# ---- a whole model ----


@pytest.mark.parametrize("size", [LLAMA, OPT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_rows(size: Geometry, dtype: torch.dtype) -> None:
    names = ["srida", "stda", "tda", "tda-gate", "dense", "qrida"]
    result = measure_decode(size, names, dtype)
    plans = ["dense", "given", "given", "product", "gate", "dense", "given"]
    assert [s.plan for s in result.sides] == plans
    assert [row.name for row in result.rows] == 7 * ["decode", "decode-mlp", "prefill"]
    for row in result.rows:
        assert 0 < row.max_rel_err < 0.02
        assert row.rows == (20 if row.name == "prefill" else 1)
        assert 0 < row.bytes <= result.model_bytes
        if row.name != "prefill" and row.plan != "dense":
            assert 0.2 < row.density < 0.45
    for side, step, mlps in zip(result.sides, result.rows[::3], result.rows[1::3], strict=True):
        assert 0 < side.mlp_share < 1
        # All matrices of the MLPs, or, of those, what the plan reads.
        whole = size.layers * (3 if size.gated else 2) * size.d * size.f * dtype.itemsize
        assert result.rows[1].bytes == whole and 0 < mlps.bytes <= whole + side.added_bytes
        assert step.bytes - mlps.bytes == result.rows[0].bytes - whole
    srida, qrida = (result.rows[3 * k] for k in (1, 6))
    assert qrida.bytes - srida.bytes == result.sides[6].added_bytes > 0
    assert len(result.as_dict()["sides"]) == 7
    json.dumps(result.as_dict())


def test_decode_rows_count_a_router() -> None:
    def roda(model: Any) -> RODA:
        d, f, rank = LLAMA.d, LLAMA.f, 4
        layer = LayerRouter(
            torch.randn(rank, d), torch.randn(f, rank), torch.zeros(f), torch.zeros(201),
            torch.full((f,), 0.5), 1e-30, 0.0, *(1.0, 1.0, 0.5, 1.0, 0.5),
        )  # fmt: skip
        return RODA(Router((layer,) * LLAMA.layers, fingerprint(model), 0.2, 0.9, 0))

    result = benchmarking.measure_decode(
        LLAMA,
        [roda],
        torch.bfloat16,
        prompt_tokens=20,
        new_tokens=3,
        rounds=1,
        bandwidth_bytes=1 << 20,
    )
    side, whole, mlps = result.sides[1], result.rows[1].bytes, result.rows[4].bytes
    read = 4 * (LLAMA.d + LLAMA.f) * 2 + 4 * LLAMA.f  # two factors, and a bias in float32
    assert side.added_bytes == LLAMA.layers * read
    assert mlps - side.added_bytes == pytest.approx(side.density * whole, abs=2 * LLAMA.layers)


def test_decode_rows_with_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measure_decode(LLAMA, ["dense", "srida"], torch.bfloat16, projections=True)
    names = ["unpatched", "dense", "srida", "dense+projections", "srida+projections"]
    assert [row.method for row in result.rows[::3]] == names
    assert [s.projections for s in result.sides] == [False] * 3 + [True] * 2
    right = ops.gather_gemv
    monkeypatch.setattr(ops, "gather_gemv", lambda *args: 1.03 * right(*args))
    with pytest.raises(BenchmarkError, match=r"dense\+projections, model.*: the result is off"):
        measure_decode(LLAMA, ["dense"], torch.bfloat16, projections=True)


def test_a_wrong_operator_in_a_model_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_mlp
    monkeypatch.setattr(ops, "sparse_mlp", lambda *args: 1.03 * right(*args))
    with pytest.raises(BenchmarkError, match=r"srida, decode step, model\.layers\.0\.mlp"):
        measure_decode(LLAMA, ["srida"], torch.bfloat16)


@pytest.mark.parametrize("size", [LLAMA, OPT])
def test_probes_see_what_the_mlp_computes(size: Geometry) -> None:
    model = random_model(size, torch.float32)
    sites = find_mlps(model)
    patch(model, method_at("tda", 0.3)(model))
    with torch.inference_mode():
        cache = cache_of(model(input_ids=torch.arange(8, 11).unsqueeze(0)))
        with recorded(sites, governed=True) as seen:
            model(input_ids=torch.arange(3, 8).unsqueeze(0), **passing(model, cache))
    unpatch(model)
    assert [s.site.index for s in seen] == [0, 1, 2]
    for s in seen:
        w = s.site.weights()
        with torch.inference_mode():
            wanted = reference.masked_mlp(
                s.x,
                w.gate,
                w.up,
                w.down_t,
                w.gate_bias,
                w.up_bias,
                w.down_bias,
                s.active,
                w.activation,
            )
        torch.testing.assert_close(s.out, wanted, rtol=1e-4, atol=1e-6)
        assert 0.1 < float(s.active.float().mean()) < 0.5


def test_random_model_is_whole() -> None:
    model = random_model(LLAMA, torch.bfloat16, layers=2)
    assert model.config.num_hidden_layers == 2 and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool(t.isfinite().all()) for t in [*model.parameters(), *model.buffers()])
    rotary = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    assert float(rotary[0]) == 1.0 and 0 < float(rotary[-1]) < 1
    opt = random_model(OPT)
    assert opt.lm_head.weight is opt.get_input_embeddings().weight
    tied = opt.lm_head.weight.numel() * 2
    assert weight_bytes(opt) < sum(v.numel() * 2 for v in opt.state_dict().values()) - tied // 2


@pytest.mark.parametrize("name", GEOMETRIES)
def test_named_geometries_are_those_of_their_models(name: str) -> None:
    parameters = {
        "llama-2-7b": 6_738_415_616,
        "llama-3-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "tinyllama-1.1b": 1_100_048_384,
        "opt-6.7b": 6_658_473_984,
    }
    g = GEOMETRIES[name]
    config = benchmarking.random_model._config(g, None, 2048)
    with torch.device("meta"):
        model = benchmarking.random_model.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters[name]


def test_stda_reaches_the_density_with_as_many_tokens_as_the_prompt_has() -> None:
    """A statistic over more tokens spreads less, so that its quantile is another."""
    model = random_model(LLAMA, torch.float32, positions=400)
    ids = torch.randint(3, LLAMA.vocabulary, (1, 300), generator=torch.Generator().manual_seed(4))
    found = []
    for tokens in (8, 300):
        patch(model, method_at("stda", 0.2, tokens)(model))
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=4, min_new_tokens=4)
        found.append(report(model).density)
        unpatch(model)
    assert abs(found[1] - 0.2) < 0.03 < abs(found[0] - 0.2)


def test_a_method_that_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="method is 'sirius'"):
        method_at("sirius", 0.5)
    with pytest.raises(ConfigurationError, match="density is 2"):
        method_at("srida", 2)
    with pytest.raises(ConfigurationError, match="tokens is 0"):
        method_at("stda", 0.5, 0)
    with pytest.raises(ConfigurationError, match="that of one MLP"):
        benchmarking.measure_decode("64,128", [])


# ---- files, machine, command line ----


def row(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "name": "mlp", "device": "a, b", "dtype": "bfloat16", "geometry": "64,200",
        "method": "sparse_mlp", "plan": "given", "rows": 1, "density": 0.33,
        "microseconds": [3.0, 1.0, 2.0], "dense_microseconds": [6.0, 4.0, 5.0], "bytes": 4000,
        "bandwidth_gbps": 4.0, "dense_impl": "torch", "max_rel_err": float("nan"),
    }  # fmt: skip
    return make_row(**{**fields, **changes})


def test_make_row() -> None:
    made = row()
    assert (made.median_us, made.gbps, made.fraction_of_bandwidth) == (2.0, 2.0, 0.5)
    assert made.speedup_vs_dense == 2.5 and made.torch == torch.__version__ and made.commit


def test_csv_is_appended_and_guarded(tmp_path: Any) -> None:
    path = tmp_path / "rows.csv"
    benchmarking.write_csv(path, [row()])
    benchmarking.write_csv(path, [row(rows=8)])
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert [r["rows"] for r in read] == ["1", "8"]
    assert read[0]["device"] == "a, b" and read[0]["max_rel_err"] == ""
    assert tuple(read[0]) == benchmarking.COLUMNS
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="has the columns"):
        benchmarking.write_csv(other, [row()])
    assert other.read_text() == "a,b\n1,2\n"
    with pytest.raises(ConfigurationError, match="does not exist"):
        benchmarking.check_csv(tmp_path / "no" / "rows.csv")


def test_quantile_is_torchs() -> None:
    values = torch.randn(31, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert math.isclose(
            quantile(values.tolist(), q), float(values.quantile(q)), rel_tol=1e-5, abs_tol=1e-6
        )


def test_random_rows_differ() -> None:
    filler = Filler(torch.float32)
    matrices = torch.cat([filler.draw(500, 64, deviation=0.5) for _ in range(3)])
    assert torch.unique(matrices, dim=0).shape[0] == 1500
    assert abs(float(matrices.std()) - 0.5) < 0.02


@LINUX
def test_memory_watch_sees_the_peak_and_what_stays() -> None:
    size = 64 << 20
    with machines.MemoryWatch() as memory:
        kept = torch.ones(size // 4)
        for _ in range(2):
            temporary = torch.ones(size // 4)
            time.sleep(0.05)
            del temporary
    assert memory.peak is not None and memory.lasting is not None
    assert abs(memory.peak - 2 * size) < size // 4
    assert abs(memory.lasting - size) < size // 4
    del kept


def test_a_busy_machine_is_named() -> None:
    quiet = Machine("cpu", 2, 2, "scalar", 1 << 25, 0.1, 0.02)
    busy = Machine("cpu", 2, 2, "scalar", 1 << 25, 3.0, 0.5)
    assert quiet.warnings() == [] and "50%" in busy.warnings()[0]


def test_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GEOMETRIES, "tiny", LLAMA)
    rows, out = tmp_path / "rows.csv", tmp_path / "out.json"
    runner = CliRunner()
    files = ["--csv", str(rows), "--json", str(out)]
    small = ["--repeats", "2", "--layers", "3", "-d", "0.5"]
    done = runner.invoke(app, ["bench", "mlp", "-g", "64,96", "-p", "given", *small, *files])
    assert done.exit_code == 0, done.output
    assert "given" in done.output and len(rows.read_text().splitlines()) == 3
    assert json.loads(out.read_text())["rows"][1]["plan"] == "given"
    short = ["--prompt", "16", "--new", "2", "--rounds", "1", "-d", "0.5", "--projections"]
    done = runner.invoke(app, ["bench", "decode", "-g", "tiny", "-m", "srida", *short, *files])
    assert done.exit_code == 0, done.output
    assert len(rows.read_text().splitlines()) == 12
    assert "srida+projections" in done.output
    facts = json.loads(out.read_text())
    assert facts["sides"][1]["method"].startswith("SRIDA(") and facts["one_down_bytes"] == 24576
    for bad in (["--dtype", "int8"], ["-p", "down"], ["--csv", str(tmp_path / "no" / "x.csv")]):
        done = runner.invoke(app, ["bench", "mlp", "-g", "64,96", *small, *bad])
        assert done.exit_code == 2 and "moyu: error:" in done.output
