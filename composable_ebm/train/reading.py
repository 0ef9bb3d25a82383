"""Training configurations from TOML, with errors that say where."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import fields
from pathlib import Path

from composable_ebm.data.dataset import unknown_name
from composable_ebm.train.config import TrainConfig

__all__ = ["read_config"]


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TOML file; tables are the nested dataclasses.

    Raises:
        ValueError: If the file is no TOML, or a name or type is wrong; the message says where.
        FileNotFoundError: If there is no such file.
    """
    try:
        content = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    try:
        return _build(TrainConfig, content, TrainConfig(), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _build(kind: type, content: dict, defaults: object, where: str):
    hints = typing.get_type_hints(kind)
    known = {f.name: getattr(defaults, f.name) for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ValueError(unknown_name("setting", f"{where}{name}", [where + n for n in known]))
        default = known[name]
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            if not isinstance(value, dict):
                raise ValueError(f"{where}{name} is a table: write [{where}{name}].")
            default = _choose(
                hints[name], value.pop("type", type(default).__name__), default, f"{where}{name}"
            )
            values[name] = _build(type(default), value, default, f"{where}{name}.")
        else:
            values[name] = _convert(value, hints[name], f"{where}{name}")
    return dataclasses.replace(defaults, **values)  # type: ignore[type-var]


def _choose(hint: object, name: str, default: object, where: str) -> object:
    """The defaults of the dataclass called `name` among those that a table may be."""
    options = {kind.__name__: kind for kind in (typing.get_args(hint) or (type(default),))}
    if name not in options:
        raise ValueError(unknown_name(f"type of {where}", name, options))
    return default if type(default) is options[name] else options[name]()


def _convert(value: object, hint: object, where: str) -> object:
    """The TOML value as the annotated type; whole numbers may stand for decimals, lists for tuples."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list):
            return tuple(_convert(v, typing.get_args(option)[0], where) for v in value)
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and type(value) is origin:
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{where} must be {names}, got {value!r}.")
