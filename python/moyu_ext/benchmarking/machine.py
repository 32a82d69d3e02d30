"""The machine under the numbers: what it is, how busy it is, how fast it reads memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import _load, ops
from .._cpu import cpu_name
from ..errors import ConfigurationError
from .rows import quantile

MIB = 1 << 20
BUSY = 0.08  # share of the machine's time that others may use before a ratio is in doubt


@dataclass(frozen=True)
class Machine:
    """device: the CPU's name. threads: torch's. cache_bytes: last-level cache. load: of the last
    minute. busy: the share of all cores' time that was in use just before the run, NaN if unknown.
    """

    device: str
    cores: int
    threads: int
    isa: str
    cache_bytes: int
    load: float
    busy: float

    @classmethod
    def look(cls, seconds: float = 1.0) -> Machine:
        """Look at the machine; sleeps for `seconds` to see whether others use it."""
        return cls(
            device=cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            isa=_load._C.isa_name(),
            cache_bytes=last_level_cache(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
            busy=busy_share(seconds),
        )

    @property
    def label(self) -> str:
        """What rows call it: processors of one name differ in their instructions."""
        return f"{self.device}, {self.isa}"

    def warnings(self) -> list[str]:
        """What makes the numbers of this run doubtful."""
        if self.busy <= BUSY:
            return []
        return [
            f"other processes use {self.busy:.0%} of this machine (load {self.load:.2f}); threads "
            "then wait for each other in every call, so measure again when it is quiet"
        ]


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where that is unknown."""
    sizes = [32 * MIB]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": MIB, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def busy_share(seconds: float) -> float:
    """The share of all cores' time that is in use while this process sleeps; NaN if unknown."""
    if not Path("/proc/stat").exists():
        return float("nan")
    before = _ticks()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
    return 1 - idle / total if total else float("nan")


def _ticks() -> tuple[int, int]:
    values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(values), values[3] + values[4]  # idle and waiting for a disk


def require_memory(needed: int, what: str) -> None:
    """Raise ConfigurationError where fewer than `needed` bytes are available."""
    available = _status("/proc/meminfo", "MemAvailable")
    if available is not None and available < needed:
        raise ConfigurationError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
            "available; choose fewer layers or a smaller geometry"
        )


def _status(file: str, field: str) -> int | None:
    """A field in kB of a file like /proc/self/status, in bytes; None where there is none."""
    path = Path(file)
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


class MemoryWatch:
    """With-block that sees by how much memory grows: `peak` within it, `lasting` after it.

    In bytes of resident anonymous memory, looked at every millisecond: file-backed memory would
    count the code that the kernel has dropped and reads again. None where there is no /proc.
    """

    peak: int | None = None
    lasting: int | None = None

    def __enter__(self) -> MemoryWatch:
        before = _status("/proc/self/status", "RssAnon")
        self._before = self._highest = before or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        after = _status("/proc/self/status", "RssAnon")
        if after is None:
            return
        self._thread.join()
        self.peak = max(self._highest, after) - self._before
        self.lasting = after - self._before

    def _look(self) -> None:
        while not self._over.wait(0.001):
            now = _status("/proc/self/status", "RssAnon") or 0
            self._highest = max(self._highest, now)


def _gather(flat: Tensor) -> Callable[[], object]:
    weight = flat.view(torch.bfloat16).view(-1, 4096)
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    indices = torch.arange(weight.shape[0], dtype=torch.int32)
    count = torch.tensor([weight.shape[0]], dtype=torch.int32)
    return lambda: ops.gather_gemv(x, weight, indices, count)


def _times_vector(flat: Tensor) -> Callable[[], object]:
    weight = flat.view(torch.float32).view(-1, 4096)
    x = torch.ones(4096)
    return lambda: torch.mv(weight, x)


# Which of these streams fastest depends on the processor, so each is tried and the best counts.
_READERS: dict[str, Callable[[Tensor], Callable[[], object]]] = {
    "sum of int64": lambda flat: flat.sum,
    "maximum of int32": lambda flat: flat.view(torch.int32).amax,
    "float32 matrix times vector": _times_vector,
    "gather_gemv": _gather,
}


class Bandwidth:
    """The machine's read bandwidth with torch's threads, sampled in between other measurements.

    Every sample streams `size` bytes per reader, each through memory of its own, so that with the
    other readers and the measured work in between nothing of it is left in a cache.
    """

    def __init__(self, size: int = 128 * MIB) -> None:
        self.size = size // 16384 * 16384 or 16384
        self._read = {
            name: make(torch.ones(self.size // 4).view(torch.int64))
            for name, make in _READERS.items()
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._read}

    def sample(self) -> None:
        """Read once by each reader."""
        for name, read in self._read.items():
            start = time.perf_counter()
            read()
            self._seconds[name].append(time.perf_counter() - start)

    @property
    def by_reader(self) -> dict[str, float]:
        """GB/s by reader, from the median time."""
        return {n: self.size / quantile(s, 0.5) / 1e9 for n, s in self._seconds.items()}

    @property
    def gbps(self) -> float:
        """GB/s of the fastest reader."""
        return max(self.by_reader.values())
