"""Reading YAML and JSON strictly: a file means what it says, or is refused with the line.

PyYAML's and json's own readers keep the last of two equal keys, turn `on` into true and `0123` into 83,
follow aliases without a limit, and wait forever on a named pipe. Here:

- a key that occurs twice in one mapping is refused, with both lines;
- numbers, true, false and null are those of YAML 1.2's core schema (`on`, `12:30` and `0123` are text);
- a plain scalar keeps its text (`Scalar`), so that a text field gets `1e3` and not 1000.0;
- size, depth and the number of values (aliases followed) are bounded, and only plain files are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from lora_lab.errors import CheckpointError

LARGEST_FILE = 4_000_000
"""Size in bytes of the largest file that is read."""
DEEPEST = 40
"""Levels of nested mappings and lists."""
MOST_VALUES = 200_000
"""Values in one document, those behind aliases counted each time they are used."""


class DocumentError(CheckpointError):
    """A file that cannot be read as the YAML or JSON that it should hold."""


@dataclass(frozen=True)
class Scalar:
    """A plain (unquoted) scalar that is not text: its value, and its text in the file."""

    value: bool | int | float
    text: str


Tree = dict[str, Any] | list[Any] | Scalar | str | None
"""A document: mappings with text keys, lists, and leaves that keep their text."""

COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
"""Tags of plain mappings and lists."""

_RESOLVERS: list[tuple[str, re.Pattern[str], str]] = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, and without merge keys (`<<`)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes texts that `_Loader` would take for something else: '1e-3'."""


for _tag, _pattern, _first in _RESOLVERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, _pattern, ["" if c == "\0" else c for c in _first])


def yaml_text(tree: Mapping[str, Any]) -> str:
    """Returns a YAML document from which `parse_yaml`, and other readers, get this tree again."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_text(path: Path) -> str:
    """Returns the text of a plain file.

    Raises:
        DocumentError: if it is missing, not a plain file, too large, or not UTF-8.
    """
    try:
        if not path.exists():
            raise DocumentError(f"{path}: there is no such file.")
        if not path.is_file():
            raise DocumentError(f"{path}: is not a plain file.")
        if path.stat().st_size > LARGEST_FILE:
            raise DocumentError(
                f"{path}: holds {path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read."
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: is not UTF-8 text ({error}).") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DocumentError(f"{path}: cannot be read ({error}).") from error


def read_yaml(path: Path) -> Tree:
    """Returns the document of a YAML file; see the module for what is refused.

    Raises:
        DocumentError: if the file cannot be read, or is not one document of strict YAML.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, source: str) -> Tree:
    """Returns the document that a YAML text holds; `source` names it in errors.

    Raises:
        DocumentError: if the text is not one document of strict YAML.
    """
    try:
        _check_depth(text, source)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _tree(loader, node, source, [MOST_VALUES], ())
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise DocumentError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError) as error:  # a character or number that Python cannot represent
        raise DocumentError(f"{source}: is not valid YAML: {error}") from error


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, with the same rules: no duplicate keys, bounded size and depth.

    Raises:
        DocumentError: if the file cannot be read, or is not strict JSON.
    """
    text = read_text(path)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DocumentError(f"{path}: the key '{twice}' occurs twice in one object.")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path}: is not valid JSON ({error}).") from error
    _check_json_depth(found, path)
    return found


def plain(tree: object) -> Any:
    """Returns a document with the values of its scalars, as other YAML readers do."""
    return _with_scalars(tree, lambda scalar: scalar.value)


def texts(tree: object) -> Any:
    """Returns a document with the texts of its scalars as they were written."""
    return _with_scalars(tree, lambda scalar: scalar.text)


def _with_scalars(tree: object, read: Callable[[Scalar], object]) -> Any:
    if isinstance(tree, Scalar):
        return read(tree)
    if isinstance(tree, Mapping):
        return {name: _with_scalars(value, read) for name, value in tree.items()}
    return [_with_scalars(value, read) for value in tree] if isinstance(tree, list) else tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted keys; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def references(tree: object) -> list[str]:
    """Returns the texts in a document with `${`, which OmegaConf would interpolate."""
    if isinstance(tree, Mapping):
        return [text for item in tree.items() for part in item for text in references(part)]
    if isinstance(tree, list):
        return [text for value in tree for text in references(value)]
    return [tree] if isinstance(tree, str) and "${" in tree else []


def _check_depth(text: str, source: str) -> None:
    """Counts levels and values in the stream of events, which needs no recursion."""
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        values += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise DocumentError(f"{source}: nests more than {DEEPEST} levels (line {_line(event)}).")
        if values > MOST_VALUES:
            raise DocumentError(f"{source}: holds more than {MOST_VALUES:,} values.")


def _tree(
    loader: _Loader, node: yaml.Node, source: str, left: list[int], within: tuple[yaml.Node, ...]
) -> Tree:
    left[0] -= 1
    if left[0] < 0:
        raise DocumentError(f"{source}: its aliases expand to more than {MOST_VALUES:,} values.")
    if any(node is outer for outer in within):
        raise DocumentError(f"{source}: the alias in line {_line(node)} holds itself.")
    within = (*within, node)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in COLLECTIONS:
        raise _unread_tag(node, source)
    if isinstance(node, yaml.SequenceNode):
        return [_tree(loader, item, source, left, within) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise DocumentError(f"{source}: the key in line {_line(key)} is not text.")
            name = str(key.value)
            if name in found:
                raise DocumentError(
                    f"{source}: the key '{name}' occurs twice, in lines {lines[name]} and {_line(key)}; "
                    "make them one."
                )
            found[name], lines[name] = _tree(loader, value, source, left, within), _line(key)
        return found
    return _leaf(loader, cast(yaml.ScalarNode, node), source)


def _leaf(loader: _Loader, node: yaml.ScalarNode, source: str) -> Scalar | str | None:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    text = str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return Scalar(text.lower() == "true", text)
    if kind == "int":
        if len(text) > 400:  # Python's own limit is about 4,300 digits; nothing here needs as many
            raise DocumentError(f"{source}: the number in line {_line(node)} has {len(text)} digits.")
        return Scalar(int(text, 0) if text[:2] in ("0o", "0x") else int(text), text)
    if kind == "float":
        bare = text.lower().replace(".inf", "inf").replace(".nan", "nan")
        return Scalar(float(bare), text)
    raise _unread_tag(node, source)


def _unread_tag(node: yaml.Node, source: str) -> DocumentError:
    return DocumentError(
        f"{source}: the tag '{node.tag}' in line {_line(node)} is not read; write plain values."
    )


def _line(mark: Any) -> int:
    return int(mark.start_mark.line) + 1


def _check_json_depth(found: object, path: Path) -> None:
    level: list[object] = [found]
    for _ in range(DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise DocumentError(f"{path}: nests more than {DEEPEST} levels.")
