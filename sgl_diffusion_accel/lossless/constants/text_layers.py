"""Keeps the keys and values that blocks make of the text, where they are the same in each call of a run.

In cross-attention the picture looks at the text: keys and values are made of that alone. Whether a block is given the
very output that a constant part has made of the prompt is seen by the tensor itself. Where a block has changed it
before, by the timestep for example, it is another one, and is computed.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sgl_diffusion_accel.intercept import release
from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import KIND, is_context_parallel
from sgl_diffusion_accel.lossless.constants.constant import Constant, Constants
from sgl_diffusion_accel.lossless.constants.kept import Call, LayerOutput, Present
from sgl_diffusion_accel.lossless.constants.part_state import are_moved, layers_of
from sgl_diffusion_accel.lossless.constants.worth import LEAST_SHARE, MOST_BYTES, Worth
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Instead
from sgl_diffusion_accel.targets import Target, is_in_compiled_wrapper

_COMPILED = "its blocks are compiled, and a layer that is left out would cut their graphs into pieces"
_DIVIDED = "its tokens are divided over several devices (context parallelism)"
_MOVED = "offloading moves the weights of its layers in each call"
_OTHERS = "for such reasons with other figures"
_MOST_REMARKS = 8
"""That are counted apart: a service sees pictures of all sizes for weeks."""


class _Layer(NamedTuple):
    """A layer that is given the text."""

    part: str
    name: str
    owner: weakref.ref[nn.Module]
    innermost: weakref.ref[nn.Module]


class TextLayers:
    """The layers of one transformer's blocks that are given the text.

    Args:
        target: The transformer.
        constants: What is told of its class.
        present: The call that is under way.
        verify: Makes the first of what is kept once more, and raises where that differs; None verifies none.

    Attributes:
        computed: How often keys or values were computed.
        spared: How often they were not.
        remarks: Why nothing was kept, with how many calls.
    """

    def __init__(self, target: Target, constants: Constants, present: Present, verify: Verification | None) -> None:
        self.present = present
        self.computed = self.spared = 0
        self.remarks: Counter[str] = Counter()
        self.verify = verify
        self._module = weakref.ref(target.module)
        self._constants = constants
        self._texts = {each.part: each.of[0] for each in constants.parts}
        self._worth = Worth(target.module, constants)
        self._layers = [
            _Layer(constant.part, name, weakref.ref(owner), weakref.ref(layers_of(layer)[-1]))
            for block in self._blocks
            for constant in constants.parts
            for owner, name, layer in _found_in(block, constant)
        ]
        self._most_bytes = 0
        self._share = 0.0
        self._patch: weakref.ref[Patch] | None = None
        self._is_attached = False
        self._lock = threading.Lock()

    @property
    def _blocks(self) -> list[nn.Module]:
        module = self._module()
        blocks: Any = module.get_submodule(self._constants.blocks) if module is not None else ()
        return list(blocks)

    @property
    def hindrance(self) -> str:
        """Why the layers must be called; empty where they need not."""
        blocks = self._blocks
        if any(_is_compiled(block) for block in blocks):
            self.release()
            return _COMPILED
        module = self._module()
        if module is not None and is_context_parallel(module):
            return _DIVIDED
        first = [*blocks[:1], *(owner for each in self._layers[:1] if (owner := each.owner()) is not None)]
        return _MOVED if are_moved(first) else ""

    def belong_to(self, patch: Patch) -> None:
        """Tells the patch, of which something is to stand in front of the layers once that is of use."""
        self._patch = weakref.ref(patch)

    def attach(self) -> None:
        """Puts something in front of the layers, before the first call that is worth it: until then it costs none."""
        with self._lock:
            patch = self._patch() if self._patch is not None else None
            if self._is_attached or patch is None or not patch.is_in_place:
                return
            self._is_attached = True
            for each in self._layers:
                layer = each.innermost()
                if layer is not None:
                    patch.intercept(layer, KeptLayer(patch, self, each))

    def release(self) -> None:
        """Takes what stands in front of the layers away, for good."""
        for each in self._layers:
            layer = each.innermost()
            if layer is not None:
                release(layer, KIND)

    def may_pay(self, given: Mapping[str, Any]) -> bool:
        """Whether a call may be worth it, before its text is cut.

        Args:
            given: Its arguments that the constants name.
        """
        remark = self.hindrance
        if not remark:
            texts = {part: _tokens(given.get(name)) for part, name in self._texts.items()}
            share = self._worth.share(texts, given)
            remark = _too_little(share) if share < LEAST_SHARE else ""
        if remark:
            self._note(remark)
        return not remark

    def decide(self, call: Call, part: str, output: Tensor) -> None:
        """Decides whether a branch's keys and values are kept, once its text is there as the blocks are given it.

        Args:
            call: The call.
            part: The part of the transformer that has come to its end.
            output: What it gave.
        """
        branch = call.branch
        branch.forget_layers(part)
        branch.planned[part] = self._worth.nbytes(part, output)
        texts = {name: _tokens(call.values.get(text)) for name, text in self._texts.items()}
        branch.tokens[part] = _tokens(output)
        share = self._worth.share(texts | branch.tokens, call.values)
        total = sum(each.planned_bytes() for each in call.outputs.by_branch.values())
        if share < LEAST_SHARE:
            remark = _too_little(share)
        elif total > self._worth.most_bytes:
            remark = (
                f"a run would hold {total / 2**20:,.0f} MiB of keys and values, more than {MOST_BYTES:.0%} of the "
                "transformer's weights"
            )
        else:
            self._share, self._most_bytes = share, max(self._most_bytes, total)
            return
        self._leave_alone(call, remark)

    def give_up(self, call: Call) -> None:
        """Keeps nothing of a branch whose second call is of another text, or with other weights: so may be the next."""
        self._leave_alone(call, "the text or weights of the second call of their branch were others than of the first")

    def _leave_alone(self, call: Call, remark: str) -> None:
        self._note(remark)
        call.branch.leave_alone()
        self.present.call = None

    def _note(self, remark: str) -> None:
        self.remarks[remark if remark in self.remarks or len(self.remarks) < _MOST_REMARKS else _OTHERS] += 1

    def check(self, call: Call, layer: _Layer, kept: Tensor, made: Tensor) -> None:
        """Verifies that a layer gives what is kept of it.

        Raises:
            LosslessError: It gives something else.
        """
        module = self._module()
        if self.verify is not None and module is not None:
            self.verify.kept(module, layer.name, kept, made)
        call.branch.verified.add(layer)

    def lines(self) -> list[str]:
        """What was kept, and why nothing was."""
        lines = [f"text keys and values not kept, {count} times: {why}" for why, count in self.remarks.items()]
        if self.computed:
            lines.insert(
                0,
                f"text keys and values computed {self.computed} times, reused {self.spared} times: an estimated "
                f"{self._share:.1%} of a call's work, {self._most_bytes / 2**20:,.0f} MiB a run",
            )
        return lines


class KeptLayer(PatchHandler):
    """Stands in front of one layer, and answers for it from the second call of a run and branch on.

    Args:
        patch: The patch that it belongs to.
        texts: All such layers of the transformer.
        layer: The layer.

    Attributes:
        part: The part of the transformer that gives the text.
    """

    is_inmost = True

    def __init__(self, patch: Patch, texts: TextLayers, layer: _Layer) -> None:
        self.patch = patch
        self._texts, self._layer = texts, layer
        self.part = layer.part
        self._present, self._owner = texts.present, layer.owner
        self._name = layer.name.rpartition(".")[2]

    def enter(self, layer: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
        """Answers with what is kept."""
        call = self._present.call
        if call is None or not args:
            return None
        text = args[0]  # all layers are given the same one, in most models
        if call.texts.get(self.part) is not text and not call.is_constant(self.part, text):
            return None
        kept = call.branch.layers.get(self)
        if kept is not None and kept.is_still(layer, self._top()):
            if self._texts.verify is not None and self._layer not in call.branch.verified:
                return call, kept.output
            self._texts.spared += 1
            return Instead(kept.output)
        return call, None

    def _top(self) -> nn.Module | None:
        owner = self._owner()
        return owner._modules.get(self._name) if owner is not None else None

    def leave(self, layer: nn.Module, token: tuple[Call, Tensor | None] | None, output: Any) -> Any:
        """Keeps what was computed."""
        if token is None or not isinstance(output, Tensor):
            return output
        call, kept = token
        if kept is not None:
            self._texts.check(call, self._layer, kept, output)
        self._texts.computed += 1
        if not are_moved([layer]) and not layer._forward_hooks and not layer._forward_pre_hooks:
            call.branch.layers[self] = LayerOutput(layer, self._top(), output)
        return output

    def fail(self, _: nn.Module, __: Any) -> None:
        """Nothing: the transformer's own handler ends the call."""


def _found_in(block: nn.Module, constant: Constant) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The layers of a block that are given a constant part's output: what has them, their names, the layers."""
    for name in constant.layers:
        path, _, last = name.rpartition(".")
        owner = block.get_submodule(path)
        yield owner, name, getattr(owner, last)


def _is_compiled(block: nn.Module) -> bool:
    return vars(block).get("_compiled_call_impl") is not None or is_in_compiled_wrapper(block)


def _tokens(text: Any) -> int:
    return text.numel() // (text.shape[0] * text.shape[-1]) if isinstance(text, Tensor) and text.numel() else 0


def _too_little(share: float) -> str:
    return f"an estimated {share:.1%} of a call's work, less than {LEAST_SHARE:.1%}"
