"""Means over seeds, and models compared in pairs on the same documents, each with a 95 % interval."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
Seed = tuple[int, int]  # of the training, of the evaluation
Estimate = tuple[float, float | None, float | None]  # value, ci_low, ci_high

# Student's t at 97.5 % for 1, 2 ... 10 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# The last one is set beside other Infini memories only.
REFERENCES = ("local_block", "transformer_xl", "memorizing", "infini_linear")
