"""Finds the transformers to be patched in what the user hands over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from sgl_diffusion_accel.errors import ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.slots import original_class

TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer", "transformer_ref")
"""Pipeline components that denoise, in the order in which a run uses them.

`transformer_2` is a second expert, which takes over in mid-run (Wan2.2). `unconditional_transformer` runs beside
`transformer` at every step, as the branch without the prompt (Ideogram 4). `transformer_ref` runs in the place of
`transformer` where the call has references (MiniMax H3).
"""

_BESIDE = {"unconditional_transformer": "transformer"}
"""Components that run at the same steps as another one."""


_COMPILED = "_orig_mod"
_WRAPPED = (_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under these names wrappers of PyTorch hold their only part: compiled, sharded, checkpointed."""


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers that hold nothing else, or the module itself.

    Such wrappers are those of `torch.compile`, `DistributedDataParallel`, `FullyShardedDataParallel` and checkpointing.
    """
    inner = _inside(module)
    while inner is not None:
        module, inner = inner, _inside(inner)
    return module


def unwrap_but_compiled(module: nn.Module) -> nn.Module:
    """The same, but for `torch.compile`'s wrapper, which may have kept the module's own `__call__`."""
    while (inner := _inside(module)) is not None and _COMPILED not in module._modules:
        module = inner
    return module


def is_in_compiled_wrapper(module: nn.Module) -> bool:
    """Whether one of a module's wrappers is that of `torch.compile`."""
    return _COMPILED in unwrap_but_compiled(module)._modules


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds, None for a module that is no wrapper."""
    parts = module._modules
    if len(parts) != 1 or module._parameters:
        return None
    ((name, part),) = parts.items()
    # DataParallel's wrappers hold theirs under `module`, which is a name in models too: they are known by their class.
    is_wrapper = name in _WRAPPED or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return part if is_wrapper else None


def refuse_data_parallel(name: str, module: nn.Module) -> None:
    """Raises UnsupportedModelError where a component is in a wrapper that copies it to several devices.

    Args:
        name: The component's name.
        module: The component.
    """
    part: nn.Module | None = module
    while part is not None:
        if isinstance(part, nn.DataParallel):
            raise UnsupportedModelError(
                f"{name} is wrapped in torch.nn.DataParallel, which runs copies of it in threads, at every call anew: "
                f"a patch can follow none of them. Hand over {name}.module and run without the wrapper, or use "
                "torch.nn.parallel.DistributedDataParallel."
            )
        part = _inside(part)


def expert_of(name: str) -> str:
    """The component whose steps a component takes part in: its own name, unless it runs beside another one.

    Example:
        >>> expert_of("transformer_2"), expert_of("unconditional_transformer")
        ('transformer_2', 'transformer')
    """
    return _BESIDE.get(name, name)


def branch_label(name: str, branch: str) -> str:
    """The name of a branch in what components share: of a component that is not known by name, its own.

    What such a component is for is not known either: it may run at the same steps as another one, on a branch of the
    same name.

    Example:
        >>> branch_label("transformer_2", "cond"), branch_label("refiner", "cond")
        ('cond', 'cond of refiner')
    """
    return branch if name in TRANSFORMERS else f"{branch} of {name}"


def model_class(module: nn.Module) -> type:
    """The class that a model was made with, without what interception and PyTorch's sharding have put on top."""
    classes = (each for each in original_class(module).__mro__ if not each.__module__.startswith("torch.distributed."))
    return next(classes)


Pipe: TypeAlias = object
"""What a patch is applied to: a diffusers pipeline, or its transformer by itself.

No closer type: a type checker sees diffusers' pipelines as stand-ins without any of their attributes, and would refuse
each of them for a protocol.
"""

Pipeline: TypeAlias = Any
"""A diffusers pipeline that is called: what calibration and comparison need."""


@dataclass(frozen=True, eq=False)
class Target:
    """A component that is patched.

    Attributes:
        name: Its name in the pipeline.
        module: The model, inside of all wrappers.
        wrapper: What the pipeline calls: the model itself, or a wrapper such as that of `torch.compile`.
    """

    name: str
    module: nn.Module
    wrapper: nn.Module

    @classmethod
    def of(cls, name: str, part: nn.Module) -> Target:
        """A component under its name.

        Raises:
            UnsupportedModelError: It is wrapped in `torch.nn.DataParallel`.
        """
        refuse_data_parallel(name, part)
        return cls(name, unwrap(part), part)

    @property
    def is_wrapped(self) -> bool:
        """Whether the model is in a wrapper."""
        return self.wrapper is not self.module

    @property
    def doors(self) -> tuple[nn.Module, ...]:
        """Where its calls come in: a wrapper may have kept the model's own `__call__`, or do work of its own."""
        return (self.module, self.wrapper) if self.is_wrapped else (self.module,)

    @property
    def model(self) -> str:
        """Name of the model's class."""
        return model_class(self.module).__name__


class Targets(Sequence[Target]):
    """Components of a pipeline that are to be patched, in the order in which a run uses them.

    Args:
        pipe: The pipeline, or the module by itself.
        found: The components.
    """

    def __init__(self, pipe: object, found: Iterable[Target]) -> None:
        self.pipe = pipe
        self._found = tuple(found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    @property
    def names(self) -> list[str]:
        """Names of the components."""
        return [target.name for target in self._found]

    @property
    def pipeline(self) -> str:
        """Name of the pipeline's class, for errors."""
        return type(self.pipe).__name__


def components_of(pipe: object) -> dict[str, nn.Module]:
    """The modules among the components of a pipeline, as they are there; a transformer by itself is `"transformer"`.

    Raises:
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
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def find_targets(pipe: object) -> Targets:
    """Finds the diffusion transformers of a pipeline.

    They are known by name (`TRANSFORMERS`). A component under another name is one of them if it is of the class of one
    that was found: pipelines have a second model of that class for another part of the denoising.

    Args:
        pipe: A diffusers pipeline, or a transformer by itself.

    Returns:
        The transformers, each once, in the order in which a run uses them; several for models that have several.

    Raises:
        UnsupportedModelError: The pipeline has no transformer, or one in `torch.nn.DataParallel`.
        ConfigTypeError: Neither a pipeline nor a module was given.
    """
    modules = components_of(pipe)
    if isinstance(pipe, nn.Module):
        return Targets(pipe, [Target.of("transformer", pipe)])
    found: dict[nn.Module, Target] = {}
    for name in TRANSFORMERS:
        if name in modules:
            found.setdefault(unwrap(modules[name]), Target.of(name, modules[name]))
    classes = {model_class(module) for module in found}
    for name, part in modules.items():
        if model_class(unwrap(part)) in classes:
            found.setdefault(unwrap(part), Target.of(name, part))
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no component {' or '.join(map(repr, TRANSFORMERS))}; its modules are "
            f"{', '.join(modules) or 'none'}. Only diffusion transformers are supported (a UNet is not one); "
            "a transformer under another name can be passed by itself."
        )
    return Targets(pipe, found.values())
