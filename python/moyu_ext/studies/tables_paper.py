"""Tables 1-5 as arXiv 2406.12569 prints them, and against each other: nothing here was measured
by this project.

Each table maps a row's label to its cells, None where the paper prints nothing. Accuracy and ROUGE
in percent, latency in seconds.
"""

from __future__ import annotations

from .report import Report

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


def consistency(report: Report) -> None:
    """The paper's rows against each other."""
    one, two, five = TABLE_1["LLaMA-2-7B"], TABLE_2, TABLE_5
    drops = {
        m: [a - b for a, b in zip(one[m][:3], row[:3], strict=True) if a and b]
        for m, row in five.items()
    }
    gains = {
        f"{m} {setup}": row[1] - row[0] for (m, setup), row in TABLE_4.items()
        if row[0] is not None and row[1] is not None
    }  # fmt: skip
    named = {m: ", ".join(f"{x:.2f}" for x in values) for m, values in drops.items()}
    sparse = {m: values for m, values in drops.items() if m != "dense"}
    most, least = (
        [choose(sparse, key=lambda m: sparse[m][i]) for i in range(3)] for choose in (max, min)
    )
    report.table(
        "The paper's rows against each other",
        ["rows", "what they show"],
        [
            ["Table 2, 1-shot ROUGE-1, and Table 1, GSM8K", "; ".join(
                f"{m} ({two[m][3]}) and ({one[m][3]})" for m in two)],
            ["Table 1 less Table 5, dense (MMLU, TruthfulQA, Winogrande)", named["dense"]],
            ["Table 1 less Table 5, the methods", "; ".join(
                f"{m} {named[m]}" for m in TABLE_5 if m != "dense")],
            ["Table 4, 1-shot less 0-shot (text: sTDA gains most; TDA, which has no row, is the "
             "most accurate)", "; ".join(f"{k} {v:+.2f}" for k, v in gains.items())],
            ["Table 3, dense", "both rows are labelled "
             f"{TABLE_3[0][2]} % sparse"],
            ["Section 4.4 and Limitations", "Table 5 removes heavy hitters; the limitations say "
             "that this ablation was not conducted"],
        ],
    )  # fmt: skip
    report.numbers["table 1 less table 5, quoted"] = drops
    report.judged(
        "section 4.4, Table 5",
        "without heavy hitters TDA's accuracy falls most and sRIDA's least",
        "by the paper's own rows, Table 1 less Table 5 on MMLU, TruthfulQA and Winogrande: falls "
        f"most {', '.join(most)}; least {', '.join(least)}",
        {"": 1 if {*most} == {"TDA"} and {*least} == {"sRIDA"} else -1},
    )
    report.judged(
        "section 4.4, Table 4",
        "from 0-shot to 1-shot sTDA gains most",
        "by the paper's own rows: " + ", ".join(f"{k} {v:+.2f}" for k, v in gains.items()),
        {"": 1 if max(gains, key=lambda k: gains[k]).startswith("sTDA") else -1},
    )
