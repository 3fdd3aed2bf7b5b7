"""`torch.compile` before and after applying: no graph break, no recompilation, right results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from invariants import CACHES, NEVER_SKIPPING, Apply, cross, skips_some
from invariants.families import present

NEVER, REUSE, TEACACHE = NEVER_SKIPPING["threshold 0"], CACHES["reuse"], CACHES["teacache"]


class Counting:
    """A compiler backend that runs the captured graph as it is and counts how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def blocks_compiled(pipe: Any) -> Counting:
    backend = Counting()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return backend


@pytest.mark.parametrize(
    ("name", "first", "apply"),
    [
        ("wan", "patch first", REUSE),
        ("flux", "compile first", REUSE),
        ("wan", "compile first", TEACACHE),
        ("flux", "patch first", TEACACHE),
        pytest.param("wan", "compile first", REUSE, marks=pytest.mark.matrix),
        pytest.param("flux", "patch first", REUSE, marks=pytest.mark.matrix),
        pytest.param("flux", "compile first", TEACACHE, marks=pytest.mark.matrix),
    ],
)
def test_compiled_blocks(name: str, first: str, apply: Apply) -> None:
    family = present(name)
    few = {"num_layers": 2} if name == "wan" else {"num_layers": 2, "num_single_layers": 2}
    expected, cached = family.run(family.make(**few), steps=6), None
    with apply(cached_pipe := family.make(**few)):
        cached = family.run(cached_pipe, steps=6)

    pipe = family.make(**few)
    patch = apply(pipe) if first == "patch first" else None
    backend = blocks_compiled(pipe)
    patch = patch or apply(pipe)
    family.run(pipe, steps=2)
    graphs = backend.graphs
    assert graphs >= len(family.block_lists)
    torch.testing.assert_close(family.run(pipe, steps=6), cached, rtol=0, atol=1e-5)
    assert skips_some(patch)
    assert backend.graphs == graphs, "recompiled after the first two steps"
    NEVER(pipe)
    torch.testing.assert_close(family.run(pipe, steps=6), expected, rtol=0, atol=1e-5)
    assert backend.graphs == graphs, "recompiled for another patch"


@pytest.mark.parametrize("first", ["patch first", "compile first"])
def test_one_code_for_all_blocks_over_many_patches(first: str) -> None:
    family = present("wan")
    graphs = []
    for layers in (4, 8):
        torch._dynamo.reset()
        pipe = family.make(num_layers=layers)
        patch = NEVER(pipe) if first == "patch first" else None
        backend = blocks_compiled(pipe)
        family.run(pipe, steps=2)
        if patch is not None:
            patch.remove()
        for _ in range(2):  # once more each, patched and unpatched: both have been seen then
            with REUSE(pipe):
                family.run(pipe, steps=2)
            family.run(pipe, steps=2)
        graphs.append(backend.graphs)
        for _ in range(3):
            for apply in (NEVER, CACHES["taylor"]):
                with apply(pipe):
                    family.run(pipe, steps=1)
            family.run(pipe, steps=1)
        assert backend.graphs == graphs[-1]
    assert graphs[0] == graphs[1], "more blocks, more compiled code"


@pytest.mark.parametrize(
    ("name", "first", "apply"),
    [
        ("wan", "patch first", REUSE),
        ("wan", "wrapper first", TEACACHE),
        ("ltx", "compile first", TEACACHE),
        pytest.param("wan", "compile first", CACHES["gap control"], marks=pytest.mark.matrix),
        pytest.param("wan", "compile first", REUSE, marks=pytest.mark.matrix),
        pytest.param("wan", "wrapper first", REUSE, marks=pytest.mark.matrix),
        pytest.param("wan", "patch first", TEACACHE, marks=pytest.mark.matrix),
    ],
)
def test_compiled_transformer(name: str, first: str, apply: Apply) -> None:
    family = present(name)
    expected = family.run(family.make(num_layers=2))
    with apply(plain := family.make(num_layers=2)):
        cached = family.run(plain)
    pipe = family.make(num_layers=2)
    patch = apply(pipe) if first == "patch first" else None
    if first == "wrapper first":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    patch = patch or apply(pipe)
    torch.testing.assert_close(family.run(pipe), cached, rtol=0, atol=1e-5)
    assert skips_some(patch)
    assert patch.stats.outside == 0
    patch.remove()
    torch.testing.assert_close(family.run(pipe), expected, rtol=0, atol=1e-5)


@cross("first, apply", ["patch first", "compile first"], {"reuse": REUSE, "teacache": TEACACHE})
def test_whole_transformer_without_graph_breaks_is_refused(first: str, apply: Apply) -> None:
    family = present("wan")
    pipe = family.make(num_layers=2)

    def compile_and_run() -> None:
        if first == "patch first":
            apply(pipe)
        pipe.transformer.compile(fullgraph=True, backend="eager")
        if first != "patch first":
            apply(pipe)
        family.run(pipe, steps=3)

    with pytest.raises(Exception, match="compile_repeated_blocks"):
        compile_and_run()
