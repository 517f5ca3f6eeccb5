"""The one command-line parser: a verb's flags, help text and typed values from the fields of its configuration.

It imports the standard library only, and PyYAML where a --config file is given.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from leanvit.config.base import convert, flag_of, from_dict, load_yaml
from leanvit.errors import ConfigError, did_you_mean

Config = TypeVar("Config")

MANY = -1
"""How many values a list takes: all up to the next flag."""


def parse_arguments(verb: str, cls: type[Config], arguments: Sequence[str]) -> Config:
    """The configuration of a verb from its arguments and `--config file.yaml`; flags win.

    Positional arguments may stand anywhere; what follows `--` is positional. `null` is no value, as in YAML.
    Raises ConfigError for an unknown flag or key, a wrong type, a missing value or one out of range.
    """
    parser = _build(verb, cls)
    takes = _values_taken(cls)
    found, unknown = parser.parse_known_args(_ordered(arguments, takes))
    texts = vars(found)
    for word in (word for word in unknown if word != "--"):
        flag = word.partition("=")[0]
        parser.error(f"unknown flag {flag}.{did_you_mean(flag, takes)}")
    path = texts.pop("config", None)
    values = convert(cls, load_yaml(path), f"config file {path}") if path else {}
    hints = get_type_hints(cls)
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name in texts:
            try:
                values[item.name] = _typed(texts[item.name], hints[item.name])
            except ValueError as error:
                parser.error(f"{_shown_name(item)} is wrong: {error}")
    for item in fields(cls):  # type: ignore[arg-type]
        if _is_required(item) and item.name not in values:
            parser.error(f"no {_shown_name(item)} given, expected one.")
    return from_dict(cls, values, f"leanvit {verb}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} Run: {self.prog} --help")


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _shown_name(item: Field[Any]) -> str:
    return item.name if item.metadata.get("positional") else flag_of(item)


def _typed_fields(cls: type) -> list[tuple[Field[Any], Any]]:
    """Fields that are arguments, with their types. `version` is a key of files, which nobody types."""
    hints = get_type_hints(cls)
    return [(item, hints[item.name]) for item in fields(cls) if item.name != "version"]


def _count(hint: Any) -> int:
    """How many values a flag of this type takes: 0 for a switch, MANY for a list of any length."""
    if hint is bool:
        return 0
    if get_origin(hint) is list or (get_origin(hint) is tuple and Ellipsis in get_args(hint)):
        return MANY
    if get_origin(hint) in (Union, types.UnionType):
        return MANY if MANY in map(_count, get_args(hint)) else 1
    return len(get_args(hint)) if get_origin(hint) is tuple else 1


def _values_taken(cls: type) -> dict[str, int]:
    """Every flag with the number of values that follow it."""
    takes = {"--config": 1, "--help": 0, "-h": 0}
    for item, hint in _typed_fields(cls):
        if not item.metadata.get("positional"):
            takes[flag_of(item)] = _count(hint)
            if hint is bool:
                takes[flag_of(item).replace("--", "--no-", 1)] = 0
    return takes


def _ordered(arguments: Sequence[str], takes: dict[str, int]) -> list[str]:
    """`BUNDLE --top-k 2 IMAGE` as `--top-k 2 -- BUNDLE IMAGE`: argparse takes positionals in one place only."""
    plain: list[str] = []
    flagged: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            plain += rest
            break
        if not word.startswith("-") or word == "-":
            plain.append(word)
            continue
        count = 0 if "=" in word else takes.get(word, 1)
        following = next((i for i, text in enumerate(rest) if text.startswith("--")), len(rest))
        values = rest[: following if count == MANY else min(count, following)]
        del rest[: len(values)]
        if count == 1 and values and re.match(r"-\.?\d", values[0]):
            # argparse takes -1 for a value, and -1e-3 for a flag.
            flagged.append(f"{word}={values[0]}")
        else:
            flagged += [word, *values]
    return [*flagged, "--", *plain] if plain else flagged


def _typed(text: Any, hint: Any) -> Any:
    """Text of the command line as a value of type `hint`; raises ValueError that says what was expected."""
    if isinstance(text, bool):
        return text
    if isinstance(text, list):
        if get_origin(hint) in (Union, types.UnionType):
            if text == ["null"] and types.NoneType in get_args(hint):
                return None
            hint = next(arg for arg in get_args(hint) if _count(arg) == MANY)
        inner = get_args(hint)
        return [_typed(one, inner[0]) for one in text]
    if get_origin(hint) in (Union, types.UnionType):
        if text == "null" and types.NoneType in get_args(hint):
            return None
        return _typed(text, next(arg for arg in get_args(hint) if arg is not types.NoneType))
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if str(choice) == text:
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, get_args(hint)))}. Got value: {text}")
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"expected {hint.__name__}. Got value: {text}") from None


def _build(verb: str, cls: type) -> _Parser:
    """An argparse parser that leaves out what is not given, so that flags can win over a file."""
    arguments = _typed_fields(cls)
    names = [_positional_usage(item, hint) for item, hint in arguments if item.metadata.get("positional")]
    usage = " ".join([f"leanvit {verb}", *names, "[options]"])
    parser = _Parser(
        prog=f"leanvit {verb}",
        usage=usage,
        description=cls.__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with these keys; flags win.")
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for item, hint in arguments:
        tasks: tuple[str, ...] = item.metadata.get("tasks", ())
        if tasks not in groups:
            groups[tasks] = parser.add_argument_group(f"for {', '.join(tasks)}")
        _add(groups[tasks], item, hint)
    return parser


def _positional_usage(item: Field[Any], hint: Any) -> str:
    name = item.name.upper()
    if _count(hint) == MANY:
        return f"[{name} ...]"
    return name if _is_required(item) else f"[{name}]"


def _add(group: Any, item: Field[Any], hint: Any) -> None:
    """Add the argument of one field."""
    help = _help(item)
    count = _count(hint)
    if item.metadata.get("positional"):
        group.add_argument(item.name, nargs="*" if count == MANY else "?", help=help)
    elif hint is bool and _default(item) is True:
        group.add_argument(flag_of(item), dest=item.name, action=argparse.BooleanOptionalAction, help=help)
    elif hint is bool:
        group.add_argument(flag_of(item), dest=item.name, action="store_true", default=argparse.SUPPRESS, help=help)
        # What a file switched on can be switched off; seldom needed, so not shown.
        off = {"dest": item.name, "action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(flag_of(item).replace("--", "--no-", 1), **off)
    else:
        nargs = {MANY: "*", 1: None}.get(count, count)
        group.add_argument(
            flag_of(item), dest=item.name, nargs=nargs, metavar=_choices(hint) or _metavar(item), help=help
        )


def _metavar(item: Field[Any]) -> str:
    return flag_of(item).removeprefix("--").replace("-", "_").upper()


def _help(item: Field[Any]) -> str:
    """Help text of a field with its default, where that says something."""
    text = str(item.metadata["help"])
    default = None if _is_required(item) else _default(item)
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    if default is True:
        text += " (default: on)"
    elif default is not None and default is not False and default != "":
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _choices(hint: Any) -> str | None:
    """{a,b} of a Literal, also inside a list or an Optional; None for other types."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    found = [_choices(arg) for arg in get_args(hint) if get_origin(hint) is not None and arg is not Ellipsis]
    return next((text for text in found if text), None)
