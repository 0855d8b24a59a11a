"""Write an artifact folder: tensor by tensor, complete or not at all, equal bytes for equal work."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkvq.artifact.layout import (
    CONFIG,
    FORMAT,
    INDEX,
    PROVENANCE,
    QUANTIZATION,
    SHARD_BYTES,
    SUMS,
    TOKENIZER_SUFFIXES,
    entries_of,
    part_key,
    shards_of,
)
from rwkvq.artifact.quantization import quantization_json
from rwkvq.artifact.sums import write_sums
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.errors import ArtifactError, OutputError, QuantizationError, TokenizerError
from rwkvq.files import Progress, atomic_folder, code_version, no_progress, write_bytes, write_json
from rwkvq.formats import DenseLayout, dense, pack_codes
from rwkvq.formats.parts import check_parts
from rwkvq.plan.plan import Plan, PlannedTensor

Quantized = Callable[[PlannedTensor], Mapping[str, Tensor]]
"""Returns the packed parts of a weight that is not kept, by part name."""

_CODE = tuple(
    f"rwkvq.{name}"
    for name in ("checkpoint", "formats", "models", "proxies", "calibration", "plan", "quantize", "distill", "artifact")
)
_LIBRARIES = ("numpy", "pyarrow", "safetensors", "tokenizers", "torch")


def write_artifact(
    out: Path,
    source: WeightSource,
    plan: Plan,
    quantized: Quantized,
    errors: Mapping[str, Mapping[str, Any]],
    *,
    tokenizer: Path | None,
    provenance: Mapping[str, Any],
    overwrite: bool,
    distilled: Mapping[str, Tensor] | None = None,
    on_tensor: Progress = no_progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the folder `out`; it appears under that name only when it is complete.

    Kept weights come from `distilled` where their name is in it, else from `source`, all others from `quantized`; one
    weight is in memory at a time. errors: figures by weight name, written beside the plan's rows. provenance is written
    as given. shard_bytes: size of a weight file at most. Raises PlanError for a plan of another model,
    QuantizationError for parts that do not fit the plan or values that are not finite, TokenizerError, and OutputError
    if `out` cannot be written or must not be replaced.
    """
    plan.check_model(source)
    check_replaceable(out)
    tokenizer_name = None if tokenizer is None else _tokenizer_name(tokenizer)
    with atomic_folder(out, overwrite=overwrite) as folder:
        shards = shards_of(plan.tensors, shard_bytes)
        stream = _PartStream(source, quantized, distilled or {}, on_tensor, len(plan.tensors))
        for name, members in shards:
            entries = [entry for planned in members for entry in entries_of(planned)]
            write_safetensors(folder / name, entries, stream.parts_of(members), {"format": FORMAT})
        if len(shards) > 1:
            write_json(folder / INDEX, _index(shards))
        write_json(folder / CONFIG, _config(plan, tokenizer_name))
        write_json(folder / QUANTIZATION, quantization_json(plan, errors))
        write_json(folder / PROVENANCE, dict(provenance))
        if tokenizer is not None and tokenizer_name is not None:
            write_bytes(folder / tokenizer_name, _tokenizer_bytes(tokenizer))
        write_sums(folder)


def software_versions() -> dict[str, Any]:
    """What computed the bytes, for provenance: a hash of the sources that decide them, and library versions."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"code_version": code_version(_CODE), "libraries": libraries}


class _PartStream:
    """Yields the stored tensors of weights in order, and reports each weight when all its parts have been taken."""

    def __init__(
        self,
        source: WeightSource,
        quantized: Quantized,
        distilled: Mapping[str, Tensor],
        on_tensor: Progress,
        total: int,
    ) -> None:
        shapes = {name: source.shape(name) for name in source.names()}
        self._source = source
        self._weights = {weight.name: weight for weight in weights_of(source.spec, shapes)}
        self._quantized = quantized
        self._distilled = distilled
        self._on_tensor = on_tensor
        self._total = total
        self._done = 0

    def parts_of(self, members: Sequence[PlannedTensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) of every part of `members`, as `entries_of` lists them."""
        for planned in members:
            parts = self._parts(planned)
            for part in planned.layout.parts():
                yield part_key(planned.name, planned.layout, part), parts[part]
            self._done += 1
            self._on_tensor(planned.name, self._done, self._total)

    def _parts(self, planned: PlannedTensor) -> Mapping[str, Tensor]:
        if planned.method == "keep":
            if planned.name in self._distilled:
                return _dense(self._distilled[planned.name], planned, "distilled")
            weight = extract(self._source.tensor(planned.tensor), self._weights[planned.name])
            return _dense(weight, planned, str(self._source.path))
        parts = self._quantized(planned)
        try:
            check_parts(parts, planned.layout)
        except ArtifactError as error:
            raise QuantizationError(f"{planned.name}: does not fit the plan ({error}); quantize it again") from error
        return parts


def _dense(weight: Tensor, planned: PlannedTensor, where: str) -> dict[str, Tensor]:
    assert isinstance(planned.layout, DenseLayout), planned.layout
    try:
        return pack_codes(dense.encode(weight, planned.layout))
    except QuantizationError as error:
        raise QuantizationError(f"{where}: {planned.name}: {error}") from error


def check_replaceable(out: Path) -> None:
    """Overwriting means replacing an artifact, never deleting a folder of something else. Raises OutputError."""
    is_artifact = (out / QUANTIZATION).is_file() or (out / SUMS).is_file()
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_artifact and not is_empty:
        raise OutputError(f"{out}: exists and is no artifact, so it is not replaced; choose another folder")


def _tokenizer_name(tokenizer: Path) -> str:
    if tokenizer.suffix not in TOKENIZER_SUFFIXES:
        expected = " or ".join(TOKENIZER_SUFFIXES)
        raise TokenizerError(f"{tokenizer}: its ending is {tokenizer.suffix!r}, expected {expected}; rename it")
    return f"tokenizer{tokenizer.suffix}"


def _tokenizer_bytes(tokenizer: Path) -> bytes:
    try:
        return tokenizer.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{tokenizer}: cannot be read ({error.strerror}); check the path") from error


def _index(shards: Sequence[tuple[str, Sequence[PlannedTensor]]]) -> dict[str, Any]:
    places = {key: name for name, members in shards for planned in members for key, _, _ in entries_of(planned)}
    total = sum(planned.stored_bits // 8 for _, members in shards for planned in members)
    return {"metadata": {"total_size": total}, "weight_map": places}


def _config(plan: Plan, tokenizer_name: str | None) -> dict[str, Any]:
    """The model description; keys beyond ModelSpec are for programs that list models, rwkvq does not read them."""
    spec = plan.spec
    return {
        **spec.to_json(),
        "model_type": "rwkvq",
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "head_dim": spec.head_size,
        "vocab_size": spec.vocab,
        "tokenizer": tokenizer_name,
        "quantization_config": {
            "quant_method": "rwkvq",
            "format": FORMAT,
            "policy": plan.policy,
            "preset": plan.preset,
        },
    }
