"""One transformer call on its way through the blocks.

A call is computed or skipped as a whole. Computed: the blocks run, and at the end of each list's span
`output - input` goes into the branch's history. Skipped: the span's blocks pass their input through, and the last of
them returns `span input + predicted residual`, whatever it was given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.cached_model import BlockRun, Branch, CachedModel
from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.measuring import Measurement
from sgl_diffusion_accel.caching.blocks.order import BlockOrder
from sgl_diffusion_accel.caching.blocks.parallel import local_part, signal_reduction
from sgl_diffusion_accel.caching.blocks.wiring import Call, elements, form_of
from sgl_diffusion_accel.caching.parts.history import History, Residuals
from sgl_diffusion_accel.caching.parts.output_tensors import take_apart
from sgl_diffusion_accel.caching.parts.policies import Decision, Position
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.intercept import eager
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Where
from sgl_diffusion_accel.slots import Detour, Instead

logger = logging.getLogger(__name__)

# The residual of a run's first step, at the highest noise, is unlike the others. Once two later ones are known it is
# left out of predictions: kept, second order after three steps lost over 10 dB on a small trained model.
_FIRST_OUT = 2


class TransformerCall:
    """One call of a cached transformer.

    Args:
        model: The cached transformer.
        module: The transformer itself.
        where: Where the call is.
    """

    def __init__(self, model: CachedModel, module: nn.Module, where: Where) -> None:
        self._where = where
        self._model = model
        self._parts = model.parts
        self._module = module
        self._key = (model.name, where.branch)
        self._kept = BlockRun.of(where.run)
        self._kept.close()  # the scheduler's step has come, or another branch instead
        self._branch = self._kept.branches.setdefault(self._key, Branch())
        self._decider = model.decider(where, self._kept, self._branch)
        policy, seen = self._decider.policy, self._branch.seen
        self._position = Position(where.step, where.run.total, seen)
        self._following = Position(where.step + 1, where.run.total, seen)
        # Else what is computed is of no further use.
        self._keeps = not where.is_last and policy.may_skip(self._following)
        is_needed = policy.needs_signal and policy.may_skip(self._position)
        self._measurement = Measurement(model, module, where, self._kept, self._branch, is_needed)
        self._order = BlockOrder(model)
        self._decision: Decision | None = None
        self._previous: dict[int, Any] = {}
        self._inputs: dict[int, Entry] = {}
        self._residuals: dict[int, Residuals] = {}
        self._skipped: dict[int, list[Any]] = {}  # what the last block of each list's span is to return, until it does
        self._passing: int | None = None  # the list whose skipped blocks take the short way at present

    @property
    def run(self) -> Run:
        """The run that the call belongs to."""
        return self._where.run

    def before(self, list_index: int, index: int, block: nn.Module, call: Call) -> TransformerCall | Instead:
        """Sees a block's arguments; answers for the block if it is skipped."""
        if self._passing is not None:
            self._end_passing(self._passing)
        self._order.enter(list_index, index)
        blocks = self._parts.layout.lists[list_index]
        wiring = self._model.wiring(self._branch, list_index)
        if not wiring.complete and list_index in self._previous:
            wiring.observe(self._previous[list_index], call)
        self._measurement.before(list_index, index, block, call)
        if not blocks.start <= index < blocks.end:
            return self
        # Not before the span: until here the head has run, and there is something to measure.
        if self._decision is None:
            self._decision = self._decide(call)
        # A list of which nothing could be kept, since its blocks wrote over their input, runs also in a skipped call.
        if not self._decision.compute and list_index in self._branch.histories:
            return Instead(self._skip(list_index, index, call))
        if index == blocks.start and self._keeps:
            self._inputs[list_index] = Entry(call, self._model.writes_inputs)
        return self

    def after(self, list_index: int, index: int, output: Any) -> None:
        """Sees what a computed block returned."""
        blocks = self._parts.layout.lists[list_index]
        if not self._model.wiring(self._branch, list_index).complete:
            # Only while there is something to learn from it: it keeps tensors alive.
            self._previous[list_index] = output
        self._measurement.after(list_index, index, output)
        if list_index in self._inputs:
            # Apart from the last block's: the last one of Stable Diffusion 3 returns no text stream.
            if index == blocks.start < blocks.end - 1:
                self._branch.forms[list_index, False] = form_of(output)
            if index == blocks.end - 1:
                self._record(list_index, output)

    def finish(self, output: Any) -> Any:
        """Puts what was computed into the branch's history, or lets the branch go after its last step.

        Args:
            output: What the transformer has returned.

        Returns:
            The same.
        """
        branch = self._branch
        branch.seen += 1
        if self._passing is not None:
            self._end_passing(self._passing)
        self._order.finish()
        if not self._order.started and not self._model.warned:
            self._model.warned = True
            logger.warning("%s ran without calling its blocks: nothing can be cached.", type(self._module).__name__)
        if self._where.is_last:
            self._kept.branches.pop(self._key, None)
        if self._keeps:
            self._keep(output)
        else:
            branch.forget(branch.signature)
        self._show(output)
        return output

    def _keep(self, output: Any) -> None:
        branch, time = self._branch, self._time()
        if self._decider.policy.needs_error:
            # Before the new residuals are in the history: they would predict themselves.
            self._compare(time, output)
        for list_index, residuals in self._residuals.items():
            history = branch.histories.setdefault(list_index, History(self._parts.predictor.depth))
            history.append(time, residuals)
            # A slope of the first two residuals, at the highest noise, cost up to 9 dB after three steps of warm-up.
            if self._where.step < self._parts.settling:
                history.keep_newest()
            elif branch.recorded == _FIRST_OUT and len(history) > _FIRST_OUT:
                history.drop_oldest()
        branch.recorded += bool(self._residuals)

    def _show(self, output: Any) -> None:
        """Shows the call to who records."""
        recorder, at = self._parts.recorder, (self.run.number, self._where.branch, self._where.step)
        if recorder is not None:
            recorder.saw_output(*at, output)
            residuals = self._hidden_residuals()
            if residuals:
                recorder.saw_residuals(*at, residuals)

    def _hidden_residuals(self) -> list[Tensor]:
        """What each block list has added to the hidden states, as far as it was kept."""
        found = []
        for list_index, residuals in self._residuals.items():
            if any(residual is not None for residual in residuals):
                residual = residuals[self._branch.wirings[list_index].hidden(residuals)]
                found += [] if residual is None else [residual]
        return found

    def abandon(self) -> None:
        """Lets go of all tensors: the call failed, and its traceback may keep this object for long."""
        self._branch.forget()
        for kept in (self._previous, self._inputs, self._residuals, self._skipped):
            kept.clear()
        self._measurement.drop()
        self._decider.forget()
        # Left open, they would answer for the blocks of the next call.
        for detours in self._model.detours:
            for detour in detours:
                detour.close()

    def cut_off(self, output: Any) -> Any:
        """Ends a call whose patch was taken off meanwhile; what it has computed is of no use to later ones.

        Raises:
            UnsupportedModelError: The call was to be skipped, and the rest of its blocks have run on what came in.
        """
        if self._passing is not None:
            self._end_passing(self._passing)
        is_whole = self._decision is None or self._decision.compute or self._order.is_complete
        self.abandon()
        if not is_whole:
            raise UnsupportedModelError(
                f"the cache was taken off {type(self._module).__name__} in the middle of a skipped call, so that its "
                "output is neither predicted nor computed. Remove or replace a patch between the steps of a run, in "
                "callback_on_step_end for example, or between runs."
            )
        return output

    def _decide(self, call: Call) -> Decision:
        branch, decider, measurement = self._branch, self._decider, self._measurement
        policy = decider.policy
        signature = (*_signature(call), self.run.given)
        # A batch shrinks where guidance ends, a ControlNet may begin: what was kept before is of no use then.
        if branch.histories and branch.signature != signature:
            branch.forget()
            self._kept.guided = None
        branch.signature = signature
        if not branch.histories and policy.may_skip(self._position):
            decider.restart(self._position)
            decision = Decision(True, "nothing to reuse")
        else:
            decision = decider.decide(self._position, branch.tally, measurement.change)
            if not decision.compute and not branch.histories:
                # It was not asked whether it may skip, and would: the blocks run, and that is what is noted.
                decision = Decision(True, "nothing to reuse")
        branch.tally = branch.tally.after(decision)
        if self._keeps and policy.needs_signal:
            measurement.keep(decision.compute, policy.may_measure(self._following))
        measurement.drop()
        self._model.log.decided(self._where, decision)
        return decision

    def _record(self, list_index: int, output: Any) -> None:
        entry, parts = self._inputs.pop(list_index), elements(output)
        wiring = self._model.wiring(self._branch, list_index)
        self._branch.forms[list_index, True] = form_of(output)
        if not wiring.complete:
            wiring.settle(entry.call, output)
        # What came in is lost, and with it the residual of this step. From the next call on inputs are copied.
        if self._model.has_written(entry):
            return
        self._residuals[list_index] = tuple(
            _residual(part, wiring.get(entry.call, key), self._module)
            if isinstance(part, Tensor) and key is not None
            else None
            for part, key in zip(parts, wiring.matched(parts), strict=True)
        )

    def _skip(self, list_index: int, index: int, call: Call) -> Any:
        blocks, branch = self._parts.layout.lists[list_index], self._branch
        wiring = branch.wirings[list_index]
        inputs = [None if key is None else wiring.get(call, key) for key in wiring.keys]
        if index == blocks.start:
            # Made now, of new memory: a model may add to what the blocks before the last one return, in place.
            output = branch.forms[list_index, True](self._predict(branch.histories[list_index], inputs))
            self._skipped[list_index] = [output]
        if index == blocks.end - 1:
            return self._skipped.pop(list_index).pop()
        if index == blocks.start:
            inside, last = self._model.detours[list_index]
            inside.open(branch.passing(list_index))
            last.open(_handing_over(self._skipped[list_index], last))
            self._passing = list_index
        return branch.forms[list_index, False](inputs)

    def _end_passing(self, list_index: int) -> None:
        """Notes the blocks of a list that have been passed by since its first one was skipped."""
        self._passing = None
        detours = self._model.detours[list_index]
        self._order.passed(list_index, sum(detour.taken for detour in detours))
        for detour in detours:
            detour.close()

    def _time(self) -> float:
        """When this call is, in the predictor's clock."""
        step = self._where.step
        return self.run.sigmas()[step] if self._parts.spacing == "sigma" else float(step)

    def _compare(self, time: float, output: Any) -> None:
        """Tells the policy what would have been predicted, beside what was computed."""
        predicted, computed = [], []
        for list_index, residuals in self._residuals.items():
            history = self._branch.histories.get(list_index)
            # With one step known Taylor can only reuse; that error says nothing of the line that it will follow.
            if history is None or len(history) < min(self._parts.predictor.depth, 2):
                return
            if all(residual is None for residual in residuals):
                continue
            hidden = self._branch.wirings[list_index].hidden(residuals)
            guess = history.combine(hidden, self._model.weights(history.times, time))
            residual = residuals[hidden]
            if guess is not None and residual is not None:
                predicted.append(guess)
                computed.append(residual)
        where, reduce = self._where, signal_reduction(self._module)
        guesses, residuals_ = tuple(predicted), tuple(computed)
        self._decider.compare(where.step, where.branch, guesses, residuals_, where.run.guidance, reduce)
        self._kept.await_step(self._decider, where.run.scheduler, take_apart(output)[0], guesses, residuals_)

    def _predict(self, history: History, inputs: list[Any]) -> list[Any]:
        weights = self._model.weights(history.times, self._time())
        outputs = []
        for index, entering in enumerate(inputs):
            residual = history.combine(index, weights)
            if residual is not None:
                entering = local_part(entering, residual, self._module).to(residual.device) + residual
            outputs.append(entering)
        return outputs


def _handing_over(waiting: list[Any], detour: Detour) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Returns what the last skipped block of a span answers: what waits for it, once."""

    def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
        # At once: a second call of this block is out of turn, and has to come to `BlockOrder`.
        detour.answer = None
        return waiting.pop()

    return eager(answer)


def _residual(output: Tensor, entering: Tensor, transformer: nn.Module) -> Tensor | None:
    if output is entering:
        return None
    entering = local_part(entering, output, transformer)
    if output.shape != entering.shape:
        raise UnsupportedModelError(
            f"a block list takes {list(entering.shape)} and returns {list(output.shape)}: there is no residual to "
            "keep. This model cannot be cached."
        )
    return output - entering.to(output.device)


def _signature(call: Call) -> tuple[Any, ...]:
    values = (*call[0], *call[1].values())
    return tuple((value.shape, value.dtype, value.device) for value in values if isinstance(value, Tensor))
