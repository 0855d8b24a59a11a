"""Distillation: its gradient against finite differences, what it may touch, and that it makes held-out text better."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkvq.calibration.windows import Windows, model_inputs
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.distill import distill, train
from rwkvq.distill.loss import Teacher, hidden, loss_and_gradients
from rwkvq.distill.outputs import read_curve, read_distilled, write_distilled
from rwkvq.distill.student import Parts, QuantizedSource, Student, Vectors, trained_weights
from rwkvq.engine.model import Engine
from rwkvq.errors import QuantizationError, TextError
from rwkvq.formats import DenseLayout
from rwkvq.plan.plan import Plan
from rwkvq.settings import DistillSettings
from tests.distillation import rounded_model
from tests.unit.test_activations import made_up_windows

VERSIONS = ("x060", "x070")
Model = tuple[Checkpoint, Plan, Parts]


@pytest.fixture(scope="module", params=VERSIONS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return rounded_model(tmp_path_factory.mktemp(request.param), request.param)


def trainable(model: Model) -> tuple[Student, Vectors, Tensor, Teacher, Tensor]:
    """Everything in float64: student, vectors, their values, the float model's word and the ids of one window."""
    source, plan, parts = model
    ids = torch.from_numpy(model_inputs(made_up_windows(1).ids)).long()
    student = Student.of(QuantizedSource(source, plan, parts), torch.float64)
    vectors = Vectors.of(plan, student)
    flat = vectors.join({entry.name: student.value(entry.name) for entry in vectors.entries})
    teacher = Teacher(
        Engine(source, dtype=torch.float64, resident=False).hidden(ids), source.tensor("head.weight").double()
    )
    return student, vectors, flat, teacher, ids


def kl_of(student: Student, values: dict[str, Tensor], ids: Tensor, teacher: Teacher) -> float:
    """The definition: sum over tokens and vocabulary of p (ln p - ln q)."""
    own = (hidden(student, values, ids) @ student.head.T).log_softmax(-1)
    reference = (teacher.hidden @ teacher.head.T).log_softmax(-1)
    return float((reference.exp() * (reference - own)).sum())


def test_the_loss_is_the_divergence_and_its_gradient_a_finite_difference(model: Model) -> None:
    student, vectors, flat, teacher, ids = trainable(model)
    values = vectors.split(flat)
    loss, gradients = loss_and_gradients(student, values, ids, teacher)
    assert loss == pytest.approx(kl_of(student, values, ids, teacher), rel=1e-10)
    assert set(gradients) == set(values) == {entry.name for entry in vectors.entries}
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for name, value in values.items():
        probe = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        up, down = ({**values, name: value + sign * step * probe} for sign in (1, -1))
        slope = (kl_of(student, up, ids, teacher) - kl_of(student, down, ids, teacher)) / (2 * step)
        assert float((gradients[name] * probe).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_a_few_tokens_at_a_time_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    student, vectors, flat, teacher, ids = trainable(model)
    whole, gradients = loss_and_gradients(student, vectors.split(flat), ids, teacher)
    monkeypatch.setattr("rwkvq.distill.loss.LOGITS_BYTES", 5 * 8 * student.spec.vocab)
    parts, again = loss_and_gradients(student, vectors.split(flat), ids, teacher)
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(vectors.join(again), vectors.join(gradients), rtol=1e-10, atol=1e-12)


def test_the_student_is_what_an_artifact_computes(model: Model) -> None:
    source, plan, parts = model
    student, vectors, flat, _, ids = trainable(model)
    expected = Engine(QuantizedSource(source, plan, parts), dtype=torch.float64, resident=False).hidden(ids)
    torch.testing.assert_close(hidden(student, vectors.split(flat), ids), expected, rtol=1e-12, atol=1e-12)


def test_only_vectors_that_the_plan_keeps_may_move(model: Model) -> None:
    _, plan, _ = model
    names = {entry.name for entry in trained_weights(plan)}
    assert {"ln_out.weight", "blocks.0.ln0.bias", "blocks.1.ln1.weight", "blocks.1.att.ln_x.bias"} <= names
    assert not {entry.name for entry in plan.tensors if entry.weight_class in ("matrix", "lora")} & names
    assert not names & {"emb.weight", "head.weight"}
    quantized = next(entry for entry in trained_weights(plan) if entry.weight_class == "elementwise")
    rows = tuple(replace(entry, method="elementwise") if entry == quantized else entry for entry in plan.tensors)
    assert names - {entry.name for entry in trained_weights(replace(plan, tensors=rows))} == {quantized.name}


def test_rounding_is_that_of_the_plan(model: Model) -> None:
    student, vectors, flat, _, _ = trainable(model)
    assert torch.equal(vectors.rounded(flat), flat)  # they come as they are stored
    moved = flat * (1 + 2.0**-20)
    assert torch.equal(vectors.rounded(moved), flat) and not torch.equal(moved, flat)
    for entry in vectors.entries:
        assert isinstance(entry.layout, DenseLayout)
        stored = vectors.stored(flat)[entry.name]
        assert tuple(stored.shape) == entry.layout.shape
        assert str(stored.dtype) == f"torch.{entry.layout.dtype}"
        assert 8 * stored.numel() * stored.itemsize == entry.stored_bits
        torch.testing.assert_close(stored.double().flatten(), student.value(entry.name).flatten(), rtol=0, atol=0)
    units = vectors.split(vectors.root_mean_squares(flat))
    name = vectors.entries[3].name
    torch.testing.assert_close(
        units[name], student.value(name).square().mean().sqrt().expand(units[name].shape), rtol=1e-12, atol=0
    )


def settings(**values: float) -> DistillSettings:
    return DistillSettings.model_validate({"steps": 16, "learning_rate": 0.01, "batch": 3} | values)


def is_as_in(source: Checkpoint, name: str, value: Tensor) -> bool:
    """Whether a vector has the checkpoint's values, in its own dtype."""
    return torch.equal(value.flatten(), source.tensor(name).to(value.dtype).flatten())


def windows(count: int = 10) -> Windows:
    return made_up_windows(count, 32, held_out=3)


def test_held_out_windows_become_better_with_equal_bits(model: Model) -> None:
    source, plan, parts = model
    seen: list[int] = []
    result = distill(
        source, plan, parts, windows(), settings(), seed=0, on_step=lambda what, done, total: seen.append(done)
    )
    assert seen == list(range(1, 17))
    assert [check.step for check in result.checks] == [0, 8, 16]
    assert result.after < 0.97 * result.before
    assert result.checks[0].train_kl is None and result.checks[1].train_kl is not None
    stored = {entry.name: entry for entry in trained_weights(plan)}
    assert set(result.values) == set(stored)
    for name, value in result.values.items():
        assert 8 * value.numel() * value.itemsize == stored[name].stored_bits
    moved = [
        n for n, v in result.values.items() if not torch.equal(v.flatten(), source.tensor(n).to(v.dtype).flatten())
    ]
    assert len(moved) > len(stored) / 2


def test_the_figures_are_those_of_the_stored_values(model: Model) -> None:
    source, plan, parts = model
    result = distill(source, plan, parts, windows(), settings(), seed=0)
    student = Student.of(QuantizedSource(source, plan, parts))
    shapes = {name: student.value(name).shape for name in result.values}
    values = {name: value.float().reshape(shapes[name]) for name, value in result.values.items()}
    ids = torch.from_numpy(model_inputs(windows().ids)).long()[windows().held_out]
    own = (hidden(student, values, ids) @ student.head.T).double().log_softmax(-1)
    reference = (Engine(source).hidden(ids) @ source.tensor("head.weight").float().T).double().log_softmax(-1)
    measured = float((reference.exp() * (reference - own)).sum(-1).mean())
    assert result.after == pytest.approx(measured, rel=1e-4)


def test_workers_change_no_bit_and_the_seed_does(model: Model) -> None:
    source, plan, parts = model
    alone, beside, other = (
        distill(source, plan, parts, windows(), settings(steps=4), seed=seed, workers=workers)
        for seed, workers in ((0, 1), (0, 3), (1, 1))
    )
    assert alone.checks == beside.checks
    assert all(torch.equal(value, beside.values[name]) for name, value in alone.values.items())
    assert alone.checks[-1] != other.checks[-1]


def test_training_that_makes_it_worse_is_stopped_and_leaves_everything_as_it_was(model: Model) -> None:
    source, plan, parts = model
    result = distill(source, plan, parts, windows(), settings(steps=80, learning_rate=1.0, patience=2), seed=0)
    assert result.step == 0 and result.after == result.before
    assert [check.step for check in result.checks] == [0, 8, 16]
    for name, value in result.values.items():
        assert is_as_in(source, name, value), name


def test_held_out_windows_are_never_trained_on(model: Model) -> None:
    source, plan, parts = model
    flags = windows().held_out
    work = train._Work(source, plan, parts, windows(), list(range(10)), 1)
    seen: list[int] = []
    gradient = work.gradient
    work.gradient = lambda flat, some: (seen.extend(some), gradient(flat, some))[1]  # type: ignore[method-assign]
    order = list(islice(train._shuffled((~flags).nonzero()[0].tolist(), 0), 9))
    train._train(work, order, flags.nonzero()[0].tolist(), settings(steps=3), lambda what, done, total: None)
    assert seen == order and not flags[np.array(seen)].any()
    assert sorted(order[:7]) == (~flags).nonzero()[0].tolist()  # each once before any comes again


def test_without_held_out_windows_nobody_can_judge(model: Model) -> None:
    source, plan, parts = model
    with pytest.raises(TextError, match=r"set windows\.held_out to 1 or more"):
        distill(source, plan, parts, made_up_windows(4, held_out=0), settings(), seed=0)


def test_files_round_trip_and_damage_is_named(model: Model, tmp_path: Path) -> None:
    source, plan, parts = model
    result = distill(source, plan, parts, windows(), settings(steps=2), seed=0)
    tensors, curve = tmp_path / "distilled.safetensors", tmp_path / "distillation.json"
    write_distilled(result, tensors, curve)
    found = read_distilled(tensors, plan)
    assert all(torch.equal(value, found[name]) for name, value in result.values.items())
    figures = read_curve(curve)
    assert (figures["before"], figures["after"], figures["step"]) == (result.before, result.after, result.step)
    assert figures["vectors"] == len(result.values) and len(figures["checks"]) == len(result.checks)

    fewer = replace(plan, tensors=tuple(entry for entry in plan.tensors if entry.name != "ln_out.bias"))
    with pytest.raises(QuantizationError, match="not the vectors that the plan keeps; run stage distill again"):
        read_distilled(tensors, fewer)
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(QuantizationError, match="missing or damaged; run stage distill again"):
        read_distilled(tensors, plan)
    for text in ("{}", '{"before": "x", "after": 1, "step": 0, "vectors": 1}', ""):
        curve.write_text(text)
        with pytest.raises(QuantizationError, match="run stage distill again"):
            read_curve(curve)
