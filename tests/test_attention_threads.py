"""Threads that share a model with an attention backend: each call has its own steps, and no count is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from invariants.families import present
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.backends.requirements import facts_of
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice
from sgl_diffusion_accel.attention.redirect import Redirect
from sgl_diffusion_accel.attention.select import set_attention_backend
from sgl_diffusion_accel.attention.underway import UnderWay
from zoo import Family

torch.set_num_threads(1)


def half(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Something else than attention, so that where it ran is seen."""
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1) * 0.5


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("half", half, mask_and_causal=True)


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each piece of work returns, all of them begun at once; the first error is raised."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def sharing(family: Family, count: int) -> list[Any]:
    """Pipelines with one transformer, each with a scheduler of its own."""
    pipes = [family.make() for _ in range(count)]
    for pipe in pipes[1:]:
        pipe.transformer = pipes[0].transformer
    return pipes


def test_eight_threads_that_share_a_transformer_with_steps_left_out() -> None:
    """Runs of several lengths, so that at any time some threads are inside of the steps left out and some outside."""
    family = present("wan")
    pipes = sharing(family, 8)
    patch = set_attention_backend(pipes[0], "half", skip_first_steps=2, skip_last_steps=1)
    works = [
        lambda pipe=pipe, seed=seed: family.run(pipe, seed=seed, steps=4 + seed % 3) for seed, pipe in enumerate(pipes)
    ]
    expected = [work() for work in works]
    once = patch.calls["transformer"]["half"]
    for _ in range(2):
        outputs = in_threads(works)
        assert [torch.equal(*pair) for pair in zip(outputs, expected, strict=True)] == [True] * 8
    assert patch.calls["transformer"] == {"half": 3 * once}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_in_threads_take_what_their_own_thread_has() -> None:
    """Two graphs, for steps with and without the backend; which one a call takes is asked in the thread that calls."""
    family = present("wan")
    pipes = sharing(family, 4)
    set_attention_backend(pipes[0], "half", skip_first_steps=2)
    graphs: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    pipes[0].transformer.compile_repeated_blocks(fullgraph=True, backend=compiler)
    works = [
        lambda pipe=pipe, seed=seed: family.run(pipe, seed=seed, steps=4 + seed % 2) for seed, pipe in enumerate(pipes)
    ]
    expected = [work() for work in works]
    assert len(graphs) == 2
    for _ in range(3):
        outputs = in_threads(works)
        assert [torch.equal(*pair) for pair in zip(outputs, expected, strict=True)] == [True] * 4
    # Not that there are two graphs still: threads that meet in the compiler's cache now and then make it compile again.
    assert not torch._dynamo.utils.counters["graph_break"]


def test_text_encoder_in_threads_beside_a_transformer_with_steps_left_out() -> None:
    """It has no steps, and its redirect holds in the thread that calls it alone."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    encoder = CLIPTextModel._from_config(config, attn_implementation="sdpa").eval()
    family = present("wan")
    pipe = family.make()
    pipe.register_modules(text_encoder=encoder)
    tokens = torch.randint(64, (4, 1, 9))
    patch = set_attention_backend(pipe, {"text_encoder": "half", "transformer": "half"}, skip_first_steps=1)
    works: list[Callable[[], Tensor]] = [
        lambda: family.run(pipe, steps=3),
        *(lambda row=row: torch.stack([encoder(row).last_hidden_state for _ in range(20)]) for row in tokens),
    ]
    with torch.no_grad():
        expected = [work() for work in works]
        once = patch.calls
        assert once["text_encoder"] == {"half": 2 * 20 * 4}
    for _ in range(2):
        outputs = in_threads([torch.no_grad()(work) for work in works])
        assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert patch.calls == {name: {"half": 3 * calls["half"]} for name, calls in once.items()}


def test_no_call_is_lost_in_counting_and_each_kind_is_verified_once() -> None:
    verified: list[str] = []
    one = Redirect(
        "transformer",
        Backend("half", lambda: half),
        "native",
        lambda layer, *_: verified.append(layer),
    )
    sides = tuple(torch.randn(1, 1, 2, 4) for _ in range(3))

    def work() -> None:
        for _ in range(400):
            one.sdpa(*sides)
            one.sdpa(*sides, dropout_p=0.5)

    in_threads([work] * 8)
    assert one.calls == {"half": 3200}
    assert one.fallbacks == {("transformer", "it has no dropout"): 3200}
    assert 1 <= len(verified) <= 8, "at most once by each thread that came before the first was done"


def test_auto_measures_a_kind_of_call_once_and_all_threads_take_its_choice() -> None:
    choice = MeasuredChoice(allow_quantised=False, store=None)
    measured: list[Any] = []
    find = choice._find
    choice._find = lambda *given: (measured.append(given), find(*given))[1]  # type: ignore[method-assign]
    sides = tuple(torch.randn(1, 2, 8, 16) for _ in range(3))
    more = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    facts = facts_of(sides[0], sides[1], None, 0.0, False, False)
    picked = in_threads([lambda: choice.pick(facts, sides, more).name] * 8)  # type: ignore[arg-type]
    assert len(measured) == 1
    assert len(set(picked)) == 1


# The call that is under way


def test_each_thread_has_its_own_call_and_a_nested_one_puts_back_what_was() -> None:
    call = UnderWay()
    outer = call.begin(False)
    call.seen += 2
    inner = call.begin(True)
    call.seen += 1
    assert in_threads([lambda: (call.is_on, call.seen, call.is_inside)]) == [(True, 0, False)]
    assert call.end(inner) == 1
    assert (call.is_on, call.seen, call.is_inside) == (False, 2, True)
    assert call.end(outer) == 2
    assert (call.is_on, call.seen, call.is_inside) == (True, 0, False)


def test_call_whose_end_was_never_reached_disturbs_no_later_one() -> None:
    """Where Ctrl-C strikes between the beginning of a call and what puts things back."""
    family = present("wan")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half", skip_first_steps=1)
    expected = family.run(pipe, steps=3)
    (redirect,) = patch._redirects.values()
    for is_on in (True, False):
        redirect.call.begin(is_on)
        assert torch.equal(family.run(pipe, steps=3), expected)


def test_call_that_fails_puts_back_what_was() -> None:
    """Outside of a call of the transformer its layers have the backend, also after a step that had left it out."""
    family = present("wan")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half", skip_first_steps=3)
    inputs: list[Any] = []
    block = pipe.transformer.blocks[0]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    failing = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        family.run(pipe, steps=4)
    handle.remove(), failing.remove()
    assert not patch.calls["transformer"]
    args, kwargs = inputs[0]
    with torch.no_grad():
        block(*args, **kwargs)
    assert patch.calls["transformer"] == {"half": 2}
