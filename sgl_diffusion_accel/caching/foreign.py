"""Recognises diffusers' own caches on a model."""

from __future__ import annotations

from torch import nn

from sgl_diffusion_accel.errors import UnsupportedModelError

# Names under which diffusers registers the hooks of its caches: first block, MagCache, TaylorSeer, FasterCache,
# pyramid attention broadcast, SeaCache.
_HOOKS = ("fbc_", "mag_cache", "taylorseer", "faster_cache", "pyramid_attention_broadcast", "sea_cache")


def has_foreign_cache(transformer: nn.Module) -> bool:
    """Whether one of diffusers' own caches is on a transformer, also if it was applied by function."""
    registries = (module.__dict__.get("_diffusers_hook") for module in transformer.modules())
    names = (name for registry in registries for name in getattr(registry, "hooks", ()))
    return any(name.startswith(_HOOKS) for name in names)


FORBIDDEN = (
    "this transformer has a cache of sgl_diffusion_accel on it, and two caches cannot share a model. Type: "
    "sgl_diffusion_accel.remove(pipe)"
)
"""What a transformer under our cache says when one of diffusers' own is to be enabled on it."""


def refuse_late_cache(transformer: nn.Module) -> None:
    """Raises UnsupportedModelError where one of diffusers' own caches has come onto a transformer that has ours."""
    if has_foreign_cache(transformer):
        raise UnsupportedModelError(
            "one of diffusers' own caches was put on this transformer after the cache of sgl_diffusion_accel, and "
            "two caches cannot share a model. Take one of them off: sgl_diffusion_accel.remove(pipe)"
        )
