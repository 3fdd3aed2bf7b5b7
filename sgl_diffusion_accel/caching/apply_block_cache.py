"""`apply_block_cache`: a cache of one's own, from a policy and a predictor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_on_blocks, targets_of_cache
from sgl_diffusion_accel.caching.parts.policies import Policy
from sgl_diffusion_accel.caching.parts.predictors import Predictor, Reuse
from sgl_diffusion_accel.caching.parts.signals import HeadResidual, Signal
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.targets import Pipe
from sgl_diffusion_accel.validate import choice, count, names_checked, of_type


@names_checked
def apply_block_cache(
    pipe: Pipe,
    policy: Policy | Callable[[Run, str], Policy],
    *,
    predictor: Predictor | None = None,
    signal: Signal | None = None,
    fn_compute_blocks: int | None = None,
    bn_compute_blocks: int = 0,
    spacing: Literal["step", "sigma"] = "step",
) -> CachePatch:
    """Caches transformer blocks by a policy of one's own, and predicts what they add by a predictor of one's own.

    At each denoising step and branch the policy decides. Computed: the blocks run, and what they add to the hidden
    states is kept. Skipped: the predictor says with which weights the kept ones stand in. Everything else (where in
    which loop a call is, branches, wiring, undo, statistics) is as with the caches of this library.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        policy: Decides; or a function of (run, name of the branch) that makes a policy for each branch of each run, for
            policies that remember something.
        predictor: What stands in for skipped blocks; None reuses what they added last.
        signal: What the policy's changes are measured on. None: what the first blocks add (`HeadResidual`), where a
            policy asks for a change (`Policy.needs_signal`); for a function that makes policies, nothing.
        fn_compute_blocks: First blocks that are computed at every step. None: 1 where they are the signal, else 0.
        bn_compute_blocks: Last blocks that are computed at every step.
        spacing: What the predictor's times count: denoising steps, or the scheduler's sigmas.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is unknown or not allowed, or leaves nothing to skip.
        ConfigTypeError: Something has a wrong type.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Example:
        >>> class EveryOther(Policy):
        ...     def decide(self, position, tally, change):
        ...         is_last = position.step == position.total - 1
        ...         return Decision(is_last or position.step % 2 == 0, "every other step")
        >>> patch = apply_block_cache(pipe, EveryOther())
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    _check_policy(policy)
    predictor = of_type("predictor", predictor or Reuse(), Predictor, "a Predictor, such as Taylor(1), or None")
    if signal is not None:
        of_type("signal", signal, Signal, "a Signal, or None")
    elif isinstance(policy, Policy) and policy.needs_signal:
        signal = HeadResidual()
    needs_head = signal is not None and signal.needs_head
    first = count("fn_compute_blocks", int(needs_head) if fn_compute_blocks is None else fn_compute_blocks, 0)
    if needs_head and not first:
        raise ConfigError("fn_compute_blocks=0 leaves no block to take the signal from. Type: fn_compute_blocks=1.")
    last, spacing = count("bn_compute_blocks", bn_compute_blocks, 0), choice("spacing", spacing, ("step", "sigma"))
    targets = targets_of_cache(pipe)
    parts = {
        target.name: Parts(divide(target.module, first, last), policy, predictor, signal, spacing) for target in targets
    }
    name = type(policy).__name__ if isinstance(policy, Policy) else getattr(policy, "__name__", "policy")
    return put_on_blocks(targets, f"block cache ({name}, F{first}B{last}, {predictor})", parts, policy)


def _check_policy(policy: object) -> None:
    is_class = isinstance(policy, type)
    if is_class or not (isinstance(policy, Policy) or callable(policy)):
        seen = f"the class {getattr(policy, '__name__', '')}" if is_class else f"a {type(policy).__name__}"
        raise ConfigTypeError(f"policy is {seen}; allowed: a Policy, or a function of (run, branch) that makes one.")
