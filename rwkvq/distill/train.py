"""The training: Adam on the KL to the float model, judged on held-out windows with the values as they are stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.distill.loss import LOGITS_BYTES, Teacher, hidden, loss_and_gradients
from rwkvq.distill.student import OUTER, Parts, QuantizedSource, Student, Vectors
from rwkvq.engine.model import Engine
from rwkvq.errors import QuantizationError, TextError
from rwkvq.evaluation.logprobs import score
from rwkvq.files import Progress, no_progress
from rwkvq.models import batches_at_once
from rwkvq.plan.plan import Plan
from rwkvq.settings import DistillSettings
from rwkvq.threads import map_in_order, single_threaded_torch

BETAS = (0.9, 0.98)
"""Decay of Adam's two means (arXiv 1412.6980); the second is short, since steps are few."""
EPSILON = 1e-12
WARM_UP = 4
"""Steps over which the rate rises to distill.learning_rate."""
INTERVAL = 8
"""Steps between two looks at the held-out windows."""
FLOOR = 1e-3
"""Least root mean square of a tensor that its steps are measured by: a tensor of zeros can move too."""


@dataclass(frozen=True, slots=True)
class Check:
    """One look at the held-out windows: steps so far, mean KL there with the values as they are stored, and mean KL of
    the training windows since the look before (None at the first); nats a token.
    """

    step: int
    held_out_kl: float
    train_kl: float | None


@dataclass(frozen=True, slots=True)
class Distilled:
    """values: every vector that may have moved, by weight name, as the plan stores it: those of the best check.

    checks: all, the first before any step. step: of the best.
    """

    values: dict[str, Tensor]
    checks: tuple[Check, ...]
    step: int

    @property
    def before(self) -> float:
        """Held-out KL before any step."""
        return self.checks[0].held_out_kl

    @property
    def after(self) -> float:
        """Held-out KL of `values`; the least of all checks, so a little better than on other text."""
        return min(check.held_out_kl for check in self.checks)


def distill(
    source: WeightSource,
    plan: Plan,
    parts: Parts,
    windows: Windows,
    settings: DistillSettings,
    *,
    seed: int,
    workers: int = 1,
    on_step: Progress = no_progress,
) -> Distilled:
    """Train the vectors that `plan` keeps, codes as `parts` gives them, on the windows that statistics use.

    The student is in memory as float32, and the final hidden states of the float model for all windows. workers:
    windows that run at once; it changes no bit. Raises TextError without held-out windows, QuantizationError if the
    loss is not finite, and what reading model or parts raises.
    """
    used, held_out = ((windows.held_out == flag).nonzero()[0].tolist() for flag in (False, True))
    if not held_out:
        raise TextError("distill: no window is held out to judge by; set windows.held_out to 1 or more")
    order = list(islice(_shuffled(used, seed), settings.steps * settings.batch))
    with single_threaded_torch():
        work = _Work(source, plan, parts, windows, sorted({*order, *held_out}), workers)
        return _train(work, order, held_out, settings, on_step)


def _shuffled(windows: Sequence[int], seed: int) -> Iterator[int]:
    """The windows again and again, each time in another order that depends on the seed alone."""
    epoch = 0
    while True:

        def key(window: int, epoch: int = epoch) -> bytes:
            return hashlib.sha256(f"distill {seed} {epoch} {window}".encode()).digest()

        yield from sorted(windows, key=key)
        epoch += 1


class _Work:
    """The student, what the float model says about each window, and passes over several windows at once."""

    def __init__(
        self, source: WeightSource, plan: Plan, parts: Parts, windows: Windows, seen: list[int], workers: int
    ) -> None:
        inputs = torch.from_numpy(model_inputs(windows.ids)).long()
        self.ids = {window: inputs[window : window + 1] for window in seen}
        self.length = inputs.shape[1]
        self.workers = batches_at_once(source.spec, 4 * self.length, workers)  # as in the pass of stage gradients
        head = source.tensor(OUTER[1]).float()
        states = Engine(source, resident=False).hidden_of(list(self.ids.values()), self.workers)
        self.teachers = {window: Teacher(state, head) for window, state in zip(seen, states, strict=True)}
        self.student = Student.of(QuantizedSource(source, plan, parts))
        self.vectors = Vectors.of(plan, self.student)

    def start(self) -> Tensor:
        """The vectors as they are stored without distillation."""
        return self.vectors.join({entry.name: self.student.value(entry.name) for entry in self.vectors.entries})

    def gradient(self, flat: Tensor, windows: Sequence[int]) -> tuple[float, Tensor]:
        """Mean KL over the tokens of some windows, and its gradient to the vectors."""
        values = self.vectors.split(flat)

        def run(window: int) -> tuple[float, Tensor]:
            found = loss_and_gradients(self.student, values, self.ids[window], self.teachers[window])
            return found[0], self.vectors.join(found[1])

        loss, total = 0.0, torch.zeros_like(flat)
        for own, gradient in map_in_order(run, windows, self.workers):
            loss += own
            total += gradient
        tokens = len(windows) * self.length
        return loss / tokens, total / tokens

    def kl(self, flat: Tensor, windows: Sequence[int]) -> float:
        """Mean KL over the tokens of some windows, logarithms in float64."""
        values = self.vectors.split(flat)
        rows = max(1, LOGITS_BYTES // (4 * len(self.student.head)))

        def run(window: int) -> float:
            teacher, states = self.teachers[window], hidden(self.student, values, self.ids[window])
            pairs = zip(torch.split(teacher.hidden[0], rows), torch.split(states[0], rows), strict=True)
            return sum(_kl(theirs @ teacher.head.T, own @ self.student.head.T) for theirs, own in pairs)

        total = sum(map_in_order(run, windows, self.workers))
        return total / (len(windows) * self.length)


def _kl(reference: Tensor, logits: Tensor) -> float:
    scores = score([reference, logits], torch.zeros(len(logits), dtype=torch.int64))[1]
    assert scores.kl is not None
    return float(scores.kl.sum())


class _Adam:
    """Adam without weight decay; each tensor's steps are in units of its root mean square at the start."""

    def __init__(self, start: Tensor, unit: Tensor, settings: DistillSettings) -> None:
        self.values, self._unit, self._settings = start.clone(), unit, settings
        self._mean, self._square = torch.zeros_like(start), torch.zeros_like(start)
        self.step_number = 0

    def step(self, gradient: Tensor) -> None:
        """One step against `gradient`."""
        first, second = BETAS
        self.step_number += 1
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        mean = self._mean / (1 - first**self.step_number)
        deviation = (self._square / (1 - second**self.step_number)).sqrt()
        self.values -= self._rate() * self._unit * mean / (deviation + EPSILON)

    def _rate(self) -> float:
        """A short rise, then a cosine to 0 over distill.steps."""
        progress = (self.step_number - 1) / self._settings.steps
        rise = min(1.0, self.step_number / WARM_UP)
        return self._settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * progress))


def _train(
    work: _Work, order: Sequence[int], held_out: Sequence[int], settings: DistillSettings, on_step: Progress
) -> Distilled:
    start = work.start()
    adam = _Adam(start, work.vectors.root_mean_squares(start).clamp_min(FLOOR), settings)
    checks = [_checked(0, work.kl(start, held_out), None)]
    best, best_step, losses = start, 0, []
    for step in range(1, settings.steps + 1):
        batch = order[(step - 1) * settings.batch : step * settings.batch]
        # the gradient where the stored values are, the step from where the exact ones are
        loss, gradient = work.gradient(work.vectors.rounded(adam.values), batch)
        losses.append(loss)
        adam.step(gradient)
        on_step(f"held-out KL {checks[-1].held_out_kl:.5f}", step, settings.steps)
        if step % INTERVAL and step < settings.steps:
            continue
        values = work.vectors.rounded(adam.values)
        checks.append(_checked(step, work.kl(values, held_out), sum(losses) / len(losses)))
        losses = []
        if checks[-1].held_out_kl < min(check.held_out_kl for check in checks[:-1]):
            best, best_step = values, step
        elif step - best_step >= settings.patience * INTERVAL:
            break
    return Distilled(work.vectors.stored(best), tuple(checks), best_step)


def _checked(step: int, held_out: float, train: float | None) -> Check:
    if not math.isfinite(held_out):
        raise QuantizationError(f"distill: the KL after step {step} is not finite; lower distill.learning_rate")
    return Check(step, held_out, train)
