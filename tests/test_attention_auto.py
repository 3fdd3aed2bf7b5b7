"""`"auto"` times what is usable on the calls that come, discards what is wrong, and remembers the fastest."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invariants import Snapshot, assert_same, families
from invariants.families import present
from sgl_diffusion_accel import UnsupportedModelError
from sgl_diffusion_accel.attention import measured_choice as auto
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import Backend, find_backend, register_attention_backend
from sgl_diffusion_accel.attention.backends.requirements import facts_of
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice, as_rows, default_store
from sgl_diffusion_accel.attention.select import set_attention_backend
from zoo import Family

torch.set_num_threads(1)

MORE: dict[str, Any] = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table with PyTorch's own and nothing else beside it, and an empty cache directory; returns the file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(auto, "_ENOUGH_S", 0.02)
    return tmp_path / "sgl-diffusion-accel" / "attention.json"


def right(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    return find_backend("sdpa").load()(query, key, value, **more)


def slow(*parts: Tensor, **more: Any) -> Tensor:
    time.sleep(0.05)
    return right(*parts, **more)


def wrong(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Faster than any attention."""
    return torch.zeros_like(query)


def quick(answers: dict[Any, Tensor]) -> Any:
    """Right and the fastest by far: it has the answers by heart."""

    def run(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        known = answers.get(query.data_ptr())
        if known is None:
            time.sleep(0.001)
            known = answers[query.data_ptr()] = right(query, key, value, **more)
        return known

    return run


def only(monkeypatch: pytest.MonkeyPatch, *names: str | Backend) -> None:
    """Leaves these backends of the table, and puts others into it."""
    there = [each for each in backends.TABLE if each.name in names]
    monkeypatch.setattr(backends, "TABLE", (*there, *(each for each in names if isinstance(each, Backend))))


def sides(queries: int = 40, heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries), (heads, 40), (heads, 40))
    return tuple(torch.randn(1, h, n, 16, generator=generator).to(dtype) for h, n in shapes)  # type: ignore[return-value]


def pick(choice: MeasuredChoice, parts: tuple[Tensor, Tensor, Tensor], **given: Any) -> str:
    more = MORE | given
    facts = facts_of(parts[0], parts[1], more["mask"], 0.0, more["is_causal"], more["enable_gqa"])
    return choice.pick(facts, parts, more).name


# What is picked


def test_fastest_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", "math")
    register_attention_backend("slow", slow)
    register_attention_backend("quick", quick({}))
    choice = MeasuredChoice(False, None)
    assert pick(choice, sides()) == "quick"
    ((label, timings),) = choice.timings.items()
    assert label == "B1 H2 Q40 K40 D16 float32"
    assert {timing.backend for timing in timings} == {"sdpa", "math", "slow", "quick"}
    times = {timing.backend: timing.milliseconds or 0.0 for timing in timings}
    assert times["slow"] > 50
    assert times["quick"] == min(times.values())
    assert all(timing.error is not None and timing.error < 1e-6 and not timing.note for timing in timings)
    assert choice.picks == {label: "quick"}


def test_slow_ones_are_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    register_attention_backend("slow", slow)
    assert pick(MeasuredChoice(False, None), sides()) == "sdpa"


def failing(*_: Tensor, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (wrong, "error 1"),
        (lambda *parts, **more: right(*parts, **more) * float("nan"), "error nan"),
        (lambda *parts, **more: right(*parts, **more) * 1.002, "error 0.002"),
        (failing, "RuntimeError: no kernel image is available"),
        (lambda *parts, **more: None, "TypeError: "),
    ],
    ids=["zeros", "NaN", "slightly off", "failing", "nothing"],
)
def test_what_is_wrong_or_fails_is_out_with_a_note(function: Any, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    register_attention_backend("mine", function)
    choice = MeasuredChoice(True, None)
    assert pick(choice, sides()) == "sdpa"
    (timings,) = choice.timings.values()
    mine = next(timing for timing in timings if timing.backend == "mine")
    assert mine.milliseconds is None
    assert mine.note.startswith(note)


def test_backend_that_cannot_be_loaded_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    only(monkeypatch, "sdpa")
    monkeypatch.setitem(backends._registered, "broken", Backend("broken", load))
    choice = MeasuredChoice(False, None)
    assert pick(choice, sides()) == "sdpa"
    assert choice.timings["B1 H2 Q40 K40 D16 float32"][1].note.startswith("OSError: libcudart")


def test_nothing_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    register_attention_backend("mine", wrong)
    with pytest.raises(UnsupportedModelError, match=r"no attention backend works for B1 H2 Q40 K40 D16 float32"):
        pick(MeasuredChoice(False, None), sides())


def test_quantised_ones_take_part_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    answers: dict[Any, Tensor] = {}
    register_attention_backend("few bits", lambda *parts, **more: quick(answers)(*parts, **more) * 1.03, is_exact=False)
    monkeypatch.setattr(auto, "median_ms", lambda run, device: 0.0 if answers else 1.0)
    exact = MeasuredChoice(False, None)
    assert pick(exact, sides()) == "sdpa"
    assert [timing.backend for timing in next(iter(exact.timings.values()))] == ["sdpa"]
    assert pick(MeasuredChoice(True, None), sides()) == "few bits"


def test_each_kind_of_call_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, type, mask, causal, shared heads: timed once each, among those that can take it."""
    only(monkeypatch, "sdpa", "flex")
    register_attention_backend("mine", right, masks=False, causal=False, gqa=False)
    choice = MeasuredChoice(False, None)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    calls: list[tuple[str, Any, dict[str, Any], bool]] = [
        ("B1 H2 Q40 K40 D16 float32", sides(), {}, True),
        ("B1 H2 Q7 K40 D16 float32", sides(7), {}, True),
        ("B1 H2 Q40 K40 D16 bfloat16", sides(dtype=torch.bfloat16), {}, True),
        ("B1 H2 Q40 K40 D16 float32 bool mask", sides(), {"mask": mask}, False),
        ("B1 H2 Q40 K40 D16 float32 float mask", sides(), {"mask": mask.float()}, False),
        ("B1 H2 Q40 K40 D16 float32 causal", sides(), {"is_causal": True}, False),
        ("B1 H2 Q40 K40 D16 Hkv1 float32", sides(heads=1), {"enable_gqa": True}, False),
    ]
    for _ in range(2):
        for _, parts, given, _ in calls:
            pick(choice, parts, **given)
    assert [*choice.timings] == [label for label, *_ in calls]
    for label, _, _, takes_part in calls:
        assert ("mine" in {timing.backend for timing in choice.timings[label]}) == takes_part, label
    rows = as_rows(choice.timings)
    assert len(rows) == 7 * 2 + 3
    assert json.loads(json.dumps(rows[0]))["call"] == calls[0][0]


# What is remembered


def test_choice_is_remembered_and_not_timed_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", Backend("quick", lambda: quick({})))
    assert default_store() == store
    assert not store.exists()
    assert pick(MeasuredChoice(False, store), sides()) == "quick"
    assert [*json.loads(store.read_text()).values()] == ["quick"]
    assert [path.name for path in store.parent.iterdir()] == [store.name], "nothing else is left there"
    again = MeasuredChoice(False, store)
    assert pick(again, sides()) == "quick"
    assert not again.timings
    assert again.picks == {"B1 H2 Q40 K40 D16 float32": "quick"}
    other = MeasuredChoice(False, store)
    pick(other, sides(7))
    assert other.timings
    assert len(json.loads(store.read_text())) == 2


def test_default_is_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_store() == Path.home() / ".cache" / "sgl-diffusion-accel" / "attention.json"


def test_what_it_was_compared_with_is_part_of_the_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of torch and of the packages, the backends that took part, and the number of threads."""
    versions = {"pack": "1.0"}
    monkeypatch.setattr(backends, "installed_version", lambda package: versions[package])
    only(monkeypatch, "sdpa", Backend("slow", lambda: slow, package="pack"))

    def was_timed() -> bool:
        choice = MeasuredChoice(False, store)
        pick(choice, sides())
        return bool(choice.timings)

    assert was_timed()
    assert not was_timed()
    versions["pack"] = "1.1"
    assert was_timed()
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "99.0")
        assert was_timed()
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 99)
        assert was_timed()
    register_attention_backend("one more", slow)
    assert was_timed()


def test_quantised_choice_is_not_remembered_for_exact_runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", Backend("few bits", lambda: quick({}), is_exact=False))
    assert pick(MeasuredChoice(True, store), sides()) == "few bits"
    assert pick(MeasuredChoice(False, store), sides()) == "sdpa"


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"a": 5}', "\x00\xff"])
def test_damaged_memory_is_none(text: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    store.parent.mkdir(parents=True)
    store.write_text(text)
    choice = MeasuredChoice(False, store)
    assert pick(choice, sides()) == "sdpa"
    assert choice.timings
    assert "sdpa" in json.loads(store.read_text()).values()


def test_bytes_that_are_no_text_are_none(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    store.parent.mkdir(parents=True)
    store.write_bytes(b"\xff\xfe\x00")
    assert pick(MeasuredChoice(False, store), sides()) == "sdpa"


def test_remembered_name_that_is_none_is_timed_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    pick(MeasuredChoice(False, store), sides())
    for value in ("gone", 5, None):
        store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), value)))
        choice = MeasuredChoice(False, store)
        assert pick(choice, sides()) == "sdpa"
        assert choice.timings


def test_directory_that_cannot_be_written_is_told_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only(monkeypatch, "sdpa")
    (tmp_path / "file").touch()
    assert pick(MeasuredChoice(False, tmp_path / "file" / "attention.json"), sides()) == "sdpa"
    assert "cannot be remembered" in caplog.text


def test_function_of_the_same_name_is_looked_at_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody works on a kernel it is registered anew, and is not always right."""
    only(monkeypatch, "sdpa")
    register_attention_backend("mine", quick({}))
    assert pick(MeasuredChoice(False, store), sides()) == "mine"
    register_attention_backend("mine", wrong)
    assert pick(MeasuredChoice(False, store), sides()) == "sdpa"


def test_function_that_has_become_faster_is_timed_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    register_attention_backend("mine", slow)
    assert pick(MeasuredChoice(False, store), sides()) == "sdpa"
    register_attention_backend("mine", quick({}))
    assert pick(MeasuredChoice(False, store), sides()) == "mine"


# In a pipeline


@families("wan", "flux", "sd3", "hunyuan", "lumina2")
def test_output_is_within_tolerance_of_unpatched(family: Family, store: Path) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    before = Snapshot(pipe)
    with set_attention_backend(pipe, "auto", verify=True) as patch:
        output = family.run(pipe, steps=2)
    assert float((output - expected).norm() / expected.norm()) < 1e-5
    assert patch.backends == {"transformer": "auto"}
    assert patch.choices
    assert {*patch.timings} == {*patch.choices}
    assert sum(patch.calls["transformer"].values()) > 0
    assert {*patch.calls["transformer"]} == {*patch.choices.values()}
    assert store.exists()
    assert not [line for line in before.differences(Snapshot(pipe)) if "torch.nn.modules.module.Module" not in line]
    assert torch.equal(family.run(pipe, steps=2), expected)


def test_second_pipeline_takes_what_the_first_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", "math")
    family = present("wan")
    first = set_attention_backend(pipe := family.make(num_layers=2), "auto")
    family.run(pipe, steps=2)
    assert len(first.timings) == 2, "self-attention and cross-attention"
    second = set_attention_backend(pipe := family.make(num_layers=2), "auto")
    family.run(pipe, steps=2)
    assert not second.timings
    assert second.choices == first.choices
    family.run(pipe, steps=1, size=family.other_size)
    assert len(second.timings) == 2


def test_table_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa")
    register_attention_backend("zeros", wrong)
    register_attention_backend("slow", slow)
    family = present("wan")
    patch = set_attention_backend(pipe := family.make(num_layers=1), "auto", layers="*.attn1")
    family.run(pipe, steps=1)
    lines = str(patch).splitlines()
    assert lines[0] == "attention of transformer: auto, in 1 places"
    assert lines[1] == "  calls: 2 by sdpa"
    assert lines[2:4] == ["  B1 H2 Q32 K32 D16 float32: sdpa", "  measured for B1 H2 Q32 K32 D16 float32:"]
    assert [line.split()[0] for line in lines[4:]] == ["sdpa", "slow", "zeros"]
    assert lines[-1].endswith("out: error 1")


def test_auto_and_a_name_in_one_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", "math")
    family = present("wan22")
    patch = set_attention_backend(pipe := family.make(), {"transformer": "auto", "transformer_2": "math"})
    family.run(pipe)
    assert patch.backends == {"transformer": "auto", "transformer_2": "math"}
    assert [*patch.calls["transformer_2"]] == ["math"]
    assert patch.choices


def test_auto_beside_steps_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed at steps that keep their own attention."""
    only(monkeypatch, "sdpa")
    family = present("wan")
    patch = set_attention_backend(pipe := family.make(num_layers=1), "auto", skip_first_steps=2)
    family.run(pipe, steps=2)
    assert not patch.choices
    family.run(pipe, steps=3)
    assert len(patch.choices) == 2


def test_patched_pipeline_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "sdpa", "math")
    family = present("wan")
    pipe = family.make(num_layers=1)
    family.run(pipe, steps=1)
    before = Snapshot(pipe)
    with set_attention_backend(pipe, "auto"):
        family.run(pipe, steps=1)
    assert_same(before, pipe)
