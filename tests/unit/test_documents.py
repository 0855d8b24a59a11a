"""YAML and JSON from outside: plain values, or one line that says where and what; never code, never without bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rwkvq import documents
from rwkvq.documents import parse_json, parse_yaml, read_json, read_yaml
from rwkvq.errors import SettingsError


def laughs(first: str, again: str) -> str:
    """Nine aliases of nine aliases of ...: 9**12 values in a few hundred bytes."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {again.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12)]
    return "\n".join(lines)


def test_plain_values_with_anchors_and_merge_keys() -> None:
    text = "base: &b {bits: 3, on_gpu: false}\nrun: {<<: *b, bits: 4}\nlist: [*b, 1.5, ~, 'yes', 2:30]\n"
    assert parse_yaml(text) == {
        "base": {"bits": 3, "on_gpu": False},
        "run": {"bits": 4, "on_gpu": False},
        "list": [{"bits": 3, "on_gpu": False}, 1.5, None, "yes", 150],
    }
    assert parse_yaml("") is None


BAD_YAML = {
    "code": (
        "a: !!python/object/apply:os.mkdir ['ran']",
        "line 1: tag 'tag:yaml.org,2002:python/object/apply:os.mkdir'",
    ),
    "code of a new kind": ("a: !!python/name:os.system", "tag"),
    "any tag": ("a: !!binary aGk=", "only plain values"),
    "billion laughs": (laughs("[x, x, x]", "[{}]"), "once aliases are expanded"),
    "billion merges": (laughs("{x: 1}", "{{<<: [{}]}}"), "once aliases are expanded"),
    "long text many times": ("a: &a " + "x" * 60_000 + "\nb: [" + "*a, " * 40 + "1]", "once aliases are expanded"),
    "anchor in itself": ("a: &a [1, *a]", "line 1: an anchor that contains itself"),
    "anchor in its own key": ("&a {*a : 1}", "line 1"),
    "unknown alias": ("a: *b", "undefined alias 'b'"),
    "deep": ("[" * 50_000, "nested more than 32 deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(40)), "nested more than 32 deep"),
    "many values": ("[" + "x," * 30_000 + "]", "more than 20000 values"),
    "key twice": ("a: {b: 1}\nc: 1\na: 2", "line 3: key 'a' occurs twice"),
    "key twice below": ("a:\n  b: 1\n  b: 2", "line 3: key 'b' occurs twice"),
    "number as key": ("1: 2", "key '1' of a mapping is no text"),
    "boolean as key": ("on: 2", "key 'on' of a mapping is no text"),
    "list as key": ("? [a]\n: b", "a list or mapping of a mapping is no text"),
    "mapping as key": ("? {a: 1}\n: b", "is no text"),
    "infinity": ("a: .inf", ".inf is no finite number"),
    "not a number": ("a: [1, .NaN]", "no finite number"),
    "overflow": ("a: 1.0e+999999", "no finite number"),
    "digits": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "base sixty": ("a: " + ":".join(["59"] * 50_000), "a number of"),
    "bits": ("a: 0b" + "1" * 100_000, "a number of"),
    "date": ("a: 2024-99-99", "line 1: '2024-99-99' is a timestamp"),
    "surrogate": ('a: "\\uD800"', "the character '\\ud800'"),
    "zero byte": ('a: "b\\0"', "the character '\\x00'"),
    "line in a path": ('model: "a\\nb"', "the character '\\n'"),
    "escape sequence": ('a: "\\e[2J"', "the character '\\x1b'"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "control character": ("a: \x07", "special characters are not allowed"),
    "open bracket": ("a: [1", "line 1"),
    "tab": ("a:\n\tb: 1", "line 2"),
    "version": ("%YAML 9.9\n---\na: 1", "incompatible"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_bad_yaml_is_one_line_with_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    text, words = BAD_YAML[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert str(path) in message and words in message and "YAML" in message and "correct the file" in message
    assert "\n" not in message and len(message) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["params.yaml"]


def test_a_mapping_is_expected_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for text in ("- 1", "text", "3"):
        path.write_text(text)
        with pytest.raises(SettingsError, match=r"not a mapping.*correct the file"):
            read_yaml(path)
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


def make_odd(path: Path, kind: str) -> None:
    """Put something else than a file at `path`."""
    if kind == "pipe":
        os.mkfifo(path)  # opening one waits for a writer, for ever
    elif kind == "device":
        path.symlink_to("/dev/zero")  # reading it never ends
    elif kind == "folder":
        path.mkdir()
    elif kind == "too large":
        path.touch()
        os.truncate(path, 1 << 40)  # sparse
    elif kind == "other encoding":
        path.write_bytes("a: ü".encode("utf-16"))
    elif kind == "loop":
        path.symlink_to(path)


ODD = {
    "pipe": "regular file",
    "device": "regular file",
    "folder": "regular file",
    "too large": "at most",
    "other encoding": "UTF-8",
    "loop": "cannot be read",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_text_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "params.yaml"
    make_odd(path, kind)
    with pytest.raises(SettingsError, match=ODD[kind]) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    with pytest.raises((OSError, ValueError)):
        read_json(path)


def test_a_link_to_a_file_is_the_users_own_choice(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("a: 1")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    assert read_yaml(tmp_path / "link.yaml") == {"a": 1}


BAD_JSON = {
    "constant": ('{"a": NaN}', "no finite number"),
    "infinity": ("[-Infinity]", "no finite number"),
    "overflow": ("[1e999999]", "no finite number"),
    "digits": ("9" * 10_000, "digits"),
    "key twice": ('{"a": {"b": 1, "c": 2, "b": 3}}', "key 'b' occurs twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "many values": ("[" + "{}," * (1 << 20) + "0]", "values"),
    "surrogate": ('["\\ud800"]', "surrogate"),
    "no JSON": ("{", "Expecting"),
    "more behind": ("{} {}", "Extra data"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_a_reason_of_one_line(kind: str) -> None:
    text, words = BAD_JSON[kind]
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_sound_json_is_what_json_reads() -> None:
    values = {"a": [1, 2.5, None, True, "\U0001f600 \u00fc"], "b": {"c": -1e-300}}
    for ascii_only in (True, False):
        assert parse_json(json.dumps(values, ensure_ascii=ascii_only)) == values


def test_limits_are_far_above_real_files() -> None:
    """The demo's plan and settings use a small part of what is allowed."""
    root = Path(__file__).resolve().parents[2]
    assert (root / "params.yaml").stat().st_size < documents.MAX_YAML_BYTES / 100
    assert isinstance(read_yaml(root / "params.yaml"), dict)
