"""Finds the transformers to be patched in what the user hands over."""

from __future__ import annotations

from torch import nn

from sgl_diffusion_accel.errors import ConfigTypeError, UnsupportedModelError

TRANSFORMERS = ("transformer", "transformer_2")
"""Pipeline components that denoise, in the order in which a run uses them."""


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile`'s wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def find_transformers(pipe: object) -> dict[str, nn.Module]:
    """Finds the diffusion transformers of a pipeline.

    Args:
        pipe: A diffusers pipeline, or a transformer by itself.

    Returns:
        Component name to module: `{"transformer": …}`, with `"transformer_2"` for models with two experts. What
        `torch.compile` has wrapped is returned with its wrapper; see `unwrap`.

    Raises:
        UnsupportedModelError: The pipeline has no transformer.
        ConfigTypeError: Neither a pipeline nor a module was given.
    """
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ConfigTypeError(
            f"expected a diffusers pipeline or its transformer, got {type(pipe).__name__}. "
            "Hand over pipe, or pipe.transformer."
        )
    found: dict[str, nn.Module] = {}
    for name in TRANSFORMERS:
        part = components.get(name)
        if isinstance(part, nn.Module) and unwrap(part) not in map(unwrap, found.values()):
            found[name] = part
    if not found:
        modules = [name for name, part in components.items() if isinstance(part, nn.Module)]
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no component {' or '.join(map(repr, TRANSFORMERS))}; its modules are "
            f"{', '.join(modules) or 'none'}. Only diffusion transformers are supported (a UNet is not one); "
            "a transformer under another name can be passed by itself."
        )
    return found
