"""Tokenizers: Hugging Face tokenizer.json, and the RWKV World vocabulary."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.documents import check_regular
from rwkvq.errors import TokenizerError

MAX_FILE_BYTES = 256 << 20
"""The largest vocabularies are some ten MB; anything larger is refused unread."""
END_OF_TEXT = 0
"""The id that starts every window and ends every text; the World vocabulary file does not list it."""
_TOKEN = -1  # key of a token id in a node of the trie; the other keys are bytes


class Tokenizer(Protocol):
    """Text to token ids and back; no special token is added. vocab_size is 1 + the highest id it can give."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""


class JsonTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend: Any = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every problem of the file
            raise TokenizerError(f"{path}: not a tokenizer.json ({_first_line(error)}); copy it again") from error
        # a file may ask to cut or fill every text, which would change the windows
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        if not self.vocab_size:
            raise TokenizerError(f"{path}: the vocabulary is empty; copy it again")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


class WorldTokenizer:
    """The RWKV World vocabulary: greedy longest match over UTF-8 bytes, which never fails.

    The file has one token a line, `id literal length`: a Python string or bytes literal and its length in bytes. Every
    single byte must be a token.
    """

    def __init__(self, path: Path) -> None:
        self._tokens: dict[int, bytes] = {}
        self._trie: dict[int, Any] = {}
        lines = _read_text(path).split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                identity, token = _parse_line(path, number, line.rstrip("\r"))
                self._add(path, number, identity, token)
        absent = [byte for byte in range(256) if _TOKEN not in self._trie.get(byte, {})]
        if absent:
            raise TokenizerError(f"{path}: no token for byte {absent[0]:#04x}, expected all 256; use the whole file")
        self.vocab_size = 1 + max(self._tokens)

    def _add(self, path: Path, number: int, identity: int, token: bytes) -> None:
        node = self._trie
        for byte in token:
            node = node.setdefault(byte, {})
        if identity in self._tokens or _TOKEN in node:
            raise TokenizerError(f"{path}: line {number}: id {identity} or its token occurs twice; copy it again")
        self._tokens[identity] = token
        node[_TOKEN] = identity

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        data = text.encode("utf-8", errors="replace")
        ids: list[int] = []
        position, end = 0, len(data)
        while position < end:
            node, ahead = self._trie, position
            best, best_end = END_OF_TEXT, position
            while ahead < end and (following := node.get(data[ahead])) is not None:
                node, ahead = following, ahead + 1
                if (token := node.get(_TOKEN)) is not None:
                    best, best_end = token, ahead
            ids.append(best)
            position = best_end
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; id 0 is left out, an id without a token gives U+FFFD."""
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        return b"".join(self._tokens.get(i, unknown) for i in ids if i != END_OF_TEXT).decode("utf-8", errors="replace")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json or a World vocabulary (.txt). Raises TokenizerError: not there, damaged, unknown kind."""
    try:
        check_regular(path)
        size = path.stat().st_size
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}; name a tokenizer.json or a World vocabulary (.txt)") from error
    if size > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {size} bytes, at most {MAX_FILE_BYTES} are read; copy it again")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".txt":
        return WorldTokenizer(path)
    raise TokenizerError(f"{path}: unknown kind of tokenizer, expected tokenizer.json or a World vocabulary (.txt)")


def check_fits(tokenizer: Tokenizer, spec: ModelSpec, path: Path) -> None:
    """Raise TokenizerError if the tokenizer at `path` can give ids for which the model has no embedding."""
    if tokenizer.vocab_size > spec.vocab:
        raise TokenizerError(
            f"{path}: has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary holds {spec.vocab}; "
            "use the tokenizer that the model was trained with"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as UTF-8 ({_first_line(error)})") from error


def _parse_line(path: Path, number: int, line: str) -> tuple[int, bytes]:
    """Id and bytes of one line. The literal is parsed, never evaluated. Raises TokenizerError."""
    try:
        identity, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal.strip())
        token = value.encode("utf-8") if isinstance(value, str) else value
        is_valid = isinstance(token, bytes) and token and len(token) == int(length) and int(identity) > END_OF_TEXT
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        is_valid = False
    if not is_valid:
        raise TokenizerError(f"{path}: line {number} is not `id literal length` with a matching length; copy it again")
    return int(identity), token


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
