"""A question that is asked of several packages, and the answer: who agrees with whom, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median
from typing import Any

import torch

from ernet_fast.benchmark.interleaved import (
    LEAST_ROUNDS,
    over_images,
    percentiles,
    ratios,
    time_interleaved,
    time_over_images,
)
from ernet_fast.benchmark.macenko_peers import reason_of

OWN = "ernet_fast"
ROUNDS = 25
LEAST_IMAGES = 4
"""Of a contestant that is too slow to be timed on all of them."""
Call = Callable[[], Any]


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
        prepare: makes the call to be timed, or a list of one call an image, with everything that is no part of the
            question done; an exception says that the package cannot answer here.
        package: the distribution whose version is shown, None for PyTorch itself.
    """

    name: str
    prepare: Callable[[], Call | list[Call]]
    package: str | None = None


@dataclass(frozen=True)
class Question:
    """What is measured: one call, or where `prepare` gives lists, one call for each of many images.

    Attributes:
        name: short, for files and `--only`.
        title: for people.
        items: what one call works on, e.g. 64 images; rates are items a second.
        own: this library's answer, which `verify` must accept.
        others: whom it is compared with.
        verify: raises if the own result, or the list of them, is wrong.
        agreement: compares another's result, or results, with the own.
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

    On many images the figures are percentiles over the images, and `times_slower` is the median of the images' own
    ratios; a contestant that is too slow for all of them in that time gets fewer, at even distances.

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
    own = question.own.prepare()
    calls, agreements = {question.own.name: _by_image(own)}, {question.own.name: Agreement(True, "")}
    results = [call() for call in calls[question.own.name].values()]
    single = not isinstance(own, list)
    try:
        question.verify(results[0] if single else results)
    except AssertionError as error:
        said = f"{question.title}: the result of {OWN} is wrong, so no speed is reported: {error}"
        raise RuntimeError(said) from error
    share = seconds / (len(question.others) + 1)
    for other in question.others:
        try:
            chosen = _by_image(other.prepare())
            chosen = chosen if single else _affordable(chosen, share, wait)
            found, mine = [call() for call in chosen.values()], [results[image] for image in chosen]
            agreements[other.name] = question.agreement(*((found[0], mine[0]) if single else (found, mine)))
            calls[other.name] = chosen
        except Exception as error:  # whatever another package raises, the rest is measured
            answer.missing.append({"name": other.name, "reason": reason_of(error)})
    del results
    timed = _times(calls, seconds, wait) if single else _times_over_images(calls, seconds, wait)
    packages = {one.name: one.package for one in (question.own, *question.others)}
    for name, found_figures in timed.items():
        answer.figures.append({
            "name": name, "version": version_of(packages[name]), **found_figures,
            "items_per_second": 1e3 * question.items / found_figures["p50_ms"],
            "same_result": agreements[name].same, "agreement": agreements[name].detail,
        })  # fmt: skip
    return answer


def _by_image(prepared: Call | list[Call]) -> dict[int, Call]:
    return dict(enumerate(prepared if isinstance(prepared, list) else [prepared]))


def _affordable(calls: dict[int, Call], seconds: float, wait: Callable[[], Any]) -> dict[int, Call]:
    """As many of the calls as the least rounds of them take `seconds`, at even distances; the first is called twice."""
    calls[0]()
    start = time.perf_counter()
    calls[0]()
    wait()
    each = (LEAST_ROUNDS + 1) * (time.perf_counter() - start)
    count = min(len(calls), max(LEAST_IMAGES, int(seconds / max(each, 1e-9))))
    chosen = {round(step * (len(calls) - 1) / max(1, count - 1)) for step in range(count)}
    return {image: calls[image] for image in sorted(chosen)}


def _times(calls: Mapping[str, Mapping[int, Call]], seconds: float, wait: Callable[[], Any]) -> dict[str, Any]:
    """Percentiles over the repeats of one call of each."""
    times = time_interleaved({name: found[0] for name, found in calls.items()}, ROUNDS, budget=seconds, wait=wait)
    figures = {name: percentiles(values, 1e3) for name, values in times.items()}
    own, *_ = figures.values()
    return {
        name: {
            **{f"{key}_ms": value for key, value in found.items()},
            "repeats": len(times[name]), "times_slower": found["p50"] / own["p50"],
        }
        for name, found in figures.items()
    }  # fmt: skip


def _times_over_images(
    calls: Mapping[str, Mapping[int, Call]], seconds: float, wait: Callable[[], Any]
) -> dict[str, Any]:
    """Percentiles over the images of their median times, and ratios image by image."""
    times = time_over_images(calls, ROUNDS, budget=seconds, wait=wait)
    medians = {name: {image: median(values) for image, values in found.items()} for name, found in times.items()}
    own, *_ = medians.values()
    found = {}
    for name, mine in medians.items():
        middle, least = ratios(own, mine)
        found[name] = {
            **{f"{key}_ms": value for key, value in over_images(list(mine.values()), 1e3).items()},
            "repeats": min(map(len, times[name].values())), "images": len(mine),
            "times_slower": middle, "least_times_slower": least,
        }  # fmt: skip
    return found
