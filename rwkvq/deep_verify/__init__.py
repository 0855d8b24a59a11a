"""Prove where an artifact comes from: its recorded inputs are the given ones, and quantizing again gives its bytes.

Nothing here computes in its own way: windows, activations and the block job are those of the line.
"""

from rwkvq.deep_verify.proof import DeepReport, Evidence, deep_verify
from rwkvq.deep_verify.records import Check

__all__ = ["Check", "DeepReport", "Evidence", "deep_verify"]
