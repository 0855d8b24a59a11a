"""Both kinds of tokenizer, and files that are neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from rwkvq.errors import TokenizerError
from rwkvq.models.tokenizer import check_fits, load_tokenizer
from tests.tiny import tiny_spec, write_byte_vocabulary

TEXT = "The cat's déjà vu\r\n\t 東京 \U0001f600\x00 end"


def _world(path: Path, *extra: str) -> Path:
    write_byte_vocabulary(path)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in extra)
    return path


def _json(path: Path) -> Path:
    """A tokenizer.json of bytes and the token `th`, with a special token 0, that asks to cut and fill texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {char: number for number, char in enumerate([*alphabet, "th"], start=1)}
    backend = Backend(models.BPE(vocab=vocab, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["world", "json"])
def test_text_comes_back(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(_world(tmp_path / "v.txt") if kind == "world" else _json(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([0, *ids, 0]) == TEXT
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_json_is_neither_cut_nor_filled_nor_marked(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_json(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("ththththx")
    assert ids[:4] == [257] * 4 and len(ids) == 5 and tokenizer.vocab_size == 258


def test_world_takes_the_longest_match(tmp_path: Path) -> None:
    path = _world(tmp_path / "v.txt", "300 'ab' 2", "301 'abcd' 4", "302 ' b' 2", "303 b'\\xe6\\x9d' 2", "304 '東' 3")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abcd abce") == [301, 33, 300, 100, 102]
    assert tokenizer.encode("東\u6771"[:1]) == [304]
    assert tokenizer.encode("\u675f") == [303, 0x9F + 1]
    assert tokenizer.decode([303]) == "\ufffd" and tokenizer.decode([299]) == "\ufffd"
    assert tokenizer.vocab_size == 305


def test_world_encodes_a_long_partial_match(tmp_path: Path) -> None:
    """A token of 128 bytes that nearly matches everywhere is looked at, never taken."""
    tokenizer = load_tokenizer(_world(tmp_path / "v.txt", f"400 '{'a' * 127}b' 128"))
    assert tokenizer.encode("a" * 5_000) == [98] * 5_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("300 'ab' 3", "line 257 is not"),
        ("300 'ab'", "line 257 is not"),
        ("x 'ab' 2", "line 257 is not"),
        ("0 'ab' 2", "line 257 is not"),
        ("300 '' 0", "line 257 is not"),
        ("300 17 2", "line 257 is not"),
        ("300 'ab 2", "line 257 is not"),
        ("300 __import__('os').getcwd() 2", "line 257 is not"),
        ("300 " + "(" * 5000 + " 2", "line 257 is not"),
        ("5 'ab' 2", "occurs twice"),
        ("300 'a' 1", "occurs twice"),
    ],
)
def test_world_line_that_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    _refused(_world(tmp_path / "v.txt", line), message)


def test_world_without_a_byte(tmp_path: Path) -> None:
    path = _world(tmp_path / "v.txt")
    path.write_text("\n".join(line for line in path.read_text().split("\n") if not line.startswith("11 ")))
    _refused(path, "no token for byte 0x0a")


def _refused(path: Path, message: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    text = str(caught.value)
    assert message in text and str(path) in text and "\n" not in text


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.json", "cannot be read")
    for name, data, message in (
        ("a.json", b"{}", "not a tokenizer.json"),
        ("b.json", b"\xff\xfe", "not a tokenizer.json"),
        ("c.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("d.txt", b"", "no token for byte 0x00"),
        ("e.model", b"", "unknown kind of tokenizer"),
    ):
        (tmp_path / name).write_bytes(data)
        _refused(tmp_path / name, message)


def test_tokenizer_must_fit_the_vocabulary(tmp_path: Path) -> None:
    path = _world(tmp_path / "v.txt")
    tokenizer = load_tokenizer(path)
    check_fits(tokenizer, tiny_spec("x070", vocab=257), path)
    with pytest.raises(TokenizerError, match=r"v\.txt: has ids up to 256, but the model's vocabulary holds 256"):
        check_fits(tokenizer, tiny_spec("x070", vocab=256), path)
