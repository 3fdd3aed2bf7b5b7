"""Covering arrays: few cases in which each pair of values of two different factors comes up at least once.

The greedy search of the AETG system (Cohen et al., 1997): a case begins with a pair that none has covered yet, and
takes for each further factor the value that covers the most; of several such cases the best one is kept.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

Factors = Mapping[str, Sequence[str]]
"""The values of each factor."""

Case = dict[str, str]
"""A value for each factor."""

Value = tuple[str, str]
"""A factor and its value."""

Pair = frozenset[Value]
"""Two values, of different factors."""

_TRIES = 40
"""Cases that are made for each one that is kept; more of them save no further case here."""


def pair(*values: Value) -> Pair:
    """Two values as a pair; their order does not matter."""
    return frozenset(values)


def pairs_of(case: Mapping[str, str]) -> Iterator[Pair]:
    """All pairs of values in a case."""
    return (pair(*two) for two in itertools.combinations(case.items(), 2))


def all_pairs(factors: Factors, forbidden: Iterable[Pair] = ()) -> set[Pair]:
    """All pairs of values of different factors, but for those that are forbidden."""
    found = {
        pair((one, a), (other, b))
        for one, other in itertools.combinations(factors, 2)
        for a, b in itertools.product(factors[one], factors[other])
    }
    return found - set(forbidden)


def covering(
    factors: Factors, forbidden: Iterable[Pair] = (), *, given: Iterable[Case] = (), seed: int = 0
) -> list[Case]:
    """Cases in which every allowed pair comes up; the same ones whenever they are made.

    Args:
        factors: The factors.
        forbidden: Pairs that no case may have.
        given: Cases that there are already: what they cover is not covered again.
        seed: Of the search.

    Raises:
        ValueError: A pair can be in no case, since each value of some other factor is forbidden with one of its two.
    """
    refused, chance = frozenset(forbidden), random.Random(seed)
    open_ = all_pairs(factors, refused) - {two for case in given for two in pairs_of(case)}
    cases: list[Case] = []
    while open_:
        ordered = sorted(open_, key=sorted)
        made = [_case(dict(chance.choice(ordered)), factors, refused, open_, chance) for _ in range(_TRIES)]
        best = max((case for case in made if case), key=lambda case: len(open_ & set(pairs_of(case))), default=None)
        if best is None:
            best = _exhaustive(dict(ordered[0]), factors, refused)
        cases.append({factor: best[factor] for factor in factors})
        open_ -= set(pairs_of(best))
    return cases


def _case(case: Case, factors: Factors, refused: frozenset[Pair], open_: set[Pair], chance: random.Random) -> Case:
    """A case with the values that it has; an empty one where it cannot be completed."""
    rest = [factor for factor in factors if factor not in case]
    chance.shuffle(rest)
    for factor in rest:
        gains = {
            value: sum(pair((factor, value), other) in open_ for other in case.items())
            for value in factors[factor]
            if not any(pair((factor, value), other) in refused for other in case.items())
        }
        if not gains:
            return {}
        most = max(gains.values())
        case[factor] = chance.choice([value for value, gain in gains.items() if gain == most])
    return case


def _exhaustive(start: Case, factors: Factors, refused: frozenset[Pair]) -> Case:
    rest = [factor for factor in factors if factor not in start]
    for values in itertools.product(*(factors[factor] for factor in rest)):
        case = start | dict(zip(rest, values, strict=True))
        if refused.isdisjoint(pairs_of(case)):
            return case
    raise ValueError(f"no case can have {start}: every value of another factor is forbidden with one of the two")
