"""The covering array of the pairwise tests: every allowed pair comes up, no forbidden one does, in few cases."""

from __future__ import annotations

import math

import pytest

from pairwise.covering import all_pairs, covering, pair, pairs_of

FACTORS = {"a": "1234", "b": "123", "c": "123", "d": "12", "e": "12"}


def covered(cases: list[dict[str, str]]) -> set[object]:
    return {two for case in cases for two in pairs_of(case)}


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_comes_up_in_few_cases(seed: int) -> None:
    cases = covering(FACTORS, seed=seed)
    assert covered(cases) == all_pairs(FACTORS)
    assert len(all_pairs(FACTORS)) == sum(len(x) * len(y) for x, y in [*_twos()])
    assert 12 <= len(cases) <= 15, "at least as many as the two largest factors have pairs"
    assert math.prod(map(len, FACTORS.values())) == 144


def _twos() -> list[tuple[str, str]]:
    values = list(FACTORS.values())
    return [(x, y) for i, x in enumerate(values) for y in values[i + 1 :]]


def test_forbidden_pairs_come_up_in_none() -> None:
    forbidden = {pair(("a", "1"), ("b", "1")), pair(("a", "1"), ("b", "2")), pair(("d", "1"), ("e", "2"))}
    cases = covering(FACTORS, forbidden)
    assert covered(cases) == all_pairs(FACTORS, forbidden) == all_pairs(FACTORS) - forbidden


def test_pair_that_has_no_case_is_an_error() -> None:
    forbidden = {pair(("a", "1"), ("d", "1")), pair(("b", "1"), ("d", "2"))}
    with pytest.raises(ValueError, match=r"no case can have"):
        covering(FACTORS, forbidden)


def test_what_is_covered_already_is_not_covered_again() -> None:
    first = covering({**FACTORS, "a": "123"})
    rest = covering(FACTORS, given=first)
    assert covered(first + rest) == all_pairs(FACTORS)
    assert all(case["a"] == "4" for case in rest)
    assert covering(FACTORS, given=first + rest) == []


def test_same_cases_whenever_they_are_made() -> None:
    assert covering(FACTORS, seed=3) == covering(FACTORS, seed=3) != covering(FACTORS, seed=4)
