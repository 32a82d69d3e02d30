"""The methods, one file each, and their registry."""

from .base import AdaptiveRule, Method, Rule, SequenceRule, TokenRule
from .dense import Dense
from .lossless import Lossless
from .online_roda import OnlineRODA
from .qrida import QRIDA
from .rida import RIDA
from .roda import RODA
from .srida import SRIDA
from .stda import STDA
from .tda import TDA

# The command line and the tests find methods here; a new one is one file and one entry.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Lossless, Dense, TDA, STDA, SRIDA, QRIDA, RODA, OnlineRODA, RIDA)
}

__all__ = [
    "METHODS",
    "QRIDA",
    "RIDA",
    "RODA",
    "SRIDA",
    "STDA",
    "TDA",
    "AdaptiveRule",
    "Dense",
    "Lossless",
    "Method",
    "OnlineRODA",
    "Rule",
    "SequenceRule",
    "TokenRule",
]
