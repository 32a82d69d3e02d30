"""Packed rows: codes of 3 to 8 bits, with a scale and an offset per group of columns."""
