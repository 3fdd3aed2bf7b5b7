"""Families of the zoo as test parameters, with a reason where the installed diffusers lacks one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from zoo import FAMILIES, Family

from .matrix import in_matrix


def families(*names: str, matrix: Iterable[str] = ()) -> Any:
    """Parametrises a test over the families of these names, over all of them where none is given.

    Args:
        *names: Families of the default run.
        matrix: Families of the long matrix; those of `names` may be among them.
    """
    return pytest.mark.parametrize("family", family_params(*names, matrix=matrix))


def family_params(*names: str, matrix: Iterable[str] = ()) -> list[Any]:
    """The same as a list of parameters."""
    params = [family(name) for name in names or FAMILIES]
    return params + [in_matrix(family(name)) for name in matrix if name not in names]


def family(name: str) -> Any:
    """A family as a test parameter."""
    found = FAMILIES[name]
    marks = [pytest.mark.skip(reason=found.missing)] if found.missing else []
    return pytest.param(found, id=name, marks=marks)


TWO_BRANCH = tuple(name for name, f in FAMILIES.items() if len(f.branches) == 2 and not f.model_per_branch)
"""Names of the families that call one transformer twice a step."""


def present(name: str) -> Family:
    """The family, or a skip with the reason."""
    found = FAMILIES[name]
    if found.missing:
        pytest.skip(found.missing)
    return found


def few_blocks(family: Family, **given: Any) -> Any:
    """A pipeline whose transformer has two blocks in each list, for what does not depend on how many there are."""
    other = {"zimage": "n_layers", "kandinsky5": "num_visual_blocks"}.get(family.name)
    if other is not None:
        return family.make(**{other: 2}, **given)
    lists = {"num_layers": 2} if len(family.block_lists) == 1 else {"num_layers": 2, "num_single_layers": 2}
    return family.make(**lists, **given)
