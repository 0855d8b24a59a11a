from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.engine.model import Engine
from rwkvq.evaluation.continuations import Continuation, rolling_logprob, score_continuations
from tests.tiny import write_tiny


@pytest.fixture(params=["x060", "x070"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return Engine(open_checkpoint(write_tiny(tmp_path / "model.pth", request.param)))


def alone(engine: Engine, item: Continuation) -> tuple[float, bool]:
    row = item.context + item.target
    logits = engine.logits(engine.hidden(torch.tensor([row]))[0]).double()
    logprobs = torch.log_softmax(logits, -1)[len(item.context) - 1 : -1]
    target = torch.tensor(item.target)
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


def items(count: int) -> list[Continuation]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 320, (length,), generator=generator).tolist())

    return [Continuation((0, *ids((7 * i) % 40)), ids(1 + i % 3)) for i in range(count)]


def test_padded_batches_equal_every_item_alone_in_the_order_given(engine: Engine) -> None:
    wanted = items(11)
    scores = score_continuations(engine, wanted, batch=4)
    expected = [alone(engine, item) for item in wanted]
    assert [score.logprob for score in scores] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert len({round(logprob, 3) for logprob, _ in expected}) == 11


def test_greedy_needs_every_token(engine: Engine) -> None:
    context = (0, 9, 17)
    row = list(context)
    for _ in range(2):
        row.append(int(engine.logits(engine.hidden(torch.tensor([row]))[0, -1]).argmax()))
    right = Continuation(context, tuple(row[3:]))
    half = Continuation(context, (row[3], (row[4] + 1) % 320))
    assert [score.is_greedy for score in score_continuations(engine, [right, half], batch=2)] == [True, False]


def test_rolling_carries_the_state_over_segments(engine: Engine) -> None:
    ids = torch.randint(1, 320, (75,), generator=torch.Generator().manual_seed(6)).tolist()
    whole = alone(engine, Continuation((0,), tuple(ids)))[0]
    assert rolling_logprob(engine, ids, bos=0, segment=16) == pytest.approx(whole, rel=1e-5)
    assert rolling_logprob(engine, [], bos=0) == 0.0


def test_progress_counts_examples(engine: Engine) -> None:
    seen: list[tuple[str, int, int]] = []
    score_continuations(engine, items(5), batch=3, on_batch=lambda *item: seen.append(item))
    assert seen == [("examples", 3, 5), ("examples", 5, 5)]
