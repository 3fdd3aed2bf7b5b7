"""Step computation masks: the published presets, every step count, bins, lists and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest

from sgl_diffusion_accel import StepsMask
from sgl_diffusion_accel.errors import AccelError, ConfigError, ConfigTypeError

NAMES = ("slow", "medium", "fast", "ultra")
TOTALS = (*range(1, 61), *range(67, 201, 7))
"""Numbers of steps that are tried: all that are usual, and some up to 200."""
LATE = ("late-slow", "late-medium", "late-fast", "late-ultra")
PUBLISHED = {
    28: (18, 15, 11, 8),
    50: (38, 29, 20, 14),
    9: (8, 7, 6, 5),
    8: (7, 6, 5, 4),
}
"""Computed steps, as the peers state them."""

BINS_28 = {
    "slow": ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3]),
    "medium": ([6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3]),
    "fast": ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4]),
    "ultra": ([4, 1, 1, 1, 1], [2, 5, 6, 7]),
}


def text(name, total):
    return "".join(map(str, StepsMask.preset(name).resolve(total)))


def longest_gap(steps):
    return max(len(gap) for gap in steps.split("1"))


def share(name, total):
    return PUBLISHED[total][NAMES.index(name)] / total


@pytest.mark.parametrize("total", PUBLISHED)
def test_presets_compute_the_published_number_of_steps(total):
    assert tuple(sum(StepsMask.preset(name).resolve(total)) for name in NAMES) == PUBLISHED[total]


@pytest.mark.parametrize("name", NAMES)
def test_presets_at_28_steps_are_the_published_bins(name):
    compute, cache = BINS_28[name]
    expected = "".join("1" * n + "0" * m for n, m in itertools.zip_longest(compute, cache, fillvalue=0))
    assert text(name, 28) == expected


@pytest.mark.parametrize("name", NAMES + LATE)
def test_presets_at_six_and_four_steps_are_the_published_masks(name):
    assert text(name, 6) == "111001"
    assert text(name, 4) == "1101"


@pytest.mark.parametrize("name", NAMES + LATE)
def test_presets_have_an_entry_a_step_and_compute_the_first_and_the_last(name):
    for total in TOTALS:
        steps = StepsMask.preset(name).resolve(total)
        assert len(steps) == total
        assert set(steps) <= {0, 1}
        assert steps[0] == steps[-1] == 1


@pytest.mark.parametrize("names", [NAMES, LATE], ids=["published", "late"])
def test_presets_compute_fewer_steps_from_slow_to_ultra(names):
    counts = {total: [sum(StepsMask.preset(name).resolve(total)) for name in names] for total in TOTALS}
    assert {total: n for total, n in counts.items() if n != sorted(n, reverse=True)} == {}


@pytest.mark.parametrize("name", NAMES)
def test_presets_leave_no_wider_gap_in_proportion_than_the_published_ones(name):
    widest = max(longest_gap(text(name, total)) / total for total in (28, 50))
    gaps = {total: longest_gap(text(name, total)) for total in TOTALS}
    assert {total: gap for total, gap in gaps.items() if gap > math.ceil(widest * total) + 1} == {}


@pytest.mark.parametrize("name", NAMES)
def test_presets_compute_the_published_share_at_every_step_count(name):
    """Between two published step counts the share lies between theirs, but for a step."""
    wrong = {}
    for total in TOTALS[7:]:
        below = max(stated for stated in PUBLISHED if stated <= total)
        above = min((stated for stated in PUBLISHED if stated >= total), default=28)
        low, high = sorted((share(name, below), share(name, above)))
        count = sum(StepsMask.preset(name).resolve(total))
        if not low * total - 1 <= count <= high * total + 1:
            wrong[total] = (count, low * total, high * total)
    assert wrong == {}


@pytest.mark.parametrize("name", NAMES)
def test_one_more_step_changes_the_number_of_computed_steps_by_two_at_most(name):
    counts = [sum(StepsMask.preset(name).resolve(total)) for total in range(1, 101)]
    jumps = {total: (a, b) for total, (a, b) in enumerate(itertools.pairwise(counts), 1) if abs(b - a) > 2}
    assert jumps == {}


@pytest.mark.parametrize("share", [0.1, 0.28, 0.4, 0.54, 0.7, 0.9, 1.0])
def test_late_masks_compute_their_share_the_first_steps_and_the_last(share):
    for total in TOTALS[7:]:
        steps = StepsMask.late(share).resolve(total)
        assert len(steps) == total
        assert steps[:3] == (1, 1, 1)
        assert steps[-1] == 1
        assert abs(sum(steps) - max(share * total, 5)) <= 1.5, total


@pytest.mark.parametrize("share", [0.1, 0.28, 0.4, 0.54, 0.7])
def test_late_masks_compute_ever_more_densely_but_for_rounding(share):
    for total in TOTALS[7:]:
        steps = "".join(map(str, StepsMask.late(share).resolve(total)))
        gaps = [len(gap) for gap in steps[2:-1].split("1")[1:]]
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(gaps)), steps
        half = total // 2
        assert steps[3:half].count("1") <= steps[half:].count("1"), steps


def test_late_presets_are_late_masks_of_about_the_published_share():
    for name, published in zip(LATE, NAMES, strict=True):
        late = sum(StepsMask.preset(name).resolve(28)) / 28
        assert late == pytest.approx(share(published, 28), abs=0.08)


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, True, "0.5", None, math.nan])
def test_late_mask_of_an_impossible_share_is_refused(bad):
    with pytest.raises(ConfigError, match=r"share=.*above 0 and up to 1"):
        StepsMask.late(bad)


@pytest.mark.parametrize(
    "mask", [StepsMask.preset("slow"), StepsMask.late(0.3), StepsMask.of([1, 0, 1]), StepsMask.preset("late-fast")]
)
def test_representation_is_what_to_type(mask):
    assert eval(repr(mask), {"StepsMask": StepsMask}) == mask


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES + LATE)
def test_up_to_three_steps_everything_is_computed(name, total):
    assert text(name, total) == "1" * total


@pytest.mark.parametrize(
    ("compute", "cache", "expected"),
    [
        ([4, 2, 1], [3, 2], "111100011001"),
        ([1], [], "1"),
        ([2], [2], "1100"),
        ((1, 1), (1, 1), "1010"),
    ],
)
def test_bins_alternate_and_start_with_computed_steps(compute, cache, expected):
    mask = StepsMask(compute, cache)
    assert "".join(map(str, mask.resolve(len(expected)))) == expected == str(mask)


@pytest.mark.parametrize(
    ("compute", "cache"), [([], []), ([], [1]), ([2, 2], []), ([2], [1, 1]), ([3, 3, 3], [1]), ([1, 1], [1, 1, 1])]
)
def test_bins_that_do_not_alternate_are_refused(compute, cache):
    with pytest.raises(ConfigError, match=r"do not alternate.*Type: StepsMask\("):
        StepsMask(compute, cache)


@pytest.mark.parametrize("bad", [[0], [-1], [2.0], ["3"], "833", [None]])
def test_bins_other_than_positive_whole_numbers_are_refused(bad):
    with pytest.raises(ConfigError, match=r"compute_bins=.*whole numbers"):
        StepsMask(bad, [])
    with pytest.raises(ConfigError, match=r"cache_bins=.*whole numbers"):
        StepsMask([1, 1], bad)


@pytest.mark.parametrize("bad", [5, 2.5, None])
def test_bins_that_are_no_list_are_refused_with_what_is_allowed(bad):
    with pytest.raises(AccelError, match=r"compute_bins=.*whole numbers"):
        StepsMask(bad, [])


def test_a_list_of_zeros_and_ones_is_taken_as_it_is():
    assert StepsMask.of([1, 0, 1, 0]).resolve(4) == (1, 0, 1, 0)
    assert StepsMask.of((True, False, True)).resolve(3) == (1, 0, 1)
    assert str(StepsMask.of([1, 0, 1, 0])) == "1010"


def test_a_mask_is_taken_as_it_is():
    mask = StepsMask([2], [1])
    assert StepsMask.of(mask) is mask


@pytest.mark.parametrize("bad", [[1, 2], [1, -1], [1, 0.5], [1, "0"], [1, None], [1, 1.0]])
def test_entries_other_than_zero_and_one_are_refused_and_named(bad):
    with pytest.raises(ConfigError, match="0 and 1") as error:
        StepsMask.of(bad)
    assert repr(bad[1]) in str(error.value)


def test_an_empty_list_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match="0 and 1"):
        StepsMask.of([])


def test_a_mask_that_starts_with_a_skip_is_refused():
    with pytest.raises(ConfigError, match="starts with 0"):
        StepsMask.of([0, 1, 1])


@pytest.mark.parametrize("bad", [3, 0.5, {"a": 1}, {1, 0}])
def test_other_types_are_refused_as_such(bad):
    with pytest.raises(ConfigTypeError, match=f"{type(bad).__name__}.*slow, medium, fast, ultra"):
        StepsMask.of(bad)


def test_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'medum'.*Did you mean 'medium'.*Known: .*fast, .*medium, .*ultra"):
        StepsMask.of("medum")


@pytest.mark.parametrize("total", [3, 5, 50])
def test_mask_of_another_length_is_refused_with_both_lengths(total):
    with pytest.raises(ConfigError, match=rf"4 entries.*{total} denoising steps.*preset"):
        StepsMask.of([1, 0, 0, 1]).resolve(total)


def test_equal_masks_are_equal_hashed_alike_and_survive_copies():
    first, second = StepsMask([2, 1], [3]), StepsMask((2, 1), (3,))
    assert first == second
    assert hash(first) == hash(second)
    assert StepsMask.preset("slow") == StepsMask.of("slow") != StepsMask.of("fast")
    assert pickle.loads(pickle.dumps(first)) == copy.deepcopy(first) == first


def test_preset_shows_its_name():
    assert str(StepsMask.preset("ultra")) == "ultra"
