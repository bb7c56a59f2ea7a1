"""`python3 dev.py bench`: measure this tree, compare it with another revision, or draw how it changed.

Without NAME it measures everything that the documents need, the most important first, and takes twelve minutes at most.
Each row is on disk as it comes; `--resume` goes on where a run ended. Arguments that are not listed here go to pytest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare import compare, run_benches
from green import NotReported, require_green
from history import history
from record import RESULTS, ROOT

PROGRESS = ROOT / "build" / "bench_progress.txt"
MINUTES = 11.5  # and what the last bench takes


def percent(text: str) -> float:
    """A share from "5%" or "5"."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a percentage such as 5%")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="dev.py bench", description=__doc__.splitlines()[0])
    made.add_argument("names", nargs="*", metavar="NAME", help="benches with this in their file or name; default all")
    made.add_argument("-k", metavar="EXPRESSION", help="pytest's way to choose")
    made.add_argument("--slow", action="store_true", help="also those that take minutes")
    made.add_argument("--resume", action="store_true", help="only what an earlier run of this tree has not measured")
    made.add_argument("--minutes", type=float, help=f"begin no bench after so many (default {MINUTES:g} without NAME)")
    made.add_argument("--record", type=Path, default=RESULTS, metavar="FOLDER", help="default bench/results")
    made.add_argument("--compare", metavar="REV", help="build this git revision beside, and time both interleaved")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="of --compare (default 3)")
    made.add_argument("--fail-above", type=percent, metavar="5%%", help="exit 1 where a row became slower by more")
    made.add_argument("--history", nargs="?", type=Path, const=ROOT / "build" / "history.png", metavar="PNG")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a bench failed, a row regressed, or the speed is not to be reported; 2 for wrong usage."""
    begin = time.monotonic()
    given = parser()
    options, rest = given.parse_known_args(arguments)
    if options.rounds < 1:
        given.error(f"--rounds {options.rounds}; expected 1 or more")
    if options.fail_above is not None and options.compare is None:
        given.error("--fail-above needs --compare REV")
    if options.minutes is not None and not options.minutes > 0:
        given.error(f"--minutes {options.minutes:g}; expected a positive number")
    if options.history is not None:
        return history(options.names, options.history)
    selection = [part for name in options.names for part in ("--name", name)]
    selection += ["-k", options.k] if options.k else []
    selection += ["--slow"] if options.slow else []
    try:
        if options.compare is not None:
            return compare(options.compare, [*selection, *rest], options.rounds, options.fail_above)
        require_green()
    except NotReported as reason:
        print(f"dev.py bench: {reason}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"dev.py bench: {error}", file=sys.stderr)
        return 2
    whole = not (options.names or options.k or options.slow)
    minutes = options.minutes or (MINUTES if whole else None)
    selection += ["--progress", str(PROGRESS)] + (["--resume"] if options.resume else [])
    if minutes:
        selection += ["--minutes", f"{max(0.0, minutes - (time.monotonic() - begin) / 60):.2f}"]
    return run_benches(ROOT, options.record, [*selection, *rest])


if __name__ == "__main__":
    sys.exit(main())
