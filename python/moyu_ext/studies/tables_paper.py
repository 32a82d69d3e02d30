"""Tables 1-5 as arXiv 2406.12569 prints them: quoted, nothing here was measured by this project.

Each table maps a row's label to its cells, None where the paper prints nothing. Accuracy and ROUGE
in percent, latency in seconds.
"""

from __future__ import annotations

TASKS = ("MMLU", "TruthfulQA", "Winogrande", "GSM8K")
Row = tuple[float | None, ...]

TABLE_1: dict[str, dict[str, Row]] = {
    "LLaMA-2-7B": {
        "dense": (45.83, 61.04, 74.11, 13.95),
        "TDA": (45.62, 60.66, 73.88, 13.65),
        "sTDA": (43.59, 59.26, 73.21, 12.31),
        "sRIDA": (42.28, 56.92, 70.64, 10.00),
    },
    "LLaMA-3-8B": {
        "dense": (66.60, 56.11, 76.64, 49.13),
        "TDA": (63.89, 55.64, 75.37, 44.66),
        "sTDA": (61.37, 50.81, 75.18, 43.39),
        "sRIDA": (60.74, 49.02, 74.29, 40.81),
    },
}

# Sparsity in percent, from the notes under Tables 1 and 2.
SPARSITY: dict[str, dict[str, float]] = {
    "LLaMA-2-7B": {"dense": 0.0, "TDA": 67.12, "sTDA": 67.12, "sRIDA": 56.17},
    "LLaMA-3-8B": {"dense": 0.0, "TDA": 45.84, "sTDA": 45.84, "sRIDA": 40.25},
}

ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "1-shot R-1")
TABLE_2: dict[str, Row] = {
    "dense": (25.81, 8.24, 21.83, 27.15),
    "TDA": (24.46, 7.99, 21.01, 13.65),
    "sTDA": (22.13, 6.92, 18.32, 12.31),
    "sRIDA": (23.92, 7.19, 20.00, 10.17),
}

# (method, prompt + new tokens, sparsity in percent as printed, seconds)
TABLE_3: tuple[tuple[str, str, float, float], ...] = (
    ("dense", "1024+128", 67.12, 4.11),
    ("dense", "1024+1024", 67.12, 132.88),
    ("TDA", "1024+1024", 67.12, 126.23),
    ("sTDA", "1024+1024", 67.12, 91.25),
    ("sRIDA", "1024+128", 56.17, 3.18),
)

# (method, prompt + new tokens): ROUGE-1, 1-shot ROUGE-1
TABLE_4: dict[tuple[str, str], Row] = {
    ("dense", "512+128"): (18.29, 20.31),
    ("dense", "512+512"): (17.27, 20.07),
    ("sTDA", "512+512"): (14.72, 15.83),
    ("sRIDA", "512+128"): (16.93, 15.72),
}

TABLE_5: dict[str, Row] = {
    "dense": (38.83, 52.04, 66.11, None),
    "TDA": (33.94, 55.00, 63.18, None),
    "sTDA": (29.83, 48.17, 51.11, 2.16),
    "sRIDA": (39.22, 50.72, 63.84, 8.00),
}


def speedups() -> dict[str, float]:
    """Table 3: dense seconds over the method's, within one setup of prompt and new tokens."""
    dense = {setup: seconds for method, setup, _, seconds in TABLE_3 if method == "dense"}
    return {
        method: dense[setup] / seconds for method, setup, _, seconds in TABLE_3 if method != "dense"
    }
