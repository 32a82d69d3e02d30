"""The methods, one file each, and their registry."""

from .base import Method, Rule, SequenceRule, TokenRule
from .dense import Dense
from .qrida import QRIDA
from .srida import SRIDA
from .stda import STDA
from .tda import TDA

# The command line and the tests find methods here; a new one is one file and one entry.
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Dense, TDA, STDA, SRIDA, QRIDA)
}

__all__ = [
    "METHODS",
    "QRIDA",
    "SRIDA",
    "STDA",
    "TDA",
    "Dense",
    "Method",
    "Rule",
    "SequenceRule",
    "TokenRule",
]
