"""What calibration says about the weights of one block, as quantizers take it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvq.calibration import activations, statistics
from rwkvq.calibration.gradients import Sensitivity, read_gradients
from rwkvq.calibration.outer import read_outer
from rwkvq.calibration.statistics import Weighting
from rwkvq.checkpoint.names import Weight
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.device import CPU
from rwkvq.errors import ActivationError
from rwkvq.models import load_block


class WeightInputs(NamedTuple):
    """The statistics of one weight, as Inputs names them; None where it has none."""

    second_moment: Tensor | None
    importance: Tensor | None
    fisher: Tensor | None
    output_moment: Tensor | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Statistics by weight name.

    second_moments [in, in] of matrices and LoRA factors; importance [size] of vectors; fisher [out] and output_moments
    [blocks, size, size]: mean squared gradient of the loss at each output, and mean products of those of one block of
    outputs, of weights that are guided by gradients.
    """

    second_moments: Mapping[str, Tensor]
    importance: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    output_moments: Mapping[str, Tensor]

    def of(self, name: str) -> WeightInputs:
        """Those of one weight."""
        tables = self.second_moments, self.importance, self.fisher, self.output_moments
        return WeightInputs(*(table.get(name) for table in tables))


NOTHING = Inputs({}, {}, {}, {})


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the statistics of a block come from, and how they are taken.

    cache, gradients: folders of the stages; guide: share of the loss-weighted second moment in that of a guided weight;
    weighting, percentile: of element-wise weights; scratch: folder for second moments that do not stay in memory;
    every: of so many batches of windows one is used; device: where they are computed, and stay.
    """

    cache: Path
    gradients: Path
    scratch: Path
    guide: float = 0.0
    weighting: Weighting = "none"
    percentile: float = 100.0
    every: int = 1
    device: torch.device = CPU


def collect_inputs(
    source: WeightSource, block: int, wanted: Sequence[Weight], guided: Collection[str], calibration: Calibration
) -> Inputs:
    """The statistics of the `wanted` weights of one block; `guided` names those that gradients guide.

    Raises CheckpointError, ActivationError.
    """
    sensitivities: dict[str, Sensitivity] = {}
    weights_of_tokens: dict[str, Tensor] = {}
    if guided:
        sensitivities = read_gradients(calibration.gradients, block, sorted(guided))
        used, length = activations.used_windows(calibration.cache, block)
        taken = torch.tensor([window // activations.BATCH % calibration.every == 0 for window in used])
        weights_of_tokens = {
            name: token_weights(item, (len(used), length), calibration)[taken] for name, item in sensitivities.items()
        }
    device = calibration.device
    batches = activations.read_block(calibration.cache, block, model_sha256=source.identity(), every=calibration.every)
    collected = statistics.collect(
        source.spec,
        block,
        load_block(source, block, device=device, without=("ffn.value.weight",)),
        activations.on_device(batches, device),
        wanted,
        weighting=calibration.weighting,
        percentile=calibration.percentile,
        token_weights={name: counts.to(device) for name, counts in weights_of_tokens.items()},
        scratch=calibration.scratch,
    )
    keys = {
        weight.name: weight.name if weight.name in sensitivities else str(weight.site)
        for weight in wanted
        if weight.weight_class != "elementwise"
    }
    fisher = {name: item.fisher.to(device) for name, item in sensitivities.items()}
    outputs = {name: item.output_moment.to(device) for name, item in sensitivities.items()}
    return Inputs(collected.second_moments.renamed(keys), collected.importance, fisher, outputs)


def outer_inputs(gradients: Path, wanted: Collection[str], device: torch.device) -> Inputs:
    """The statistics of embedding or head on `device`, of stage `gradients`. Raises ActivationError."""
    found = {name: item for name, item in read_outer(gradients).items() if name in wanted}
    moments = {name: item.second_moment.to(device) for name, item in found.items()}
    return Inputs(moments, {}, {name: item.fisher.to(device) for name, item in found.items()}, {})


def token_weights(sensitivity: Sensitivity, used: tuple[int, int], calibration: Calibration) -> Tensor:
    """How much each token counts in a guided second moment, float32 [windows, time] for `used` windows and their time.

    (1 - g) plus g times the token's share of the loss-weighted second moment, which is scaled to the trace of the plain
    one; tokens whose gradients were not taken have the first part only (docs/method.md 14).
    """
    windows, length = used
    guide = sensitivity.guide
    if len(guide) > windows or guide.shape[1] != length:
        raise ActivationError(
            f"{calibration.gradients}: gradients of {list(guide.shape)} tokens, the activations have {[*used]}; "
            "run the gradients stage again"
        )
    result = torch.full((windows, length), 1.0 - calibration.guide)
    result[: len(guide)] += guide * (calibration.guide * sensitivity.energy * windows * length)
    return result
