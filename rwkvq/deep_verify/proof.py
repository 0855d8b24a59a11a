"""The proof: records, every kept weight against the checkpoint, one quantized weight made again from the text.

Where the kept vectors were distilled, that is done again, from the artifact's own codes.
"""

from __future__ import annotations

import json
import random
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.artifact.layout import entries_of
from rwkvq.artifact.reader import Artifact
from rwkvq.artifact.shards import Stored, read_headers, read_tensors
from rwkvq.calibration.windows import Windows
from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import Checkpoint, open_checkpoint
from rwkvq.deep_verify.cache import Cache
from rwkvq.deep_verify.records import Check, Records
from rwkvq.distill import distill
from rwkvq.errors import ArtifactError
from rwkvq.files import Progress, no_progress
from rwkvq.formats import DenseLayout, dense, pack_codes
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.quantize import block
from rwkvq.quantize.results import tensor_path
from rwkvq.run import cores
from rwkvq.settings import Device, Settings
from rwkvq.stages.blocks import quantized_file
from rwkvq.threads import single_threaded_torch

_LEGITIMATE = "plan, code or libraries are not the recorded ones, so it can be sound: verify with those"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an artifact is held against.

    model: the float checkpoint; text: calibration text (None = the source that the artifact records); activations: a
    folder with the cache of stage `activations` (None = computed again up to the tensor's block); tensor: the weight to
    quantize again (None = one by `seed`); seed of that choice (None = a new one).
    """

    model: Path
    text: str | None = None
    activations: Path | None = None
    tensor: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class DeepReport:
    """What was proved. checks: inputs, all equal, then plan, code and libraries, which may differ.

    kept: weights equal to the checkpoint's; distilled: vectors equal to what distillation gives again. tensor, method,
    parts, bytes: the weight that was quantized again, its stored parts and their size, all equal (None and 0 if the
    plan keeps every weight); seed: what chose it, None if it was named; activations: `computed`, `cache` or `not
    needed`.
    """

    checks: tuple[Check, ...]
    kept: int
    distilled: int = 0
    tensor: str | None = None
    method: str | None = None
    parts: int = 0
    bytes: int = 0
    seed: int | None = None
    activations: str = "not needed"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; each check says whether it is the `same`."""
        checks = [{**asdict(check), "same": check.is_same} for check in self.checks]
        return {**asdict(self), "checks": checks}


def deep_verify(
    artifact: Artifact, evidence: Evidence, progress: Callable[[str], Progress] = lambda stage: no_progress
) -> DeepReport:
    """Hold an artifact against its checkpoint and text: recorded hashes, every kept weight, one weight quantized again.

    `progress(stage)` gives the Progress of each part. One block and a few windows are in memory; activations go to the
    system's temporary folder. Raises ArtifactError, one line, for the first thing that differs, and what reading the
    evidence raises: CheckpointError, TextError, TokenizerError, ActivationError.
    """
    records = Records.read(artifact, evidence.text)
    entry, seed = _choose(artifact, evidence)
    source = open_checkpoint(evidence.model)
    with tempfile.TemporaryDirectory(prefix="rwkvq-verify-") as temporary:
        folder = Path(temporary)
        inputs = records.check_inputs(source)
        windows, check = records.rebuild_windows(folder)
        software = records.check_software(folder)
        checks = (*inputs, check, *software)
        progress("provenance")(f"{len(checks)} records", len(checks), len(checks))
        work = _Work(artifact, source, read_headers(artifact.path), folder)
        distilled = work.distilled(records.settings, windows, progress("distill"))
        changed = any(not item.is_same for item in software)
        kept = work.compare_kept(distilled, progress("kept"), changed=changed) - len(distilled)
        if entry is None:
            return DeepReport(checks, kept, len(distilled))
        cache = Cache(evidence.activations, entry, source, windows, records.settings)
        inputs_folder = cache.fill(folder / "activations", progress("activations"))
        gradients = cache.fill_gradients(inputs_folder, folder / "gradients", progress("gradients"))
        size = work.compare_quantized(entry, inputs_folder, gradients, records.settings.run.device, changed=changed)
        progress("quantize")(entry.name, 1, 1)
    parts = len(entry.layout.parts())
    return DeepReport(checks, kept, len(distilled), entry.name, entry.method, parts, size, seed, cache.origin)


def _choose(artifact: Artifact, evidence: Evidence) -> tuple[PlannedTensor | None, int | None]:
    """The weight to quantize again, and the seed that chose it; None if the plan keeps every weight."""
    quantized = {entry.name: entry for entry in artifact.plan.tensors if entry.method != "keep"}
    if evidence.tensor is not None:
        if evidence.tensor not in quantized:
            raise ArtifactError(
                f"{artifact.path}: {evidence.tensor} is none of its {len(quantized)} quantized weights; "
                "rwkvq inspect DIR --tensors lists them"
            )
        return quantized[evidence.tensor], None
    if not quantized:
        return None, None
    seed = secrets.randbelow(1 << 32) if evidence.seed is None else evidence.seed
    return quantized[random.Random(seed).choice(sorted(quantized))], seed


@dataclass(frozen=True, slots=True)
class _Work:
    """The comparisons: what the artifact stores against what the checkpoint gives."""

    artifact: Artifact
    source: Checkpoint
    headers: Mapping[str, Stored]
    folder: Path

    def distilled(self, settings: Settings, windows: Windows, progress: Progress) -> dict[str, Tensor]:
        """The vectors that distillation of this artifact's codes gives, by name; none if the settings ask for none."""
        if not settings.distill.steps:
            return {}
        plan, seed = self.artifact.plan, settings.seed
        return distill(
            self.source, plan, self._stored, windows, settings.distill, seed=seed, workers=cores(), on_step=progress
        ).values

    def compare_kept(self, distilled: Mapping[str, Tensor], progress: Progress, *, changed: bool) -> int:
        """Compare every kept weight with `distilled` or the checkpoint's, one in memory; return how many.

        changed: plan, code or libraries are not the recorded ones. Raises ArtifactError.
        """
        kept = [entry for entry in self.artifact.plan.tensors if entry.method == "keep"]
        shapes = {name: self.source.shape(name) for name in self.source.names()}
        weights = {weight.name: weight for weight in weights_of(self.source.spec, shapes)}
        for done, entry in enumerate(kept, 1):
            assert isinstance(entry.layout, DenseLayout)
            weight = distilled.get(entry.name, extract(self.source.tensor(entry.tensor), weights[entry.name]))
            expected = pack_codes(dense.encode(weight, entry.layout))
            difference = _difference(expected, self._stored(entry))
            if difference and entry.name in distilled:
                raise ArtifactError(
                    f"{self.artifact.path}: {entry.name}: {difference} from what distillation gives now; "
                    f"{_LEGITIMATE if changed else 'it was changed after it was distilled; quantize again'}"
                )
            if difference:
                raise ArtifactError(
                    f"{self.artifact.path}: {entry.name}: is kept as it was, but {difference} from "
                    f"{self.source.path}; quantize again"
                )
            progress(entry.name, done, len(kept))
        return len(kept)

    def compare_quantized(
        self, entry: PlannedTensor, activations: Path, gradients: Path, device: Device, *, changed: bool
    ) -> int:
        """Quantize one weight again and compare its parts and its recorded error; return the bytes compared.

        changed: plan, code or libraries are not the recorded ones. Raises ArtifactError, and what block.run raises.
        """
        plan = self.folder / "plan.json"
        _alone(self.artifact.plan, entry).write(plan)
        job = block.BlockJob(
            checkpoint=str(self.source.path),
            plan=str(plan),
            activations=str(activations),
            out_dir=str(self.folder / "quantized"),
            block=entry.block,
            gradients=str(gradients),
            device=device,
        )
        with single_threaded_torch():
            block.run(asdict(job), lambda event: None)
        with quantized_file(tensor_path(job.folder, entry.name)) as file:
            expected = {name: file.get_tensor(name) for name in entry.layout.parts()}
            error = json.loads(file.metadata()["error"])
        difference = _difference(expected, self._stored(entry))
        if difference is None and error != self.artifact.errors.get(entry.name):
            difference = "its recorded error differs"
        if difference is not None:
            touched = "it was changed after it was quantized (or run.threads was not 1); quantize again"
            advice = _LEGITIMATE if changed else touched
            raise ArtifactError(
                f"{self.artifact.path}: {entry.name}: {difference} from what {entry.method} gives now; {advice}"
            )
        return sum(part.numel() * part.itemsize for part in expected.values())

    def _stored(self, entry: PlannedTensor) -> dict[str, Tensor]:
        """The stored parts of a weight, by part name."""
        keys = [key for key, _, _ in entries_of(entry)]
        return dict(zip(entry.layout.parts(), read_tensors(self.headers[keys[0]].file, keys), strict=True))


def _alone(plan: Plan, entry: PlannedTensor) -> Plan:
    """The plan with every other weight of the block kept, so that its job quantizes this one."""

    def kept(other: PlannedTensor) -> PlannedTensor:
        if other.block != entry.block or other.name == entry.name or other.method == "keep":
            return other
        return replace(other, method="keep", layout=DenseLayout(other.shape, "float32"), options={})

    return replace(plan, tensors=tuple(kept(other) for other in plan.tensors))


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Which part differs, and in how many bytes; None if all are equal, byte by byte."""
    for name, part in expected.items():
        here, there = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (part, found[name]))
        if count := int((here != there).sum()):
            return f"part {name} differs in {count} of {len(here)} bytes"
    return None
