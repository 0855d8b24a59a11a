"""How much the loss depends on the output of every weight: one backward pass of the float model, block by block.

Targets are sampled from the model's own softmax, so the mean squared gradient is the diagonal of the true Fisher
information: 0.5 * sum_i f_i dW_i H dW_i^T predicts the KL divergence that an error dW costs (docs/method.md 14).
One block is in memory, beside the gradient of its output for all watched tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rwkvq.calibration import activations
from rwkvq.calibration.activations import InputBatch
from rwkvq.calibration.outer import HeadSums, embedding_statistics, outer_path, write_outer
from rwkvq.calibration.taps import tapped
from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.checkpoint.names import OUTER, Weight, weights_of
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.device import CPU
from rwkvq.errors import ActivationError
from rwkvq.files import make_folder, sha256_of_bytes
from rwkvq.models import batches_at_once, load_block, run_block_with_graph
from rwkvq.models.layers import layer_norm
from rwkvq.tensors import is_finite
from rwkvq.threads import map_in_order

CODE = (
    "rwkvq.models",
    "rwkvq.calibration.gradients",
    "rwkvq.calibration.outer",
    "rwkvq.calibration.taps",
    *activations.CODE,
)
"""The sources that decide what this pass finds."""
CLIP_QUANTILE = 0.999
"""Token weights above this quantile are cut down to it: single tokens do not decide a second moment."""
_LOGITS_BYTES = 256 << 20
"""What the logits of the tokens that are turned into gradients at once may take."""
_PARTS = ("fisher", "guide", "energy", "output_moment")
OUTPUT_BLOCK = 256
"""Consecutive outputs, at most, whose gradients are multiplied with each other: a whole head or several."""
_HEAD = 64
"""Outputs of a head: blocks hold whole heads where they can."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one weight's output means to the loss.

    fisher float32 [out]: mean over tokens of the squared gradient of the loss at each output. guide float32
    [windows, length]: a weight for each watched token, its mean squared gradient, scaled so that sum guide |x|^2 is 1.
    energy: mean over tokens of |x|^2, x the weight's input. output_moment float32 [blocks, size, size]: mean over
    tokens of the products of the gradients at outputs of one block (output_blocks), with `fisher` along its diagonal.
    """

    fisher: Tensor
    guide: Tensor
    energy: float
    output_moment: Tensor


def output_blocks(outputs: int) -> tuple[int, int]:
    """Number and size of the blocks of consecutive outputs: as large as may be, of whole heads where possible."""
    sizes = [size for size in range(min(outputs, OUTPUT_BLOCK), 0, -1) if outputs % size == 0]
    size = next((size for size in sizes if size % _HEAD == 0), sizes[0])
    return outputs // size, size


def gradients_path(folder: Path, block: int | None) -> Path:
    """File with the sensitivities of a block; None = with the statistics of embedding and head."""
    return outer_path(folder) if block is None else folder / f"block-{block:03d}.safetensors"


def watched_windows(held_out: NDArray[np.bool_], count: int) -> list[int]:
    """The windows whose gradients are taken: the first `count` that statistics use."""
    used: list[int] = (~held_out).nonzero()[0][:count].tolist()
    return used


def write_gradients(
    source: WeightSource,
    windows: Windows,
    cache: Path,
    folder: Path,
    *,
    count: int,
    seed: int,
    workers: int = 1,
    device: torch.device = CPU,
    on_block: Callable[[int], None] = lambda block: None,
) -> list[Path]:
    """Write the sensitivities of every block into `folder`, from the last to the first, then what the loss means to
    embedding and head; return the files.

    cache: folder of the activation cache of `windows`; count: windows to watch. workers change no byte; device: where
    blocks run. Raises CheckpointError, ActivationError (cache damaged, gradients that are not finite), OutputError.
    """
    chosen = watched_windows(windows.held_out, count)
    if not chosen:
        raise ActivationError("gradients: every window is held out; set windows.samples to 1 or more")
    work = _Pass(source, windows, cache, make_folder(folder), chosen, seed, workers, device)
    for block in reversed(range(source.spec.layers)):
        work.run(block)
        on_block(block)
    return [*(gradients_path(folder, block) for block in range(source.spec.layers)), work.write_outer()]


class _Sums:
    """Sums of one weight over its watched tokens."""

    def __init__(self, outputs: int, windows: int, length: int, device: torch.device) -> None:
        self.fisher = torch.zeros(outputs, dtype=torch.float64, device=device)
        blocks, size = output_blocks(outputs)
        self.output_moment = torch.zeros(blocks, size, size, dtype=torch.float64, device=device)
        self.squares = torch.zeros(windows, length, device=device)
        self.energy = torch.zeros(windows, length, device=device)

    def finish(self) -> dict[str, Tensor]:
        """The parts of a Sensitivity."""
        squares, energies = self.squares.cpu(), self.energy.cpu()
        limit = float(np.quantile(squares.numpy(), CLIP_QUANTILE))
        clipped = squares.clamp_max(limit).double()
        whole = float((clipped * energies).sum())
        guide = clipped / whole if whole > 0 else torch.zeros_like(clipped)
        fisher = self.fisher.cpu() / squares.numel()
        energy = energies.double().mean().reshape(1)
        found = {"fisher": fisher, "guide": guide, "energy": energy}
        found["output_moment"] = self.output_moment.cpu() / squares.numel()
        return {name: tensor.float() for name, tensor in found.items()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one window shows of a weight: sums of g^2 [out] and of products of g in blocks; mean g^2, |x|^2 [time]."""

    fisher: Tensor
    output_moment: Tensor
    squares: Tensor
    energy: Tensor

    @classmethod
    def of(cls, x: Tensor, gradient: Tensor) -> _Seen:
        """Of inputs x [1, time, in] and gradients [1, time, out] of the outputs."""
        squares = gradient.square()
        blocks = gradient.view(-1, *output_blocks(gradient.shape[-1])).transpose(0, 1)  # [blocks, time, size]
        fisher, moment = squares.sum((0, 1), dtype=torch.float64), blocks.transpose(1, 2) @ blocks
        return cls(fisher, moment, squares.mean(-1)[0], x.square().sum(-1)[0])


class _Pass:
    """The backward pass; gradients are those of the output of the block that runs next, [windows, length, width]."""

    def __init__(
        self,
        source: WeightSource,
        windows: Windows,
        cache: Path,
        folder: Path,
        chosen: list[int],
        seed: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.source, self.cache, self.folder, self.chosen, self.seed = source, cache, folder, chosen, seed
        self.ids = torch.from_numpy(model_inputs(windows.ids[chosen])).long()
        spec, self.length, self.device = source.spec, windows.ids.shape[1], device
        # what is recorded takes several times as much
        self.workers = batches_at_once(spec, 4 * self.length, workers, device)
        self.gradients = torch.zeros(len(chosen), self.length, spec.width, device=device)
        has_v_first = spec.version == "x070" and spec.layers > 1
        self.v_first = torch.zeros_like(self.gradients) if has_v_first else None
        shapes = {name: source.shape(name) for name in source.names()}
        self.weights = [item for item in weights_of(spec, shapes) if item.weight_class in ("matrix", "lora")]
        self.head_sums = HeadSums(spec.vocab, spec.width, device)

    def run(self, block: int) -> None:
        """Take the gradients through a block: write its sensitivities, leave the gradients of its input."""
        watched = [weight for weight in self.weights if weight.block == block]
        weights = load_block(self.source, block, device=self.device)
        head = _Head.of(self.source, self.device) if block == self.source.spec.layers - 1 else None
        count = len(self.chosen)
        sums = {weight.name: _Sums(weight.shape[0], count, self.length, self.device) for weight in watched}

        def step(item: tuple[int, InputBatch]) -> tuple[int, dict[str, _Seen], HeadSums | None]:
            own = (
                None if head is None else replace(head, sums=HeadSums(len(head.head), head.head.shape[1], self.device))
            )
            return item[0], self._step(block, weights, watched, own, *item), None if own is None else own.sums

        for place, seen, of_head in map_in_order(step, self._batches(block), self.workers):
            if of_head is not None:
                self.head_sums.merge(of_head)
            for name, item in seen.items():
                sums[name].fisher += item.fisher
                sums[name].output_moment += item.output_moment
                sums[name].squares[place] = item.squares
                sums[name].energy[place] = item.energy
        if not is_finite(self.gradients):
            raise ActivationError(f"block {block}: gradients that are not finite; use an undamaged checkpoint")
        tensors = {f"{name}::{part}": tensor for name, total in sums.items() for part, tensor in total.finish().items()}
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
        write_safetensors(gradients_path(self.folder, block), entries, sorted(tensors.items()), {})

    def write_outer(self) -> Path:
        """Write what the passes through the last and the first block say of head and embedding; return the file."""
        emb, *ln0 = (self.source.tensor(name) for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"))
        weight, bias = (tensor.reshape(-1).float() for tensor in ln0)
        embedding = embedding_statistics(emb, (weight, bias), zip(self.ids, self.gradients.cpu(), strict=True))
        return write_outer(self.folder, dict(zip(OUTER, (embedding, self.head_sums.finish()), strict=True)))

    def _batches(self, block: int) -> Iterator[tuple[int, InputBatch]]:
        """(place among the watched windows, its inputs), window by window."""
        places = {window: place for place, window in enumerate(self.chosen)}
        identity = self.source.identity()
        batches = activations.read_block(self.cache, block, model_sha256=identity, batch=1)
        for window, batch in enumerate(activations.on_device(batches, self.device)):
            if window in places:
                yield places[window], batch
            if window >= self.chosen[-1]:
                return

    def _step(
        self,
        block: int,
        weights: Mapping[str, Tensor],
        watched: Sequence[Weight],
        head: _Head | None,
        place: int,
        batch: InputBatch,
    ) -> dict[str, _Seen]:
        """Gradients of one window through a block, and what they show of each watched weight."""
        seen: dict[str, _Seen] = {}

        def note(name: str, x: Tensor, gradient: Tensor) -> None:
            seen[name] = _Seen.of(x, gradient)

        x = batch.x.requires_grad_()
        v_first = None if batch.v_first is None else batch.v_first.requires_grad_()
        y, v_out = run_block_with_graph(self.source.spec, block, tapped(weights, watched, note), x, v_first=v_first)
        here = slice(place, place + 1)
        gradient = self.gradients[here] if head is None else head.gradient(y.detach(), self._generator(place))
        outputs, gradients, inputs = [y], [gradient], [x]
        if self.v_first is not None and block == 0:
            assert v_out is not None
            outputs, gradients = [*outputs, v_out], [*gradients, self.v_first[here]]
        if v_first is not None:
            inputs.append(v_first)
        found = torch.autograd.grad(outputs, inputs, gradients)
        self.gradients[here] = found[0]
        if v_first is not None:
            assert self.v_first is not None
            self.v_first[here] += found[1]
        return seen

    def _generator(self, place: int) -> torch.Generator:
        digest = sha256_of_bytes(f"gradients {self.seed} {self.chosen[place]}".encode())
        return torch.Generator().manual_seed(int(digest[:12], 16))


@dataclass(frozen=True, slots=True)
class _Head:
    """ln_out and the head [vocab, width], float32, and the sums over the tokens that it turns into gradients."""

    weight: Tensor
    bias: Tensor
    head: Tensor
    sums: HeadSums

    @classmethod
    def of(cls, source: WeightSource, device: torch.device) -> _Head:
        """Read them from the checkpoint."""
        names = ("ln_out.weight", "ln_out.bias")
        weight, bias = (source.tensor(name).reshape(-1).to(device, torch.float32) for name in names)
        head = source.tensor("head.weight").to(device, torch.float32)
        return cls(weight, bias, head, HeadSums(len(head), head.shape[1], device))

    def gradient(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """dL/dy [1, time, width] of the summed cross entropy to targets drawn from the softmax of each token.

        `sums` counts these tokens.
        """
        with torch.enable_grad():
            y = y.requires_grad_()
            normalised = layer_norm(y, self.weight, self.bias)
        rows = max(1, _LOGITS_BYTES // (4 * len(self.head)))
        parts = []
        for some in torch.split(normalised.detach()[0], rows):
            probabilities = F.linear(some, self.head).softmax(-1)
            targets = sampled(probabilities, generator)
            self.sums.add(probabilities, some)
            probabilities.scatter_add_(1, targets, -torch.ones_like(targets, dtype=probabilities.dtype))
            parts.append(probabilities @ self.head)
        (result,) = torch.autograd.grad(normalised, y, torch.cat(parts)[None])
        return result


def sampled(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token [rows, 1] drawn from each row of probabilities [rows, vocab]; several times as fast as multinomial."""
    sums = probabilities.cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True).clamp_max_(sums.shape[1] - 1)


def read_gradients(folder: Path, block: int, names: Sequence[str]) -> dict[str, Sensitivity]:
    """The sensitivities of the named weights of a block. Raises ActivationError for a missing or damaged file."""
    path = gradients_path(folder, block)
    try:
        with open_safetensors(path) as file:
            found = {name: [file.get_tensor(f"{name}::{part}") for part in _PARTS] for name in names}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ActivationError(f"{path}: {reason}; run the gradients stage again") from error
    result = {}
    for name, (fisher, guide, energy, moment) in found.items():
        if not all(map(is_finite, found[name])) or guide.dim() != 2 or moment.dim() != 3:
            raise ActivationError(f"{path}: damaged ({name}); run the gradients stage again")
        result[name] = Sensitivity(fisher, guide, float(energy), moment)
    return result
