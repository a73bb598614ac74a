"""Frozen dataclasses from plain mappings, as YAML gives them, with errors that name the dotted field."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal

import yaml


def require(condition: Any, name: str, expected: str, found: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found!r}")


def unknown_key(key: str, known: Sequence[str], where: str) -> ValueError:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return ValueError(f"{join(where, key)}: unknown key; {hint}")


def join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


@cache
def type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build_dataclass(cls: type, values: Any, where: str) -> Any:
    """Dataclass `cls` from a mapping; `where` is the dotted path for error messages."""
    require(isinstance(values, Mapping), where or "recipe", "a mapping", values)
    known = [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, where)
    for item in fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        require(item.name in values or not required, join(where, item.name), "a value", "nothing")
    arguments = {key: convert(value, type_hints(cls)[key], join(where, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(join(where, str(error))) from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint`: dataclass, tuple of them, union, Literal, dict, list, or a plain type.

    Integers are accepted where a float is expected, and so are strings such as "2e-5", which YAML 1.1 reads as text.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), where, "a list", value)
        return tuple(convert(item, arguments[0], f"{where}.{i}") for i, item in enumerate(value))
    if origin is Literal:
        require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin in (types.UnionType, typing.Union):
        # float last: a union that also takes text or a flag must not turn it into a number
        for option in sorted(arguments, key=lambda option: option is float):
            try:
                return convert(value, option, where)
            except ValueError:
                continue
        raise ValueError(f"{where}: expected {_describe(hint)}, found {_found(value)}")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{where}: expected a number, found {_found(value)}") from None
        require(math.isfinite(number), where, "a finite number", value)
        return number
    kind = origin or hint
    if isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is int):
        return value
    raise ValueError(f"{where}: expected {_describe(hint)}, found {_found(value)}")


def _describe(hint: Any) -> str:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    names = [option.__name__ if isinstance(option, type) else str(option) for option in options]
    return " or ".join("null" if name == "NoneType" else name for name in names)


def _found(value: Any) -> str:
    hint = " (YAML reads yes, no, on, off as flags: quote the word)" if isinstance(value, bool) else ""
    return f"{type(value).__name__} {value!r}{hint}"


def assign(node: Any, path: Sequence[str], value: Any, override: str) -> None:
    """Sets a value inside mappings and lists. What lies on the way is copied: YAML's aliases and merges share it."""
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            valid = key.isdecimal() and int(key) < len(node)
            require(valid, f"override {override!r}", f"an index below {len(node)}", key)
            key = int(key)
        else:
            found = f"{'.'.join(path[:depth])} = {node!r}"
            require(isinstance(node, dict), f"override {override!r}", "a field that holds others", found)
        if last:
            node[key] = value
        else:
            child = node[key] if isinstance(node, list) else node.get(key)
            node[key] = {} if child is None and isinstance(node, dict) else copy.copy(child)
            node = node[key]


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
