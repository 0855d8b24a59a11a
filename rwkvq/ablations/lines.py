"""The ordinary runs that experiments are made from: settings by name of the line.

`{texts}` and `{leak_windows}` are filled in by the study. Element-wise weights and 8-bit LoRA factors are made under
policy rtn, whose matrices cost nothing; mixes take only those weights from there.
"""

from __future__ import annotations

from collections.abc import Mapping

Overrides = tuple[str, ...]

SQ, VQ, RTN = "plan.policy=sq", "plan.policy=vq", "plan.policy=rtn"
BUDGETS = (2.5, 3.0, 3.275, 3.5, 4.0, 4.5)
SAMPLES = (8, 32, 128, 512)
PRESETS = ("text", "camera", "official", "rwkvq")
WIDTHS = (2, 3, 4)
ARMS = ("sq", "vq")

_WEIGHTS = {
    "none": ("none", 100.0),
    "official": ("official", 99.0),
    "mean-sq": ("mean_sq", 99.0),
    "second-moment": ("second_moment", 100.0),
    "second-moment-99.9": ("second_moment", 99.9),
    "second-moment-99": ("second_moment", 99.0),
    "second-moment-95": ("second_moment", 95.0),
}
"""How channels count in the codebooks of element-wise weights, and the percentile that x^2 is clipped at."""


def width_line(arm: str, bits: int) -> str:
    """Name of the line that quantizes every weight in one arm at one width."""
    return arm if bits == 3 else f"{arm}-{bits}"


def samples_line(samples: int) -> str:
    """Name of the line of arm SQ with so many calibration windows."""
    return "sq" if samples == 128 else f"sq-samples-{samples}"


def budget_line(bpw: float) -> str:
    """Name of the line of policy budget with one target."""
    return f"budget-{bpw:g}"


ELEMENTWISE = (*(f"elementwise-{name}" for name in _WEIGHTS), "elementwise-rtn", "elementwise-int8")
LEAKS = ("leak-books", "leak-first", "leak-second")
OTHERS = ("awq", "rotation", "hqq", "residual")
BASELINES = ("rtn", "rtn-clip", "sq-plain", "sq-symmetric-plain", "sq-order", "kmeans-1d", "kmeans", "vq-1d", *OTHERS)

_ONE_DIMENSION: Overrides = (
    "quantize.vector.dimension=1",
    "quantize.vector.group_rows=4",
    "quantize.vector.group_columns=64",
)
_LEAK: Overrides = ("plan.policy=rwkvquant", "windows.samples={leak_windows}", "windows.held_out=0")


def _leak(half: str) -> Overrides:
    return (*_LEAK, f"windows.source={{texts}}/lambada-{half}.jsonl", "windows.field=text")


LINES: Mapping[str, Overrides] = {
    **{width_line("sq", bits): (SQ, f"quantize.bits={bits}") for bits in WIDTHS},
    **{width_line("vq", bits): (VQ, f"quantize.bits={bits}") for bits in WIDTHS},
    "sq-symmetric": (SQ, "quantize.scalar.symmetric=true"),
    **{
        f"elementwise-{name}": (
            RTN,
            "plan.elementwise=vq",
            f"quantize.elementwise.weight={weight}",
            f"quantize.elementwise.percentile={percentile}",
        )
        for name, (weight, percentile) in _WEIGHTS.items()
    },
    "elementwise-rtn": (RTN, "plan.elementwise=rtn"),
    "elementwise-int8": (RTN, "plan.elementwise=int8"),
    "lora-int8": (RTN, "plan.lora=int8"),
    "lora-fp16": (RTN, "plan.lora=fp16"),
    **{f"preset-{preset}": ("plan.policy=rwkvquant", f"plan.preset={preset}") for preset in PRESETS},
    **{samples_line(count): (SQ, f"windows.samples={count}") for count in SAMPLES if count != 128},
    "leak-books": _LEAK,
    "leak-first": _leak("first"),
    "leak-second": _leak("second"),
    "rtn": (RTN,),
    "rtn-clip": (RTN, "quantize.scalar.clip_search=true"),
    "sq-plain": (SQ, "quantize.scalar.clip_search=false"),
    "sq-symmetric-plain": (SQ, "quantize.scalar.symmetric=true", "quantize.scalar.clip_search=false"),
    "sq-order": (SQ, "quantize.scalar.static_groups=true", "quantize.scalar.act_order=true"),
    "kmeans-1d": ("plan.policy=kmeans", *_ONE_DIMENSION),
    "kmeans": ("plan.policy=kmeans",),
    "vq-1d": (VQ, *_ONE_DIMENSION),
    **{policy: (f"plan.policy={policy}",) for policy in OTHERS},
    **{budget_line(bpw): ("plan.policy=budget", f"plan.bpw={bpw}") for bpw in BUDGETS},
}
"""Settings of every line by its name."""
