"""The page beside llama.cpp: what its figures say of each other, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.llamacpp import KEPT, THEIRS, gguf_tokenizer_bytes, methods

OUTER_WEIGHTS = 2 * 8192 * 256
"""Of embedding and head together, in both models."""


def test_the_sizes_of_files_with_one_body_differ_by_embedding_and_head() -> None:
    def outer_bytes(emb: float, head: float) -> int:
        return int(OUTER_WEIGHTS * (emb + head) / 16)

    same_body = {
        "IQ3_XXS --pure": ("IQ3_XXS", 3.0625, 3.0625),
        "Q3_K_S --pure": ("Q3_K", 3.4375, 3.4375),
        "IQ3_XXS default": ("IQ3_XXS", 3.4375, 5.5),
        "IQ3_M default": ("IQ3_S", 3.4375, 6.5625),
        "Q3_K_M default": ("Q3_K", 3.4375, 6.5625),
        "Q4_K_M default": ("Q4_K", 4.5, 6.5625),
    }
    for name, (body, emb, head) in same_body.items():
        for small, kept in zip(THEIRS[name].sizes, THEIRS[body].sizes, strict=True):
            assert kept - small == outer_bytes(16, 16) - outer_bytes(emb, head), name


def test_ours_is_made_free_and_where_theirs_keeps_embedding_and_head_kept_too() -> None:
    found = methods({"Q4_K": 1_000_000, "IQ3_M default": 900_000})
    assert list(found) == ["free Q4_K", "kept Q4_K", "free IQ3_M default"]
    assert found["kept Q4_K"] == (*found["free Q4_K"], *KEPT)
    assert found["free IQ3_M default"][-1] == "plan.size=720000B"


def test_a_tokenizer_in_gguf(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for merges in (["a b"], [["a", "b"]]):
        path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges}}))
        # four strings of 8 bytes and their text, three types
        assert gguf_tokenizer_bytes(path) == 4 * 8 + (1 + 1 + 2 + 3) + 3 * 4
