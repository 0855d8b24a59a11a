"""A report with invented figures in the proportions of a real run: nothing in it was measured."""

from __future__ import annotations

import math
import random

from rwkvq.checkpoint.names import WeightClass
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.report.data import (
    Arm,
    Calibration,
    Disjointness,
    Estimate,
    Evaluation,
    ProxyPlane,
    ProxyRow,
    QualityRow,
    ReportData,
    Sizes,
    StageTime,
    TensorRow,
)

_MATRICES = (
    ("att.receptance", 1),
    ("att.key", 1),
    ("att.value", 1),
    ("att.output", 1),
    ("ffn.key", 4),
    ("ffn.value", 4),
)
_LORA = (
    ("att.w1", 32),
    ("att.w2", 32),
    ("att.a1", 32),
    ("att.a2", 32),
    ("att.v1", 32),
    ("att.v2", 32),
    ("att.g1", 64),
    ("att.g2", 64),
)
_VECTORS = (
    "att.x_r",
    "att.x_w",
    "att.x_k",
    "att.x_v",
    "att.x_a",
    "att.x_g",
    "att.k_k",
    "att.k_a",
    "att.r_k",
    "ffn.x_k",
)
_KEPT = (
    "ln1.weight",
    "ln1.bias",
    "ln2.weight",
    "ln2.bias",
    "att.w0",
    "att.a0",
    "att.v0",
    "att.ln_x.weight",
    "att.ln_x.bias",
)


def _quantized(block: int, short: str, numel: int, weight_class: WeightClass, noise: random.Random) -> TensorRow:
    is_scalar = short.endswith("2") or noise.random() < 0.05
    bits = (3.59 if weight_class == "lora" else 3.297) if is_scalar else 3.504
    error = 10 ** noise.uniform(-2.3, -1.2) * (0.6 if is_scalar else 1.0)
    reason = "P_c 1.31 < 1.52 and P_f 12.4 < 18.1: scalar" if is_scalar else "P_c 1.93 >= 1.52: vector"
    kind, method = ("scalar", "gptq") if is_scalar else ("vector", "gptvq")
    name = f"blocks.{block}.{short}" + (".weight" if weight_class == "matrix" else "")
    return TensorRow(name, block, short, weight_class, kind, method, numel, round(bits * numel), error, reason)


def _dense(name: str, block: int | None, short: str, weight_class: WeightClass, numel: int) -> TensorRow:
    reason = (
        "kept: element-wise weights are fp16 in preset rwkvq"
        if weight_class == "elementwise"
        else "kept: never quantized"
    )
    return TensorRow(name, block, short, weight_class, "dense", "keep", numel, 16 * numel, None, reason)


def tensors(layers: int = 6, width: int = 256, vocab: int = 8192) -> tuple[TensorRow, ...]:
    """Every weight of an RWKV-7; block 0 has no v1 and v2."""
    noise = random.Random(7)
    rows = [_dense("emb.weight", None, "emb", "keep", vocab * width)]
    for block in range(layers):
        rows += [_quantized(block, name, factor * width * width, "matrix", noise) for name, factor in _MATRICES[:4]]
        rows += [
            _quantized(block, name, rank * width, "lora", noise)
            for name, rank in _LORA
            if block or name not in ("att.v1", "att.v2")
        ]
        rows += [_quantized(block, name, factor * width * width, "matrix", noise) for name, factor in _MATRICES[4:]]
        rows += [_dense(f"blocks.{block}.{name}", block, name, "elementwise", width) for name in _VECTORS]
        rows += [_dense(f"blocks.{block}.{name}", block, name, "keep", width) for name in _KEPT]
    rows += [
        _dense("ln_out.weight", None, "ln_out.weight", "keep", width),
        _dense("head.weight", None, "head", "keep", vocab * width),
    ]
    return tuple(rows)


def plane(rows: tuple[TensorRow, ...]) -> ProxyPlane:
    """Proxies that fit the formats of `rows`, and vectors that nobody decided."""
    noise = random.Random(11)
    points = []
    for row in rows:
        arm: Arm | None = {"scalar": "sq", "vector": "vq"}.get(row.format)  # type: ignore[assignment]
        if row.weight_class == "keep":
            continue
        p_c = {"sq": noise.uniform(1.12, 1.5), "vq": noise.uniform(1.53, 2.9), None: noise.uniform(0.9, 3.4)}[arm]
        p_f = math.exp(1.75 * p_c + noise.gauss(0, 0.35))
        points.append(
            ProxyRow(row.name, row.block, row.weight_class, row.numel, p_c, min(p_f, 17.5) if arm == "sq" else p_f, arm)
        )
    return ProxyPlane(tuple(points), "quantile", "share 0.10 by weights", 1.52, 18.1)


def _quality(file_bytes: int, checkpoint_bytes: int) -> tuple[QualityRow, ...]:
    return (
        QualityRow(
            "float",
            "float",
            checkpoint_bytes,
            16.0,
            16.0,
            16.04,
            Estimate(28.314, 0.4127),
            None,
            None,
            None,
            Estimate(141.2, 14.8),
            Estimate(0.212, 0.0183),
        ),
        QualityRow(
            "RTN",
            "baseline",
            file_bytes - 180000,
            3.305,
            3.42,
            8.991,
            Estimate(30.651, 0.4518),
            Estimate(0.09701, 0.0013),
            0.7713,
            Estimate(0.8331, 0.0021),
            Estimate(188.4, 21.1),
            Estimate(0.176, 0.017),
        ),
        QualityRow(
            "quantized",
            "quantized",
            file_bytes,
            3.481,
            3.602,
            9.145,
            Estimate(29.201, 0.4266),
            Estimate(0.05532, 0.00088),
            0.4122,
            Estimate(0.8716, 0.0018),
            Estimate(152.6, 16.2),
            Estimate(0.204, 0.018),
        ),
    )


def report(layers: int = 6, width: int = 256) -> ReportData:
    """The whole report of a model of `layers` blocks."""
    rows = tensors(layers, width)
    weights = sum(row.numel for row in rows)
    file_bytes = sum(row.stored_bits for row in rows) // 8 + 41_216
    checkpoint_bytes = 2 * weights + 51_000
    spec = ModelSpec("x070", layers, width, width // 64, 64, 4 * width, 8192, {"w": 32, "a": 32, "v": 32, "g": 64})
    stages = (
        ("windows", 1.42),
        ("activations", 9.8),
        ("proxies", 0.61),
        ("plan", 0.04),
        ("quantize", 31.7),
        ("pack", 0.9),
        ("evaluate", 187.3),
        ("report", 0.3),
    )
    return ReportData(
        model="rwkv7-9m",
        spec=spec,
        policy="rwkvquant",
        preset="rwkvq",
        sizes=Sizes(checkpoint_bytes, file_bytes, weights, 3.401, 3.479, 3.481, 3.602, 8 * file_bytes / weights),
        quality=_quality(file_bytes, checkpoint_bytes),
        evaluation=Evaluation("books_validation.txt", 64, 512, "lambada_dev.jsonl", 500),
        calibration=Calibration("books_calibration.txt", 128, 512, 8, 0),
        disjointness=(
            Disjointness("books_validation.txt", 32_256, 0, 32),
            Disjointness("lambada_dev.jsonl", 21_344, 0, 32),
        ),
        budget=None,
        distillation=None,
        proxies=plane(rows),
        tensors=rows,
        stages=tuple(StageTime(name, seconds, name == "windows") for name, seconds in stages),
        provenance={
            "checkpoint": {"path": "rwkv7-9m.pth", "sha256": "8f1d" * 16},
            "windows": {"sha256": "03ab" * 16, "tokenizer_sha256": "77c1" * 16},
            "plan": {"sha256": "5ee2" * 16},
            "settings": {"seed": 0, "quantize": {"bits": 3, "damping": 0.01}, "evaluate": {"baselines": ["rtn"]}},
            "code_version": "c0de" * 16,
            "libraries": {"torch": "2.13.0+cpu", "numpy": "2.3.4", "safetensors": "0.6.2"},
        },
    )
