"""The denoising loop of a pipeline, read from its source: what will place its calls, and which branches it has."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from sgl_diffusion_accel.auto.checking.findings import FoundLoop
from sgl_diffusion_accel.loop.pipeline_frames import is_negative, may_be_loop
from sgl_diffusion_accel.slots import original_class
from sgl_diffusion_accel.targets import TRANSFORMERS, Targets

_OWN_LOOP = (
    "a transformer by itself: its calls are placed in a pipeline that loops over its timesteps, or in a loop of your "
    "own by denoising_steps(...)"
)
_MODULAR = "a modular pipeline: its blocks keep timesteps and step in their state"
_UNSEEN = "no loop over timesteps is seen in its source: after the first run print(patch) tells, and what to type"


def loop_of(targets: Targets) -> FoundLoop:
    """What the source of a pipeline tells of its denoising loop.

    Args:
        targets: Its transformers.
    """
    if isinstance(targets.pipe, nn.Module):
        return FoundLoop(False, _OWN_LOOP)
    kind = original_class(targets.pipe)
    if any(cls.__name__ == "ModularPipeline" for cls in kind.__mro__):
        return FoundLoop(True, _MODULAR)
    denoisers = {*TRANSFORMERS, *targets.names}
    found = [(function, loop) for function in _methods(kind) for loop in _loops(function)]
    # The loop that calls the transformer, if that is seen; a pipeline may call it through a method of its own.
    found.sort(key=lambda each: not _calls_of(each[1], denoisers))
    if not found:
        return FoundLoop(False, _UNSEEN)
    function, loop = found[0]
    how = f"{function.__qualname__} loops: for {ast.unparse(loop.target)} in {ast.unparse(loop.iter)}"
    contexts = _contexts(loop)
    is_batched = _is_batched(loop, denoisers) or "cond_uncond" in contexts
    return FoundLoop(True, how, _branches(targets, loop, contexts, is_batched), contexts, is_batched)


def _methods(kind: type) -> Iterator[FunctionType]:
    """The methods of a pipeline that may be its loop, those of its own class first."""
    seen: set[str] = set()
    for cls in kind.__mro__:
        if cls.__module__ == "diffusers.pipelines.pipeline_utils":
            return
        for name, value in vars(cls).items():
            function: Any = inspect.unwrap(value) if callable(value) else None
            if not isinstance(function, FunctionType) or name in seen:
                continue
            if may_be_loop(function.__code__):
                yield function
            # One that overrides a method and calls it may do something before and after, and leave the loop to it.
            if not {"super", name} & {*function.__code__.co_names}:
                seen.add(name)


def _loops(function: FunctionType) -> list[ast.For]:
    """The loops of a function over timesteps."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # typed at a prompt, or made at run time
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.For) and _is_over_timesteps(node.iter)]


def _is_over_timesteps(iterable: ast.expr) -> bool:
    names = {each.id for each in ast.walk(iterable) if isinstance(each, ast.Name)}
    return "timesteps" in names | {each.attr for each in ast.walk(iterable) if isinstance(each, ast.Attribute)}


def _calls_of(loop: ast.For, denoisers: set[str]) -> list[str]:
    """The denoisers that a loop calls, one entry for each call that is written in it."""
    called = (each.func for each in ast.walk(loop) if isinstance(each, ast.Call))
    return [each.attr for each in called if isinstance(each, ast.Attribute) and each.attr in denoisers]


def _contexts(loop: ast.For) -> tuple[str, ...]:
    calls = (each for each in ast.walk(loop) if isinstance(each, ast.Call))
    given = [each.args[0] for each in calls if _name_of(each.func) == "cache_context" and each.args]
    # Written out; a guider of diffusers names the branches itself.
    return tuple(dict.fromkeys(str(each.value) for each in given if isinstance(each, ast.Constant)))


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_batched(loop: ast.For, denoisers: set[str]) -> bool:
    """Whether latents are doubled in the loop: `torch.cat([latents] * 2)`, `torch.cat([x, x])`, `x.repeat(2, …)`."""
    calls = [each for each in ast.walk(loop) if isinstance(each, ast.Call)]
    lines = [each.lineno for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr in denoisers]
    # What is doubled after the last call is for the scheduler (Cosmos).
    for call in (each for each in calls if each.lineno <= max(lines, default=each.lineno)):
        name, first = _name_of(call.func), call.args[0] if call.args else None
        if name == "repeat" and isinstance(first, ast.Constant) and first.value == 2 and len(call.args) > 2:
            return True
        if name == "cat" and isinstance(first, ast.BinOp) and isinstance(first.op, ast.Mult):
            return True
        joined = [ast.unparse(each) for each in first.elts] if isinstance(first, ast.List) else []
        if name == "cat" and len(joined) > 1 == len(set(joined)):
            return True
    return False


def _branches(targets: Targets, loop: ast.For, contexts: tuple[str, ...], is_batched: bool) -> tuple[str, ...]:
    """The names of the branches, as statistics show them."""
    if contexts:
        return tuple(each.removeprefix("pred_") for each in contexts)
    if is_batched:
        return ("cond",)
    has_guider = any(_name_of(each.func) == "cache_context" for each in ast.walk(loop) if isinstance(each, ast.Call))
    calls = _calls_of(loop, {*TRANSFORMERS, *targets.names})
    words = {each.id for each in ast.walk(loop) if isinstance(each, ast.Name)}
    is_guided = len(calls) > 1 and any(map(is_negative, [*words, *calls]))
    return ("cond", "uncond") if has_guider or is_guided else ("cond",)
