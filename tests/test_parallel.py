"""Under context parallelism all ranks take the same decision, whatever each sees of the signal."""

from __future__ import annotations

import traceback
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist

from invariants.families import present
from invariants.ranks import on_ranks
from sgl_diffusion_accel import CachePatch, apply_cache_dit
from sgl_diffusion_accel.caching import call

NAMES = ("wan", "flux")
ORDERS = ("patch first", "parallel first")


def run(name: str, pipe: Any) -> torch.Tensor:
    """A run whose tokens, those of the prompt too, divide by two."""
    family = present(name)
    call = family.call(pipe)
    even = {k: torch.cat([v, v[:, :1]], dim=1) for k, v in call.items() if "prompt_embeds" in k and v.ndim == 3}
    return family.run(pipe, **even)


def parallel(pipe: Any) -> None:
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size()))


def apply(pipe: Any, threshold: float) -> CachePatch:
    return apply_cache_dit(pipe, residual_diff_threshold=threshold, max_warmup_steps=1, max_continuous_cached_steps=2)


def on_every_rank(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
    """All that the tests below look at, in one set of processes; an error is kept as text."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for name in NAMES:
        for order in ("unpatched", *ORDERS):
            results[name, order] = answer_or_error(name, order)
    return results


def answer_or_error(name: str, order: str) -> dict[str, Any]:
    try:
        return one_case(name, order)
    except Exception:
        return {"error": traceback.format_exc()}


def one_case(name: str, order: str) -> dict[str, Any]:
    if order == "unpatched":
        pipe = present(name).make()
        parallel(pipe)
        return {"output": run(name, pipe).numpy()}
    alone = patched_run(name, order, 1e-6)["alone"]
    firsts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, alone[0])
    # at this threshold one rank by itself would skip, the other compute
    threshold = sum(firsts) / len(firsts)
    return {**patched_run(name, order, threshold), "threshold": threshold, "firsts": firsts}


def patched_run(name: str, order: str, threshold: float) -> dict[str, Any]:
    """A cached run; `alone` is what this rank's own part of the signal would have said."""
    alone: list[float] = []
    measure = call.relative_l1

    def listen(now: Any, reference: Any, reduce: Any = None) -> float:
        alone.append(measure(now, reference))
        return measure(now, reference, reduce)

    call.relative_l1 = listen
    try:
        pipe = present(name).make()
        if order == "parallel first":
            parallel(pipe)
        patch = apply(pipe, threshold)
        if order == "patch first":
            parallel(pipe)
        output = run(name, pipe).numpy()
    finally:
        call.relative_l1 = measure
    decisions = [branch.computed for branch in patch.stats.runs[-1].branches.values()]
    return {"output": output, "decisions": decisions, "alone": alone, "held": patch.held_bytes()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="this diffusers has no context parallelism")
def test_ranks_take_the_same_decision() -> None:
    ranks = on_ranks(on_every_rank)
    for name in NAMES:
        for order in ORDERS:
            check(ranks, name, order)


def check(ranks: Any, name: str, order: str) -> None:
    for rank in ranks:
        if "error" in rank[name, "unpatched"]:
            reason = rank[name, "unpatched"]["error"].strip().splitlines()[-1]
            pytest.skip(f"diffusers' context parallelism does not run here: {reason}")
    pipe = present(name).make()
    expected = run(name, pipe)
    for rank in ranks:
        unpatched = torch.from_numpy(rank[name, "unpatched"]["output"])
        torch.testing.assert_close(unpatched, expected, rtol=0, atol=1e-3)
    one, other = (rank[name, order] for rank in ranks)
    assert "error" not in one, one["error"]
    assert "error" not in other, other["error"]
    threshold = one["threshold"]
    assert min(one["firsts"]) < threshold < max(one["firsts"])
    assert one["decisions"] == other["decisions"]
    assert one["held"] == other["held"] == 0

    patch = apply(pipe, threshold)
    single = run(name, pipe)
    assert [branch.computed for branch in patch.stats.runs[-1].branches.values()] == one["decisions"]
    assert not all(all(branch) for branch in one["decisions"])
    for rank in (one, other):
        torch.testing.assert_close(torch.from_numpy(rank["output"]), single, rtol=0, atol=1e-3)
