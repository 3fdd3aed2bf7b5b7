"""Calls with a store of keys and values: one that may write it is computed in full, one that reads it is skipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from classes import ROWS
from classes.loop import STEPS, arguments
from invariants.caches import adaptive
from sgl_diffusion_accel import CachePatch, apply_adaptive_cache, apply_cache_dit, branch, denoising_steps
from sgl_diffusion_accel.caching.full_calls import full_call_argument

STORE = object()


def glm(*modes: str | None) -> Any:
    return SimpleNamespace(caches=[SimpleNamespace(mode=mode) for mode in modes])


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({}, None),
        ({"kv_cache": None, "kv_cache_mode": None}, None),
        ({"kv_cache": STORE, "kv_cache_mode": "cached"}, None),
        ({"kv_cache": STORE, "kv_cache_mode": "extract"}, "kv_cache_mode='extract'"),
        ({"kv_cache": None, "kv_cache_mode": "extract"}, "kv_cache_mode='extract'"),
        ({"kv_cache": STORE, "kv_cache_mode": "inject"}, "kv_cache_mode='inject'"),
        ({"kv_cache": STORE}, "kv_cache="),
        ({"kv_cache": STORE, "kv_cache_flag": {"is_cache_step": False}}, "kv_cache="),
        ({"kv_cache": STORE, "kv_cache_mode": "cached", "skip_layers": [1]}, "skip_layers="),
        ({"kv_caches": glm("read", "read")}, None),
        ({"kv_caches": glm("skip", "skip")}, None),
        ({"kv_caches": glm(None, None)}, None),
        ({"kv_caches": glm("read", "write")}, "kv_caches="),
        ({"kv_caches": STORE}, "kv_caches="),
        ({"past_key_values": STORE, "kv_cache_mode": "cached"}, "past_key_values="),
    ],
)
def test_only_calls_that_say_that_they_read_may_be_skipped(given: dict[str, Any], argument: str | None) -> None:
    assert full_call_argument(given) == argument


class Editing:
    """Qwen-Image 2.1 as its pipeline runs it: the first step fills a store for each branch, the others read it."""

    def __init__(self) -> None:
        self.row = ROWS["QwenImage21Transformer2DModel"]
        if self.row.missing:
            pytest.skip(self.row.missing)
        self.model = self.row.make()
        self.given = arguments(self.row, self.model)
        self.stores: dict[str, Any] = {}

    def run(self) -> Tensor:
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        self.stores = {name: QwenImage21KVCache(len(self.model.transformer_blocks)) for name in ("cond", "uncond")}
        latents = self.given["hidden_states"]
        for step, t in enumerate(denoising_steps(scheduler.timesteps, scheduler=scheduler, guidance=3.0)):
            outputs = {}
            for name, text in (("cond", 1.0), ("uncond", -0.5)):
                call = {
                    **self.given,
                    "hidden_states": latents,
                    "timestep": t.expand(1) / 1000,
                    "encoder_hidden_states": text * self.given["encoder_hidden_states"],
                    "kv_cache": self.stores[name],
                    "kv_cache_mode": "cached" if step else "extract",
                }
                with torch.no_grad(), branch(name):
                    outputs[name] = self.model(**call)[0][:, -latents.shape[1] :]
            noise = outputs["uncond"] + 3.0 * (outputs["cond"] - outputs["uncond"])
            latents = scheduler.step(noise, t, latents).prev_sample
        return latents

    def kept(self) -> list[Tensor]:
        layers = range(len(self.model.transformer_blocks))
        return [each.clone() for store in self.stores.values() for i in layers for each in store.get_layer(i).get()]


def blocks(model: Any) -> CachePatch:
    return apply_cache_dit(model, fn_compute_blocks=1, residual_diff_threshold=10.0, max_warmup_steps=2)


@pytest.mark.parametrize("apply", [adaptive, blocks], ids=["whole calls", "blocks"])
def test_steps_that_read_a_store_are_skipped_and_leave_it_as_it_is(apply: Any) -> None:
    loop = Editing()
    unpatched = loop.run()
    stores = loop.kept()
    with apply(loop.model) as patch:
        output = loop.run()
    for taken in patch.stats.runs[-1].branches.values():
        assert taken.computed[0]
        assert not all(taken.computed)
    assert all(map(torch.equal, loop.kept(), stores))
    assert torch.isfinite(output).all()
    assert not torch.equal(output, unpatched)
    ((_, remark),) = {each for each in patch.stats.runs[-1].remarks if "in full" in each[1]}
    assert remark.startswith("each call with kv_cache_mode='extract' is computed in full")
    assert torch.equal(loop.run(), unpatched)


@pytest.mark.parametrize(
    "apply",
    [
        lambda model: apply_adaptive_cache(model, tolerance=0),
        lambda model: apply_cache_dit(model, residual_diff_threshold=0.0, max_warmup_steps=1),
    ],
    ids=["whole calls", "blocks"],
)
def test_never_skipping_is_exact_with_a_store(apply: Any) -> None:
    loop = Editing()
    unpatched = loop.run()
    with apply(loop.model):
        assert torch.equal(loop.run(), unpatched)
