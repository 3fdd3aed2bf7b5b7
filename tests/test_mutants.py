"""The list of deliberate faults: each still has its place, and the tests that should see it exist."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from benchmarks import mutants
from benchmarks.mutants import Fault

FAULTS = mutants.faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_has_its_place_and_is_code(fault: Fault) -> None:
    place = fault.place(mutants.ROOT)
    changed = place.read_text().replace(fault.old, fault.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(place.read_text()))


def test_every_part_of_the_library_has_some() -> None:
    areas = Counter(fault.area for fault in FAULTS)
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 40
    assert min(areas.values()) >= 7


def test_likely_tests_exist() -> None:
    named = {likely.partition("::")[0] for fault in FAULTS for likely in fault.likely}
    assert [name for name in sorted(named) if not (mutants.ROOT / "tests" / name).exists()] == []


def test_fault_without_a_place_is_told() -> None:
    with pytest.raises(LookupError, match="X1: its code stands in 0 files"):
        Fault("X1", "none", "nothing", "no such code", "", []).place(mutants.ROOT)


def test_fault_is_found_in_a_copy_and_the_copy_is_sound_again(tmp_path: object) -> None:
    from pathlib import Path

    root = Path(str(tmp_path))
    mutants.make_copy(root)
    fault = next(fault for fault in FAULTS if fault.id == "R3")
    before = fault.place(root).read_text()
    found = mutants.judge(fault, root, is_likely_only=True)
    assert found["test"].startswith("tests/test_multistep.py::")
    assert fault.place(root).read_text() == before
    assert mutants.failing(root, ["tests/test_multistep.py"]) is None
