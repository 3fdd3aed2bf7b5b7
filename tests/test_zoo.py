"""The zoo itself: its pipelines run, repeat bit by bit, and no block of theirs is idle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo import FAMILIES, Family, tensor_of

NAMES = [
    pytest.param(name, marks=pytest.mark.skip(reason=family.missing)) if family.missing else name
    for name, family in FAMILIES.items()
]


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    torch.set_num_threads(1)
    return family.make(seed=0)


@pytest.fixture(scope="module")
def reference(family: Family, pipe: Any) -> torch.Tensor:
    return family.run(pipe, steps=4)


def count_calls(family: Family, pipe: Any, **kw: Any) -> int:
    """How often a run calls the transformer, or one of the transformers."""
    calls: list[None] = []
    hooks = [getattr(pipe, t).register_forward_pre_hook(lambda *_: calls.append(None)) for t in family.transformers]
    family.run(pipe, **kw)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_runs_repeat_bit_by_bit(family: Family, pipe: Any, reference: torch.Tensor) -> None:
    assert torch.isfinite(reference).all()
    assert 0.1 < reference.std() < 30
    assert torch.equal(family.run(pipe, steps=4), reference)


def test_seed_decides_the_weights(family: Family, reference: torch.Tensor) -> None:
    state = torch.get_rng_state()
    assert torch.equal(family.run(family.make(seed=0), steps=4), reference)
    assert not torch.allclose(family.run(family.make(seed=1), steps=4), reference, rtol=0.05)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_calls(family: Family, pipe: Any, reference: torch.Tensor) -> None:
    assert not torch.allclose(family.run(pipe, steps=4, seed=1), reference, rtol=0.05)
    assert not torch.allclose(family.run(pipe, steps=3), reference, rtol=0.05)
    batch = family.run(pipe, steps=2, batch=2)
    assert batch.shape[0] == 2 * reference.shape[0]
    assert not torch.allclose(batch[0], batch[1], rtol=0.05)
    other = family.run(pipe, steps=2, size=family.other_size)
    assert other.numel() > reference.numel()


def test_calls_per_step(family: Family, pipe: Any) -> None:
    assert count_calls(family, pipe, steps=3) == 3 * len(family.branches)
    if family.other_guidance is not None:
        guidance, branches = family.other_guidance
        assert count_calls(family, pipe, steps=3, guidance=guidance) == 3 * len(branches)


def test_cache_contexts(family: Family, pipe: Any) -> None:
    """Some transformers have no `cache_context` at all, and some pipelines do not use theirs."""
    seen: set[str] = set()
    spied = [getattr(pipe, t) for t in family.transformers if hasattr(getattr(pipe, t), "cache_context")]
    for transformer in spied:

        def spy(name: str, *args: Any, _original: Any = transformer.cache_context, **kwargs: Any) -> Any:
            seen.add(name)
            return _original(name, *args, **kwargs)

        transformer.cache_context = spy
    try:
        family.run(pipe, steps=4)
        if family.other_guidance is not None:
            family.run(pipe, steps=4, guidance=family.other_guidance[0])
    finally:
        for transformer in spied:
            del transformer.cache_context
    assert seen == set(family.contexts)


def test_bare_call(family: Family, pipe: Any) -> None:
    first = tensor_of(pipe.transformer(**family.bare(pipe))[0])
    assert torch.isfinite(first).all()
    assert first.std() > 0.05
    assert torch.equal(tensor_of(pipe.transformer(**family.bare(pipe))[0]), first)


def test_every_block_counts(family: Family, pipe: Any) -> None:
    """A block that passes its input through changes what the transformer returns."""
    for attribute in family.transformers:
        transformer = getattr(pipe, attribute)
        kwargs = family.bare(pipe)
        with torch.no_grad():
            full = tensor_of(transformer(**kwargs)[0])
            for name, index, block in family.blocks(transformer):
                names = _streams(block, transformer, kwargs)
                handle = block.register_forward_hook(
                    lambda module, args, kw, out, names=names: _passed(names, args, kw, out), with_kwargs=True
                )
                changed = tensor_of(transformer(**kwargs)[0])
                handle.remove()
                change = ((changed - full).norm() / full.norm()).item()
                assert change > 0.02, f"{attribute}.{name}[{index}] changes the output by {change:.4f} only"


def _streams(block: Any, transformer: Any, kwargs: dict[str, Any]) -> list[int | str | None]:
    """Which argument of the block each of its outputs continues, by shape, hidden state first."""
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True)
    transformer(**kwargs)
    handle.remove()
    args, kw, out = seen[0]
    given: dict[int | str, Any] = {**dict(enumerate(args)), **kw}
    taken: list[int | str | None] = []
    for part in out if isinstance(out, tuple) else (out,):
        alike = [
            key
            for key, value in given.items()
            if isinstance(part, torch.Tensor)
            and isinstance(value, torch.Tensor)
            and value.shape == part.shape
            and key not in taken
        ]
        taken.append(alike[0] if alike else None)
    return taken


def _passed(names: list[int | str | None], args: tuple[Any, ...], kw: dict[str, Any], out: Any) -> Any:
    given: dict[int | str | None, Any] = {**dict(enumerate(args)), **kw}
    parts = out if isinstance(out, tuple) else (out,)
    passed = tuple(part if name is None else given[name] for name, part in zip(names, parts, strict=True))
    return passed if isinstance(out, tuple) else passed[0]


def present(name: str) -> Family:
    """The family, or a skip with the reason."""
    family = FAMILIES[name]
    if family.missing:
        pytest.skip(family.missing)
    return family


def test_controlnet_residuals_count() -> None:
    family = present("flux_controlnet")
    pipe = family.make()
    full = family.run(pipe, steps=2)
    assert not torch.allclose(family.run(pipe, steps=2, controlnet_conditioning_scale=0.0), full, rtol=0.05)


@pytest.mark.parametrize("steps", [6, 12])
def test_each_expert_gets_half_of_the_steps(steps: int) -> None:
    family = present("wan22")
    pipe = family.make()
    called: list[str] = []
    for name in family.transformers:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    family.run(pipe, steps=steps)
    assert called == ["transformer"] * steps + ["transformer_2"] * steps
