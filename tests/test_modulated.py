"""The modulated input is bit by bit what the first attention of a block takes, and taking it leaves no trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import nn

from invariants import families
from invariants.families import present
from sgl_diffusion_accel import UnsupportedModelError
from sgl_diffusion_accel.caching.blocks.modulated import _OnDevice, has_attention, modulated_input
from zoo import Family

CPU, META = torch.device("cpu"), torch.device("meta")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_block(family: Family, pipe: Any) -> nn.Module:
    return pipe.transformer.get_submodule(family.block_lists[0])[0]


def attentions(block: nn.Module) -> list[nn.Module]:
    """The attentions in a block, told by their class."""
    return [part for part in block.modules() if part is not block and type(part).__name__.endswith("Attention")]


def first_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What goes in at the first parameter of a module's `forward`, however it is given."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return list(bound.arguments.values())[1]


class Watch:
    """Records the calls of a block, and for each what went into its attentions, the first one first."""

    def __init__(self, block: nn.Module) -> None:
        self.calls: list[Call] = []
        self.taken: list[list[torch.Tensor]] = []
        self._hooks = [block.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._hooks += [a.register_forward_pre_hook(self._take, with_kwargs=True) for a in attentions(block)]

    def _begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((args, kwargs))
        self.taken.append([])

    def _take(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.taken[-1].append(first_argument(attention, args, kwargs).clone())

    def off(self) -> None:
        for hook in self._hooks:
            hook.remove()


def watched(family: Family, pipe: Any) -> Watch:
    """A short run in the transformer's own dtype; of two experts, each has two of its steps."""
    watch = Watch(first_block(family, pipe))
    given, dtype = family.call(pipe, steps=4), pipe.transformer.dtype
    floats = {k: v.to(dtype) for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    family.run(pipe, steps=4, **floats)
    watch.off()
    return watch


def state(block: nn.Module) -> dict[str, Any]:
    """Everything that a block and its parts consist of, by identity."""
    found: dict[str, Any] = {}
    for path, part in block.named_modules():
        found[f"type({path})"] = type(part)
        for name, value in vars(part).items():
            found[f"{path}.{name}"] = tuple(map(id, value.values())) if isinstance(value, dict) else id(value)
            found[f"{path}.{name} keys"] = tuple(value) if isinstance(value, dict) else None
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            found[f"{path}.{name} version"] = (tensor._version, tensor.device)
    return found


@families()
def test_it_is_what_the_first_attention_takes(family: Family) -> None:
    pipe = family.make()
    watch = watched(family, pipe)
    assert len(watch.calls) >= 2
    for call, taken in zip(watch.calls, watch.taken, strict=True):
        seen = modulated_input(first_block(family, pipe), call)
        assert torch.equal(seen, taken[0])
        assert seen.dtype == taken[0].dtype
    assert not torch.equal(watch.taken[0][0], watch.taken[-1][0]), "it is the same at every step"


@families()
def test_block_is_left_as_it_was_and_its_attention_does_not_run(family: Family) -> None:
    pipe = family.make()
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    ran: list[nn.Module] = []
    for attention in attentions(block):
        attention.register_forward_hook(lambda part, *_: ran.append(part))
    inputs = [v for v in (*watch.calls[-1][0], *watch.calls[-1][1].values()) if isinstance(v, torch.Tensor)]
    before, copies, versions = state(block), [v.clone() for v in inputs], [v._version for v in inputs]
    modulated_input(block, watch.calls[-1])
    assert state(block) == before
    assert not ran
    assert [v._version for v in inputs] == versions
    assert all(torch.equal(v, copy) for v, copy in zip(inputs, copies, strict=True))
    block(*watch.calls[-1][0], **watch.calls[-1][1])
    assert ran, "the block's own attention is no longer called"


@families()
def test_result_has_memory_of_its_own(family: Family) -> None:
    """What is kept until the next step must not be written over, nor keep anything larger alive."""
    pipe = family.make()
    watch = watched(family, pipe)
    args, kwargs = watch.calls[-1]
    seen = modulated_input(first_block(family, pipe), (args, kwargs))
    own = seen.untyped_storage()
    inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    parts = [*first_block(family, pipe).parameters(), *first_block(family, pipe).buffers()]
    assert own.data_ptr() not in {v.untyped_storage().data_ptr() for v in (*inputs, *parts)}
    assert own.nbytes() == seen.numel() * seen.element_size()


def test_hooks_of_the_block_do_not_run_a_second_time() -> None:
    family = present("wan")
    pipe = family.make()
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    calls: list[Any] = []
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.register_forward_hook(lambda *_: calls.append("after"))
    assert torch.equal(modulated_input(block, watch.calls[-1]), watch.taken[-1][0])
    assert not calls


# Under what others have done to the block


def sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def group_offload(pipe: Any, **how: Any) -> None:
    try:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)
    except AttributeError:
        if torch.accelerator.current_accelerator() is None and diffusers.__version__ < "0.42":
            pytest.skip(f"group offloading of diffusers {diffusers.__version__} needs an accelerator")
        raise


def block_offload(pipe: Any) -> None:
    group_offload(pipe, offload_type="block_level", num_blocks_per_group=2)


def leaf_offload(pipe: Any) -> None:
    group_offload(pipe, offload_type="leaf_level")


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def adapter(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "norm1.linear"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


STEPS = {f.__name__: f for f in (sequential_offload, block_offload, leaf_offload, layerwise_casting, bfloat16, adapter)}
CASES = [(name, step) for name in ("wan", "flux", "zimage", "ltx") for step in STEPS]


@pytest.mark.parametrize(("name", "step"), [*CASES, ("wan", "fused"), ("flux", "fused")])
def test_it_is_what_the_attention_takes_after(name: str, step: str) -> None:
    family = present(name)
    pipe = family.make()
    {**STEPS, "fused": fused}[step](pipe)
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    before = state(block)
    assert torch.equal(modulated_input(block, watch.calls[-1]), watch.taken[-1][0])
    if step != "sequential_offload":  # which gives a block new tensors whenever it is loaded
        assert state(block) == before


def test_offloaded_block_is_unloaded_again() -> None:
    family = present("wan")
    expected = watched(family, family.make()).taken[-1][0]
    pipe = family.make()
    sequential_offload(pipe)
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    assert {p.device for p in block.parameters()} == {META}
    assert torch.equal(modulated_input(block, watch.calls[-1]), expected)
    assert {p.device for p in block.parameters()} == {META}
    with pytest.raises(TypeError):
        modulated_input(block, (watch.calls[-1][0][:1], {"no_such": 1}))
    assert {p.device for p in block.parameters()} == {META}


def test_compiled_block_stays_compiled_and_nothing_more_is_compiled() -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    family = present("wan")
    pipe = family.make()
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    torch._dynamo.reset()
    try:
        block.compile(backend=backend)
        block(*watch.calls[-1][0], **watch.calls[-1][1])
        compiled, before = block._compiled_call_impl, len(graphs)
        assert before
        assert torch.equal(modulated_input(block, watch.calls[-1]), watch.taken[-1][0])
        block(*watch.calls[-1][0], **watch.calls[-1][1])
        assert block._compiled_call_impl is compiled
        assert len(graphs) == before
    finally:
        torch._dynamo.reset()


# Blocks within blocks


def hidream_block(single: bool) -> nn.Module:
    module = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
    cls = module.HiDreamImageSingleTransformerBlock if single else module.HiDreamImageTransformerBlock
    torch.manual_seed(0)
    return module.HiDreamBlock(cls(dim=32, num_attention_heads=2, attention_head_dim=16)).eval()


@pytest.mark.parametrize("single", [False, True])
def test_attention_of_a_block_within_a_block_is_found(single: bool) -> None:
    block = hidream_block(single)
    hidden, text, temb = torch.randn(2, 5, 32), torch.randn(2, 3, 32), torch.randn(2, 32)
    call: Call = ((hidden,), {"encoder_hidden_states": text, "temb": temb})
    shift, scale, *_ = block.block.adaLN_modulation(temb)[:, None].chunk(6 if single else 12, dim=-1)
    expected = block.block.norm1_i(hidden) * (1 + scale) + shift
    before = state(block)
    assert torch.equal(modulated_input(block, call), expected)
    assert state(block) == before
    assert has_attention(block)
    accelerate.cpu_offload(block, execution_device=CPU)
    assert torch.equal(modulated_input(block, call), expected)
    assert {p.device for p in block.parameters()} == {META}


class Attention(nn.Module):
    """Fails if it runs."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("the attention ran")


class Plain(nn.Module):
    """A block whose parts and forward are given."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.forward_of = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.forward_of(self, hidden_states)


HIDDEN = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "forward",
    [
        lambda block, hidden: block.attn(hidden + 1, hidden + 2),
        lambda block, hidden: block.attn(encoder_hidden_states=hidden + 2, hidden_states=hidden + 1),
        lambda block, hidden: block.attn(context=hidden + 2, x=hidden + 1),
        lambda block, hidden: block.attn(None, mask=None, anything=hidden + 1),
        lambda block, hidden: block.attn(hidden + (block.attn.heads - 2)),
    ],
    ids=["positional", "by name", "by another name", "under an unknown name", "after a look at the attention"],
)
def test_hidden_states_are_found_among_what_the_attention_takes(forward: Callable[[Any, torch.Tensor], Any]) -> None:
    assert torch.equal(modulated_input(Plain(forward, attn=Attention()), ((HIDDEN,), {})), HIDDEN + 1)


@pytest.mark.parametrize("part", [lambda hidden: hidden, lambda hidden: hidden[:, 1:]], ids=["itself", "a view"])
def test_input_that_goes_into_the_attention_unchanged_is_copied(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    hidden = HIDDEN.clone()
    seen = modulated_input(Plain(lambda block, h: block.attn(part(h)), attn=Attention()), ((hidden,), {}))
    hidden.zero_()
    assert torch.equal(seen, part(HIDDEN))


@pytest.mark.parametrize(
    "into",
    [pytest.param(lambda hidden: hidden, id="itself"), pytest.param(lambda h: h * 2, id="modulated")],
)
def test_no_gradient_is_recorded(into: Callable[[torch.Tensor], torch.Tensor]) -> None:
    hidden = HIDDEN.clone().requires_grad_()
    with torch.enable_grad():
        seen = modulated_input(Plain(lambda block, h: block.attn(into(h)), attn=Attention()), ((hidden,), {}))
        assert torch.is_grad_enabled()
    assert not seen.requires_grad


@pytest.mark.parametrize("order", [["attn1", "attn2"], ["attn2", "attn1"]])
def test_first_attention_is_the_one_that_is_called_first(order: list[str]) -> None:
    def forward(block: Any, hidden: torch.Tensor) -> None:
        for index, name in enumerate(order):
            getattr(block, name)(hidden + index)

    block = Plain(forward, attn1=Attention(), attn2=Attention())
    assert torch.equal(modulated_input(block, ((HIDDEN,), {})), HIDDEN)


class WritesFirst(nn.Module):
    """Adds to its input in place before its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states += 1
        return hidden_states + self.attn(hidden_states)


def test_block_that_writes_over_its_input_before_its_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="writes over its input"):
        modulated_input(WritesFirst(), ((torch.zeros(1, 2, 4),), {}))


def test_first_attention_may_lie_deeper_than_a_later_one() -> None:
    """As in Kandinsky6's fused video and audio blocks."""

    def forward(block: Any, hidden: torch.Tensor) -> Any:
        return block.cross_attention(block.video.self_attention(hidden + 1))

    video = Plain(lambda *_: None, self_attention=Attention())
    block = Plain(forward, video=video, cross_attention=Attention())
    assert torch.equal(modulated_input(block, ((HIDDEN,), {})), HIDDEN + 1)


# Refusals


@pytest.mark.parametrize(
    "block",
    [
        Plain(lambda block, hidden: block.proj(hidden), proj=nn.Linear(4, 4)),
        Plain(lambda block, hidden: hidden, attn=Attention()),
        Plain(lambda block, hidden: block.attn(3), attn=Attention()),
    ],
    ids=["no attention", "attention that is not called", "attention that takes no tensor"],
)
def test_block_without_the_input_of_an_attention_is_refused_with_what_to_type(block: nn.Module) -> None:
    before = state(block)
    with pytest.raises(UnsupportedModelError, match=r"^Plain calls no attention.*apply_cache_dit"):
        modulated_input(block, ((HIDDEN,), {}))
    assert state(block) == before


def test_error_before_the_attention_comes_out_as_it_is() -> None:
    block = Plain(lambda block, hidden: block.attn(block.proj(hidden)), proj=nn.Linear(5, 5), attn=Attention())
    before = state(block)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        modulated_input(block, ((HIDDEN,), {}))
    assert state(block) == before


@families()
def test_every_first_block_has_an_attention(family: Family) -> None:
    assert has_attention(first_block(family, family.make()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attn", True),
        ("attn1", True),
        ("self_attention", True),
        ("AttentionLayer", True),
        ("attention_norm1", False),
        ("self_attention_norm", False),
        ("cross_attn_gate", False),
        ("attn_modulation", False),
        ("attn_scale_shift_table", False),
        ("attn_proj", False),
        ("ff", False),
    ],
)
def test_attention_is_told_by_its_name(name: str, expected: bool) -> None:
    assert has_attention(Plain(lambda *_: None, **{name: nn.Identity()})) is expected
    assert (
        has_attention(Plain(lambda *_: None, inner=nn.Sequential(Plain(lambda *_: None, **{name: nn.Identity()}))))
        is expected
    )


# Offloaded as a whole: what lies on the host is brought to where the inputs are. Without a second device, that is meta.


def test_part_runs_where_its_inputs_are_and_stays_where_it_is() -> None:
    part = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6))
    before = state(part)
    assert torch.equal(_OnDevice(part, CPU)(HIDDEN), part(HIDDEN))
    there = _OnDevice(part, META)(HIDDEN.to(META))
    assert (there.device, there.shape) == (META, (2, 3, 6))
    assert state(part) == before
    assert _OnDevice(part, META).training is part.training


@families("wan", "flux", "zimage", "ltx", "kandinsky5")
def test_block_on_the_host_works_on_inputs_elsewhere(family: Family) -> None:
    pipe = family.make()
    watch = watched(family, pipe)
    block = first_block(family, pipe)
    before = state(block)
    seen = modulated_input(
        block, torch.utils._pytree.tree_map_only(torch.Tensor, lambda v: v.to(META), watch.calls[-1])
    )
    assert (seen.device, seen.shape, seen.dtype) == (META, watch.taken[-1][0].shape, watch.taken[-1][0].dtype)
    assert state(block) == before


@pytest.mark.gpu
@families("wan", "flux")
@pytest.mark.parametrize(
    "how", [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}]
)
def test_block_that_is_offloaded_from_a_gpu(family: Family, how: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe = family.make().to("cuda")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in family.call(pipe).items()}
    watch = Watch(first_block(family, pipe))
    family.run(pipe, **given)
    watch.off()
    pipe.transformer.enable_group_offload(onload_device=torch.device("cuda"), offload_device=CPU, **how)
    block = first_block(family, pipe)
    assert {p.device.type for p in block.parameters()} == {"cpu"}
    seen = modulated_input(block, watch.calls[-1])
    assert seen.device.type == "cuda"
    assert torch.equal(seen, watch.taken[-1][0])
    assert {p.device.type for p in block.parameters()} == {"cpu"}
