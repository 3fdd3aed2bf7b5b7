"""The share of the blocks that was computed, told by a cache's own statistics or by counting."""

from __future__ import annotations

import pytest
import torch

from invariants import caches
from invariants.families import families, present
from sgl_diffusion_accel import apply_cache_dit, set_attention_backend
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork, is_compiled
from sgl_diffusion_accel.comparing.measures.computed_share import Computed


@families("wan", "wan22", "qwen", "ltx", "zimage")
def test_a_caches_own_statistics_and_the_count_of_work_agree(family):
    pipe = family.make()
    with caches.static(pipe), Computed(pipe, count=False) as told:
        works = [BlockWork(getattr(pipe, name)) for name in family.transformers]
        for work in works:
            work.__enter__()
        family.run(pipe, steps=caches.STEPS)
        for work in works:
            work.__exit__(None, None, None)
    assert told.counts_itself
    assert told.share == pytest.approx(sum(work.total for work in works) / sum(work.full for work in works))


def test_prompts_of_two_lengths_do_not_look_like_skipped_work():
    family = present("qwen")  # whose prompts have 7 and 5 words
    pipe = family.make()
    with Computed(pipe, count=True) as told:
        family.run(pipe, steps=2)
    assert told.share == 1.0
    assert not told.counts_itself


def test_an_attention_backend_computes_everything():
    family = present("wan")
    pipe = family.make()
    with set_attention_backend(pipe, "sdpa"), Computed(pipe, count=True) as told:
        family.run(pipe, steps=2)
    assert (told.share, told.maps) == (1.0, {})


def test_nothing_is_counted_where_it_was_not_asked_for_or_would_compile_anew():
    family = present("wan")
    pipe = family.make()
    with Computed(pipe, count=False) as told:
        family.run(pipe, steps=1)
    assert told.share is None
    assert not is_compiled(pipe.transformer)
    pipe.transformer.blocks[1].compile()
    assert is_compiled(pipe.transformer)
    with Computed(pipe, count=True):
        assert not pipe.transformer._forward_pre_hooks
    pipe = family.make()
    plain, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer)
    with Computed(pipe, count=True):
        assert not plain._forward_pre_hooks


def test_a_cache_on_one_of_two_experts_is_counted_on_both():
    family = present("wan22")
    pipe = family.make()
    with apply_cache_dit(pipe.transformer_2, fn_compute_blocks=0, steps_mask=[1] * 4 + [0] * 2, steps_policy="static"):
        with Computed(pipe, count=True) as told:
            family.run(pipe, steps=caches.STEPS)
        assert not told.counts_itself
        assert told.share == pytest.approx(4 / 6)


def test_hooks_are_gone_after_an_error():
    pipe = present("wan").make()
    with pytest.raises(KeyError), Computed(pipe, count=True):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_a_run_that_no_cache_knows_has_skipped_nothing():
    family = present("wan")
    pipe = family.make()
    bare = family.bare(pipe)
    with caches.reuse(pipe), Computed(pipe, count=False) as told, torch.no_grad():
        pipe.transformer(**bare)
    assert told.share == 1.0
