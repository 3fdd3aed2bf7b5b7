"""Which loops are around a call, read from the bytecode of functions of many forms."""

# ruff: noqa: B007  (the variables of the loops are what is looked at)

from __future__ import annotations

import sys

import pytest

from sgl_diffusion_accel.loop.code_loops import loops_around


def around():
    frame = sys._getframe(1)
    return loops_around(frame.f_code, frame.f_lasti)


class Bar:
    """Stands for progress bars and cache contexts."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def only(loops):
    assert len(loops) == 1
    return loops[0]


def plain(timesteps):
    for i, t in enumerate(timesteps):
        found = around()
    return found, i, t


def within_with(timesteps):
    with Bar():
        for i, t in enumerate(timesteps):
            if t == "skip":
                continue
            with Bar():
                found = around()
            with Bar():
                other = around()
    assert [loop.targets for loop in found] == [loop.targets for loop in other]
    return found, i, t


def within_try(timesteps):
    for i, t in enumerate(timesteps):
        try:
            found = around()
        except ValueError:
            continue
        finally:
            del t
    return found, i


def after_another(timesteps):
    for k in range(3):
        timesteps = [*timesteps, k]
    for i, t in enumerate(timesteps):
        found = around()
    return found, i, t


def of_a_long_body():
    """A function whose jumps are over more than 255 instructions, and have a prefix, as those of pipelines."""
    source = ["def long_body(timesteps):", "    for i, t in enumerate(timesteps):", "        found = around()"]
    source += ["        x = i if i else None"] * 400
    made = {"around": around}
    exec("\n".join([*source, "    return found, i, t, x"]), made)
    return made["long_body"]


@pytest.mark.parametrize("function", [plain, within_with, within_try, after_another, of_a_long_body()])
def test_one_loop_over_the_timesteps(function):
    loop = only(function(["a", "b"])[0])
    assert loop.targets == ("i", "t")
    assert loop.names == {"enumerate", "timesteps"}
    assert loop.is_plain


def test_loops_within_one_another_come_innermost_first():
    for t in [1, 2]:
        for tile in range(2):
            inner, outer = around()
    assert inner.targets == ("tile",)
    assert outer.targets == ("t",)
    assert {"t", "tile", "inner", "outer"} <= outer.stored
    assert "t" not in inner.stored
    assert (t, tile) == (2, 1)


def test_a_while_is_a_loop_without_targets():
    i = 0
    while i < 2:
        t = around()
        i += 1
    loop = only(t)
    assert loop.targets == ()
    assert loop.stored == {"i", "t"}


def test_a_call_behind_a_loop_is_in_none():
    for _ in range(2):
        pass
    assert around() == ()


def test_targets_may_be_nested_and_shared_with_a_closure():
    for i, (sigma, (following, _)) in enumerate([(1, (2, 3))]):
        found = around()
    assert only(found).targets == ("i", "sigma", "following", "_")

    def closure():
        return i, sigma, following

    assert closure() == (0, 1, 2)


@pytest.mark.parametrize(
    ("names", "is_plain", "function"),
    [
        ({"range", "len", "timesteps"}, True, lambda timesteps: counted(timesteps)),
        ({"enumerate", "timesteps"}, False, lambda timesteps: sliced(timesteps)),
        ({"enumerate", "timesteps"}, False, lambda timesteps: offset(timesteps)),
    ],
    ids=["range", "slice", "start"],
)
def test_what_a_loop_runs_over(names, is_plain, function):
    loop = only(next(function(["a", "b", "c"])))
    assert loop.names == names
    assert loop.is_plain is is_plain


def counted(timesteps):
    for i in range(len(timesteps)):
        yield around()
        del i


def sliced(timesteps):
    for i, t in enumerate(timesteps[1:]):
        yield around()
        del i, t


def offset(timesteps):
    for i, t in enumerate(timesteps, 1):
        yield around()
        del i, t


def test_timesteps_that_a_slice_leaves_off_at_the_end():
    timesteps, others = [0, 1, 2], [3, 4]
    found = {}
    for _ in enumerate(timesteps[:-1]):
        found["[:-1]"] = only(around()).left_off
    for _ in timesteps[0:-2]:
        found["[0:-2]"] = only(around()).left_off
    for _ in zip(timesteps[:-1], timesteps[1:], strict=True):  # noqa: RUF007
        found["pairs"] = only(around()).left_off
    for _ in zip(timesteps[1:], others[:-1], strict=False):
        found["others"] = only(around()).left_off
    for _ in timesteps[:2]:
        found["[:2]"] = only(around()).left_off
    for _ in timesteps[1:-1]:
        found["[1:-1]"] = only(around()).left_off
    assert found == {"[:-1]": 1, "[0:-2]": 2, "pairs": 1, "others": 0, "[:2]": 0, "[1:-1]": 0}


def test_of_what_only_an_exception_leads_to_nothing_is_known():
    for _ in range(2):
        try:
            raise ValueError
        except ValueError:
            found = around()
    assert found is None
