"""What users switch on together: patches, attention, the compiler, offloading, LoRA, types and callbacks, in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from invariants import in_matrix
from pairwise import table
from pairwise.cases import COMPILED, EAGER, FACTORS, FORBIDDEN, QUANTISED_CASES
from pairwise.check import Subject, check, equal, simplified
from pairwise.covering import Case, Pair, all_pairs, pairs_of
from pairwise.quantised import QUANTISED

torch.set_num_threads(1)

DEFAULT_COMPILED: list[Case] = []
"""Cases of the compiler in the default run: none yet, since each takes ten seconds and more."""


def params(cases: Sequence[Case], by_default: Sequence[Case]) -> list[Any]:
    found = [pytest.param(case, id="-".join(case.values())) for case in cases]
    return [param if case in by_default else in_matrix(param) for case, param in zip(cases, found, strict=True)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def what_cannot_be_here(request: pytest.FixtureRequest) -> None:
    case: Mapping[str, str] = request.node.callspec.params.get("case", {}) if hasattr(request.node, "callspec") else {}
    if case.get("LoRA", "none") != "none":
        pytest.importorskip("peft")
    if case.get("offload", "").startswith("group") and diffusers.__version__ < "0.42":
        pytest.skip(f"group offloading of diffusers {diffusers.__version__} needs an accelerator")


@pytest.mark.parametrize("case", params(EAGER, EAGER))
def test_together(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", params(COMPILED, DEFAULT_COMPILED))
def test_together_compiled(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", params(QUANTISED_CASES, []))
def test_together_quantised(case: Case) -> None:
    check(case)


def test_every_pair_is_in_a_case() -> None:
    eager = {two for case in EAGER for two in pairs_of(case)}
    assert eager == all_pairs({**FACTORS, "compile": ["none"]}, FORBIDDEN)
    every = {**FACTORS, "dtype": [*FACTORS["dtype"], *QUANTISED]}
    covered = eager | {two for case in [*COMPILED, *QUANTISED_CASES] for two in pairs_of(case)}
    assert covered == all_pairs(every, FORBIDDEN)


PAIRS = {" with ".join("=".join(value) for value in sorted(two)): two for two in FORBIDDEN}
"""By name."""


def fails_soon(two: Pair) -> bool:
    """Within a second, and without a package that may be missing."""
    return not {"whole", "wrapper", *QUANTISED} & {value for _, value in two}


@pytest.mark.parametrize(
    "two",
    [pytest.param(two, id=name, marks=[] if fails_soon(two) else [pytest.mark.matrix]) for name, two in PAIRS.items()],
)
def test_forbidden_pair_fails_without_any_patch(two: Pair) -> None:
    """Else it is none any more, and has to be tested."""
    usual = {factor: values[0] for factor, values in FACTORS.items()} | {"attention": "none", "order": "patch last"}
    case = usual | dict(two)
    if case["LoRA"] != "none":
        pytest.importorskip("peft")

    def compare() -> None:
        plain = Subject(case)
        plain.run()
        plain.change_lora()
        equal(plain.run(), Subject(simplified(case), lora_first=True).run())

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), pytest.raises(Exception, match=r"\S"):
        compare()


def test_table_of_what_was_tested_together() -> None:
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert table.between_marks(page) == table.text(), "write tests/pairwise/table.py's text() there"
