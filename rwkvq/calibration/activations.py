"""The activation cache: the float input of every block on disk, so that blocks can be worked on independently.

Each file follows from the one before it as it was stored (rounded to float16), never from values in memory: a run that
is resumed, or a file that is rebuilt, gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkvq.calibration.cache import REMEDY, BeyondFloat16Error, CacheKey, CacheReader, CacheShape, CacheWriter, Kind
from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.device import CPU
from rwkvq.errors import ActivationError
from rwkvq.files import atomic_path, code_version, make_folder
from rwkvq.models import batches_at_once, embed, fitting_batch, load_block, run_block
from rwkvq.settings import ActivationsSettings
from rwkvq.threads import map_in_order, prefetched

CODE = (
    "rwkvq.models",
    "rwkvq.checkpoint.names",
    "rwkvq.calibration.activations",
    "rwkvq.calibration.cache",
    "rwkvq.calibration.windows",
)
"""The sources that decide what is in the cache."""
BATCH = 2
"""Windows that are read at once."""
_V_FIRST = "v_first.parquet"
_V_FIRST_ROWS = "v_first"
_TOKEN_OVERHEAD = 8
"""Bytes a token beside its values: window and position."""
_WINDOW_OVERHEAD = 512
"""Bytes a row group: page headers and its entry in the footer."""


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Some windows' inputs of one block: x and v_first (x070, not block 0; else None) float32 [batch, time, width].

    held_out bool [batch]: which of them statistics leave out.
    """

    x: Tensor
    v_first: Tensor | None
    held_out: Tensor

    def to(self, device: torch.device) -> InputBatch:
        """The batch with its tensors on `device`."""
        v_first = None if self.v_first is None else self.v_first.to(device)
        return InputBatch(self.x.to(device), v_first, self.held_out)

    def without_held_out(self) -> InputBatch:
        """Only the windows that statistics use."""
        if not self.held_out.any():
            return self
        used = ~self.held_out
        v_first = None if self.v_first is None else self.v_first[used]
        return InputBatch(self.x[used], v_first, self.held_out[used])

    def parts(self, windows: int) -> Iterator[InputBatch]:
        """The batch in pieces of at most `windows` windows."""
        for start in range(0, len(self.x), windows):
            some = slice(start, start + windows)
            v_first = None if self.v_first is None else self.v_first[some]
            yield InputBatch(self.x[some], v_first, self.held_out[some])


def block_path(folder: Path, block: int) -> Path:
    """File with the inputs of a block."""
    return folder / f"block-{block:03d}.parquet"


def cache_key(source: WeightSource, windows: Windows) -> CacheKey:
    """What the cache of this model and these windows carries in the metadata of every file."""
    return CacheKey(source.identity(), windows.identity(), code_version(CODE))


def estimate_cache_bytes(spec: ModelSpec, windows: int, length: int) -> int:
    """Bytes on disk of the cache for `windows` (held-out ones included) of `length` tokens, stored as float16."""
    files = spec.layers + int(_has_v_first(spec))
    return files * windows * (length * (2 * spec.width + _TOKEN_OVERHEAD) + _WINDOW_OVERHEAD)


def _has_v_first(spec: ModelSpec) -> bool:
    return spec.version == "x070" and spec.layers > 1


def write_activations(
    source: WeightSource,
    windows: Windows,
    folder: Path,
    settings: ActivationsSettings,
    *,
    workers: int = 1,
    device: torch.device = CPU,
    on_block: Callable[[int], None] = lambda block: None,
) -> list[Path]:
    """Write the input of every block (and v_first of x070) into `folder`; return the files.

    A file that is there, undamaged and of the same model, windows and code is kept; only the others are computed, each
    from the file before it. One block's weights and workers + 1 batches of windows are in memory. workers: batches that
    run at once, each with torch's number of threads; it changes no byte. device: where blocks run.
    on_block(i): the inputs of block i are there.
    Raises CheckpointError, ActivationError (values that are not finite), OutputError.
    """
    length = windows.ids.shape[1]
    batch = fitting_batch(source.spec, length, settings.batch)
    workers = batches_at_once(source.spec, batch * length, workers, device)
    job = _Job(source, windows, make_folder(folder), cache_key(source, windows), batch, workers, device)
    for step in range(source.spec.layers):
        if not all(job.is_valid(rows, path) for rows, path in job.outputs(step).items()):
            job.run(step)
        on_block(step)
    return [path for step in range(source.spec.layers) for path in job.outputs(step).values()]


@dataclass(frozen=True, slots=True)
class _Job:
    """Step 0 embeds the windows; step i runs block i - 1; each writes the inputs of block i."""

    source: WeightSource
    windows: Windows
    folder: Path
    key: CacheKey
    batch: int
    workers: int
    device: torch.device

    @property
    def shape(self) -> CacheShape:
        count, length = self.windows.ids.shape
        held_out = tuple(self.windows.held_out.nonzero()[0].tolist())
        return CacheShape(count, length, self.source.spec.width, held_out, _has_v_first(self.source.spec))

    def outputs(self, step: int) -> dict[str, Path]:
        """Files that a step writes, by what their rows are."""
        files = {_input_of(step): block_path(self.folder, step)}
        return files | {_V_FIRST_ROWS: self.folder / _V_FIRST} if step == 1 and self.shape.has_v_first else files

    def is_valid(self, rows: str, path: Path) -> bool:
        """True if the file is there, was made for this job, and reads back whole."""
        try:
            with CacheReader(path, rows) as reader:
                reader.expect(self.key)
                reader.check()
                return reader.shape == self.shape
        except ActivationError:
            return False

    def run(self, step: int) -> None:
        """Write the outputs of a step; what does not fit float16 is computed again and written as float32."""
        kinds: dict[str, Kind] = dict.fromkeys(self.outputs(step), "float16")
        while True:
            try:
                return self._write(step, kinds)
            except BeyondFloat16Error as overflow:
                kinds[overflow.rows] = "float32"

    def _write(self, step: int, kinds: dict[str, Kind]) -> None:
        with ExitStack() as stack:
            writers = []
            for rows, path in self.outputs(step).items():
                temporary = stack.enter_context(atomic_path(path))
                writers.append(stack.enter_context(CacheWriter(temporary, rows, self.key, self.shape, kinds[rows])))
            for tensors in self._embedded() if step == 0 else self._advanced(step - 1):
                for writer, x in zip(writers, tensors, strict=True):
                    writer.add(x)

    def _embedded(self) -> Iterator[tuple[Tensor, ...]]:
        """The input of block 0, batch by batch: (x,)."""
        names = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
        emb, weight, bias = (self.source.tensor(name) for name in names)
        ids = torch.from_numpy(model_inputs(self.windows.ids)).long()
        for some in torch.split(ids, self.batch):
            yield (embed(emb, weight.float(), bias.float(), some),)

    def _advanced(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """The output of a block on its cached inputs, batch by batch: (x,), of block 0 (x, v_first) if there is one."""
        weights = load_block(self.source, block, device=self.device)

        def run(batch: InputBatch) -> tuple[Tensor, ...]:
            x, _, v_first = run_block(self.source.spec, block, weights, batch.x, v_first=batch.v_first)
            is_first = block == 0 and self.shape.has_v_first
            return (x, v_first) if is_first and v_first is not None else (x,)

        return map_in_order(run, on_device(_read(self.folder, block, self.key, self.batch), self.device), self.workers)


def on_device(batches: Iterable[InputBatch], device: torch.device) -> Iterator[InputBatch]:
    """The batches with their tensors on `device`; for a GPU they are read ahead."""
    return iter(batches) if device.type == "cpu" else (batch.to(device) for batch in prefetched(batches))


def cache_windows(folder: Path) -> str:
    """The identity of the windows that the cache in `folder` was made from. Raises ActivationError."""
    with CacheReader(block_path(folder, 0), _input_of(0)) as reader:
        return reader.key.windows_sha256


def used_windows(folder: Path, block: int) -> tuple[list[int], int]:
    """The windows of a block's inputs that statistics use, and their length. Raises ActivationError."""
    with CacheReader(block_path(folder, block), _input_of(block)) as reader:
        held_out = set(reader.shape.held_out)
        return [window for window in range(reader.shape.windows) if window not in held_out], reader.shape.length


def read_block(
    folder: Path, block: int, *, model_sha256: str, batch: int = BATCH, every: int = 1
) -> Iterator[InputBatch]:
    """The inputs of a block, `batch` windows at a time; only these are in memory. every: of so many batches, 1 is read.

    Raises ActivationError, naming the file and the remedy: missing, damaged, of another model, other windows than the
    rest of the cache, or other code.
    """
    yield from _read(folder, block, CacheKey(model_sha256, cache_windows(folder), code_version(CODE)), batch, every)


def _read(folder: Path, block: int, key: CacheKey, batch: int, every: int = 1) -> Iterator[InputBatch]:
    with ExitStack() as stack:
        inputs = stack.enter_context(CacheReader(block_path(folder, block), _input_of(block)))
        readers = [inputs]
        if inputs.shape.has_v_first and block > 0:
            readers.append(stack.enter_context(CacheReader(folder / _V_FIRST, _V_FIRST_ROWS)))
        for reader in readers:
            reader.expect(key)
            if reader.shape != inputs.shape:
                raise ActivationError(f"{reader.path}: damaged (not of the shape of {inputs.path.name}); {REMEDY}")
        is_held_out = torch.zeros(inputs.shape.windows, dtype=torch.bool)
        is_held_out[list(inputs.shape.held_out)] = True
        for start in range(0, inputs.shape.windows, batch * every):
            stop = min(start + batch, inputs.shape.windows)
            x, *v_first = (reader.read(start, stop) for reader in readers)
            yield InputBatch(x, v_first[0] if v_first else None, is_held_out[start:stop])


def _input_of(block: int) -> str:
    return f"input of block {block}"
