"""Runs a case on fresh pipelines, and asserts all that must hold."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel import remove

from .covering import Case
from .model import BLOCKS, Work, call, counting, family_of, leftovers, relative
from .quantised import QUANTISED
from .switches import ATTENTION, COMPILE, DTYPE, EVENT, LORA, OFFLOAD, PATCHES, STEPS

ROUNDING = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Largest relative difference of a run without padding from one with it, which sums in another order. In float32 as in
the tests of `apply_lossless`; half types round each result to 2^-8 and 2^-11 of it, and guidance of 4 makes that
seven times as much."""

FAR = 1.0
"""Largest relative difference of a run with skipped steps: as far as another picture is. Random weights in 6 steps, of
which half are skipped at the boldest settings, come near that; a branch or a run that is mistaken goes beyond."""


class Subject:
    """One pipeline of a case.

    Args:
        case: The case.
        patch: Its patch: `"never"` skipping or `"skipping"`; None for an unpatched pipeline.
        lora_first: Whether what is done to LoRA between two runs is done before the first one.
    """

    def __init__(self, case: Case, patch: str | None = None, lora_first: bool = False) -> None:
        if case["compile"] != "none":
            torch._dynamo.reset()  # so that what other pipelines had compiled does not count towards the limit
        self.case, self.work = case, Work()
        self.family = family_of(case["model"])
        self.pipe: Any = self.family.make(num_layers=BLOCKS)
        self.patch: Any = None
        if case["order"] == "patch first":
            self._apply(patch)
        {**DTYPE, **QUANTISED}[case["dtype"]](self.pipe)
        LORA[case["LoRA"]][0](self.pipe)
        if lora_first:
            LORA[case["LoRA"]][1](self.pipe)
        OFFLOAD[case["offload"]](self.pipe)
        COMPILE[case["compile"]](self.pipe, self.work)
        if case["order"] == "patch last":
            self._apply(patch)

    def _apply(self, patch: str | None) -> None:
        if patch is not None:
            never, skipping = PATCHES[self.case["patch"]]
            self.patch = (skipping if patch == "skipping" else never)(self.pipe)
        ATTENTION[self.case["attention"]](self.pipe)

    def change_lora(self) -> None:
        """What is done to LoRA between two runs."""
        offload = self.case["offload"]
        lifted = self.case["LoRA"] == "load" and offload in ("model", "sequential")
        if lifted:
            self.pipe.remove_all_hooks()
        LORA[self.case["LoRA"]][1](self.pipe)
        if lifted:
            OFFLOAD[offload](self.pipe)

    def skipped_some(self, to_compute: int) -> bool:
        """Whether its first run has left out blocks of those to compute; in compiled code the patch says so itself."""
        if self.case["compile"] == "none":
            return self.work.done < to_compute
        branches = self.patch.stats.runs[0].branches.values() if self.patch is not None else ()
        return any(not all(branch.computed) for branch in branches)

    def run(self, steps: int = 6) -> Tensor:
        """The output of a run that the case's callback looks into."""
        given = {**call(self.case["model"], self.pipe, steps), **EVENT[self.case["callback"]]}
        eager = self.case["compile"] == "none"
        with counting(self.pipe, self.family, self.work) if eager else contextlib.nullcontext(), torch.no_grad():
            output: Tensor = self.pipe(**given, return_dict=False)[0]
        assert torch.isfinite(output).all()
        return output.detach().clone()


def check(case: Case) -> None:
    """Asserts what must hold of a case."""
    # Lengths, adapters, hooks and patches each are compiled for once, on and off, which is more than the usual eight.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):
        steps = STEPS.get(case["patch"], 6)
        plain, simple = Subject(case), simplified(case)
        expected = plain.run()
        before = plain.work.done
        in_full = plain.run(steps) if steps != 6 else expected
        to_compute = plain.work.done - before or before
        plain.change_lora()
        changed = plain.run()
        if case["LoRA"] != "none":
            sound = Subject(simple, lora_first=True).run()
            assert not torch.equal(changed, expected), "this LoRA changes nothing"
            assert torch.equal(changed, sound), "without any patch LoRA comes out otherwise here"

        never = Subject(case, "never")
        same(case, never.run(), expected)
        never.change_lora()
        same(case, never.run(), changed)
        is_as_before(never, changed)

        cached = Subject(case, "skipping")
        output = cached.run(steps)
        if case["patch"] != "lossless":
            assert cached.skipped_some(to_compute), "nothing was skipped"
            assert relative(output, in_full) < FAR
        alike(case, cached.run(steps), output)
        alike(case, output, Subject(simple, "skipping").run(steps))
        cached.change_lora()
        alike(case, cached.run(steps), Subject(simple, "skipping", lora_first=True).run(steps))
        is_as_before(cached, changed)


def is_as_before(subject: Subject, expected: Tensor) -> None:
    """Asserts that nothing of a patch is left once it is removed."""
    remove(subject.pipe)
    assert list(leftovers(subject.pipe)) == []
    ATTENTION[subject.case["attention"]](subject.pipe)
    equal(subject.run(), expected)


def simplified(case: Case) -> Case:
    """The same numbers without all that must not change them: the order, offloading and the compiler."""
    casting = case["offload"] == "layerwise casting"
    return {**case, "order": "patch last", "compile": "none", "offload": case["offload"] if casting else "none"}


def same(case: Case, output: Tensor, expected: Tensor) -> None:
    """Asserts that a patch that skips nothing changes nothing; `apply_lossless` by rounding, where it acts."""
    if case["patch"] in ("lossless", "auto") and case["model"] != "wan":
        assert relative(output, expected) < ROUNDING.get(case["dtype"], ROUNDING["float32"])
    else:
        equal(output, expected)


def alike(case: Case, output: Tensor, expected: Tensor) -> None:
    """Asserts that two runs under a patch are equal; to rounding where the compiler meets several lengths of prompts.

    It compiles for the first one, and once more for any length, which sums in another order.
    """
    if case["compile"] != "none" and case["model"] != "wan":
        assert relative(output, expected) < ROUNDING.get(case["dtype"], ROUNDING["float32"])
    else:
        equal(output, expected)


def equal(output: Tensor, expected: Tensor) -> None:
    """Asserts that two outputs are equal bit by bit."""
    assert torch.equal(output, expected), f"relative difference {relative(output, expected):.3g}"
