"""RWKV relatives that are recognised only to be refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection

_REMEDY = "use a plain RWKV-6 (x060) or RWKV-7 (x070) checkpoint in the released naming"

# the first pattern that matches any tensor name decides; names are matched before a prefix is stripped
_VARIANTS: tuple[tuple[str, str], ...] = (
    (r"::", "a packed rwkvq artifact, not a float checkpoint"),
    (r"(^|\.)layers\.\d+\.(attn|ffn)\.", "a checkpoint in the flash-linear-attention naming (model.layers)"),
    (r"^rwkv\.(embeddings|blocks\.\d+\.(attention|feed_forward))\b", "a checkpoint in the Hugging Face rwkv6 naming"),
    (r"\.qkv\.", "the variant rwkv7b (softmax attention, qkv.*)"),
    (r"\.ffn\.s_emb\b", "the variant rwkv7a (DeepEmbed, ffn.s_emb)"),
    (r"\.att\.time_maa_rkvw", "the variant x060b or x060c (att.time_maa_rkvw)"),
    (r"\.att\.gate_w1$", "the variant x060a (low-rank gate, att.gate_w1)"),
    (r"\.att\.time_state$", "a state-tuned model (att.time_state)"),
    (r"\.att\.[wavg][12]\.weight$", "an export with LoRA factors as modules (att.w1.weight)"),
)


def refusal(names: Collection[str]) -> str | None:
    """What the tensor names stand for and what to use instead, if it is a known variant that is not supported."""
    for pattern, meaning in _VARIANTS:
        if any(re.search(pattern, name) for name in names):
            return f"is {meaning}, which is not supported; {_REMEDY}"
    if any(name.endswith(".att.time_mix_k") for name in names):
        return f"is {_old_version(names)}, which is not supported; {_REMEDY}"
    return None


def _old_version(names: Collection[str]) -> str:
    """RWKV-4 has no ln_x; RWKV-5.2 renamed time_first to time_faaaa."""
    if any(name.endswith(".att.time_faaaa") for name in names):
        return "RWKV-5.2 (x052)"
    if any(name.endswith(".att.ln_x.weight") for name in names):
        return "RWKV-5.0 or 5.1"
    return "RWKV-4"
