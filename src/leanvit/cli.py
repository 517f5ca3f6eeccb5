"""The command line: verbs, their flags (made from the configuration dataclasses), and exit codes.

Starting it imports the standard library only; a verb imports what it needs. `predict` runs without PyYAML and
rich, so that a machine that serves a bundle installs onnxruntime, NumPy and Pillow only.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from leanvit import errors, passed_over
from leanvit._version import __version__

if TYPE_CHECKING:
    from types import FrameType

VERBS = {
    "optimize": ("OptimizeConfig", "network and images in, the fastest proven file that holds the accuracy out"),
    "demo": ("DemoConfig", "digits in, a proven 8-bit bundle and a report out, in minutes"),
    "models": ("ModelsConfig", "list the architectures"),
    "train": ("TrainConfig", "train or fine-tune on images or annotated pictures"),
    "sweep": ("SweepConfig", "run a verb with every combination of some options, alone or on Ray"),
    "val": ("ValConfig", "measure accuracy of a checkpoint, quantized model or bundle"),
    "quantize": ("QuantizeConfig", "quantize a checkpoint after training"),
    "export": ("ExportConfig", "write a verified ONNX bundle"),
    "verify": ("VerifyConfig", "check a bundle"),
    "predict": ("PredictConfig", "run a bundle of any task on images"),
    "web": ("WebConfig", "write a folder that runs a bundle in the browser"),
    "serve": ("ServeConfig", "serve bundles over HTTP"),
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
        with passed_over.gathering() as gathered:
            code = _dispatch(arguments)
            gathered.require_none()
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
        "optimize": ". Give the same command again: it goes on from its journal",
        "quantize": ". Give the same command again: a search of bits goes on from its journal",
        "sweep": ". Give the same command again: runs that are in its journal are not run again",
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
    from leanvit.config.parser import parse_arguments

    return parse_arguments(verb, getattr(configs, VERBS[verb][0]), arguments)


if __name__ == "__main__":
    sys.exit(main())
