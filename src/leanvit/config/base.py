"""Dataclasses as the API, the flags, the YAML keys and the help text: reading, checking and writing them.

This package imports neither torch nor timm.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import types
import typing
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from leanvit.errors import ConfigError, did_you_mean, require
from leanvit.files import write_atomic

Config = TypeVar("Config")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; `positional=True` makes it a positional argument.

    flag: what the command line calls it, where that is not the field's name.
    """
    metadata["help"] = help
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(item: Field[Any]) -> str:
    """The flag of a configuration's field."""
    return str(item.metadata.get("flag") or "--" + item.name.replace("_", "-"))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Build a configuration from plain values, converting lists to tuples where the type says so.

    Raises ConfigError for an unknown key, a missing key, a value of another type, or another version.
    """
    converted = convert(cls, values, where)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**converted)


def convert(cls: type[Config], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of some of a configuration's keys as the types of its fields.

    Raises ConfigError for an unknown key, a value of another type, or another version.
    """
    names = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), names)}")
    hints = get_type_hints(cls)
    # An option whose default is the task's own is None where that task has none.
    unset = {key for key, value in values.items() if value is None and names[key].metadata.get("by_task")}
    converted = {
        key: None if key in unset else _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()
    }
    expected = names["version"].default if "version" in names else None
    if expected is not None and converted.get("version", expected) != expected:
        raise ConfigError(
            f"{where}: version is {converted['version']}, this leanvit reads version {expected}. "
            "Use the leanvit that wrote it, or write the file again."
        )
    return converted


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; raises ConfigError where it can't be."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        if value not in args:
            expected = ", ".join(map(str, args))
            raise ConfigError(f"{where} is {value!r}, expected one of: {expected}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries, expected {len(inner)}")
        return tuple(_convert(v, t, where) for v, t in zip(value, inner, strict=True))
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return [_convert(v, args[0], where) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected keys and values")
        return {_convert(k, args[0], where): _convert(v, args[1], where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected keys and values")
        return from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, where)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise ConfigError(f"{where} is {value!r}, expected {hint.__name__}")
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {value}, expected a finite number")
    return number


def _convert_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    problems = []
    for arg in args:
        if arg is types.NoneType:
            continue
        try:
            return _convert(value, arg, where)
        except ConfigError as error:
            problems.append(str(error))
    # Of a number or a list of numbers: what is no list was meant to be the number.
    raise ConfigError(problems[-1 if isinstance(value, list | tuple | dict) else 0])


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping. Raises ConfigError where the file is missing or isn't a mapping."""
    yaml = require("yaml")
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader(yaml))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not valid YAML: {reason}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds {type(values).__name__}, expected keys and values")
    return values


def _yaml_loader(yaml: Any) -> Any:
    """A safe loader that reads 1e-3 as a number, as JSON and YAML 1.2 do; YAML 1.1 reads a string."""
    return _with_exponents(yaml.SafeLoader)


def _with_exponents(base: Any) -> Any:
    """A loader or dumper to which 1e-3 is a number: the dumper then quotes strings that look like one."""
    changed = type(base.__name__, (base,), {})
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    changed.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))  # type: ignore[attr-defined]
    return changed


def save_yaml(config: Any, path: str | Path) -> None:
    """Write a configuration with all its defaults resolved, in the order of its fields; atomically."""
    yaml = require("yaml")
    text = yaml.dump(to_dict(config), Dumper=_with_exponents(yaml.SafeDumper), sort_keys=False)
    write_atomic(path, text.encode())


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ConfigError where a number of `config` is below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} is {value}, expected at least {least}")


def command_line(verb: str, config: Any) -> str:
    """The command that makes a configuration: positional arguments, and flags that are not at their defaults."""
    words, flags = ["leanvit", *verb.split()], []
    for item in fields(config):
        value = getattr(config, item.name)
        texts = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
        if item.metadata.get("positional"):
            words += texts
        elif value != (item.default if item.default_factory is MISSING else item.default_factory()):
            flags += _switch(item, value) if isinstance(value, bool) else [flag_of(item), *texts]
    return shlex.join([*words, *flags])


def _switch(item: Field[Any], on: bool) -> list[str]:
    return [flag_of(item) if on else flag_of(item).replace("--", "--no-", 1)]
