"""The clock of single rows: what it counts and what it leaves out."""

import math

import pytest
import torch
from moyu_ext.patching.clock import Clock


def run(clock: Clock, monkeypatch: pytest.MonkeyPatch, rows: int, nanoseconds: int) -> None:
    """One call that takes this long."""
    for name, now in (("start", 1000), ("stop", 1000 + nanoseconds)):
        monkeypatch.setattr("time.perf_counter_ns", lambda now=now: now)
        if name == "start":
            began = clock.start(torch.zeros(rows, 4))
        else:
            clock.stop(began, rows)


def test_calls_of_one_row_behind_the_first_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    run(clock, monkeypatch, rows=3, nanoseconds=500)  # no warm-up either: another operator ran
    assert math.isnan(clock.seconds)
    run(clock, monkeypatch, rows=1, nanoseconds=900)  # warms up
    assert math.isnan(clock.seconds)
    run(clock, monkeypatch, rows=1, nanoseconds=10)
    run(clock, monkeypatch, rows=2, nanoseconds=70)
    run(clock, monkeypatch, rows=1, nanoseconds=30)
    assert clock.seconds == pytest.approx(20e-9)
