"""The engine: runs a checkpoint or an artifact, in sequence mode or with an explicit state."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rwkvq.artifact.layout import PROVENANCE, QUANTIZATION, SUMS, TOKENIZER_SUFFIXES
from rwkvq.artifact.reader import open_artifact
from rwkvq.checkpoint.reader import WeightSource, open_checkpoint
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.errors import EvaluationError, TokenizerError
from rwkvq.models import BlockState, embed, final_norm, load_block, run_block
from rwkvq.models.tokenizer import Tokenizer, check_fits, load_tokenizer
from rwkvq.threads import map_in_order


def is_artifact(path: Path) -> bool:
    """True if `path` is an artifact folder, even a damaged one; false for every kind of checkpoint."""
    return any((path / name).is_file() for name in (QUANTIZATION, PROVENANCE, SUMS))


def open_model(path: Path) -> WeightSource:
    """Open an artifact folder or a checkpoint. Raises ArtifactError or CheckpointError."""
    return open_artifact(path) if is_artifact(path) else open_checkpoint(path)


def open_tokenizer(model: Path, tokenizer: Path | None, spec: ModelSpec) -> Tokenizer:
    """Open `tokenizer`, or for None the copy inside the artifact folder `model`, and check that it fits the model.

    Raises TokenizerError if there is none, it cannot be read, or it can produce ids outside the vocabulary.
    """
    path = tokenizer or _tokenizer_inside(model)
    result = load_tokenizer(path)
    check_fits(result, spec, path)
    return result


def _tokenizer_inside(model: Path) -> Path:
    for suffix in TOKENIZER_SUFFIXES:
        if (path := model / f"tokenizer{suffix}").is_file():
            return path
    raise TokenizerError(f"{model}: found no tokenizer in it; name one with --tokenizer FILE")


EMBEDDING = "emb.weight"
HEAD = "head.weight"
_HEAD_ROWS = 8192
"""Rows of a head in its stored type that are cast at once."""


class Engine:
    """Runs the model of `source` on the CPU.

    Weights are decoded to `dtype` (float32 or float64). With `resident` the decoded blocks and the head are kept;
    without, one block is in memory at a time, which is how a model larger than memory runs, and the head is kept in
    its stored type from the first logits until the next tokens. The embedding stays in its stored type, because only
    the rows of the current tokens are ever cast.
    """

    def __init__(self, source: WeightSource, *, dtype: torch.dtype = torch.float32, resident: bool = True) -> None:
        assert dtype in (torch.float32, torch.float64), dtype
        self.source = source
        self.dtype = dtype
        self.resident = resident
        self._blocks: dict[int, dict[str, Tensor]] = {}
        self._outer: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._norm = tuple(source.tensor(f"ln_out.{part}").reshape(-1).to(dtype) for part in ("weight", "bias"))
        if resident:
            self._outer = {EMBEDDING: source.tensor(EMBEDDING), HEAD: source.tensor(HEAD).to(dtype)}

    @property
    def spec(self) -> ModelSpec:
        """Version and sizes of the model."""
        return self.source.spec

    def hidden(self, ids: Tensor) -> Tensor:
        """Return ln_out of the last block, [batch, time, width], for ids [batch, time] int64 from a zero state."""
        return self.run(ids, None)[0]

    @torch.no_grad()
    def run(self, ids: Tensor, state: list[BlockState] | None) -> tuple[Tensor, list[BlockState]]:
        """Return ln_out of the last block, [batch, time, width], and the state after the last token.

        ids [batch, time] int64; `state` is the one after the tokens before, None for a zero state. Raises
        EvaluationError for an id outside the vocabulary.
        """
        self._check(ids)
        self.let_go()
        x, v_first, after = self._embedded(ids, self._tensor(EMBEDDING)), None, []
        for index in range(self.spec.layers):
            before = None if state is None else state[index]
            x, block_state, v_first = run_block(self.spec, index, self._block(index), x, state=before, v_first=v_first)
            after.append(block_state)
        return final_norm(x, *self._norm), after

    @torch.no_grad()
    def hidden_of(self, batches: Sequence[Tensor], workers: int = 1) -> list[Tensor]:
        """Return hidden(ids) for each of several batches of ids, with every block loaded only once.

        The hidden states of all batches are in memory together; `workers` batches run at once, each with torch's number
        of threads. Raises EvaluationError for an id outside the vocabulary.
        """
        for ids in batches:
            self._check(ids)
        self.let_go()
        embedding = self._tensor(EMBEDDING)
        states: list[tuple[Tensor, Tensor | None]] = [(self._embedded(ids, embedding), None) for ids in batches]
        del embedding
        for index in range(self.spec.layers):
            self._through_block(index, states, workers)
        return [final_norm(x, *self._norm) for x, _ in states]

    def _through_block(self, index: int, states: list[tuple[Tensor, Tensor | None]], workers: int) -> None:
        """Replace every (x, v_first) by what block `index` makes of it; the block is gone when the next is loaded."""
        weights = self._block(index)

        def step(at: int) -> None:
            x, v_first = states[at]
            x, _, v_first = run_block(self.spec, index, weights, x, v_first=v_first)
            states[at] = (x, v_first)

        for _ in map_in_order(step, range(len(states)), workers):
            pass

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab] of hidden [..., width], in the engine's dtype."""
        if self.resident:
            return functional.linear(hidden, self._outer[HEAD])
        with self._lock:
            if HEAD not in self._outer:
                self._outer[HEAD] = self._tensor(HEAD)
        parts = torch.split(self._outer[HEAD], _HEAD_ROWS)
        return torch.cat([functional.linear(hidden, part.to(self.dtype)) for part in parts], -1)

    def let_go(self) -> None:
        """Free the head of an engine that keeps nothing; the next logits load it again."""
        if not self.resident:
            self._outer.clear()

    def initial_state(self, batch: int) -> list[BlockState]:
        """Return the zero state of `batch` sequences, one BlockState a block."""
        return [BlockState.zero(self.spec, batch, self.dtype) for _ in range(self.spec.layers)]

    def forward(self, ids: Tensor, state: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
        """Return the logits [batch, time, vocab] of ids [batch, time] that follow `state`, and the state after them."""
        hidden, after = self.run(ids, state)
        return self.logits(hidden), after

    def _block(self, index: int) -> dict[str, Tensor]:
        if not self.resident:
            return load_block(self.source, index, self.dtype)
        with self._lock:  # batches run on several threads; a block is decoded once
            if index not in self._blocks:
                self._blocks[index] = load_block(self.source, index, self.dtype)
            return self._blocks[index]

    def _tensor(self, name: str) -> Tensor:
        return self._outer[name] if name in self._outer else self.source.tensor(name)

    def _embedded(self, ids: Tensor, embedding: Tensor) -> Tensor:
        weight, bias = (self.source.tensor(f"blocks.0.ln0.{part}").to(self.dtype) for part in ("weight", "bias"))
        return embed(embedding, weight, bias, ids)

    def _check(self, ids: Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab:
            wrong = low if low < 0 else high
            raise EvaluationError(
                f"{self.source.path}: token id {wrong} is outside the vocabulary of {self.spec.vocab}; "
                "use the tokenizer that the model was trained with"
            )
