"""What each patch can do on a pipeline: by what its front door asks, without putting anything on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sgl_diffusion_accel.attention.chosen_sites import chosen_sites
from sgl_diffusion_accel.attention.sites import find_sites
from sgl_diffusion_accel.auto.checking.cache_verdicts import Subject, adaptive, dbcache, magcache, plan, teacache
from sgl_diffusion_accel.auto.checking.findings import Answer, Verdict
from sgl_diffusion_accel.auto.checking.left_out import left_out_of
from sgl_diffusion_accel.caching.cache_patch import refuse_foreign_cache
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError


def attention(subject: Subject) -> Verdict:
    """On `set_attention_backend`."""
    call = "set_attention_backend(pipe, 'auto')"
    try:
        places = sum(len(chosen_sites(target, None)) for target in subject.targets)
    except UnsupportedModelError as error:
        if any(site.can_redirect for target in subject.targets for site in find_sites(target.module)):
            return Verdict("attention", f"{call[:-1]}, layers=[…])", "in part", str(error))
        raise
    where = f"in {places} layers" if places else "in the modules that compute it, which have no processors"
    return Verdict("attention", call, "yes", f"{where}; which backends are usable here is told with the transformers")


def lossless(subject: Subject) -> Verdict:
    """On `apply_lossless`."""
    found = [left_out_of(subject.targets.pipe, target) for target in subject.targets]
    names = [f"{target.name}: " if len(subject.targets) > 1 else "" for target in subject.targets]
    reason = "; ".join(f"{name}{each.what}" for name, each in zip(names, found, strict=True))
    answer: Answer = "in part" if any(each.may for each in found) else "no"
    if any(each.cuts for each in found):
        answer = "yes"
    held = "; ".join(dict.fromkeys(each.holds for each in found if each.holds))
    return Verdict("lossless", "apply_lossless(pipe)", answer, reason, held or "nothing")


CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "adaptive": adaptive,
    "plan": plan,
    "dbcache": dbcache,
    "teacache": teacache,
    "magcache": magcache,
    "lossless": lossless,
    "attention": attention,
}
"""Name of a patch to what looks whether it can act. Another patch is another row."""

_NO_CACHES = ("lossless", "attention")


def verdicts(subject: Subject) -> tuple[Verdict, ...]:
    """A verdict on each patch."""
    return tuple(_verdict(name, check, subject) for name, check in CHECKS.items())


def _verdict(name: str, check: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    is_cache = name not in _NO_CACHES
    try:
        if is_cache:
            refuse_foreign_cache(subject.targets)
        found = check(subject)
    except (UnsupportedModelError, ConfigError) as error:
        return Verdict(name, "nothing", "no", str(error))
    if not is_cache or subject.loop.is_placed or found.answer == "no":
        return found
    return replace(found, reason=f"in a loop where its calls are placed: {found.reason}")
