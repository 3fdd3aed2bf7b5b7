"""What each value of each factor does to a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from invariants import CACHES, NEVER_SKIPPING
from sgl_diffusion_accel import Patch, apply_auto, apply_lossless, set_attention_backend
from zoo.base import normal

from .model import Work

CPU = torch.device("cpu")
Switch = Callable[[Any], Any]


def nothing(_: Any) -> None:
    """Leaves the pipeline as it is."""


# Patches: one that skips nothing, and one that does


PATCHES: dict[str, tuple[Callable[[Any], Patch], Callable[[Any], Patch]]] = {
    "adaptive": (NEVER_SKIPPING["adaptive, tolerance 0"], CACHES["adaptive"]),
    "plan": (NEVER_SKIPPING["plan, all steps"], CACHES["plan"]),
    "dbcache": (NEVER_SKIPPING["threshold 0"], CACHES["reuse"]),
    "teacache": (NEVER_SKIPPING["teacache, always over"], CACHES["teacache"]),
    "lossless": (apply_lossless, apply_lossless),
    "auto": (lambda pipe: apply_auto(pipe, "fast"), lambda pipe: apply_auto(pipe, "fast")),
}

STEPS = {"auto": 14}
"""Steps of a run in which some are skipped, where 6 are too few for that."""

ATTENTION: dict[str, Switch] = {
    "none": nothing,
    "math": lambda pipe: set_attention_backend(pipe, "math"),
    "efficient": lambda pipe: set_attention_backend(pipe, "efficient"),
}


# What others switch on


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def group_offload(pipe: Any, **how: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)


def layerwise_casting(pipe: Any) -> None:
    dtype = pipe.transformer.dtype
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


OFFLOAD: dict[str, Switch] = {
    "none": nothing,
    "model": model_offload,
    "sequential": sequential_offload,
    "group, blocks": lambda pipe: group_offload(pipe, offload_type="block_level", num_blocks_per_group=2),
    "group, leaves": lambda pipe: group_offload(pipe, offload_type="leaf_level"),
    "layerwise casting": layerwise_casting,
}

DTYPE: dict[str, Switch] = {
    "float32": nothing,
    "bfloat16": lambda pipe: pipe.transformer.to(torch.bfloat16),
    "float16": lambda pipe: pipe.transformer.to(torch.float16),
}


def regional(pipe: Any, work: Work) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=work.compile)


def whole(pipe: Any, work: Work) -> None:
    pipe.transformer.compile(backend=work.compile)


def wrapper(pipe: Any, work: Work) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=work.compile)


COMPILE: dict[str, Callable[[Any, Work], Any]] = {
    "none": lambda *_: None,
    "regional": regional,
    "whole": whole,
    "wrapper": wrapper,
}


# LoRA: what is there at first, and what is done between two runs


def adapter(pipe: Any, name: str) -> None:
    pytest.importorskip("peft")
    state = {}
    for path, module in pipe.transformer.named_modules():
        if path.endswith((".to_q", ".to_v", ".add_q_proj")):
            key = f"transformer.{path.replace('_orig_mod.', '').replace('.base_layer', '')}"
            state[f"{key}.lora_A.weight"] = normal(2, module.in_features, seed=1, key=name + path) * 0.3
            state[f"{key}.lora_B.weight"] = normal(module.out_features, 2, seed=2, key=name + path) * 0.3
    pipe.load_lora_weights(state, adapter_name=name)


def two_adapters(pipe: Any) -> None:
    adapter(pipe, "one")
    adapter(pipe, "two")
    pipe.set_adapters("one")


LORA: dict[str, tuple[Switch, Switch]] = {
    "none": (nothing, nothing),
    "load": (nothing, lambda pipe: adapter(pipe, "one")),
    "switch": (two_adapters, lambda pipe: pipe.set_adapters("two")),
    "fuse": (lambda pipe: adapter(pipe, "one"), lambda pipe: pipe.fuse_lora(components=["transformer"])),
    "unload": (lambda pipe: adapter(pipe, "one"), lambda pipe: pipe.unload_lora_weights()),
}


# What a callback does in the middle of a run


def interrupt(pipe: Any, step: int, _: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._interrupt = step >= 3
    return kwargs


def change(name: str) -> Callable[..., dict[str, Tensor]]:
    def changed(pipe: Any, step: int, _: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        value = kwargs.get(name)
        return {name: value * 1.1 + 0.05} if step == 2 and value is not None else {}

    return changed


EVENT: dict[str, dict[str, Any]] = {
    "none": {},
    "interrupt": {"callback_on_step_end": interrupt},
    "latents": {"callback_on_step_end": change("latents"), "callback_on_step_end_tensor_inputs": ["latents"]},
    "prompt": {
        "callback_on_step_end": change("prompt_embeds"),
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
}
