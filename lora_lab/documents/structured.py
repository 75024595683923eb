"""Filling a dataclass's OmegaConf schema from a document, and finding the fault of every key."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.documents.reading import Scalar, plain, texts
from lora_lab.errors import suggest

LARGEST = int(sys.float_info.max)


def fill(
    schema: DictConfig,
    settings: Mapping[str, object],
    source: str,
    faults: list[str],
    prefix: str = "",
    names: Mapping[str, str] | None = None,
) -> None:
    """Merges settings into a structured node key by key, so that one fault does not hide the others.

    Args:
        schema: `OmegaConf.structured` of a dataclass; it is changed.
        settings: key → value; values may be `documents.Scalar`.
        source: where the settings are, for messages.
        faults: the list to which faults are added, `source: key: what is wrong`.
        prefix: what is before the keys in messages, with its dot.
        names: keys of other libraries → ours, for messages.
    """
    kind: Any = OmegaConf.get_type(schema)
    known = [field.name for field in fields(kind)]
    hints = get_type_hints(kind)
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in known:
            faults.append(f"{source}: {key}: no such key{_suggest_key(str(name), known, names or {})}")
            continue
        child: Any = schema._get_node(name)
        child_kind = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if is_dataclass(child_kind):
            if isinstance(value, Mapping):
                fill(child, value, source, faults, f"{key}.", names)
            else:
                faults.append(f"{source}: {key}: must hold keys and values; got {plain(value)!r}")
            continue
        value = _as_written(value, hints[name])
        if get_origin(hints[name]) is list and isinstance(value, str | bool | int | float):
            faults.append(f"{source}: {key}: must be a list; write [{texts(value)}]")
            continue
        if not _fits(value, hints[name]):  # OmegaConf allows any container in a list or mapping
            faults.append(f"{source}: {key}: must be {_spelt(hints[name])}; got {_shown(plain(value))}")
            continue
        try:
            OmegaConf.update(schema, name, value, merge=True)
        except OmegaConfBaseException as error:
            what = str(error).partition(chr(10))[0].rstrip(".")
            if isinstance(value, list | dict) and "incompatible container" in what:
                what = f"cannot be a {'list' if isinstance(value, list) else 'set of keys and values'}"
            faults.append(f"{source}: {key}: {what}")


def _as_written(value: object, hint: object) -> object:
    """Returns a value for a field of this type: the text as it was written, if the field is text."""
    kinds = [kind for kind in _members(hint) if kind is not NoneType]
    if isinstance(value, Scalar):
        if type(value.value) is int and float in kinds and not {int, str} & {*kinds}:
            # OmegaConf does this for a field, but not inside containers.
            return float(value.value) if abs(value.value) < LARGEST else math.inf
        return value.text if str in kinds else value.value
    for kind in kinds:
        arguments = get_args(kind)
        if isinstance(value, list) and get_origin(kind) is list:
            return [_as_written(item, arguments[0]) for item in value]
        if isinstance(value, dict) and get_origin(kind) is dict:
            return {name: _as_written(item, arguments[1]) for name, item in value.items()}
    return plain(value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether lists, mappings and null are where the type allows them; OmegaConf checks other values."""
    kinds = _members(hint)
    if Any in kinds or (isinstance(value, str) and "${" in value):
        return True
    if value is None:
        return NoneType in kinds
    if isinstance(value, list | Mapping):
        kind = list if isinstance(value, list) else dict
        inner = [get_args(member)[-1] for member in kinds if get_origin(member) is kind]
        items = value if isinstance(value, list) else value.values()
        return any(all(_fits(item, one) for item in items) for one in inner)
    return any(get_origin(member) not in (list, dict) and member is not NoneType for member in kinds)


def _spelt(hint: Any) -> str:
    """Returns a type in words: `text, or a list of text`."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    found = []
    for kind in _members(hint):
        inner = [_spelt(argument) for argument in get_args(kind)]
        if get_origin(kind) is list:
            found.append(
                f"a list of {inner[0].removeprefix('a ')}" + ("s" if inner[0].startswith("a ") else "")
            )
        elif get_origin(kind) is dict:
            found.append(f"names, each with {inner[-1]}")
        else:
            found.append(words.get(kind) or " or ".join(map(repr, get_args(kind))) or str(kind))
    return ", or ".join(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _members(hint: object) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _suggest_key(name: str, known: Sequence[str], names: Mapping[str, str]) -> str:
    ours = names.get(name)
    if ours in known or (ours and "." in ours):
        return f"; it is called '{ours}' here. Known: {', '.join(sorted(known))}"
    return suggest(name, known)
