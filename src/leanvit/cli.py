"""The command line: verbs, their flags (made from the configuration dataclasses), and exit codes.

Starting it imports the standard library only; a verb imports what it needs. `predict` runs without
jsonargparse and rich, so that a machine that serves a bundle installs onnxruntime, NumPy and Pillow only.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from leanvit import errors
from leanvit._version import __version__

if TYPE_CHECKING:
    from types import FrameType

VERBS = {
    "demo": ("DemoConfig", "digits in, a proven 8-bit bundle and a report out, in minutes"),
    "models": ("ModelsConfig", "list the architectures"),
    "train": ("TrainConfig", "train or fine-tune on a folder of images"),
    "val": ("ValConfig", "measure accuracy of a checkpoint, quantized model or bundle"),
    "quantize": ("QuantizeConfig", "quantize a checkpoint after training"),
    "export": ("ExportConfig", "write a verified ONNX bundle"),
    "verify": ("VerifyConfig", "check a bundle"),
    "predict": ("PredictConfig", "classify images with a bundle"),
    "benchmark": ("BenchmarkConfig", "time bundles and checkpoints against each other"),
    "analyze": ("AnalyzeConfig", "look into one model or two: attention, tokens, receptive field, cost"),
    "data inspect": ("DataInspectConfig", "look at every image of a data set: balance, corrupt files, duplicates"),
    "data compose": ("DataComposeConfig", "compose practice pictures with boxes, masks and keypoints"),
    "report": ("ReportConfig", "draw a run as one HTML page"),
    "convert": ("ConvertConfig", "turn a checkpoint of the papers' authors into leanvit's"),
    "doctor": ("DoctorConfig", "show versions, CPU features and what is missing"),
}


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see leanvit.errors)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        signal.signal(signal.SIGTERM, _terminate)
        code = _dispatch(arguments)
        # Now, because at shutdown nobody would say in one line that a disk is full or a pipe is closed.
        sys.stdout.flush()
        return code
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        return _report(error, arguments[0] if arguments else "")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _report(error: BaseException, verb: str) -> int:
    """One line on standard error, and the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else errors.EXIT_OK
    if isinstance(error, errors.LeanvitError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted; what was finished before is kept" + _resume_hint(verb), errors.EXIT_INTERRUPTED)
    if isinstance(error, Terminated):
        return _fail("terminated; what was finished before is kept" + _resume_hint(verb), errors.EXIT_TERMINATED)
    if isinstance(error, BrokenPipeError):
        _discard_stdout()  # the reader of the pipe has what it wanted
        return errors.EXIT_OK
    if isinstance(error, MemoryError):
        return _fail("out of memory. Lower --batch-size.", errors.EXIT_ENVIRONMENT)
    if isinstance(error, OSError):
        return _fail(_explain_os_error(error), errors.EXIT_ENVIRONMENT)
    if isinstance(error, ImportError) and error.name and error.name.split(".")[0] != "leanvit":
        return _fail(_explain_import_error(error, error.name.split(".")[0]), errors.EXIT_ENVIRONMENT)
    reason = " ".join(str(error).split())[:300]
    return _fail(f"bug: {type(error).__name__}: {reason}. Run again with --debug and report it.", errors.EXIT_BUG)


def _explain_os_error(error: OSError) -> str:
    from pathlib import Path

    from leanvit.files import explain_os_error

    if error.filename:
        return str(explain_os_error(error, Path(os.fsdecode(error.filename))))
    _discard_stdout()
    return f"standard output or a file: {error.strerror or error}. Free some space or write elsewhere."


def _explain_import_error(error: ImportError, package: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{package} is not installed. Run: {errors.how_to_install(package)}"
    return f"{package} is installed but can't be imported ({error}). Run: {errors.how_to_install(package)}"


def _discard_stdout() -> None:
    """What standard output can't take goes nowhere; Python would fail on it again at shutdown."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _resume_hint(verb: str) -> str:
    hints = {
        "train": ". Go on with: leanvit train ... --resume",
        "quantize": ". Give the same command again: a search of bits goes on from its journal",
    }
    return hints.get(verb, "")


def _fail(message: str, code: int) -> int:
    print(f"leanvit: {' '.join(message.split())}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return errors.EXIT_OK if arguments else errors.EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"leanvit {__version__}")
        return errors.EXIT_OK
    words = 2 if any(verb.startswith(f"{arguments[0]} ") for verb in VERBS) else 1
    verb = " ".join(arguments[:words])
    if verb not in VERBS:
        raise errors.ConfigError(f"unknown verb '{verb}'.{errors.did_you_mean(verb, VERBS)} Run: leanvit --help")
    config = parse(verb, arguments[words:])
    room, _, function = verb.partition(" ")
    command = importlib.import_module(f"leanvit.commands.{room}")
    result: int = getattr(command, function or "run")(config)
    return result


def usage() -> str:
    """The overview that `leanvit --help` prints."""
    lines = [
        f"leanvit {__version__}: images and a vision transformer in; a small, fast, proven artifact out.",
        "",
    ]
    lines += ["usage: leanvit VERB [options]     leanvit VERB --help     add --debug for tracebacks", ""]
    lines += [f"  {verb:12} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(lines)


def parse(verb: str, arguments: list[str]) -> Any:
    """The configuration of a verb from its flags and `--config file.yaml`; flags win.

    Raises ConfigError for an unknown flag or key, a wrong type, or a value out of range.
    """
    from leanvit import config as configs

    cls = getattr(configs, VERBS[verb][0])
    if verb == "train" and _names_task(arguments):
        cls = configs.TaskTrainConfig
    arguments = _positionals_first(cls, arguments)
    if errors.is_installed("jsonargparse"):
        values = _parse_with_jsonargparse(verb, cls, arguments)
    else:
        values = _parse_with_argparse(verb, cls, arguments)
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            name = field.name if field.metadata.get("positional") else "--" + field.name.replace("_", "-")
            # The flags of a training depend on its task.
            asked = f"{verb} --task {values['task']}" if verb == "train" and "task" in values else verb
            raise errors.ConfigError(f"no {name} given, expected one. Run: leanvit {asked} --help")
    return configs.from_dict(cls, values, f"leanvit {verb}")


def _names_task(arguments: list[str]) -> bool:
    """Whether a training is for a task beside classification: by --task, or by the key in a --config file."""
    if any(argument == "--task" or argument.startswith("--task=") for argument in arguments):
        return True
    from leanvit.config import load_yaml

    config = _config_first(arguments)
    return config[:1] == ["--config"] and len(config) > 1 and "task" in load_yaml(config[1])


def _positionals_first(cls: type, arguments: list[str]) -> list[str]:
    """`BUNDLE --top-k 2 IMAGE` as `BUNDLE IMAGE --top-k 2`: the parsers take positionals in one place only."""
    names = [name.replace("_", "-") for name, hint in get_type_hints(cls).items() if hint is bool]
    switches = {prefix + name for name in names for prefix in ("--", "--no-")}
    plain: list[str] = []
    flagged: list[str] = []
    rest = list(arguments)
    while rest and rest[0] != "--":
        token = rest.pop(0)
        if not token.startswith("-"):
            plain.append(token)
            continue
        flagged.append(token)
        values = 0 if token in (*switches, "-h", "--help") or "=" in token else _count_values(cls, token, rest)
        flagged += rest[:values]
        del rest[:values]
    return [*plain, *flagged, *rest]


def _count_values(cls: type, flag: str, rest: list[str]) -> int:
    """How many of the arguments that follow belong to `flag`: one, or all up to the next flag for a list."""
    hint = get_type_hints(cls).get(flag.removeprefix("--").replace("-", "_"))
    if get_origin(hint) not in (list, tuple):
        return 1
    return next((i for i, argument in enumerate(rest) if argument.startswith("--")), len(rest))


def _parse_with_jsonargparse(verb: str, cls: type, arguments: list[str]) -> dict[str, Any]:
    import argparse

    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=f"leanvit {verb}", description=cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these keys; flags win.")
    flags = _add_fields(parser, cls, get_type_hints(cls))
    arguments = _config_first(arguments)
    from_file = _read_config(cls, arguments[1] if arguments[:1] == ["--config"] and len(arguments) > 1 else None)
    try:
        values: dict[str, Any] = parser.parse_args(arguments).as_dict()
    except argparse.ArgumentError as error:
        raise errors.ConfigError(_explain(str(error), verb, flags)) from error
    values.pop("config", None)
    # jsonargparse lets an absent positional override the file, so the file's value is put back.
    for name in (f.name for f in fields(cls) if f.metadata.get("positional")):
        values[name] = values.get(name) or from_file.get(name)
    return {name: value for name, value in values.items() if value is not None or name in from_file}


def _config_first(arguments: list[str]) -> list[str]:
    """Move --config to the front, so that flags win wherever it stands."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return ["--config", argument.partition("=")[2], *arguments[:index], *arguments[index + 1 :]]
        if argument == "--config" and index + 1 < len(arguments):
            return [*arguments[index : index + 2], *arguments[:index], *arguments[index + 2 :]]
    return arguments


def _explain(message: str, verb: str, flags: list[str]) -> str:
    """One line out of the parser's message, with the nearest known flag."""
    text = " ".join(message.split())
    text = re.sub(r'Parser key "(\w+)":', lambda match: f"--{match[1].replace('_', '-')} is wrong:", text)
    text = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", r"expected \1\2", text)
    if "unrecognized arguments:" in text:
        unknown = text.partition("unrecognized arguments:")[2].split()[0].partition("=")[0]
        text = f"unknown flag {unknown}.{errors.did_you_mean(unknown, flags)}"
    return f"{text} Run: leanvit {verb} --help"


def _parse_with_argparse(verb: str, cls: type, arguments: list[str]) -> dict[str, Any]:
    import argparse

    parser = argparse.ArgumentParser(prog=f"leanvit {verb}", description=cls.__doc__, exit_on_error=False)
    hints = {name: _plain_type(hint) for name, hint in get_type_hints(cls).items()}
    flags = _add_fields(parser, cls, hints)
    parser.add_argument("--config", help="YAML file with these keys; flags win.")
    parser.set_defaults(**dict.fromkeys(field.name for field in fields(cls)))
    try:
        values, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise errors.ConfigError(_explain(str(error), verb, flags)) from error
    if unknown:
        raise errors.ConfigError(_explain(f"unrecognized arguments: {unknown[0]}", verb, flags))
    given = {name: value for name, value in vars(values).items() if name != "config" and value not in (None, [])}
    return {**_read_config(cls, values.config), **given}


def _read_config(cls: type, path: str | None) -> dict[str, Any]:
    """What a --config file says, each value of the type of its key. Raises ConfigError naming the file."""
    from leanvit.config import convert, load_yaml

    return convert(cls, load_yaml(path), f"config file {path}") if path else {}


def _plain_type(hint: Any) -> Any:
    """What argparse needs of a type that only jsonargparse understands: the text is checked later."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not types.NoneType)
    return str if get_origin(hint) is Literal else hint


def _add_fields(parser: Any, cls: type, hints: dict[str, Any]) -> list[str]:
    """Add an argument for each field of a configuration; returns the flags."""
    from argparse import SUPPRESS, BooleanOptionalAction

    flags = []
    for field in fields(cls):
        default: Any = field.default if field.default_factory is MISSING else field.default_factory()
        if default is MISSING:
            # Absent, so that `parse` names what is required once flags and file are read.
            default = None
        if field.name == "version":
            # A key of the files that leanvit writes beside its results; nobody types it.
            parser.add_argument("--version", type=int, default=default, help=SUPPRESS)
            continue
        hint = hints[field.name]
        many = get_origin(hint) in (list, tuple)
        options: dict[str, Any] = {"help": field.metadata["help"]}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*" if many else "?", type=str, default=None, **options)
            continue
        flag = "--" + field.name.replace("_", "-")
        flags.append(flag)
        if hint is bool:
            # What is on by default needs a way to switch it off: --no-FLAG.
            action = BooleanOptionalAction if default else "store_true"
            parser.add_argument(flag, action=action, default=default, **options)
        elif many:
            count = "*" if len(get_args(hint)) == 1 or get_args(hint)[-1] is Ellipsis else len(get_args(hint))
            parser.add_argument(flag, nargs=count, type=get_args(hint)[0], default=list(default), **options)
        else:
            parser.add_argument(flag, type=hint, default=default, **options)
    return flags


if __name__ == "__main__":
    sys.exit(main())
