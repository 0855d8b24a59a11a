"""What a report shows, as plain values. The report stage fills it; tables, plots and the page only read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rwkvq.checkpoint.names import WeightClass
from rwkvq.checkpoint.spec import ModelSpec

Role = Literal["float", "baseline", "quantized"]
Arm = Literal["sq", "vq"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured mean and its standard error, in the same unit; None = no error is known."""

    value: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One model of the comparison. None = not measured, or meaningless for it (the float model against itself)."""

    name: str
    role: Role
    file_bytes: int | None = None
    matrix_bits: float | None = None
    body_bits: float | None = None
    file_bits: float | None = None
    perplexity: Estimate | None = None
    """Per token, on the text of `Evaluation`."""
    kl: Estimate | None = None
    """Mean KL(float || this model), nats a token."""
    kl_p99: float | None = None
    """99th percentile of the KL over tokens, nats."""
    top1: Estimate | None = None
    """Share, 0 .. 1, of positions with the float model's arg max."""
    lambada_perplexity: Estimate | None = None
    """Per target word."""
    lambada_accuracy: Estimate | None = None
    """Share, 0 .. 1."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the models were measured on; None = that part was not run."""

    text: str | None
    windows: int
    length: int
    """Tokens a window, and predictions a window."""
    lambada: str | None
    lambada_examples: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """The windows that the statistics came from."""

    source: str
    windows: int
    """Windows in the statistics, `held_out` not included."""
    length: int
    held_out: int
    seed: int


@dataclass(frozen=True, slots=True)
class Disjointness:
    """The proof that an evaluation set shares no text with the calibration windows.

    Every run of `size` consecutive tokens in the evaluation set is looked up among those of the calibration windows.
    """

    name: str
    positions: int
    """Runs looked up."""
    shared: int
    """Runs found; 0 = disjoint."""
    size: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes in bytes and bits per weight (docs/method.md 8); `weights` counts emb and head too."""

    checkpoint_bytes: int
    file_bytes: int
    """All weight files of the artifact, headers included."""
    weights: int
    nominal_by_count: float | None
    """The papers' formula, averaged over matrices with weight one each; None if no matrix is quantized."""
    nominal_by_weights: float | None
    matrix_bits: float | None
    body_bits: float
    file_bits: float


@dataclass(frozen=True, slots=True)
class ProxyRow:
    """The proxies of one weight in the gap mode of the decision; `arm` None = not decided by the proxies."""

    name: str
    block: int | None
    weight_class: WeightClass
    numel: int
    p_c: float
    p_f: float
    arm: Arm | None


@dataclass(frozen=True, slots=True)
class ProxyPlane:
    """All proxies, how the choice was made, and the thresholds if there are any (None for rank-free rules)."""

    rows: tuple[ProxyRow, ...]
    gap_mode: str
    decision: str
    """In words, for example `share 0.10 by weights`."""
    tau_c: float | None
    tau_f: float | None


@dataclass(frozen=True, slots=True)
class Budget:
    """What policy `budget` was given and what it expected."""

    target: str
    """In words, for example `3.275 bits a matrix weight`."""
    formats: str
    predicted_kl: float
    """Nats a token."""
    launch_groups: str = "none"
    predicted_kl_without_groups: float | None = None
    """Nats a token, with groups."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """What training the vectors that stay continuous gained: mean KL on the held-out windows, nats a token."""

    vectors: int
    before: float
    after: float
    step: int
    """The step whose values were kept; 0 = training made nothing better."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One weight of the plan and what became of it."""

    name: str
    block: int | None
    """None for emb, head and ln_out."""
    short: str
    """Name inside its block without `.weight`, for example `att.key`."""
    weight_class: WeightClass
    format: str
    method: str
    numel: int
    stored_bits: int
    """All bits of its parts in the file, padding included."""
    relative_error: float | None
    """tr(dW H dW^T) / tr(W H W^T) with the calibration second moment H; None if the weight is kept."""
    reason: str

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.stored_bits / self.numel


@dataclass(frozen=True, slots=True)
class StageTime:
    """Wall time of one stage in seconds; `reused` = nothing had to be done, an earlier run's output was still valid."""

    name: str
    seconds: float
    reused: bool = False


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything that a report shows. `tensors` holds every weight exactly once, in plan order."""

    model: str
    """Name of the checkpoint for the title."""
    spec: ModelSpec
    policy: str
    preset: str
    sizes: Sizes
    quality: tuple[QualityRow, ...]
    evaluation: Evaluation | None
    calibration: Calibration | None
    disjointness: tuple[Disjointness, ...]
    budget: Budget | None
    """None for every policy but `budget`."""
    distillation: Distillation | None
    proxies: ProxyPlane | None
    tensors: tuple[TensorRow, ...]
    stages: tuple[StageTime, ...]
    provenance: Mapping[str, Any]
    """Nested plain values: hashes, settings, library versions."""

    def quality_of(self, role: Role) -> QualityRow | None:
        """The first model of that role, if any was measured."""
        return next((row for row in self.quality if row.role == role), None)
