"""Classes that keep keys and values of what stays the same: one pass fills the store, all denoising steps read it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch

from padded.base import values

from . import borrowed, pictures, videos
from .base import TEXT, Row, at, row, shape

STORE = "with its store of keys and values"


def _with_store(name: str, prepare: Any) -> Row:
    known = {row.name: row for row in (*borrowed.ROWS, *pictures.ROWS, *videos.ROWS)}
    return replace(known[name], label=STORE, prepare=prepare)


def _made(module: str, name: str, *counts: int) -> Any:
    return getattr(importlib.import_module(f"diffusers.models.transformers.{module}"), name)(*counts)


@torch.no_grad()
def of_qwen_image21(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Text and condition pictures."""
    store = _made("transformer_qwenimage21", "QwenImage21KVCache", len(model.transformer_blocks))
    model(**given, kv_cache=store, kv_cache_mode="extract")
    return {**given, "kv_cache": store, "kv_cache_mode": "cached"}


@torch.no_grad()
def of_flux2(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """FLUX.2 Klein KV: the pictures to be edited."""
    latents, places = given["hidden_states"], given["img_ids"]
    reference, apart = values(*latents.shape, key="reference"), places.clone()
    apart[..., 0] = 10
    both = {
        "hidden_states": torch.cat([reference, latents], 1),
        "img_ids": torch.cat([apart, places], 1),
        "return_dict": False,
    }
    store = model(**{**given, **both}, kv_cache_mode="extract", num_ref_tokens=latents.shape[1])[1]
    return {**given, "kv_cache": store, "kv_cache_mode": "cached"}


@torch.no_grad()
def of_glm_image(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The pictures to be edited, without text."""
    store = _made("transformer_glm_image", "GlmImageKVCache", len(model.transformer_blocks))
    store.set_mode("write")
    reference = {"hidden_states": values(1, 4, 8, 8, key="reference"), "encoder_hidden_states": torch.zeros(1, 0, TEXT)}
    model(**{**given, **reference}, kv_caches=store)
    store.set_mode("read")
    return {**given, "kv_caches": store}


@torch.no_grad()
def of_wan_animate2(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The driving video."""
    store, grid = _made("transformer_wan_animate_2", "WanAnimate2KVCache", len(model.blocks)), torch.tensor([[2, 2, 2]])
    reference = {name: [given[name][0][:, :2]] for name in ("hidden_states", "condition_latents")}
    shared = {name: given[name] for name in ("encoder_hidden_states", "encoder_hidden_states_image")}
    told = {"kv_cache_mode": "extract", "seq_len": 8, "offset_grid_sizes": grid}
    model(**reference, **shared, **told, timestep=at(1.0), kv_cache=store)
    return {**given, "kv_cache": store, "reference_grid_sizes": grid}


@torch.no_grad()
def of_sana_wm_refiner(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The first frames."""
    given.pop("return_dict", None)
    store = _made("transformer_sana_wm_refiner", "SanaWMRefinerKVCache", len(model.transformer_blocks))
    model(**given, kv_cache=store, kv_cache_mode="capture_pre_rope")
    for index in range(len(model.transformer_blocks)):
        store.get(index).store_sink(*store.get(index).get_captured_pre_rope())
    store.sink_pe = given["video_rotary_emb"]
    return {**given, "kv_cache": store, "kv_cache_mode": "inject"}


def of_anyflow(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The chunks before, of which there are none."""
    heads, width, chunk = model.config.num_attention_heads, model.config.attention_head_dim, {"chunk_partition": [2]}
    empty = {"full_cache": torch.zeros(2, 1, heads, 96, width), "compressed_cache": torch.zeros(2, 1, heads, 32, width)}
    stores = {index: {name: each.clone() for name, each in empty.items()} for index in range(len(model.blocks))}
    return {**given, **chunk, "kv_cache": stores, "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": False}}


ROWS = (
    _with_store("QwenImage21Transformer2DModel", of_qwen_image21),
    _with_store("Flux2Transformer2DModel", of_flux2),
    _with_store("GlmImageTransformer2DModel", of_glm_image),
    _with_store("SanaWMLTX2RefinerTransformer3DModel", of_sana_wm_refiner),
    _with_store("AnyFlowFARTransformer3DModel", of_anyflow),
    row(
        "WanAnimate2Transformer3DModel",
        "blocks",
        {
            "text_len": 7,
            "in_dim": 8,
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": TEXT,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
        },
        {
            "hidden_states": [torch.linspace(-1, 1, 192).reshape(4, 3, 4, 4)],
            "timestep": at(900.0),
            "encoder_hidden_states": [torch.linspace(-1, 1, 5 * TEXT).reshape(5, TEXT)],
            "condition_latents": [torch.ones(4, 3, 4, 4)],
            "encoder_hidden_states_image": shape(1, 5, 1280),
            "kv_cache_mode": "cached",
            "seq_len": 12,
            "origin_len": 5,
            "origin_area": [32, 32],
        },
        prepare=of_wan_animate2,
    ),
)
