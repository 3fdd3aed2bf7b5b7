"""Where the attention calls of a component go: to the backend, or where it cannot take them to PyTorch's own."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.first_calls import FirstCalls
from sgl_diffusion_accel.attention.backends.kernels import Kernel
from sgl_diffusion_accel.attention.backends.registry import all_backends
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts, facts_of
from sgl_diffusion_accel.attention.underway import UnderWay
from sgl_diffusion_accel.errors import UnsupportedModelError

OnUnsupported = Literal["error", "native"]

LAYER = "_sgl_diffusion_accel_layer"
"""Attribute of a redirected processor that holds the name of its layer."""


_WITHOUT_HEADS = 3  # dimensions
_MOST_FRAMES = 12  # between a processor and what asks for the name of its layer, with helpers that it calls


class Choice(Protocol):
    """Picks the backend for a call."""

    def pick(self, facts: AttentionFacts, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> Backend:
        """Returns a backend that can take the call."""


class Redirect:
    """The attention of one component.

    Args:
        component: The component's name, for errors.
        backend: The backend; None where `choice` picks one for each kind of call.
        on_unsupported: What happens to calls that the backend cannot take.
        verify: Checks first calls: takes (layer, backend, output, sides, arguments), raises if wrong. None checks none.
        by_layer: Whether those of each layer are checked, or those of the component. See `FirstCalls`.
        choice: Picks the backend.

    Attributes:
        is_on: Whether the redirect is in place; not once its patch is removed.
        call: The call of the component that is under way in this thread, and whether it uses the backend.
        was_traced: Whether an attention call came in compiled code, where none is counted.
        calls: Calls that went to a backend, by its name. Calls in compiled code are not counted.
        fallbacks: Calls that went to PyTorch's own attention, by (layer, reason).
    """

    def __init__(
        self,
        component: str,
        backend: Backend | None,
        on_unsupported: OnUnsupported,
        verify: Callable[..., None] | None = None,
        choice: Choice | None = None,
        by_layer: bool = True,
    ) -> None:
        self.component = component
        self.backend = backend
        self.is_on = True
        self.call = UnderWay()
        self.was_traced = False
        self.calls: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()  # of the counters
        self._on_unsupported = on_unsupported
        self._first = None if verify is None else FirstCalls(verify, by_layer)
        self._choice = choice
        self._kernels: dict[str, Kernel] = {} if backend is None else {backend.name: backend.load()}
        self._kernel = None if backend is None else self._kernels[backend.name]

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stands for `torch.nn.functional.scaled_dot_product_attention`."""
        self._notice()

        def native() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        if query.ndim == _WITHOUT_HEADS:  # some VAEs leave the heads out
            sides = (query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
            mask = attn_mask.unsqueeze(1) if isinstance(attn_mask, Tensor) and attn_mask.ndim > 2 else attn_mask
            return self._attend(
                sides, mask, dropout_p, is_causal, scale, enable_gqa, lambda: native().unsqueeze(1)
            ).squeeze(1)
        if query.ndim != _WITHOUT_HEADS + 1:
            return self._fall_back(f"the query has {query.ndim} dimensions", native)
        return self._attend((query, key, value), attn_mask, dropout_p, is_causal, scale, enable_gqa, native)

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        """Stands for diffusers' `dispatch_attention_fn`, whose tensors are `[B, S, H, D]`."""
        self._notice()

        def native() -> Tensor:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            output: Tensor = dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **more
            )
            return output

        if more.get("parallel_config") is not None:
            return self._fall_back("the tokens are divided over several devices (context parallelism)", native)
        if attention_kwargs:
            return self._fall_back(f"the model passes {', '.join(attention_kwargs)} to its own backend", native)
        mask = attn_mask
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
            mask = mask[:, None, None, :]  # one entry a key, as diffusers means it
        sides = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self._attend(sides, mask, dropout_p, is_causal, scale, enable_gqa, native, transposed=True)

    def _notice(self) -> None:
        """Notes that an attention call of a redirected layer has come."""
        if torch.compiler.is_compiling():
            self._note_traced()
        else:
            self.call.seen += 1

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _note_traced(self) -> bool:
        """Runs once, while the code is traced, and never in the compiled code."""
        self.was_traced = True
        return True

    @property
    def was_unverified(self) -> bool:
        """Whether calls should have been verified that came in compiled code, where none can be."""
        return self.was_traced and self._first is not None

    def counts(self) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """Copies of `calls` and `fallbacks`, which other threads may be adding to."""
        with self._lock:
            return dict(self.calls), dict(self.fallbacks)

    def _attend(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        native: Callable[[], Tensor],
        transposed: bool = False,
    ) -> Tensor:
        # Somebody may have kept a redirected processor longer than the patch lasted.
        if not (self.is_on and self.call.is_on):
            return native()
        sides = _broadcast(_autocast(sides), enable_gqa)
        facts = facts_of(sides[0], sides[1], mask, dropout_p, is_causal, enable_gqa)
        more = {"mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": bool(facts.enable_gqa)}
        backend = self.backend
        if backend is None:
            if facts.mask == "other" or dropout_p > 0:
                return self._fall_back("there is a mask that is no tensor, or dropout", native, None, facts)
            backend = self._pick(facts, sides, more)
        reason = backend.requirements.refuses(facts)
        if reason is not None:
            return self._fall_back(reason, native, backend, facts)
        if dropout_p > 0:  # PyTorch's own has it
            return native()
        output = self._kernel_of(backend)(*sides, **more)
        # A lock, or a value that is looked at, would break the graph.
        if not torch.compiler.is_compiling():
            self._seen(backend, output, sides, more)
        return output.transpose(1, 2) if transposed else output

    def _pick(self, facts: AttentionFacts, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> Backend:
        if self._choice is None:
            raise RuntimeError("a redirect needs a backend, or something that picks one")
        return self._choice.pick(facts, sides, more)

    def _kernel_of(self, backend: Backend) -> Kernel:
        if self._kernel is not None:
            return self._kernel
        if backend.name not in self._kernels:
            self._kernels[backend.name] = backend.load()
        return self._kernels[backend.name]

    def _seen(self, backend: Backend, output: Tensor, sides: tuple[Tensor, ...], more: dict[str, Any]) -> None:
        with self._lock:
            self.calls[backend.name] += 1
        if self._first is not None:
            # Found only if it is asked for: the walk takes longer than a kernel's start.
            self._first.check(lambda: layer_in_call(self.component), backend, output, sides, more)

    def _fall_back(
        self,
        reason: str,
        native: Callable[[], Tensor],
        backend: Backend | None = None,
        facts: AttentionFacts | None = None,
    ) -> Tensor:
        if self._on_unsupported == "error":
            if torch.compiler.is_compiling():  # the compiler can trace no more than a plain message
                raise UnsupportedModelError(f"an attention call of {self.component} cannot be taken: {reason}")
            raise UnsupportedModelError(self._refusal(reason, backend or self.backend, facts))
        if not torch.compiler.is_compiling():
            layer = layer_in_call(self.component)
            with self._lock:
                self.fallbacks[layer, reason] += 1
        return native()

    def _refusal(self, reason: str, backend: Backend | None, facts: AttentionFacts | None) -> str:
        name = "auto" if backend is None else backend.name
        others = "sdpa"
        if facts is not None:
            fit = [
                each.name
                for each in all_backends().values()
                if not (each.lacks() or each.requirements.refuses(facts) or each.would_fetch())
            ]
            others = ", ".join(fit) or others
        layer = layer_in_call(self.component)
        return (
            f"the attention backend {name!r} cannot take a call of {layer}: {reason}. Usable there: {others}. Or send "
            "such calls to PyTorch's own attention: set_attention_backend(..., on_unsupported='native'); or leave the "
            "layer out with layers=."
        )


def _autocast(sides: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast would do to the sides of PyTorch's own function; it does not know the backends."""
    kind = sides[0].device.type
    if not torch.is_autocast_enabled(kind):
        return sides
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (side if side.dtype == torch.float64 else side.to(dtype) for side in sides)
    return query, key, value


def _broadcast(sides: tuple[Tensor, Tensor, Tensor], enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sides that are shared by the batch or by the heads, given to each, as PyTorch's own function does."""
    query, key, value = sides
    if query.shape[0] == key.shape[0] == value.shape[0] and (enable_gqa or query.shape[1] == key.shape[1]):
        return sides
    batch = max(side.shape[0] for side in sides)
    heads = [side.shape[1] if enable_gqa else max(side.shape[1] for side in sides) for side in sides]
    query, key, value = (side.expand(batch, n, -1, -1) for side, n in zip(sides, heads, strict=True))
    return query, key, value


def layer_in_call(component: str) -> str:
    """The name of the layer whose processor is calling, found on the stack; the component's where there is none."""
    frame = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        # Asked of the code first: reading a frame's locals makes a snapshot of all of them.
        if frame.f_code.co_varnames[:1] == ("self",):
            layer = getattr(frame.f_locals.get("self"), LAYER, None)
            if layer is not None:
                return f"{component}.{layer}"
    return component
