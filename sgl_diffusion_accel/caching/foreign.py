"""Recognises diffusers' own caches on a model."""

from __future__ import annotations

from torch import nn

# Names under which diffusers registers the hooks of its caches: first block, MagCache, TaylorSeer, FasterCache,
# pyramid attention broadcast, SeaCache.
_HOOKS = ("fbc_", "mag_cache", "taylorseer", "faster_cache", "pyramid_attention_broadcast", "sea_cache")


def has_foreign_cache(transformer: nn.Module) -> bool:
    """Whether one of diffusers' own caches is on a transformer, also if it was applied by function."""
    registries = (module.__dict__.get("_diffusers_hook") for module in transformer.modules())
    names = (name for registry in registries for name in getattr(registry, "hooks", ()))
    return any(name.startswith(_HOOKS) for name in names)
