"""A whole run in miniature: a tiny checkpoint, a byte vocabulary, texts, and settings that use them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from rwkvq.checkpoint.spec import Version
from rwkvq.settings import Settings, apply_overrides, parse
from rwkvq.stages import STAGES
from tests.tiny import write_byte_vocabulary, write_tiny

LINE = tuple(name for name in STAGES if name not in ("gradients", "curves", "distill"))
"""The stages of policy rwkvquant, which write_inputs asks for."""

WORDS = [
    "the",
    "a",
    "old",
    "new",
    "sea",
    "house",
    "man",
    "woman",
    "ran",
    "saw",
    "took",
    "red",
    "blue",
    "door",
    "stone",
    "river",
    "and",
    "then",
    "but",
    "with",
    "over",
    "under",
]


def sentences(count: int, seed: int) -> str:
    """Seeded nonsense that no two seeds share."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) + chooser.choice(["", "", ".", ","]) for _ in range(count))


def write_inputs(folder: Path, version: Version = "x070", suffix: str = ".pth", **sizes: Any) -> dict[str, Any]:
    """Write model, tokenizer and texts into `folder`; return settings values that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    model, vocabulary = folder / f"model{suffix}", folder / "vocabulary.txt"
    write_tiny(model, version, **sizes)
    write_byte_vocabulary(vocabulary)
    (folder / "calibration.txt").write_text(sentences(1500, 1))
    (folder / "validation.txt").write_text(sentences(400, 2))
    lines = [json.dumps({"text": sentences(12, 100 + index) + " door"}) for index in range(6)]
    (folder / "lambada.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "windows": {
            "source": str(folder / "calibration.txt"),
            "tokenizer": str(vocabulary),
            "samples": 12,
            "length": 48,
            "held_out": 2,
        },
        "activations": {"batch": 4},
        "gradients": {"windows": 4},
        "curves": {"state_bits": 8, "guide": 0.5, "sample": 1024},
        "plan": {"policy": "rwkvquant"},
        "distill": {"steps": 0},
        "evaluate": {
            "text": str(folder / "validation.txt"),
            "lambada": str(folder / "lambada.jsonl"),
            "windows": 4,
            "length": 48,
            "batch": 4,
        },
        "run": {"workers": 1},
    }


def settings_of(values: dict[str, Any], *overrides: str) -> Settings:
    """Validated settings of `values` with overrides."""
    return parse(apply_overrides(values, overrides), "test")


def tree_hash(folder: Path) -> dict[str, str]:
    """Hash of every file below `folder` by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
