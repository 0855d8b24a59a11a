"""Settings: one section a stage, validated into frozen typed values, all problems in one error.

The defaults here are the defaults of the whole program. `params.yaml` and `--set section.key=value` override them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rwkvq.documents import parse_yaml, read_yaml
from rwkvq.errors import SettingsError

MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""

GapMode = Literal["raw", "distinct", "unique", "quantile"]
Policy = Literal["rtn", "sq", "kmeans", "vq", "awq", "rotation", "hqq", "residual", "rwkvquant", "budget"]
Preset = Literal["text", "camera", "official", "rwkvq"]
DecisionMode = Literal["fixed", "percentile", "share", "maxrms"]
ShareBy = Literal["count", "weights", "bits"]
FormatSet = Literal["quality", "speed"]
LaunchGroups = Literal["none", "block", "role"]
Device = Literal["cpu", "cuda"]
Bits = Literal[2, 3, 4, 8]
OuterBits = Literal["auto", 4, 5, 6, 8, 16]
Dimension = Literal[1, 2, 4]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A section of the settings: immutable, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class WindowsSettings(Section):
    """Calibration text and how it is cut into windows of tokens."""

    source: str = "calibration.txt"
    """A .txt, .jsonl or .parquet file, or the name of a data set (`lambada`, `wikitext`)."""
    field: str = "text"
    """The JSONL field or Parquet column that holds the text."""
    tokenizer: str = "tokenizer.json"
    """A Hugging Face tokenizer.json or the RWKV World vocabulary (.txt)."""
    samples: PositiveInt = 128
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens a window."""
    held_out: Annotated[int, Field(ge=0)] = 8
    """Windows beyond `samples` that no statistic uses; choices are judged on them."""


class ActivationsSettings(Section):
    """How the inputs of every block are computed and stored."""

    batch: PositiveInt = 2
    """Windows that run through a block at once."""


class ProxiesSettings(Section):
    """The coarse and fine proxies (method.md 2 and 3)."""

    order: Annotated[int, Field(ge=2, le=6)] = 4
    """K, the highest moment in P_f."""
    quantiles: Annotated[int, Field(ge=4, le=4096)] = 64
    """m, the number of gaps in gap mode `quantile`."""


class GradientsSettings(Section):
    """The backward pass that tells how much the loss depends on every output (policy `budget`)."""

    windows: PositiveInt = 64
    """Calibration windows whose gradients are taken, at most windows.samples."""


class CurvesSettings(Section):
    """What each format would cost each weight (policy `budget`)."""

    state_bits: Annotated[int, Field(ge=8, le=16)] = 14
    """Bits of a trellis state: each more halves the speed of the encoder for a few percent less loss."""
    guide: Fraction = 0.5
    """Share of the loss-weighted second moment in the one that weights are rounded by."""
    output_feedback: bool = True
    """Of the table format: errors go from output to output as well, not only from input to input."""
    sample: Annotated[int, Field(ge=256)] = 4096
    """Weights of each tensor that are rounded to measure a format."""


class DecisionSettings(Section):
    """How policy `rwkvquant` sends each weight to scalar (SQ) or vector quantization (VQ). None = from the preset."""

    mode: DecisionMode | None = None
    gap_mode: GapMode | None = None
    tau_c: float | None = None
    tau_f: float | None = None
    """Thresholds of mode `fixed`."""
    coarse: Fraction | None = None
    fine: Fraction | None = None
    """C and F of mode `percentile`."""
    share: Fraction | None = None
    """Target share of SQ in mode `share`, by count or by weights."""
    share_by: ShareBy | None = None
    target_bits: Annotated[float, Field(gt=1.0, le=16.0)] | None = None
    """Target stored bits per matrix weight in mode `share` with share_by `bits`."""
    max_over_rms: Annotated[float, Field(gt=0.0)] | None = None
    """Threshold of mode `maxrms`: larger goes to VQ."""


class PlanSettings(Section):
    """Which format every tensor gets."""

    policy: Policy = "budget"
    """Unless said: `rwkvquant` where a preset or decision is set, which only that policy has; else `budget`."""
    preset: Preset = "rwkvq"
    """Of policy `rwkvquant`."""
    decision: DecisionSettings = DecisionSettings()
    formats: FormatSet = "quality"
    """Of policy `budget`: every format, or only those that decode at the speed of memory."""
    launch_groups: LaunchGroups = "none"
    """Of policy `budget`: weights that get one format and rate, so that one kernel call can decode them. block: the
    products of a block that do not wait for each other and have one shape; role: a weight in all blocks.
    """
    bpw: Annotated[float, Field(ge=2.0, le=8.0)] | None = None
    """Target of policy `budget`: stored bits per weight of matrices and LoRA factors. None = 3.275, unless size is set.
    """
    size: str | None = None
    """Target of policy `budget` for the whole weight file instead, embedding and head included: `1.2GB`, `800MiB`."""
    elementwise: Literal["vq", "rtn", "int8", "fp16"] | None = None
    """Format of the element-wise multiplication weights; None = from the preset."""
    lora: Literal["quantize", "int8", "fp16"] = "quantize"
    emb_bits: OuterBits = "auto"
    head_bits: OuterBits = "auto"
    """Of embedding and head; 16 = kept as they are. auto: what a budget with `size` decides, else 16."""

    @model_validator(mode="before")
    @classmethod
    def _policy_of_what_is_set(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "policy" not in values and {"preset", "decision"} & set(values):
            return {**values, "policy": "rwkvquant"}
        return values

    @model_validator(mode="after")
    def _one_target(self) -> PlanSettings:
        if self.bpw is not None and self.size is not None:
            raise ValueError("bpw and size are two targets; set one")
        return self


class ScalarSettings(Section):
    """The SQ arm (method.md 5). None = from the preset."""

    group_size: PositiveInt | None = None
    symmetric: bool | None = None
    clip_search: bool | None = None
    static_groups: bool = False
    """Fix all group grids before the first column is rounded."""
    act_order: bool = False
    """Process columns by falling second moment; needs static_groups, so nothing has to be stored."""

    @model_validator(mode="after")
    def _act_order_needs_static_groups(self) -> ScalarSettings:
        if self.act_order and not self.static_groups:
            raise ValueError("act_order needs static_groups: true")
        return self


class VectorSettings(Section):
    """The VQ arm (method.md 6). None = from the preset. A codebook holds 2**(bits * dimension) entries."""

    dimension: Dimension | None = None
    group_rows: PositiveInt | None = None
    group_columns: PositiveInt | None = None
    codebook_bits: Literal[8, 16] = 8
    svd_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Kept fraction of the codebooks' singular values (variant `official_1d`); only with dimension 1."""
    iterations: PositiveInt = 100
    exact_assignment: bool = True
    """Assign by the full metric inside the vector instead of its diagonal."""
    m_step: bool = True
    """Update the codebooks on the quadratic loss with assignments fixed."""


class ElementwiseSettings(Section):
    """Codebooks of the element-wise weights (method.md 7)."""

    weight: Literal["second_moment", "mean_sq", "official", "none"] | None = None
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.0
    """x^2 is clipped at this percentile over tokens; 100 = not clipped."""
    block: PositiveInt = 64
    entries: Annotated[int, Field(ge=2, le=256)] = 8


class QuantizeSettings(Section):
    """How tensors are quantized and on how many workers."""

    bits: Bits = 3
    scalar: ScalarSettings = ScalarSettings()
    vector: VectorSettings = VectorSettings()
    elementwise: ElementwiseSettings = ElementwiseSettings()
    sweeps: Annotated[int, Field(ge=0, le=20)] | None = None
    """Coordinate descent over all columns after error feedback. None = 1 for policy `budget`, else from the preset."""
    damping: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Added to the Hessian's diagonal, as a fraction of its mean. None = 0.1 for policy `budget`, else 0.01."""


DISTILL_STEPS = 64
"""Steps of `rwkvq quantize --distill`."""


class DistillSettings(Section):
    """Training of the vectors that stay in floating point, after everything else is quantized. Off unless steps > 0."""

    steps: Annotated[int, Field(ge=0)] = 0
    """Steps at most; 0 = no such stage."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.003
    """Of the first steps, as a fraction of each tensor's root mean square; falls to 0 along a cosine."""
    batch: PositiveInt = 4
    """Calibration windows a step."""
    patience: PositiveInt = 4
    """Looks at the held-out windows, eight steps apart, without a better value before training ends."""


class RunSettings(Section):
    """Where and how work runs. Changes nothing in any result, but for `threads` and `device`."""

    device: Device = "cpu"
    """Where activations, gradients, second moments and codes of policy budget and of GPTQ are computed. A GPU rounds
    sums otherwise, which changes some codes; other codes are made on the processor."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Parallel block jobs; 0 = one per core, or as many as fill a GPU."""
    threads: PositiveInt = 1
    """Torch threads of each block job. Another number splits products otherwise, which may change some codes."""
    runner: Literal["threads", "processes", "dask", "ray"] = "threads"
    """Prefect task runner of the flow."""
    dask_address: str | None = None
    """Scheduler of a running dask cluster (tcp://HOST:8786) for runner `dask`; None = a cluster on this machine."""
    ray_address: str | None = None
    """A running ray cluster (ray://HOST:10001) for runner `ray`; None = one on this machine."""
    store: str | None = None
    """Where block jobs get their files from and put their results: an fsspec URL; None = all see the run folder."""
    retries: Annotated[int, Field(ge=0)] = 1
    task_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds one task may take."""


class EvaluateSettings(Section):
    """What the artifact and the float model are compared on."""

    text: str | None = None
    field: str = "text"
    windows: PositiveInt = 64
    length: Annotated[int, Field(ge=2)] = 512
    lambada: str | None = None
    """A JSONL file with one {"text": ...} a line."""
    lambada_limit: PositiveInt | None = 500
    batch: PositiveInt = 4
    """Windows that run at once on each thread."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Models whose decoded weights take more together run block by block; None = half of the free memory. Changes no
    result."""
    baselines: tuple[Literal["rtn"], ...] = ("rtn",)


class Settings(Section):
    """Everything a run depends on."""

    model: str = "model.pth"
    """A .pth or .safetensors checkpoint, or a folder of shards with their index."""
    run_dir: str = "data/runs/default"
    shared_dir: str | None = None
    """Folder of what runs of one model share: windows, activations, proxies, gradients, curves; None = run_dir."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    windows: WindowsSettings = WindowsSettings()
    activations: ActivationsSettings = ActivationsSettings()
    proxies: ProxiesSettings = ProxiesSettings()
    gradients: GradientsSettings = GradientsSettings()
    curves: CurvesSettings = CurvesSettings()
    plan: PlanSettings = PlanSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    distill: DistillSettings = DistillSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()


def _tuples(value: Any) -> Any:
    """YAML lists as tuples, ints as floats nowhere: strict mode wants tuples, YAML has only lists."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def parse(values: Mapping[str, Any], source: str) -> Settings:
    """Validate plain values; raise SettingsError with every problem, each as `section.key: found, expected`."""
    try:
        return Settings.model_validate(_tuples(values))
    except ValidationError as error:
        raise SettingsError(source, problems_of(error, Settings)) from error


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What pydantic found wrong in values of `model`, one line each."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            problems.append(f"{where}: unknown key; known: {', '.join(_known_keys(model, item['loc'][:-1]))}")
        else:
            problems.append(f"{where}: {item['msg']}, found {_shown(item['input'])}")
    return problems


def _shown(value: Any) -> str:
    """The value found, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    section = model
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]  # a section that may be None
        section = next(item for item in options if isinstance(item, type) and issubclass(item, BaseModel))
    return list(section.model_fields)


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with `section.key=value` overrides set; values are read as YAML scalars or lists."""
    result: dict[str, Any] = {key: dict(item) if isinstance(item, Mapping) else item for key, item in values.items()}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r}: expected section.key=value")
            continue
        try:
            value = parse_yaml(text)
        except ValueError as error:
            problems.append(f"{override!r}: the value is not YAML ({error})")
            continue
        *path, last = key.split(".")
        here = result
        for part in path:
            inner = here.get(part)
            here[part] = dict(inner) if isinstance(inner, Mapping) else {}
            here = here[part]
        here[last] = value
    if problems:
        raise SettingsError("--set", problems)
    return result


def load(path: Path, overrides: Iterable[str] = ()) -> Settings:
    """Read `params.yaml`, apply overrides, validate. Raises SettingsError."""
    return parse(apply_overrides(read_yaml(path), overrides), str(path))
