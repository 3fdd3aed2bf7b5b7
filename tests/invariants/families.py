"""Families of the zoo as test parameters, with a reason where the installed diffusers lacks one."""

from __future__ import annotations

from typing import Any

import pytest

from zoo import FAMILIES, Family


def families(*names: str) -> Any:
    """Parametrises a test over the families of these names, over all of them where none is given."""
    return pytest.mark.parametrize("family", [family(name) for name in names or FAMILIES])


def family(name: str) -> Any:
    """A family as a test parameter."""
    found = FAMILIES[name]
    marks = [pytest.mark.skip(reason=found.missing)] if found.missing else []
    return pytest.param(found, id=name, marks=marks)


def two_branch() -> Any:
    """Parametrises over the families that call one transformer twice a step."""
    return families(*(name for name, f in FAMILIES.items() if len(f.branches) == 2 and not f.model_per_branch))


def present(name: str) -> Family:
    """The family, or a skip with the reason."""
    found = FAMILIES[name]
    if found.missing:
        pytest.skip(found.missing)
    return found
