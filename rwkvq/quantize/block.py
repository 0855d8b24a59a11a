"""The job of one block: statistics from its cached inputs, then every planned tensor, each written when it is done.

A job names files only, so it runs in this process, in a worker process or on another machine. A tensor whose file
already carries the key of the same work is kept, so a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.calibration import activations
from rwkvq.calibration.gradients import gradients_path
from rwkvq.checkpoint.names import Weight, extract, weights_of
from rwkvq.checkpoint.reader import WeightSource, open_checkpoint
from rwkvq.device import CPU, map_on, working_on
from rwkvq.errors import ActivationError, QuantizationError
from rwkvq.files import canonical_json, code_version, sha256_of_bytes, sha256_of_file
from rwkvq.formats import (
    FORMATS,
    AffineLayout,
    ElementwiseLayout,
    ResidualLayout,
    RotatedLayout,
    ScalarLayout,
    ScaledLayout,
    TableLayout,
    TrellisLayout,
    VectorLayout,
)
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.quantize import awq, elementwise, gptq, gptvq, hqq, kmeans, residual, rotation, rtn, tables, trellis
from rwkvq.quantize.hessian import FLOAT64_COLUMNS, row_chunks
from rwkvq.quantize.inputs import NOTHING, Calibration, Inputs, WeightInputs, collect_inputs, outer_inputs
from rwkvq.quantize.results import TensorError, read_done, tensor_path, write_result
from rwkvq.settings import Device

OnEvent = Callable[[dict[str, Any]], None]

CODE = (
    "rwkvq.quantize",
    "rwkvq.formats",
    "rwkvq.models",
    "rwkvq.calibration.gradients",
    "rwkvq.calibration.outer",
    "rwkvq.calibration.sites",
    "rwkvq.calibration.spill",
    "rwkvq.calibration.statistics",
    "rwkvq.calibration.activations",
    "rwkvq.calibration.cache",
    "rwkvq.checkpoint.names",
)
"""The sources that decide the bytes of a quantized tensor."""

NEEDS_STATISTICS = {"gptq", "gptvq", "elementwise", "trellis", "table", "awq", "rotation", "residual"}
NEEDS_GRADIENTS = {"trellis", "table"}
ON_GPU = {"trellis", "table", "gptq"}
"""Methods that run where the statistics are; the others take them to the processor."""


@dataclass(frozen=True, slots=True)
class BlockJob:
    """One block to quantize, as file names. `block` None = the tensors outside the blocks (embedding, head)."""

    checkpoint: str
    plan: str
    activations: str
    out_dir: str
    block: int | None
    gradients: str = ""
    """Folder of stage `gradients`, for plans with weights that `reads_gradients` names."""
    device: Device = "cpu"
    """Where statistics are taken, and codes of a method in ON_GPU are searched."""

    @property
    def folder(self) -> Path:
        """Where the tensors of this block are written."""
        return Path(self.out_dir) / ("outer" if self.block is None else f"block-{self.block:03d}")


def planned_for(plan: Plan, block: int | None) -> list[PlannedTensor]:
    """The tensors of `block` that are quantized, in plan order; kept tensors need no job."""
    return [entry for entry in plan.tensors if entry.block == block and entry.method != "keep"]


def work_key(entry: PlannedTensor, model: str, windows: str, gradients: str = "", device: Device = "cpu") -> str:
    """Hash of all that decides the bytes of this tensor; windows, gradients and device count where they are used."""
    parts = {
        "tensor": entry.name,
        "layout": entry.layout.to_json(),
        "method": entry.method,
        "options": entry.options,
        "model": model,
        "windows": windows if reads_activations(entry) else None,
        "gradients": gradients if reads_gradients(entry) else None,
        "device": device if entry.method in NEEDS_STATISTICS else None,
        "code": code_version(CODE),
    }
    return sha256_of_bytes(canonical_json(parts).encode())


def work_keys(work: BlockJob, plan: Plan) -> dict[str, str]:
    """Work key by name of every planned tensor of a block. Raises ActivationError."""
    entries = planned_for(plan, work.block)
    windows = activations.cache_windows(Path(work.activations)) if any(map(reads_activations, entries)) else ""
    gradients = _gradients_hash(work) if any(map(reads_gradients, entries)) else ""
    return {entry.name: work_key(entry, plan.model_sha256, windows, gradients, work.device) for entry in entries}


def _gradients_hash(work: BlockJob) -> str:
    path = gradients_path(Path(work.gradients), work.block)
    if not path.is_file():
        raise ActivationError(f"{path}: no such file; run the gradients stage again")
    return sha256_of_file(path)


def reads_activations(entry: PlannedTensor) -> bool:
    """Whether a weight is quantized with statistics of its block's inputs."""
    return entry.method in NEEDS_STATISTICS and entry.block is not None


def reads_gradients(entry: PlannedTensor) -> bool:
    """Whether a weight is quantized with what stage `gradients` found; of embedding and head that is all there is."""
    return entry.method in (NEEDS_STATISTICS if entry.block is None else NEEDS_GRADIENTS)


def run(job: Mapping[str, Any], on_event: OnEvent) -> list[str]:
    """Quantize one block; return the names of the tensors that were computed (not kept from an earlier run).

    Sends {"tensor": name, "done": n, "total": n, "kept": bool} after each. Raises CheckpointError, PlanError,
    ActivationError, QuantizationError, OutputError.
    """
    work = BlockJob(**job)
    source = open_checkpoint(Path(work.checkpoint))
    plan = Plan.read(Path(work.plan))
    entries = planned_for(plan, work.block)
    keys = work_keys(work, plan)
    done = {entry.name for entry in entries if read_done(tensor_path(work.folder, entry.name), keys[entry.name])}
    for count, name in enumerate(sorted(done), 1):
        on_event({"tensor": name, "done": count, "total": len(entries), "kept": True})
    todo = [entry for entry in entries if entry.name not in done]
    if not todo:
        return []
    catalogue = _weights(source)
    with working_on(work.device) as device:
        inputs = _statistics(work, source, todo, device)

        def make(entry: PlannedTensor) -> str:
            weight = extract(source.tensor(entry.tensor), catalogue[entry.name]).float()
            parts, error = quantize_tensor(weight, entry, inputs)
            write_result(tensor_path(work.folder, entry.name), parts, keys[entry.name], error)
            return entry.name

        by_columns = sorted(todo, key=lambda entry: -entry.shape[-1])  # a GPU takes one time for every column
        for count, name in enumerate(map_on(device, make, by_columns), len(done) + 1):
            on_event({"tensor": name, "done": count, "total": len(entries), "kept": False})
    return [entry.name for entry in todo]


def _weights(source: WeightSource) -> dict[str, Weight]:
    shapes = {name: source.shape(name) for name in source.names()}
    return {weight.name: weight for weight in weights_of(source.spec, shapes)}


def _statistics(work: BlockJob, source: WeightSource, todo: list[PlannedTensor], device: torch.device) -> Inputs:
    wanted = [entry for entry in todo if entry.method in NEEDS_STATISTICS]
    if not wanted:
        return NOTHING
    if work.block is None:
        return outer_inputs(Path(work.gradients), {entry.name for entry in wanted}, device)
    catalogue = _weights(source)
    elementwise = _common(work, wanted, {"elementwise"}, ("weight", "percentile"), ("none", 100.0))
    guided = [entry.name for entry in wanted if entry.method in NEEDS_GRADIENTS]
    (guide,) = _common(work, wanted, NEEDS_GRADIENTS, ("guide",), (0.0,))
    places = Path(work.activations), Path(work.gradients), work.folder
    calibration = Calibration(*places, guide, elementwise[0], elementwise[1], device=device)
    return collect_inputs(source, work.block, [catalogue[entry.name] for entry in wanted], guided, calibration)


def _common(
    work: BlockJob,
    wanted: list[PlannedTensor],
    methods: Collection[str],
    keys: tuple[str, ...],
    default: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The options `keys` of all weights of `methods`, `default` if there is none. Raises QuantizationError."""
    choices = {tuple(entry.options[key] for key in keys) for entry in wanted if entry.method in methods}
    if len(choices) > 1:
        raise QuantizationError(
            f"{work.plan}: block {work.block} asks for {len(choices)} values of {' and '.join(keys)}; use one"
        )
    return choices.pop() if choices else default


def quantize_tensor(weight: Tensor, entry: PlannedTensor, inputs: Inputs) -> tuple[dict[str, Tensor], TensorError]:
    """Quantize one float32 weight by the plan's method.

    weight [out, in] or [size], on the processor, where the parts are too. Returns the packed parts (format's layout)
    and the error. Raises QuantizationError.
    """
    known = inputs.of(entry.name)
    device = next((item.device for item in known if item is not None and entry.method in ON_GPU), CPU)
    known = WeightInputs(*(None if item is None else item.to(device) for item in known))
    weight = weight.to(device)
    codes = _encode(weight, entry, known)
    form = FORMATS[entry.layout.format]
    error = _error(form.decode(codes).reshape(weight.shape), weight, known.second_moment, known.importance)
    del known  # packing a wide weight needs the room
    if not math.isfinite(error.weight_error):
        raise QuantizationError(
            f"{entry.name}: {entry.method} gave values that are not finite; keep this tensor in the plan"
        )
    return {name: part.cpu() for name, part in form.pack(codes).items()}, error


def _encode(weight: Tensor, entry: PlannedTensor, known: WeightInputs) -> Any:
    layout, options = entry.layout, entry.options
    second_moment, importance, fisher, output_moment = known
    if entry.method == "elementwise":
        assert isinstance(layout, ElementwiseLayout) and importance is not None
        return elementwise.quantize(weight, importance, layout)
    matrix = weight.reshape(1, -1) if weight.ndim == 1 else weight
    if entry.method == "rtn":
        assert isinstance(layout, ScalarLayout)
        return rtn.quantize(matrix, layout, clip_search=options.get("clip_search", False))
    if entry.method == "gptq":
        assert isinstance(layout, ScalarLayout) and second_moment is not None
        return gptq.quantize(matrix, second_moment, layout, gptq.GptqOptions.from_json(options))
    if entry.method == "awq":
        assert isinstance(layout, ScaledLayout) and second_moment is not None
        return awq.quantize(matrix, second_moment, layout, clip_search=options["clip_search"])
    if entry.method == "rotation":
        assert isinstance(layout, RotatedLayout) and second_moment is not None
        return rotation.quantize(matrix, second_moment, layout, gptq.GptqOptions.from_json(options))
    if entry.method == "trellis":
        assert isinstance(layout, TrellisLayout) and second_moment is not None and fisher is not None
        return trellis.quantize(matrix, second_moment, layout, trellis.TrellisOptions.from_json(options), fisher)
    if entry.method == "table":
        assert isinstance(layout, TableLayout) and second_moment is not None and fisher is not None
        return tables.quantize(
            matrix, second_moment, layout, tables.TableOptions.from_json(options), fisher, output_moment
        )
    if entry.method == "hqq":
        assert isinstance(layout, AffineLayout)
        return hqq.quantize(matrix, layout)
    if entry.method == "residual":
        assert isinstance(layout, ResidualLayout) and second_moment is not None
        return residual.quantize(matrix, second_moment, layout, residual.ResidualOptions.from_json(options))
    assert isinstance(layout, VectorLayout)
    if entry.method == "kmeans":
        return kmeans.quantize(matrix, layout, iterations=options["iterations"])
    assert second_moment is not None
    return gptvq.quantize(matrix, second_moment, layout, gptvq.GptvqOptions.from_json(options))


def _error(decoded: Tensor, weight: Tensor, second_moment: Tensor | None, importance: Tensor | None) -> TensorError:
    """Sums over blocks of rows, in float64; only products with a wide second moment are float32."""
    chunks = row_chunks(weight) if weight.ndim == 2 else [slice(None)]
    is_wide = second_moment is not None and len(second_moment) > FLOAT64_COLUMNS
    moment = second_moment if second_moment is None or is_wide else second_moment.double()
    squares, losses = [0.0, 0.0], [0.0, 0.0]
    for rows in chunks:
        whole = weight[rows].double()
        for index, x in enumerate((decoded[rows].double() - whole, whole)):
            squares[index] += x.square().sum().item()
            if is_wide:
                assert moment is not None
                losses[index] += ((x.float() @ moment).double() * x).sum().item()
            elif moment is not None:
                losses[index] += torch.einsum("oi,ij,oj->", x, moment, x).item()
            elif importance is not None:
                losses[index] += (importance.double() @ x.square().flatten()).item()
    relative = squares[0] / max(squares[1], 1e-30)
    has_losses = moment is not None or importance is not None
    return TensorError(relative, losses[0] / max(losses[1], 1e-30) if has_losses else None)
