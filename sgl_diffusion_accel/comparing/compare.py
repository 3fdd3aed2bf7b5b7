"""`compare`: the front door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sgl_diffusion_accel.caching.cache_patch import targets_of_cache
from sgl_diffusion_accel.calls import read_calls
from sgl_diffusion_accel.comparing.comparison import ComparisonReport
from sgl_diffusion_accel.comparing.contenders import Variant, check_fewer_steps, read_variants
from sgl_diffusion_accel.comparing.evaluation import Evaluation
from sgl_diffusion_accel.comparing.measures.read_output import Decode
from sgl_diffusion_accel.comparing.runner import Runner
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.patch import patches_on
from sgl_diffusion_accel.targets import Pipeline
from sgl_diffusion_accel.validate import count, names_checked


@names_checked
def compare(
    pipe: Pipeline,
    variants: Mapping[str, Variant],
    calls: Iterable[Mapping[str, Any]],
    *,
    fewer_steps: bool | Sequence[int] = True,
    repeats: int = 1,
    warmup: int = 1,
    decode: Decode | None = None,
) -> ComparisonReport:
    """Compares patches with the unpatched pipeline, on the same calls and seeds: how much faster, how near.

    Every variant runs beside an unpatched run of the same call; speed-ups are medians of these pairs, and the order
    changes from round to round. Each variant is applied before and undone after each of its runs, also on an error. At
    the end the pipeline is as it was. A round's outputs are held on the CPU until it ends. Where the model is compiled
    and a variant is not a cache of this library, an unmeasured run comes before each of its runs, for the compiler.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer, with no patch on it.
        variants: Name to a function that patches the pipeline. It may return what this library's functions return, a
            list of them, any context manager, or nothing; what it does without this library it has to undo itself, in
            a context manager.
        calls: Keyword arguments of `pipe(...)`, one dict for each call. With a `generator`, whose state is neither
            used up nor shared, or with `seed=` (an integer), or with neither: then call i has seed i.
        fewer_steps: Also measure the unpatched pipeline with fewer steps, which is what anybody could do without a
            cache: True for as many as each variant costs, a list of step counts, or False.
        repeats: Runs of each contender on each call. More make the times steadier.
        warmup: Runs of the first call, of the unpatched pipeline and each variant, that are not measured. From the
            first of them it is also known whether the pipeline gives the same output twice.
        decode: Turns what the pipeline returned into pictures or clips, where that is not understood or shall be
            measured elsewhere, such as latents through a decoder of one's own; see `read_output`.

    Returns:
        The report: `rows` in the order of `variants`, then those with fewer steps; `to_markdown()`, `save(path)`,
        `plot(path)`, `plot_pictures(path)`, `plot_steps(path)`.

    Raises:
        ConfigError: No calls, an impossible number, a name that is taken, or a patch is on the pipeline.
        ConfigTypeError: An argument has a wrong type.
        UnsupportedModelError: The pipeline has no transformer, or one of diffusers' own caches is on it.
        VariantError: A variant failed, or left something on the pipeline; it says which.

    Example:
        >>> report = compare(pipe, {"cache": lambda pipe: apply_cache_dit(pipe)}, calls=[call])
        >>> print(report.to_markdown())  # doctest: +SKIP
        >>> report.rows[0].psnr  # doctest: +SKIP
        41.5
    """
    read = read_calls(pipe, calls, 'compare(pipe, {"cache": lambda pipe: apply_cache_dit(pipe)}, calls=…)')
    _check_unpatched(pipe)
    count("repeats", repeats, 1)
    count("warmup", warmup, 0)
    if decode is not None and not callable(decode):
        raise ConfigTypeError(f"decode is a {type(decode).__name__}; allowed: a function of the pipeline's output.")
    contenders = read_variants(variants)
    check_fewer_steps(fewer_steps, read)
    if not contenders and (isinstance(fewer_steps, bool) or not fewer_steps):
        raise ConfigError(
            "variants is empty: there is nothing to compare. Give at least one, such as "
            '{"cache": lambda pipe: apply_cache_dit(pipe)}, or a list of step counts as fewer_steps.'
        )
    runner = Runner(pipe, read, decode)
    evaluation = Evaluation(pipe, read, [one.name for one in contenders], runner.device)
    for number, taken in enumerate(runner.rounds(contenders, fewer_steps, repeats, warmup)):
        evaluation.add(taken, is_warmup=number < warmup)
        del taken  # a round's outputs may be large, and the next ones are coming
    return evaluation.report(repeats, warmup)


def _check_unpatched(pipe: Any) -> None:
    kinds = sorted({patch.kind for patch in patches_on(pipe)})
    if kinds:
        raise ConfigError(
            f"a patch is on this pipeline already ({', '.join(kinds)}), and compare needs it unpatched, as the "
            "reference. Type: remove(pipe), and apply in a variant what shall be measured."
        )
    targets_of_cache(pipe)
