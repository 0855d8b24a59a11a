"""Text files from outside, read with suspicion: regular files of bounded size, YAML and JSON of plain values.

Every reader raises OSError, or ValueError with a reason of one line; who calls it names the file and the remedy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from rwkvq.errors import SettingsError

MAX_YAML_BYTES = 1 << 18
"""A settings or family file is a page of text; anything larger is refused unread."""
MAX_YAML_VALUES = 20_000
"""Keys and values of a YAML file, each alias counted as all that it stands for."""
MAX_YAML_CHARACTERS = 1 << 20
"""Characters of all of them together."""
MAX_DEPTH = 32
MAX_NUMBER = 64
"""Characters of a number: the time to read one grows with the square of its digits."""
MAX_JSON_BYTES = 16 << 20
"""The largest plan takes about 2 MB."""
MAX_JSON_VALUES = 1 << 20
"""Objects, lists and their members; a short text can hold so many that they fill the memory."""

_STRANGE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that no name, path or pattern holds, and that would break a message of one line."""
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = frozenset(_PREFIX + kind for kind in ("str", "int", "float", "bool", "null"))
_MERGE = f"{_PREFIX}merge"


def open_regular(path: Path) -> BinaryIO:
    """The file, opened for reading. Raises ValueError for a pipe, a device or a folder, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return os.fdopen(descriptor, "rb")


def check_regular(path: Path) -> None:
    """Raise OSError or ValueError unless `path` is a regular file that may be read, for libraries that want a path."""
    open_regular(path).close()


def check_member(folder: Path, path: Path) -> None:
    """Raise ValueError unless `path`, an entry of `folder`, is a regular file in it; raise OSError if it is missing.

    A link may lead to another file of the folder, or to the `blobs` of the Hugging Face cache that the folder is in.
    """
    if path.is_symlink():
        root, target = folder.resolve(), path.resolve()
        blobs = [above.parent / "blobs" for above in (root, *root.parents) if above.name == "snapshots"]
        if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
            raise ValueError("a link that leads out of its folder")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, at most {limit} are read")
        data = file.read(limit)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> Any:
    """The plain values of a JSON file: finite numbers, no key twice, no lone surrogate."""
    return parse_json(read_text(path, MAX_JSON_BYTES))


def parse_json(text: str) -> Any:
    """The plain values of a JSON text; see read_json."""
    if sum(text.count(sign) for sign in ",[{") > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        values = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_no_number, parse_float=_finite_number
        )
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair in a text") from error
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} occurs twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _no_number(text[:80])
    return number


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file whose top level is a mapping; {} if it is empty.

    Anchors, aliases and merge keys work. Raises SettingsError, one line with the place: no such file, too large or too
    deep, also once aliases are expanded, tags, keys that are no text or occur twice, numbers that are not finite.
    """
    try:
        values = parse_yaml(read_text(path, MAX_YAML_BYTES))
    except FileNotFoundError as error:
        raise SettingsError(str(path), ["no such file"]) from error
    except OSError as error:
        raise SettingsError(str(path), [f"cannot be read ({error.strerror}); check the path"]) from error
    except ValueError as error:
        raise SettingsError(str(path), [f"cannot be read as YAML ({error}); correct the file"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(str(path), ["the top level is not a mapping of section names; correct the file"])
    return values


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text (mappings with text keys, lists, text, numbers, booleans, null).

    Raises ValueError with a reason of one line.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for plain values only; sizes are checked while nodes are made, before any value is."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node and all below it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._count += 1
        if self._count > MAX_YAML_VALUES:
            _refuse(event, f"more than {MAX_YAML_VALUES} values")
        if self._depth >= MAX_DEPTH:
            _refuse(event, f"nested more than {MAX_DEPTH} deep")
        if getattr(event, "tag", None) is not None:
            _refuse(event, f"tag {event.tag[:80]!r}, only plain values are read")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            return node  # checked where its anchor stands; once more for every alias could take for ever
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _refuse(at: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _check_scalar(node: yaml.ScalarNode) -> None:
    kind, value = node.tag, node.value
    if found := _STRANGE.search(value):
        _refuse(node, f"the character {found.group()!r} in a text")
    if kind in (_PREFIX + "int", _PREFIX + "float"):
        if len(value) > MAX_NUMBER:
            _refuse(node, f"a number of {len(value)} characters")
        if value.lstrip("+-").lower() in (".inf", ".nan"):
            _refuse(node, f"{value} is no finite number")
    elif kind not in _PLAIN and kind != _MERGE:
        _refuse(node, f"{value[:80]!r} is a {kind.removeprefix(_PREFIX)}, put it in quotes")


def _check_keys(node: yaml.MappingNode) -> None:
    """Every key of a mapping is a text of its own; `<<` merges other mappings."""
    seen = set()
    for key, _ in node.value:
        if key.tag not in (_PREFIX + "str", _MERGE):
            shown = repr(key.value[:80]) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            _refuse(key, f"key {shown} of a mapping is no text, put it in quotes")
        if key.value in seen:
            _refuse(key, f"key {key.value[:80]!r} occurs twice in a mapping")
        seen.add(key.value)


def _check_size(root: yaml.Node) -> None:
    """Raise unless the document is small once every alias is expanded; nothing is expanded to find out."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in sizes:
            if sizes[id(node)] == (0, 0):
                _refuse(node, "an anchor that contains itself")
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            return 1, len(node.value)
        sizes[id(node)] = (0, 0)
        mapping = isinstance(node, yaml.MappingNode)
        below = [child for pair in node.value for child in pair] if mapping else node.value
        measured = [measure(child) for child in below]
        found = 1 + sum(count for count, _ in measured), sum(characters for _, characters in measured)
        if found[0] > MAX_YAML_VALUES or found[1] > MAX_YAML_CHARACTERS:
            _refuse(node, "too many values once aliases are expanded")
        sizes[id(node)] = found
        return found

    measure(root)


def _float_of(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    number: float = loader.construct_yaml_float(node)
    if not math.isfinite(number):
        _refuse(node, f"{node.value} is no finite number")
    return number


_Loader.add_constructor(f"{_PREFIX}float", _float_of)
