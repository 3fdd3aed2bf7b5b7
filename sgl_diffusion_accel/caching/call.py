"""One transformer call on its way through the blocks.

A call is computed or skipped as a whole. Computed: the blocks run, and at the end of each list's span
`output - input` goes into the branch's history. Skipped: the span's blocks pass their input through, and the last of
them returns `span input + predicted residual`, whatever it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks import Layout, find_block_lists
from sgl_diffusion_accel.caching.history import History, Residuals
from sgl_diffusion_accel.caching.parallel import local_part, signal_reduction
from sgl_diffusion_accel.caching.policies import Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.predictors import Predictor
from sgl_diffusion_accel.caching.runs import Run
from sgl_diffusion_accel.caching.signals import Signal, relative_l1
from sgl_diffusion_accel.caching.stats import RunStats
from sgl_diffusion_accel.caching.wiring import Call, Wiring, argument, elements
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.intercept import Instead

Spacing = Literal["step", "sigma"]


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a cache on one transformer.

    Attributes:
        layout: The span that is skipped.
        policy: Decides.
        predictor: Supplies what the skipped blocks would have added.
        signal: What the policy's changes are measured on; None for a policy that needs none.
        spacing: The predictor's clock: steps, or the scheduler's sigmas.
    """

    layout: Layout
    policy: Policy
    predictor: Predictor
    signal: Signal | None
    spacing: Spacing = "step"


@dataclass
class Branch:
    """What is kept of one branch while its run lasts."""

    depth: int
    seen: int = 0
    tally: Tally = field(default_factory=Tally)
    signal: Tensor | None = None
    signature: tuple[Any, ...] = ()
    histories: dict[int, History] = field(default_factory=dict)

    def forget(self, signature: tuple[Any, ...]) -> None:
        """Starts over for inputs of another shape, dtype or device."""
        self.signature, self.signal, self.tally = signature, None, Tally()
        self.histories.clear()

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        signal = 0 if self.signal is None else self.signal.numel() * self.signal.element_size()
        return signal + sum(history.nbytes() for history in self.histories.values())


class CachedModel:
    """A transformer under a cache, and what has been learned of it.

    Args:
        name: The component's name.
        module: The transformer.
        parts: What the cache is made of.

    Attributes:
        wirings: For each block list, which output feeds which argument.
        forms: How the blocks of a list put their output together; by (list, whether it is the span's last block).
    """

    def __init__(self, name: str, module: nn.Module, parts: Parts) -> None:
        self.name = name
        self.parts = parts
        self.wirings = [
            Wiring(list(inspect.signature(blocks[0].forward).parameters), f"{type(module).__name__}.{list_name}")
            for list_name, blocks in find_block_lists(module).items()
        ]
        self.forms: dict[tuple[int, bool], Callable[[list[Any]], Any]] = {}

    def log(self, run: Run, step: int, branch: str, decision: Decision) -> None:
        """Enters a decision into the statistics of its run."""
        stats: RunStats | None = run.data.get("stats")
        if stats is not None:
            layout = self.parts.layout
            executed = layout.total - (0 if decision.compute else layout.skippable)
            stats.add(branch, step, self.name, decision, executed, layout.total)


class TransformerCall:
    """One call of a cached transformer.

    Args:
        model: The cached transformer.
        module: The transformer itself.
        run: The run that the call belongs to.
        step: Index of the denoising step.
        branch: Name of the branch.
    """

    def __init__(self, model: CachedModel, module: nn.Module, run: Run, step: int, branch: str) -> None:
        self.run = run
        self._model = model
        self._parts = parts = model.parts
        self._module = module
        self._key = (model.name, branch)
        self._branch: Branch = run.data.setdefault(self._key, Branch(parts.predictor.depth))
        self._position = Position(step, run.total, self._branch.seen)
        if self._branch.seen == 0:
            parts.policy.prepare(run.total)
        self._last = step >= run.total - 1
        following = replace(self._position, step=step + 1)
        self._keeps = not self._last and parts.policy.may_skip(following)  # else what is computed is of no further use
        self._decision: Decision | None = None
        self._previous: dict[int, Any] = {}
        self._inputs: dict[int, Call] = {}
        self._residuals: dict[int, Residuals] = {}
        self._skipped: dict[int, list[Any]] = {}
        self._head: tuple[Call, Any] | None = None
        self._signal: Tensor | None = None

    def before(self, list_index: int, index: int, call: Call) -> TransformerCall | Instead:
        """Sees a block's arguments; answers for the block if it is skipped."""
        blocks = self._parts.layout.lists[list_index]
        wiring = self._model.wirings[list_index]
        if not wiring.complete and list_index in self._previous:
            wiring.observe(self._previous[list_index], call)
        if list_index == 0 and index == 0 and self._parts.layout.fn:
            self._head = (call, None)
        if not blocks.start <= index < blocks.end:
            return self
        if self._decision is None:
            self._decision = self._decide(call)
        if not self._decision.compute and list_index in self._branch.histories:
            return Instead(self._skip(list_index, index, call))
        if index == blocks.start and self._keeps:
            self._inputs[list_index] = call
        return self

    def after(self, list_index: int, index: int, output: Any) -> None:
        """Sees what a computed block returned."""
        blocks = self._parts.layout.lists[list_index]
        if not self._model.wirings[list_index].complete:
            self._previous[list_index] = output
        if list_index == 0 and index == self._parts.layout.fn - 1 and self._head is not None:
            self._head = (self._head[0], output)
        if list_index in self._inputs:
            if index == blocks.start < blocks.end - 1:
                self._model.forms[list_index, False] = _form_of(output)
            if index == blocks.end - 1:
                self._record(list_index, output)

    def finish(self) -> None:
        """Puts what was computed into the branch's history, or lets the branch go after its last step."""
        branch, data = self._branch, self.run.data
        branch.seen += 1
        if self._skipped:
            raise UnsupportedModelError(
                f"{type(self._module).__name__} did not call the last block of a list: its output is not usable. "
                "This model cannot be cached."
            )
        if self._last:
            data.pop(self._key, None)
        if not self._keeps:
            branch.forget(branch.signature)
            return
        time = float(self._position.step)
        if self._parts.spacing == "sigma":
            time = self.run.sigmas()[self._position.step]
        for list_index, residuals in self._residuals.items():
            branch.histories.setdefault(list_index, History(branch.depth)).append(time, residuals)

    def abandon(self) -> None:
        """Lets go of all tensors: the call failed, and its traceback may keep this object for long."""
        self._branch.forget(())
        for kept in (self._previous, self._inputs, self._residuals, self._skipped):
            kept.clear()
        self._head = self._signal = None

    def _decide(self, call: Call) -> Decision:
        branch, policy = self._branch, self._parts.policy
        signature = _signature(call)
        if branch.signature != signature:
            branch.forget(signature)
        if not branch.histories and policy.may_skip(self._position):
            decision = Decision(True, "nothing to reuse")
        else:
            decision = policy.decide(self._position, branch.tally, self._change)
        branch.tally = branch.tally.after(decision)
        if decision.compute and self._keeps and policy.needs_signal:
            branch.signal = self._take_signal()
        self._signal = self._head = None
        self._model.log(self.run, self._position.step, self._key[1], decision)
        return decision

    def _change(self) -> float:
        now, reference = self._take_signal(), self._branch.signal
        if reference is None:
            return float("inf")
        return relative_l1(now, reference, signal_reduction(self._module))

    def _take_signal(self) -> Tensor:
        if self._signal is None:
            if self._head is None or self._parts.signal is None:
                raise UnsupportedModelError("the first blocks did not run in the order in which the model defines them")
            call, output = self._head
            wiring, parts = self._model.wirings[0], elements(output)
            if not wiring.complete:
                wiring.settle(call, output)
            index = wiring.hidden(parts)
            key = wiring.keys[index]
            before = argument(call, key) if key is not None else parts[index]
            self._signal = self._parts.signal.take(local_part(before, parts[index], self._module), parts[index])
        return self._signal

    def _record(self, list_index: int, output: Any) -> None:
        wiring, call, parts = self._model.wirings[list_index], self._inputs.pop(list_index), elements(output)
        if not wiring.complete:
            wiring.settle(call, output)
        self._model.forms[list_index, True] = _form_of(output)
        self._residuals[list_index] = tuple(
            _residual(part, argument(call, key), self._module) if isinstance(part, Tensor) and key is not None else None
            for part, key in zip(parts, wiring.keys, strict=True)
        )

    def _skip(self, list_index: int, index: int, call: Call) -> Any:
        blocks, model = self._parts.layout.lists[list_index], self._model
        inputs = [None if key is None else argument(call, key) for key in model.wirings[list_index].keys]
        if index == blocks.start:
            # Made now, of new memory: a model may add to what the blocks before the last one return, in place.
            self._skipped[list_index] = self._predict(self._branch.histories[list_index], inputs)
        if index == blocks.end - 1:
            return model.forms[list_index, True](self._skipped.pop(list_index))
        return model.forms[list_index, False](inputs)

    def _predict(self, history: History, inputs: list[Any]) -> list[Any]:
        position = self._position.step
        target = self.run.sigmas()[position] if self._parts.spacing == "sigma" else float(position)
        weights = self._parts.predictor.weights(history.times, target)
        outputs = []
        for index, entering in enumerate(inputs):
            residual = history.combine(index, weights)
            if residual is None:
                outputs.append(entering)
            else:
                outputs.append(local_part(entering, residual, self._module).to(residual.device) + residual)
        return outputs


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


def _form_of(output: Any) -> Callable[[list[Any]], Any]:
    """Returns how to put the parts of a block's output together again, in the form in which the block returns them."""
    parts = elements(output)
    strange = [type(part).__name__ for part in parts if part is not None and not isinstance(part, Tensor)]
    if strange:
        raise UnsupportedModelError(
            f"a block returns a {strange[0]}; only tensors, and tuples or lists of them, can be cached."
        )
    if isinstance(output, Tensor):
        dtype = output.dtype
        return lambda values: values[0].to(dtype)
    present = [part is not None for part in parts]
    dtypes = [part.dtype if part is not None else None for part in parts]
    kind = list if isinstance(output, list) else tuple
    return lambda values: kind(
        value.to(dtype) if there and isinstance(value, torch.Tensor) else None
        for value, dtype, there in zip(values, dtypes, present, strict=True)
    )
