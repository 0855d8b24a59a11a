"""Distillation of what stays continuous: vectors that the plan keeps move towards what the float model says.

Codes are frozen, nothing is added to what is stored (docs/method.md 14).
"""

from rwkvq.distill.train import Distilled, distill

__all__ = ["Distilled", "distill"]
