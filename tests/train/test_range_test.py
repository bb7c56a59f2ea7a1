"""Tukey's range test: the paired t-test of two, tabled quantiles, a least-squares fit; letters; levels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="needs SciPy")

from ernet_fast.train.range_test import group_letters, tukey  # noqa: E402


def random_table(treatments: int, blocks: int, seed: int = 0, spread: float = 0.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    block = generator.normal(size=blocks)
    return {f"t{k}": spread * k + block + 0.3 * generator.normal(size=blocks) for k in range(treatments)}


def test_of_two_treatments_it_is_the_paired_t_test():
    values = random_table(2, 7, spread=0.2)
    found = tukey(values)
    assert found.pairs[0].p_value == pytest.approx(stats.ttest_rel(values["t1"], values["t0"]).pvalue)
    assert found.blocks == 7 and found.treatments[0].name == "t1"


def test_by_hand():
    """Three treatments in three blocks, so four degrees of freedom; q(0.05; 3, 4) is 5.040 in tables."""
    values = {"a": [10.0, 12.0, 14.0], "b": [7.0, 9.0, 12.0], "c": [4.0, 7.0, 9.0]}
    table = np.array(list(values.values()))
    residual = table - table.mean(axis=1)[:, None] - table.mean(axis=0) + table.mean()
    error = (residual**2).sum() / 4
    found = tukey(values)
    assert found.least == pytest.approx(5.040 * np.sqrt(error / 3), rel=1e-3)
    assert [(t.name, t.mean) for t in found.treatments] == [
        ("a", 12.0), ("b", pytest.approx(28 / 3)), ("c", pytest.approx(20 / 3))
    ]  # fmt: skip
    assert [t.letters for t in found.treatments] == ["a", "b", "c"]
    assert found.treatments[0].deviation == pytest.approx(2.0)


def test_against_a_least_squares_fit_and_scipy():
    values = random_table(4, 6, seed=3, spread=0.15)
    table = np.array(list(values.values()))
    rows, columns = np.divmod(np.arange(24), 6)
    design = np.concatenate([np.eye(4)[rows], np.eye(6)[columns]], axis=1)
    _, _, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    fitted = design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    error = ((table.ravel() - fitted) ** 2).sum() / (24 - rank)
    found = tukey(values)
    for pair in found.pairs:
        q = pair.difference / np.sqrt(error / 6)
        assert pair.p_value == pytest.approx(stats.studentized_range.sf(q, 4, 15), abs=1e-9)
    # without blocks to take out, SciPy's one-way test has the same residuals and more degrees of freedom
    centred = table - table.mean(axis=0)
    scipys = stats.tukey_hsd(*centred)
    for pair in found.pairs:
        i, j = int(pair.first[1]), int(pair.second[1])
        q = abs(scipys.statistic[i, j]) / np.sqrt(((centred - centred.mean(axis=1)[:, None]) ** 2).sum() / 20 / 6)
        assert scipys.pvalue[i, j] == pytest.approx(stats.studentized_range.sf(q, 4, 20), abs=1e-6)
        assert pair.difference == pytest.approx(abs(scipys.statistic[i, j]))


@pytest.mark.parametrize(
    ("means", "least", "letters"),
    [
        ([3, 2, 1], 0.5, ["a", "b", "c"]),
        ([3, 2, 1], 1.0, ["a", "ab", "b"]),
        ([3, 2, 1], 2.0, ["a", "a", "a"]),
        ([5, 4.5, 4, 3.2, 1], 1.0, ["a", "a", "ab", "b", "c"]),
        ([1], 0.0, ["a"]),
        ([2, 2, 1], 0.0, ["a", "a", "b"]),
    ],
)
def test_letters(means, least, letters):
    assert group_letters(means, least) == letters


def test_two_share_a_letter_if_and_only_if_they_do_not_differ():
    for seed in range(2):
        found = tukey(random_table(6, 5, seed, spread=0.12))
        letters = {t.name: set(t.letters) for t in found.treatments}
        for pair in found.pairs:
            assert bool(letters[pair.first] & letters[pair.second]) == (pair.p_value > found.alpha), pair


def test_the_level_holds_for_all_pairs_together():
    """Five treatments that are the same: at 0.1 about one study in ten calls any two different."""
    q = stats.studentized_range.ppf(0.9, 5, 4 * 5)
    wrong = 0
    for seed in range(300):
        table = np.array(list(random_table(5, 6, seed).values()))
        residual = table - table.mean(axis=1)[:, None] - table.mean(axis=0) + table.mean()
        wrong += np.ptp(table.mean(axis=1)) > q * np.sqrt((residual**2).sum() / 20 / 6)
    assert 0.1 == pytest.approx(wrong / 300, abs=4 * np.sqrt(0.09 / 300))
    found = tukey(random_table(5, 6, 0), alpha=0.1)
    assert found.least == pytest.approx(q * _unit(random_table(5, 6, 0)))


def _unit(values):
    table = np.array(list(values.values()))
    residual = table - table.mean(axis=1)[:, None] - table.mean(axis=0) + table.mean()
    return np.sqrt((residual**2).sum() / ((len(table) - 1) * (table.shape[1] - 1)) / table.shape[1])


def test_without_error_equal_means_do_not_differ_and_others_do():
    found = tukey({"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3], "c": [0.0, 0.1, 0.2]})
    assert [t.letters for t in found.treatments] == ["a", "a", "b"]
    p = {frozenset((pair.first, pair.second)): pair.p_value for pair in found.pairs}
    assert p[frozenset("ab")] == 1 and p[frozenset("ac")] == 0


@pytest.mark.parametrize(
    "values", [{}, {"a": [1, 2]}, {"a": [1], "b": [2]}, {"a": [1, 2], "b": [1]}, {"a": [1, 2], "b": [1, np.nan]}]
)
def test_too_little_is_refused(values):
    with pytest.raises(ValueError, match="needs two treatments or more"):
        tukey(values)


def test_all_pairs_are_there():
    found = tukey(random_table(4, 3))
    assert {frozenset((p.first, p.second)) for p in found.pairs} == {
        frozenset(pair) for pair in itertools.combinations(["t0", "t1", "t2", "t3"], 2)
    }
    with pytest.raises(ValueError, match="alpha"):
        tukey(random_table(2, 3), alpha=1.5)
