"""A question that is asked of several packages, and the answer: who agrees with whom, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from ernet_fast.benchmark.interleaved import percentiles, time_interleaved
from ernet_fast.benchmark.macenko_peers import reason_of

OWN = "ernet_fast"
ROUNDS = 25


@dataclass(frozen=True)
class Agreement:
    """How near a result is to that of this library.

    Attributes:
        same: True if both compute the same thing, up to rounding.
        detail: one line, e.g. the largest difference.
    """

    same: bool
    detail: str


@dataclass(frozen=True)
class Contestant:
    """A candidate implementation.

    Attributes:
        name: as tables show it.
        prepare: makes the call to be timed, with everything that is no part of the question done; an exception says
            that the package cannot answer here.
        package: the distribution whose version is shown, None for PyTorch itself.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    package: str | None = None


@dataclass(frozen=True)
class Question:
    """What is measured.

    Attributes:
        name: short, for files and `--only`.
        title: for people.
        items: what one call works on, e.g. 64 images; rates are items a second.
        own: this library's answer, which `verify` must accept.
        others: whom it is compared with.
        verify: raises if the own result is wrong.
        agreement: compares another's result with the own one.
    """

    name: str
    title: str
    own: Contestant
    others: list[Contestant]
    verify: Callable[[Any], None]
    agreement: Callable[[Any, Any], Agreement]
    items: int = 1
    threads: int | None = None


@dataclass
class Answer:
    """The figures of one question."""

    question: str
    title: str
    items: int
    threads: int
    figures: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))


def version_of(package: str | None) -> str | None:
    """The installed version, None for what is not installed."""
    if package is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ask(question: Question, seconds: float, wait: Callable[[], Any]) -> Answer:
    """Call every contestant once, compare the results, then time all interleaved for about `seconds`.

    Raises:
        RuntimeError: this library's own result is wrong; nothing is timed then.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(question.threads or before)
    try:
        return _ask(question, seconds, wait)
    finally:
        torch.set_num_threads(before)


def _ask(question: Question, seconds: float, wait: Callable[[], Any]) -> Answer:
    answer = Answer(question.name, question.title, question.items, torch.get_num_threads())
    calls, agreements = {question.own.name: question.own.prepare()}, {question.own.name: Agreement(True, "")}
    result = calls[question.own.name]()
    try:
        question.verify(result)
    except AssertionError as error:
        said = f"{question.title}: the result of {OWN} is wrong, so no speed is reported: {error}"
        raise RuntimeError(said) from error
    for other in question.others:
        try:
            call = other.prepare()
            agreements[other.name] = question.agreement(call(), result)
            calls[other.name] = call
        except Exception as error:  # whatever another package raises, the rest is measured
            answer.missing.append({"name": other.name, "reason": reason_of(error)})
    del result
    times = time_interleaved(calls, ROUNDS, budget=seconds, wait=wait)
    packages = {one.name: one.package for one in (question.own, *question.others)}
    figures = {name: percentiles(values, 1e3) for name, values in times.items()}
    for name, found in figures.items():
        answer.figures.append({
            "name": name, "version": version_of(packages[name]), "p20_ms": found["p20"],
            "p50_ms": found["p50"], "p80_ms": found["p80"], "repeats": len(times[name]),
            "items_per_second": 1e3 * question.items / found["p50"],
            "times_slower": found["p50"] / figures[question.own.name]["p50"],
            "same_result": agreements[name].same, "agreement": agreements[name].detail,
        })  # fmt: skip
    return answer
