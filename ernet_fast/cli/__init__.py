"""The command ``ernet-fast``; ``_COMMANDS`` are its parts.

Built on argparse, so that ``--help`` and ``doctor`` work where only torch is installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from ernet_fast._version import __version__
from ernet_fast.cli.failures import describe, exit_code
from ernet_fast.cli.streams import lenient_streams

_COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "compare",
    "ablate",
    "predict",
    "attend",
    "export",
    "normalize",
    "segment",
    "data",
    "bench",
    "doctor",
)
_EPILOG = "Exit codes: 0 done, 1 failed while running, 2 wrong usage or input, 3 done but for some files."


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ernet-fast",
        description="Fused ER-ResNets and Macenko stain normalisation for histology images.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"ernet_fast {__version__}")
    general = argparse.ArgumentParser(add_help=False)
    group = general.add_argument_group("general")
    group.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    group.add_argument("--quiet", action="store_true", help="no progress, only warnings, errors and the result")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in _COMMANDS:
        try:
            command = importlib.import_module(f"ernet_fast.cli.{name}")
        except ImportError as error:  # even numpy may be missing, and doctor is there to say so
            _add_unavailable(commands, general, name, error)
        else:
            command.add_parser(commands, [general])
    return parser


def _add_unavailable(commands: Any, general: argparse.ArgumentParser, name: str, reason: ImportError) -> None:
    """A command that fails with the reason why it cannot be loaded."""

    def fail(arguments: argparse.Namespace) -> int:
        raise ImportError(f"{reason}; see ernet-fast doctor") from reason

    parser = commands.add_parser(name, parents=[general], help=f"not available: {reason}")
    taken = argparse.Namespace(run=fail, debug=False, quiet=False)
    parser.parse_known_args = lambda *whatever: (taken, [])  # its options are not known


@lenient_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with warnings.catch_warnings():
            # one line, without the place in the code that Python shows
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return arguments.run(arguments)
    except KeyboardInterrupt:
        print("ernet-fast: interrupted", file=sys.stderr)
        return 1
    except Exception as error:  # the boundary of the program: every error ends in a message and an exit code
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"ernet-fast {arguments.command}: {describe(error)}", file=sys.stderr)
        return exit_code(error)
