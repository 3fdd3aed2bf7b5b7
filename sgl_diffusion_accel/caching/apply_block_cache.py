"""`apply_block_cache`: a cache of one's own, from a policy and a predictor."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from sgl_diffusion_accel.caching.blocks.cached_model import MakePolicy, Parts, Spacing
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_on_blocks, targets_of_cache
from sgl_diffusion_accel.caching.parts.policies import Policy
from sgl_diffusion_accel.caching.parts.predictors import Predictor, Reuse
from sgl_diffusion_accel.caching.parts.signals import HeadResidual, Signal
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.targets import Pipe
from sgl_diffusion_accel.validate import choice, count, flag, names_checked, of_type


@names_checked
def apply_block_cache(
    pipe: Pipe,
    policy: Policy | MakePolicy,
    *,
    predictor: Predictor | None = None,
    signal: Signal | None = None,
    fn_compute_blocks: int | None = None,
    bn_compute_blocks: int = 0,
    spacing: Spacing = "step",
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
    config = BlockCacheConfig(policy, predictor, signal, fn_compute_blocks, bn_compute_blocks, spacing)
    parts = {}
    targets = targets_of_cache(pipe)
    for target in targets:
        layout = divide(target.module, config.fn_compute_blocks or 0, config.bn_compute_blocks)
        parts[target.name] = Parts(layout, config.policy, config.predictor or Reuse(), config.signal, config.spacing)
    return put_on_blocks(targets, f"block cache ({config})", parts, config)


@dataclass(frozen=True)
class BlockCacheConfig:
    """What `apply_block_cache` was asked for, by the names of its arguments, with what stands for None filled in."""

    policy: Policy | MakePolicy
    predictor: Predictor | None = None
    signal: Signal | None = None
    fn_compute_blocks: int | None = None
    bn_compute_blocks: int = 0
    spacing: Spacing = "step"

    def __post_init__(self) -> None:
        _check_policy(self.policy)
        predictor = Reuse() if self.predictor is None else self.predictor
        of_type("predictor", predictor, Predictor, "a Predictor, such as Taylor(1), or None")
        count(f"{type(predictor).__name__}.depth", predictor.depth, 1)
        signal = self.signal
        if signal is not None:
            of_type("signal", signal, Signal, "a Signal, or None")
        elif isinstance(self.policy, Policy) and self.policy.needs_signal:
            signal = HeadResidual()
        needs_head = signal is not None and signal.needs_head
        given = self.fn_compute_blocks
        first = count("fn_compute_blocks", int(needs_head) if given is None else given, 0)
        if needs_head and not first:
            raise ConfigError("fn_compute_blocks=0 leaves no block to take the signal from. Type: fn_compute_blocks=1.")
        last = count("bn_compute_blocks", self.bn_compute_blocks, 0)
        choice("spacing", self.spacing, ("step", "sigma"))
        for name, value in (
            ("predictor", predictor), ("signal", signal), ("fn_compute_blocks", first), ("bn_compute_blocks", last)
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        own = self.policy
        name = type(own).__name__ if isinstance(own, Policy) else getattr(own, "__name__", "policy")
        return f"{name}, F{self.fn_compute_blocks}B{self.bn_compute_blocks}, {self.predictor}"


def _check_policy(policy: object) -> None:
    """Refuses what is no policy, and one that remembers a run and would be shared by all of them."""
    if isinstance(policy, type) or not (isinstance(policy, Policy) or callable(policy)):
        seen = f"the class {policy.__name__}" if isinstance(policy, type) else f"a {type(policy).__name__}"
        raise ConfigTypeError(f"policy is {seen}; allowed: a Policy, or a function of (run, branch) that makes one.")
    if not isinstance(policy, Policy):
        try:
            inspect.signature(policy).bind("run", "branch")
        except TypeError as error:
            raise ConfigTypeError(f"policy is a function that is not of (run, branch): {error}.") from error
        except ValueError:  # a built-in that does not tell its parameters
            pass
        return
    kind = type(policy)
    flag(f"{kind.__name__}.needs_signal", policy.needs_signal)
    learns = kind.observe is not Policy.observe or kind.restart is not Policy.restart
    if policy.is_shared or policy.needs_error or learns:
        raise ConfigError(
            f"{kind.__name__} remembers something of a run (is_shared, needs_error, observe or restart), and one "
            f"object would carry it into the next. Have one made for each: lambda run, branch: {kind.__name__}()"
        )
