"""Which cells of a grid run by default, and which in the long matrix alone (`make test-all`).

A shared mechanism is shown on every family with one cache, and every cache on one family. The cells between them say
the same once more: they are marked `matrix`, and the default run leaves them out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

Values = Mapping[str, Any] | Iterable[Any]
"""By name; or values that name themselves, `pytest.param(..., id=...)` among them."""


def chosen(values: Values, *names: str) -> list[Any]:
    """Parameters of which those of these names run by default, and all others in the long matrix."""
    params = _params(values)
    missing = {*names} - {str(param.id) for param in params}
    assert not missing, f"no parameter is named {sorted(missing)}"
    return [param if param.id in names else in_matrix(param) for param in params]


def cross(arguments: str, *axes: Values) -> Any:
    """Parametrises a test over a grid, of which one line along each axis runs by default.

    Args:
        arguments: Names of the arguments, with commas between.
        *axes: The values of each; the first one of an axis stays where another axis is walked along.
    """
    grid = [_params(axis) for axis in axes]
    firsts = [axis[0] for axis in grid]
    cells = []
    for cell in itertools.product(*grid):
        one = pytest.param(
            *(value for param in cell for value in param.values),
            id="-".join(str(param.id) for param in cell),
            marks=[mark for param in cell for mark in param.marks],
        )
        away = sum(param is not first for param, first in zip(cell, firsts, strict=True))
        cells.append(one if away <= 1 else in_matrix(one))
    return pytest.mark.parametrize(arguments, cells)


def in_matrix(param: Any) -> Any:
    """The same parameter, in the long matrix alone."""
    return pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.matrix])


def _params(values: Values) -> list[Any]:
    if isinstance(values, Mapping):
        return [pytest.param(value, id=name) for name, value in values.items()]
    return [each if isinstance(each, _PARAM) else pytest.param(each, id=_name(each)) for each in values]


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", value))


_PARAM = type(pytest.param())
