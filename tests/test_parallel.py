"""Under context parallelism all ranks take the same decision, whatever each sees of the signal."""

from __future__ import annotations

import copy
import traceback
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist

from invariants.families import present
from invariants.ranks import on_ranks
from sgl_diffusion_accel import CachePatch, apply_cache_dit, apply_teacache, calibrate
from sgl_diffusion_accel.caching.parts import signals
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError

CASES = {
    ("wan", "dbcache"): True,
    ("flux", "dbcache"): True,
    ("wan", "teacache"): False,
    ("flux", "teacache"): True,
    ("qwen", "teacache"): False,
    ("wan", "gap control"): True,
    ("flux", "gap control"): True,
}
"""Family and cache, to whether each rank sees a part of the signal alone. Every rank knows the time embedding, and
Qwen-Image hands its first block all tokens."""
ORDERS = ("patch first", "parallel first")


STEPS = {"gap control": 12}
"""Denoising steps where they are not the family's own: gap control computes all of a run of fewer than 10."""


def even_prompts(name: str, pipe: Any) -> dict[str, torch.Tensor]:
    """Prompts whose tokens divide by two."""
    call = present(name).call(pipe)
    return {k: torch.cat([v, v[:, :1]], dim=1) for k, v in call.items() if "prompt_embeds" in k and "pooled" not in k}


def run(name: str, cache: str, pipe: Any) -> torch.Tensor:
    """A run whose tokens, those of the prompt too, divide by two."""
    steps = {"steps": STEPS[cache]} if cache in STEPS else {}
    return present(name).run(pipe, **even_prompts(name, pipe), **steps)


def parallel(pipe: Any) -> None:
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size()))


def apply(pipe: Any, cache: str, threshold: float) -> CachePatch:
    if cache == "teacache":
        return apply_teacache(pipe, threshold, coefficients=[0, 0, 0, 1, 0])
    if cache == "gap control":
        return apply_cache_dit(pipe, tolerance=threshold, max_warmup_steps=1, taylorseer_order=1)
    return apply_cache_dit(pipe, residual_diff_threshold=threshold, max_warmup_steps=1, max_continuous_cached_steps=2)


Key = tuple[str, str, str]


def on_every_rank(rank: int, cases: list[tuple[str, str]]) -> dict[Key, dict[str, Any]]:
    """The cases in one set of processes; an error is kept as text."""
    results: dict[Key, dict[str, Any]] = {}
    for name, cache in cases:
        for order in ("unpatched", *ORDERS):
            results[name, cache, order] = answer_or_error(name, cache, order)
    results["wan", "ratios", "unpatched"] = {"ratios": recorded_ratios()}
    return results


def answer_or_error(name: str, cache: str, order: str) -> dict[str, Any]:
    try:
        return one_case(name, cache, order)
    except Exception:
        return {"error": traceback.format_exc()}


def one_case(name: str, cache: str, order: str) -> dict[str, Any]:
    if order == "unpatched":
        pipe = present(name).make()
        parallel(pipe)
        return {"output": run(name, cache, pipe).numpy()}
    first = patched_run(name, cache, order, 1e-6)
    # a distance as this rank alone sees it, or as it is known beforehand
    mine = (first["alone"] or [change for change in first["changes"] if change is not None])[0]
    firsts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, mine)
    # at this threshold one rank by itself would skip, the other compute; where all see the same, every second step is
    threshold = sum(firsts) / len(firsts) * (1 if CASES[name, cache] else 1.5)
    return {**patched_run(name, cache, order, threshold), "threshold": threshold, "firsts": firsts}


def patched_run(name: str, cache: str, order: str, threshold: float) -> dict[str, Any]:
    """A cached run; `alone` is what this rank's own part would have said, of the signal or of the error."""
    alone: list[float] = []
    measure, take = signals.relative_l1, PredictionError.take

    def listen(now: Any, reference: Any, reduce: Any = None) -> float:
        alone.append(measure(now, reference))
        return measure(now, reference, reduce)

    def listen_to_errors(self: PredictionError, reduce: Any = None) -> float | None:
        mine, whole = copy.deepcopy(self), take(self, reduce)
        if whole is not None:
            errors.append((take(mine) or 0.0) / whole)
        return whole

    errors: list[float] = []
    signals.relative_l1 = listen
    PredictionError.take = listen_to_errors  # type: ignore[method-assign]
    try:
        pipe = present(name).make()
        if order == "parallel first":
            parallel(pipe)
        patch = apply(pipe, cache, threshold)
        if order == "patch first":
            parallel(pipe)
        output = run(name, cache, pipe).numpy()
    finally:
        signals.relative_l1 = measure
        PredictionError.take = take  # type: ignore[method-assign]
    branches = patch.stats.runs[-1].branches.values()
    changes = [change for branch in branches for change in branch.changes]
    if errors:  # the estimate grows as the error does, and the first estimate comes of the first error
        alone = [errors[0] * next(change for change in changes if change is not None)]
    return {
        "output": output,
        "decisions": [branch.computed for branch in branches],
        "changes": changes,
        "alone": alone,
        "held": patch.held_bytes(),
    }


def recorded_ratios(shared: bool = True) -> Any:
    """Magnitude ratios that a rank records, of a model whose tokens are divided; None where that does not run here."""
    pipe = present("wan").make()
    try:
        if shared:
            parallel(pipe)
            run("wan", "magcache", pipe)
    except Exception:
        return None
    call = {**present("wan").call(pipe), **even_prompts("wan", pipe)}
    return calibrate(pipe, [call], teacache=False).magnitude_ratios.of("transformer", "cond")


BY_DEFAULT = [("wan", "dbcache"), ("flux", "gap control")]


@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="this diffusers has no context parallelism")
@pytest.mark.parametrize(
    "cases", [BY_DEFAULT, pytest.param([*CASES], marks=pytest.mark.matrix)], ids=["one of each", "all"]
)
def test_ranks_take_the_same_decision_and_record_the_same_magnitudes(cases: list[tuple[str, str]]) -> None:
    """One test, since the processes take longer to start than to run a case."""
    ranks = on_ranks(on_every_rank, cases)
    for name, cache in cases:
        for order in ORDERS:
            check(ranks, name, cache, order)
    one, other = (rank["wan", "ratios", "unpatched"]["ratios"] for rank in ranks)
    assert one == other
    assert one[1:-1] == pytest.approx(recorded_ratios(shared=False)[1:-1], rel=1e-3)


def check(ranks: Any, name: str, cache: str, order: str) -> None:
    for rank in ranks:
        if "error" in rank[name, cache, "unpatched"]:
            reason = rank[name, cache, "unpatched"]["error"].strip().splitlines()[-1]
            pytest.skip(f"diffusers' context parallelism does not run here: {reason}")
    pipe = present(name).make()
    expected = run(name, cache, pipe)
    for rank in ranks:
        unpatched = torch.from_numpy(rank[name, cache, "unpatched"]["output"])
        torch.testing.assert_close(unpatched, expected, rtol=0, atol=1e-3)
    one, other = (rank[name, cache, order] for rank in ranks)
    assert "error" not in one, one["error"]
    assert "error" not in other, other["error"]
    threshold = one["threshold"]
    if CASES[name, cache]:
        assert min(one["firsts"]) < threshold < max(one["firsts"])
    else:
        assert one["changes"] == other["changes"]
    assert one["decisions"] == other["decisions"]
    assert one["held"] == other["held"] == 0

    patch = apply(pipe, cache, threshold)
    single = run(name, cache, pipe)
    assert [branch.computed for branch in patch.stats.runs[-1].branches.values()] == one["decisions"]
    assert {True, False} <= {flag for branch in one["decisions"] for flag in branch[1:-1]}
    for rank in (one, other):
        torch.testing.assert_close(torch.from_numpy(rank["output"]), single, rtol=0, atol=1e-3)
