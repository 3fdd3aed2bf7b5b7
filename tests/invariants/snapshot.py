"""Everything that a patch could have changed, to be compared by identity."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

_OF_DYNAMO = "torch.distributed"
"""Named in a warning filter that the compiler of torch 2.8 adds when it runs."""

_ENVIRON_OF_TOOLS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
"""Environment variables that pytest and that compiler set."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Snapshot:
    """The modules, the classes behind them, and the process's defaults, at one moment.

    Args:
        pipe: A pipeline that has run once, so that what diffusers itself makes on first use is there.
    """

    def __init__(self, pipe: Any) -> None:
        self.items: dict[str, Any] = {}
        classes: set[type] = set(type(pipe).__mro__) | set(type(pipe.scheduler).__mro__)
        self._mapping("pipe", vars(pipe), skip=("scheduler",))
        for component, part in pipe.components.items():
            if isinstance(part, nn.Module):
                for name, module in part.named_modules():
                    self._module(f"{component}.{name}", module)
                    classes |= set(type(module).__mro__)
        for cls in sorted(classes, key=lambda c: (c.__module__, c.__qualname__)):
            self._mapping(f"class {cls.__module__}.{cls.__qualname__} {id(cls):x}", vars(cls))
        self._process()

    def _module(self, path: str, module: nn.Module) -> None:
        self.items[f"type({path})"] = type(module)
        self._mapping(path, vars(module))
        for name, value in vars(module).items():
            if isinstance(value, dict):
                self._mapping(f"{path}.{name}", value)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            self.items[f"{path}.{name} version"] = tensor._version

    def _mapping(self, path: str, mapping: Any, skip: tuple[str, ...] = ()) -> None:
        self.items[f"keys({path})"] = tuple(map(str, mapping))
        for key, value in mapping.items():
            if key not in skip:
                self.items[f"{path}[{key!r}]"] = value

    def _process(self) -> None:
        from diffusers.models import attention_dispatch
        from torch.nn.modules import module as torch_module

        self._mapping("attention registry", vars(attention_dispatch._AttentionBackendRegistry))
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
            self._mapping(f"torch {name}", getattr(torch_module, name))
        self.items |= {
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "random state": tuple(torch.get_rng_state().tolist()),
            "Module.__call__": nn.Module.__call__,
            "scaled_dot_product_attention": nn.functional.scaled_dot_product_attention,
            "warning filters": tuple(text for text in map(str, warnings.filters) if _OF_DYNAMO not in text),
            "log handlers": tuple(map(str, logging.getLogger().handlers)),
            "log level": logging.getLogger().level,
        }
        self._mapping("environ", {name: value for name, value in os.environ.items() if name not in _ENVIRON_OF_TOOLS})

    def differences(self, other: Snapshot) -> list[str]:
        """What is not the same object, or for plain values not equal, in the other snapshot."""
        gone = [f"{key} is gone" for key in self.items if key not in other.items]
        new = [f"{key} is new" for key in other.items if key not in self.items]
        changed = [
            f"{key}: {value!r:.80} became {other.items[key]!r:.80}"
            for key, value in self.items.items()
            if key in other.items and not _same(value, other.items[key])
        ]
        return gone + new + changed


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        return not before and not after  # a run sets new empty dicts on the pipeline; others are compared key by key
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and not isinstance(before, nn.Parameter):
        return torch.equal(before, after)  # such as the last timestep of a run; versions tell of writing in place
    return type(before) is type(after) and isinstance(before, _VALUES) and before == after


def assert_same(before: Snapshot, pipe: Any) -> None:
    """Asserts that nothing has changed since the snapshot of this pipeline."""
    differences = before.differences(Snapshot(pipe))
    assert not differences, "\n".join(differences[:20])
