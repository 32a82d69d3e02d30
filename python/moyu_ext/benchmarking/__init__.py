"""Speed, measured honestly: dense and sparse interleaved in one run, every result checked."""

from .at_density import method_at
from .decode import measure_decode
from .geometries import GEOMETRIES, Geometry, geometry
from .machine import Machine
from .mlp import measure_mlp
from .mlp_cuda import measure_mlp_cuda
from .rows import COLUMNS, BenchmarkError, Row, check_csv, write_csv

__all__ = [
    "COLUMNS",
    "GEOMETRIES",
    "BenchmarkError",
    "Geometry",
    "Machine",
    "Row",
    "check_csv",
    "geometry",
    "measure_decode",
    "measure_mlp",
    "measure_mlp_cuda",
    "method_at",
    "write_csv",
]
