"""Calibration of thresholds: `cett` (the measure), `calibrate` (the search), `thresholds` (the
result), `text` (what it is measured on).

Nothing is imported here: `methods` needs `thresholds`, and `calibrate` stands above `patching`.
"""
