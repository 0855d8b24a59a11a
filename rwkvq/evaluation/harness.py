"""Our models in EleutherAI's lm-evaluation-harness 0.4.13, under the name `rwkvq`.

lm-eval finds models only in its own registry, so `main` registers ours first and then hands over to lm-eval's command
line. The harness is an optional extra and is imported inside functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from rwkvq.engine.generate import generate_text
from rwkvq.engine.model import Engine, open_model, open_tokenizer
from rwkvq.errors import EvaluationError
from rwkvq.evaluation.continuations import Continuation, rolling_logprob, score_continuations
from rwkvq.evaluation.lambada import read_examples
from rwkvq.models.tokenizer import END_OF_TEXT

MODEL_NAME = "rwkvq"
TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""Task files shipped with the library; `main` adds the folder to lm-eval's search path."""
Prefix = Literal["bos", "none"]


class HarnessModel:
    """The methods that lm-eval's TemplateLM leaves to a model; `model_class` joins the two.

    With prefix `bos` (default) every request reads id 0 first, which is how RWKV models are trained and what
    rwkvq.evaluation.lambada does; `none` gives the context alone, as lm-eval does for models without such an id.
    lm-eval tokenises context and target together and moves white space that ends a context to the target. That is the
    same as tokenising both alone, as rwkvq.evaluation.lambada does, unless a context does end in white space or the
    vocabulary has a token that spans the last space.
    """

    backend = "causal"

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        prefix: Prefix = "bos",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Open the model at `path` and its tokenizer: the given file, or the copy in an artifact folder.

        lm-eval always passes max_batch_size and device; the engine runs on the CPU with the one batch size, `auto`
        means 16. Raises RwkvqError for whatever cannot be opened, EvaluationError for an unknown prefix.
        """
        super().__init__()
        if prefix not in ("bos", "none"):
            raise EvaluationError(f"prefix: found {prefix!r}, expected bos or none")
        self.engine = Engine(open_model(Path(path)))
        self.text_tokenizer = open_tokenizer(Path(path), Path(tokenizer) if tokenizer else None, self.engine.spec)
        self.prefix = prefix
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 16

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text and, as lm-eval's prefix token, starts one."""
        return END_OF_TEXT

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of `string`, never with special tokens."""
        return self.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Score (any, context ids, continuation ids): (sum of ln p in nats, whether it is the greedy continuation)."""
        items = [Continuation(self._prefixed(context), tuple(target)) for _, context, target in requests]
        scores = score_continuations(self.engine, items, batch=self.batch_size)
        return [(item.logprob, item.is_greedy) for item in scores]

    def _prefixed(self, context: Sequence[int]) -> tuple[int, ...]:
        """The context with id 0 before it, unless it starts with one or the prefix is off."""
        if self.prefix == "none" or (context and context[0] == END_OF_TEXT):
            return tuple(context)
        return (END_OF_TEXT, *context)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts in nats, from id 0, the state carried through the text (no windows)."""
        texts = [request.args[0] for request in requests]
        return [rolling_logprob(self.engine, self.tok_encode(text), bos=END_OF_TEXT) for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, id 0 or `max_gen_toks` (256); sampling is seeded."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        sampled = options.get("do_sample", False)
        return generate_text(
            self.engine,
            self.text_tokenizer,
            context,
            tokens=int(options.get("max_gen_toks", 256)),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            generator=torch.Generator().manual_seed(0),
            until=[until] if isinstance(until, str) else list(until),
        )


@cache
def model_class() -> type[Any]:
    """Return the class registered with lm-eval as `rwkvq`; raises EvaluationError if lm-eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise EvaluationError(f"lm-eval cannot be imported ({error}); pip install 'rwkvq[eval]'") from error
    joined = type("RwkvqModel", (HarnessModel, TemplateLM), {})
    register_model(MODEL_NAME)(joined)
    return joined


def lambada_dataset(lambada: str | None = None, **_: object) -> dict[str, Any]:
    """Return the split `test` of task lambada_local from the JSONL file `lambada`, given as --metadata lambada=FILE.

    lm-eval also passes the model's arguments. Raises EvaluationError without a file or with one that is not usable.
    """
    if lambada is None:
        raise EvaluationError("lambada_local: no file given; add --metadata lambada=FILE.jsonl")
    from datasets import Dataset

    return {"test": Dataset.from_dict({"text": read_examples(Path(lambada))})}


def main(argv: Sequence[str]) -> None:
    """Run lm-eval's command line with arguments `argv` after registering `rwkvq` and the tasks shipped here.

    `rwkvq lm-eval run --model rwkvq --model_args path=MODEL,tokenizer=FILE --tasks ...`. Exits as lm-eval does.
    """
    model_class()
    from lm_eval.__main__ import cli_evaluate

    with _arguments(["rwkvq lm-eval", *with_tasks_folder(argv)]):
        cli_evaluate()


def with_tasks_folder(argv: Sequence[str]) -> list[str]:
    """Add our task folder to a `run` that names none itself; other commands are left alone."""
    named = any(word.split("=")[0] == "--include_path" for word in argv)
    runs = bool(argv) and argv[0] not in ("ls", "validate", "-h", "--help")
    return [*argv, "--include_path", str(TASKS_FOLDER)] if runs and not named else list(argv)


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Replace sys.argv, the only place lm-eval reads its arguments from."""
    before = sys.argv
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = before
