"""One run of cached outputs, on plain tensors and with laid-down decisions."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion_accel.caching.outputs.output_run import OutputRun
from sgl_diffusion_accel.caching.parts.call_policy import DEPTH, CallPolicy
from sgl_diffusion_accel.caching.parts.multistep import Weights, extrapolate
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Position, Tally
from sgl_diffusion_accel.loop.session import Where

SIGNATURE = ("shape",)
PLAIN, CONTROLLED = frozenset({"latents"}), frozenset({"latents", "control 0"})


class Laid(CallPolicy):
    """Computes the steps of a mask, and writes down what it is told."""

    needs_error = True

    def __init__(self, mask: str, spans_models: bool = False) -> None:
        self.mask = [each == "x" for each in mask]
        self.spans_models = spans_models
        self.errors: dict[int, float] = {}
        self.restarts: list[int] = []
        self.asked: list[bool] = []

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        self.asked.append(self.mask[position.step])
        return Decision(self.mask[position.step], "mask")

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:
        return {step: 1.0} if step in nodes else extrapolate(nodes, step, slope=1.0)

    def predicted(self, step: int, nodes: Sequence[int]) -> Weights | None:
        earlier = [node for node in nodes if node < step]
        return extrapolate(earlier, step, slope=1.0) if len(earlier) > 1 else None

    def observe(self, step: int, error: float) -> None:
        self.errors[step] = error

    def restart(self, position: Position) -> None:
        self.restarts.append(position.step)

    def needs_later(self, step: int) -> bool:
        return step < len(self.mask) - 1


def output(step: int, branch: str = "cond", batch: int = 1) -> Tensor:
    """Follows a parabola, another one on each branch."""
    scale = {"cond": 1.0, "uncond": -0.5}.get(branch, 2.0)
    return scale * (torch.arange(1.0, 5.0) * step + 0.1 * step**2 + 3).expand(batch, 4).clone()


def at(step: int, branch: str = "cond", signature: Any = SIGNATURE, given: Any = PLAIN) -> Where:
    run: Any = SimpleNamespace(total=10, given=given)
    return Where(run, step, branch, signature, is_new=False)


def call(kept: OutputRun, step: int, branch: str = "cond", guidance: float | None = None, **kw: Any) -> Any:
    """What the caller of a transformer gets, and whether it ran."""
    where = at(step, branch, kw.get("signature", SIGNATURE), kw.get("given", PLAIN))
    decision = kept.decide(where, kw.get("component", "transformer"))
    if not decision.compute:
        return kept.skip(branch)[0], False
    made = kw["output"] if "output" in kw else output(step, branch)
    return kept.computed(branch, (made,), guidance)[0], True


def test_computed_steps_return_what_was_computed_and_skipped_ones_the_line() -> None:
    kept = OutputRun(Laid("xx..x"))
    for step, runs in enumerate([True, True, False, False, True]):
        made, ran = call(kept, step)
        assert ran == runs
        expected = output(step) if ran else output(1) + (step - 1) * (output(1) - output(0))
        assert torch.allclose(made, expected)


def test_branches_of_a_step_share_one_decision_and_nothing_else() -> None:
    policy = Laid("xx.x")
    kept = OutputRun(policy)
    for step in range(4):
        for branch in ("cond", "uncond", "third"):
            made, _ = call(kept, step, branch)
            line = 2 * output(1, branch) - output(0, branch)
            assert torch.allclose(made, line if step == 2 else output(step, branch))
    assert policy.asked == [True, True, False, True], "once a step"


def test_branch_that_comes_late_is_computed_until_it_can_be_predicted() -> None:
    kept = OutputRun(Laid("xx.xx."))
    seen = []
    for step in range(6):
        call(kept, step)
        if step >= 2:
            seen.append(call(kept, step, "uncond")[1])
    assert seen == [True, True, True, False]


def test_branch_that_goes_and_comes_back_is_never_predicted_from_gaps() -> None:
    kept = OutputRun(Laid("xxxx.x"))
    ran = {}
    for step in range(6):
        call(kept, step)
        if step not in (2, 3):
            ran[step] = call(kept, step, "uncond")[1]
    assert ran[4], "the outputs that the line needs were never computed on this branch"


def test_first_step_is_computed_whatever_is_laid_down() -> None:
    kept = OutputRun(Laid(".x"))
    assert call(kept, 0)[1]


def test_run_that_begins_in_the_middle_computes_first() -> None:
    kept = OutputRun(Laid("xx...x"))
    assert call(kept, 3)[1]
    assert call(kept, 4)[1] is False


@pytest.mark.parametrize("change", [{"signature": ("other",)}, {"component": "transformer_2"}])
def test_other_shape_or_model_starts_anew(change: dict[str, Any]) -> None:
    policy = Laid("xx...x")
    kept = OutputRun(policy)
    for step in range(3):
        call(kept, step)
    assert call(kept, 3, **change)[1]
    assert policy.restarts == [3]
    made, ran = call(kept, 4, **change)
    assert not ran
    assert torch.equal(made, output(3)), "one output is known of the new one"


def test_inputs_of_another_kind_start_anew_with_a_computed_step() -> None:
    kept = OutputRun(policy := Laid("xx.......x"))
    for step in range(6):
        given = CONTROLLED if step >= 3 else PLAIN
        ran = [call(kept, step, branch, given=given)[1] for branch in ("cond", "uncond")]
        assert ran == [step in (0, 1, 3)] * 2
    assert policy.restarts == [3]


def test_policy_may_know_of_the_turn() -> None:
    class Knowing(Laid):
        def turn(self, position: Position, is_computed: bool) -> bool:
            return not is_computed

    kept = OutputRun(Knowing("xx.x..x"))
    ran = [call(kept, step, given=CONTROLLED if step >= 3 else PLAIN)[1] for step in range(6)]
    assert ran == [True, True, False, True, False, False]


def test_one_branch_alone_whose_inputs_change_is_computed_until_it_can_be_predicted() -> None:
    kept = OutputRun(policy := Laid("xx..x.x.."))
    ran: dict[str, list[bool]] = {"cond": [], "uncond": []}
    for step in range(8):
        for branch, each in ran.items():
            given = CONTROLLED if step >= 3 and branch == "uncond" else PLAIN
            each.append(call(kept, step, branch, given=given)[1])
    assert ran["cond"] == [True, True, False, False, True, False, True, False]
    assert ran["uncond"] == [True, True, False, True, True, True, True, False]
    assert policy.restarts == []


def test_policy_that_spans_models_goes_on_with_another_model() -> None:
    policy = Laid("xx.x", spans_models=True)
    kept = OutputRun(policy)
    for step in range(2):
        call(kept, step)
    assert call(kept, 2, component="transformer_2")[1] is False
    assert policy.restarts == []


def test_error_is_that_of_the_line() -> None:
    policy = Laid("xx.xx")
    kept = OutputRun(policy)
    for step in range(5):
        call(kept, step)
    line = output(1) + 2 * (output(1) - output(0))
    assert policy.errors.keys() == {3}, "that of step 4 is read before a step that does not come"
    assert policy.errors[3] == pytest.approx(float((line - output(3)).norm() / output(3).norm()), rel=1e-5)


def line_error(values: list[Tensor]) -> float:
    guess = 2 * values[1] - values[0]
    return float((guess - values[2]).norm() / values[2].norm())


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_error_is_mixed_as_guidance_mixes_the_branches(order: tuple[str, str]) -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step in range(4):
        for branch in order:
            call(kept, step, branch, guidance=4.0)
    guided = [output(step, "uncond") + 4 * (output(step, "cond") - output(step, "uncond")) for step in range(3)]
    assert policy.errors[2] == pytest.approx(line_error(guided), rel=1e-4)


def test_error_of_a_batch_of_both_branches_is_mixed() -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    both = [torch.cat([output(step, "uncond", 2), output(step, "cond", 2)]) for step in range(4)]
    for step in range(4):
        call(kept, step, "cond_uncond", guidance=4.0, output=both[step])
    guided = [torch.lerp(*each.chunk(2), 4.0) for each in both]
    assert policy.errors[2] == pytest.approx(line_error(guided), rel=1e-4)


@pytest.mark.parametrize("guidance", [None, 1.0, 0.0])
def test_error_without_guidance_is_over_all_branches(guidance: float | None) -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step in range(4):
        for branch in ("cond", "uncond"):
            call(kept, step, branch, guidance=guidance)
    both = [torch.cat([output(step, "cond"), output(step, "uncond")]) for step in range(3)]
    assert policy.errors[2] == pytest.approx(line_error(both), rel=1e-4)


def test_error_where_one_branch_does_not_come() -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step in range(4):
        call(kept, step, "cond", guidance=3.5)
    assert policy.errors[2] == pytest.approx(line_error([output(step) for step in range(3)]), rel=1e-4)


def test_error_against_nothing_is_infinite() -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step in range(4):
        call(kept, step, output=torch.zeros(1, 4))
    assert policy.errors[2] == float("inf")


def test_error_of_half_precision_does_not_overflow() -> None:
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step in range(4):
        call(kept, step, output=(output(step) * 1000).half())
    assert 0 < policy.errors[2] < 1


def test_caller_may_write_into_what_it_gets() -> None:
    expected, seen = [], []
    for writes, found in ((False, expected), (True, seen)):
        kept = OutputRun(Laid("xx..xx.x"))
        for step in range(8):
            made, _ = call(kept, step)
            found.append(made.clone())
            if writes:
                made.fill_(float("nan"))
    assert all(torch.equal(one, other) for one, other in zip(expected, seen, strict=True))


def test_memory_is_the_last_outputs_of_each_branch() -> None:
    kept = OutputRun(Laid("xxxxxx.x"))
    size = output(0).numel() * 4
    held = []
    for step in range(8):
        for branch in ("cond", "uncond"):
            call(kept, step, branch)
        held.append(kept.nbytes() // size)
    assert held == [2 * min(step + 1, DEPTH) for step in range(6)] + [2 * DEPTH, 0]


def test_memory_of_a_mixed_error_is_counted() -> None:
    kept = OutputRun(Laid("xxxx"))
    for step in range(2):
        for branch in ("cond", "uncond"):
            call(kept, step, branch, guidance=2.0)
    call(kept, 2, "cond", guidance=2.0)
    assert kept.nbytes() == (5 + 1) * output(0).numel() * 4


class Scheduler:
    """Its step is given what guidance makes of a batch."""

    def step(self, model_output: Tensor) -> Tensor:
        return model_output


def halves(step: int) -> Tensor:
    return torch.cat([output(step, "uncond"), output(step)])


@pytest.mark.parametrize("named", [False, True])
def test_error_of_one_batch_is_that_of_what_the_scheduler_is_given(named: bool) -> None:
    policy, scheduler = Laid("xxxxx"), Scheduler()
    kept = OutputRun(policy)
    for step in range(5):
        kept.decide(at(step), "transformer")
        (made,) = kept.computed("cond", (halves(step),), None, scheduler)
        guided = torch.lerp(*made.chunk(2), 4.0)
        scheduler.step(model_output=guided) if named else scheduler.step(guided)
        assert vars(scheduler) == {}
    guided = [torch.lerp(*halves(step).chunk(2), 4.0) for step in range(4)]
    assert policy.errors[2] == pytest.approx(line_error(guided[:3]), rel=1e-4)
    assert policy.errors[3] == pytest.approx(line_error(guided[1:]), rel=1e-4)


class Correcting(Laid):
    """Puts half of the line into each computed step after a skipped one."""

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:
        if step in nodes and step >= 3:
            return {step: 1.5, nodes[1]: -0.5}
        return super().weights(step, nodes)


def test_error_of_one_batch_that_was_corrected_is_that_of_what_was_computed() -> None:
    policy, scheduler = Correcting("xx.xx"), Scheduler()
    kept = OutputRun(policy)
    for step in range(5):
        if kept.decide(at(step), "transformer").compute:
            (made,) = kept.computed("cond", (halves(step),), None, scheduler)
            guided = torch.lerp(*made.chunk(2), 4.0)
            made.fill_(float("nan"))
            scheduler.step(guided)
    seen = [torch.lerp(*halves(step).chunk(2), 4.0) for step in range(4)]
    line = seen[1] + 2 * (seen[1] - seen[0])
    assert policy.errors[3] == pytest.approx(float((line - seen[3]).norm() / seen[3].norm()), rel=1e-4)


def test_step_that_does_not_come_leaves_the_error_of_one_branch() -> None:
    policy, scheduler = Laid("xxxx"), Scheduler()
    kept = OutputRun(policy)
    for step in range(4):
        kept.decide(at(step), "transformer")
        kept.computed("cond", (halves(step),), None, scheduler)
    assert policy.errors[2] == pytest.approx(line_error([halves(step) for step in range(3)]), rel=1e-4)
    assert vars(scheduler) == {}, "no decision comes after the last step"


@pytest.mark.parametrize("given", [None, 3.0, torch.tensor(1.0), torch.zeros(3, 4), torch.zeros(0, 4)])
def test_step_of_another_form_leaves_the_error_of_one_branch(given: Any) -> None:
    policy, scheduler = Laid("xxxx"), Scheduler()
    kept = OutputRun(policy)
    for step in range(4):
        kept.decide(at(step), "transformer")
        kept.computed("cond", (halves(step),), None, scheduler)
        scheduler.step(given)
    assert policy.errors[2] == pytest.approx(line_error([halves(step) for step in range(3)]), rel=1e-4)


def test_scheduler_that_cannot_be_watched_leaves_the_error_of_one_branch() -> None:
    class Slotted:
        __slots__ = ("__weakref__",)

        def step(self, model_output: Tensor) -> Tensor:
            return model_output

    policy, scheduler = Laid("xxxx"), Slotted()
    kept = OutputRun(policy)
    for step in range(4):
        kept.decide(at(step), "transformer")
        (made,) = kept.computed("cond", (halves(step),), None, scheduler)
        scheduler.step(torch.lerp(*made.chunk(2), 4.0))
    assert policy.errors[2] == pytest.approx(line_error([halves(step) for step in range(3)]), rel=1e-4)


def test_memory_of_what_waits_for_the_scheduler_is_counted() -> None:
    kept, scheduler, size = OutputRun(Laid("xxxxx")), Scheduler(), halves(0).numel() * 4
    for step in range(3):
        kept.decide(at(step), "transformer")
        kept.computed("cond", (halves(step),), None, scheduler)
    assert kept.nbytes() == 4 * size
    kept.beside((output(2),))
    assert kept.nbytes() == 4.5 * size
    scheduler.step(output(2))
    assert kept.nbytes() == 3 * size
    kept.decide(at(3), "transformer")
    kept.computed("cond", (halves(3),), None, scheduler)
    kept.close()
    assert kept.nbytes() == 4 * size
    assert vars(scheduler) == {}


def test_list_of_tensors_comes_back_as_one() -> None:
    kept = OutputRun(Laid("xx."))
    for step in range(2):
        kept.decide(at(step), "transformer")
        kept.computed("cond", ([output(step), output(step, "uncond")],), None)
    kept.decide(at(2), "transformer")
    made = kept.skip("cond")
    assert type(made) is tuple
    assert type(made[0]) is list
    assert torch.allclose(made[0][1], 2 * output(1, "uncond") - output(0, "uncond"))


def test_output_of_another_form_starts_anew() -> None:
    """A list with one tensor fewer, in mid-run: as where Z-Image's guidance ends."""
    policy = Laid("xxxx")
    kept = OutputRun(policy)
    for step, count in enumerate((2, 2, 1, 1)):
        kept.decide(at(step), "transformer")
        made = kept.computed("cond", [output(step)] * count, None)
        assert len(made) == count
