"""Comparison of methods over seeds, each at the coefficient that a sweep chose for it.

``python -m tre_lightning.compare --config FILE``; see :mod:`tre_lightning.compare.plan`.
"""

from tre_lightning.compare.plan import Method, Plan, Trial, read_plan

__all__ = ["Method", "Plan", "Trial", "read_plan"]
