"""Finds a transformer's block lists and divides them into head, span and tail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sgl_diffusion_accel.caching.blocks.odd_models import AUXILIARY_LISTS, ODD_MODELS, OddModel
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.targets import model_class, unwrap_but_compiled


@dataclass(frozen=True)
class ListSpan:
    """One list of transformer blocks that are called one after the other, and what of it is skipped.

    Attributes:
        name: The attribute under which the transformer holds it.
        count: Number of its blocks.
        start: Index of the first block of the span, which is skipped as a whole.
        end: Index behind the last block of the span; `start == end` when nothing of this list is skipped.
    """

    name: str
    count: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The block lists of a transformer, divided. It holds no module: a cache must not keep a model alive.

    Attributes:
        lists: In the order in which they run.
        fn: Number of first blocks that are always computed (the head).
        bn: Number of last blocks that are always computed (the tail).
    """

    lists: tuple[ListSpan, ...]
    fn: int
    bn: int

    @property
    def total(self) -> int:
        """Number of blocks in all lists."""
        return sum(blocks.count for blocks in self.lists)

    @property
    def skippable(self) -> int:
        """Number of blocks in the span."""
        return sum(blocks.end - blocks.start for blocks in self.lists)


def find_block_lists(transformer: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Finds the lists of blocks that a transformer runs one after the other.

    Args:
        transformer: A diffusion transformer.

    Returns:
        Attribute name to blocks, in the order in which the model defines the lists. Blocks that are wrapped one by one
        (`FullyShardedDataParallel`, checkpointing) are those inside of the wrappers.

    Raises:
        UnsupportedModelError: There are none, or the model is known not to work.
    """
    name = model_class(transformer).__name__
    odd = ODD_MODELS.get(name, OddModel())
    if odd.refuse and (odd.only_with is None or getattr(transformer.config, odd.only_with, None)):
        raise UnsupportedModelError(f"{name} cannot be cached: {odd.refuse}.")
    # As they are defined, which is how nearly all models run them. `BlockOrder` refuses the others at the first call.
    lists = {
        child_name: tuple(map(unwrap_but_compiled, child))
        for child_name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList) and child_name not in AUXILIARY_LISTS and _are_blocks(child)
    }
    for list_name, blocks in lists.items():
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError(
                f"{name}.{list_name} holds a block more than once: what it adds differs from place to place, and "
                "cannot be told apart. This model cannot be cached."
            )
    if not lists:
        seen = [child_name for child_name, _ in transformer.named_children()]
        raise UnsupportedModelError(
            f"{name} has no list of transformer blocks among its parts ({', '.join(seen) or 'none'}). A cache needs a "
            "torch.nn.ModuleList of blocks that the model calls one after the other, each with a part named attn or "
            "attention, or of a class named so."
        )
    return lists


def _are_blocks(candidates: nn.ModuleList) -> bool:
    """Blocks have attention of some kind inside; projections, norms and heads do not."""
    return len(candidates) > 0 and all(
        any(_is_attention(name) or _is_attention(type(part).__name__) for name, part in block.named_modules())
        for block in candidates
    )


def _is_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()


def divide(transformer: nn.Module, fn: int, bn: int) -> Layout:
    """Divides a transformer's blocks into head, span and tail.

    Args:
        transformer: A diffusion transformer of N blocks.
        fn: Number of first blocks to compute at every step.
        bn: Number of last blocks to compute at every step.

    Returns:
        The layout; its span is blocks fn … N - bn.

    Raises:
        ConfigError: fn and bn leave nothing to skip, or reach beyond the list that they start in.
        UnsupportedModelError: See `find_block_lists`.
    """
    name = model_class(transformer).__name__
    counts = {list_name: len(blocks) for list_name, blocks in find_block_lists(transformer).items()}
    sizes = ", ".join(f"{list_name}: {count}" for list_name, count in counts.items())
    first, last, total = next(iter(counts)), list(counts)[-1], sum(counts.values())
    if fn + bn >= total:
        raise ConfigError(
            f"fn_compute_blocks={fn} and bn_compute_blocks={bn} leave none of the {total} blocks of {name} to skip "
            f"({sizes}). Allowed: fn_compute_blocks + bn_compute_blocks <= {total - 1}."
        )
    if fn > counts[first]:
        raise ConfigError(
            f"fn_compute_blocks={fn} reaches beyond the first block list of {name} ({sizes}). "
            f"Allowed: 0 to {counts[first]}."
        )
    limit = ODD_MODELS.get(name, OddModel()).max_bn
    most = counts[last] if limit is None else limit
    if bn > most:
        raise ConfigError(
            f"bn_compute_blocks={bn} is more than the last block list of {name} allows ({sizes}). Allowed: 0 to {most}."
        )
    spans = (
        ListSpan(list_name, count, fn if list_name == first else 0, count - (bn if list_name == last else 0))
        for list_name, count in counts.items()
    )
    return Layout(tuple(spans), fn, bn)
