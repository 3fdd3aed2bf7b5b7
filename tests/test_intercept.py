"""Handlers stand in front of one module instance, and leave no trace when they are taken away."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from sgl_diffusion_accel.cache_contexts import cache_context_of
from sgl_diffusion_accel.intercept import intercept, release
from sgl_diffusion_accel.slots import Instead, With


class Block(nn.Module):
    """A block."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden, *, scale=1.0):
        if scale is None:
            raise ValueError("no scale")
        return self.linear(hidden) * scale


class Contextual(Block):
    @contextlib.contextmanager
    def cache_context(self, name, step_index=None):
        """Sets a name."""
        self.entered = name
        yield self
        self.entered = None


class Note:
    """A handler that writes down what it sees."""

    def __init__(self, name="a", log=None, instead=None):
        self.name = name
        self.log = [] if log is None else log
        self.instead = instead

    def enter(self, module, args, kwargs):
        self.log.append(("enter", self.name))
        return f"token of {self.name}" if self.instead is None else Instead(self.instead)

    def leave(self, module, token, output):
        assert token == f"token of {self.name}"
        self.log.append(("leave", self.name))
        return output

    def fail(self, module, token):
        assert token == f"token of {self.name}"
        self.log.append(("fail", self.name))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


HIDDEN = torch.ones(2, 4)


def test_module_computes_the_same_behind_a_handler(block):
    expected = block(HIDDEN, scale=2.0)
    intercept(block, "cache", Note())
    assert torch.equal(block(HIDDEN, scale=2.0), expected)


class Louder(Note):
    """Gives the module another argument, and has nothing to do afterwards."""

    only_enters = True

    def enter(self, module, args, kwargs):
        super().enter(module, args, kwargs)
        return With(args, {"scale": 3.0 if kwargs.get("scale") else None})


def test_handler_that_only_enters_hears_of_no_end_and_those_around_it_do(block):
    expected = block(HIDDEN, scale=3.0)
    log = []
    intercept(block, "lossless", Louder("inner", log))
    intercept(block, "cache", Note("outer", log))
    assert torch.equal(block(HIDDEN, scale=2.0), expected)
    assert log == [("enter", "outer"), ("enter", "inner"), ("leave", "outer")]
    log.clear()
    with pytest.raises(ValueError, match="no scale"):
        block(HIDDEN, scale=None)
    assert log == [("enter", "outer"), ("enter", "inner"), ("fail", "outer")]


def test_module_looks_the_same_behind_a_handler(block):
    shown, names = repr(block), list(block.state_dict())
    intercept(block, "cache", Note())
    cls = type(block)
    assert isinstance(block, Block)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        "Block", Block.__qualname__, Block.__module__, Block.__doc__,
    )  # fmt: skip
    assert repr(block) == shown
    assert list(block.state_dict()) == names
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)


def test_handler_sees_the_arguments_and_may_change_the_output(block):
    class Double(Note):
        def enter(self, module, args, kwargs):
            self.seen = module, args, kwargs
            return super().enter(module, args, kwargs)

        def leave(self, module, token, output):
            return super().leave(module, token, output) * 2

    expected = block(HIDDEN, scale=3.0) * 2
    handler = Double()
    intercept(block, "cache", handler)
    assert torch.equal(block(HIDDEN, scale=3.0), expected)
    module, args, kwargs = handler.seen
    assert module is block
    assert args[0] is HIDDEN
    assert kwargs == {"scale": 3.0}


def test_handler_may_answer_in_the_module_s_place(block):
    ran = []
    block.register_forward_pre_hook(lambda *_: ran.append(1))
    handler, answer = Note(instead=(1, "as it is")), (1, "as it is")
    intercept(block, "cache", handler)
    assert block(HIDDEN) == answer
    assert ran == []
    assert handler.log == [("enter", "a")]


def test_answer_of_none_is_an_answer(block):
    class Nothing(Note):
        def enter(self, module, args, kwargs):
            return Instead(None)

    intercept(block, "cache", Nothing())
    assert block(HIDDEN) is None


def test_latest_handler_is_outermost(block):
    log = []
    for name in "abc":
        intercept(block, name, Note(name, log))
    block(HIDDEN)
    assert log == [("enter", n) for n in "cba"] + [("leave", n) for n in "abc"]


def test_answer_of_an_outer_handler_hides_the_inner_ones(block):
    log = []
    for name in "abc":
        intercept(block, name, Note(name, log, instead=HIDDEN if name == "b" else None))
    assert block(None) is HIDDEN
    assert log == [("enter", "c"), ("enter", "b"), ("leave", "c")]


def test_hooks_run_inside_the_handlers_whenever_they_were_added(block):
    log = []
    block.register_forward_pre_hook(lambda *_: log.append("before"))
    intercept(block, "cache", Note("a", log))
    block.register_forward_hook(lambda *_: log.append("after"))
    block(HIDDEN)
    assert log == [("enter", "a"), "before", "after", ("leave", "a")]


def test_forward_that_is_replaced_afterwards_is_still_handled(block):
    log = []
    intercept(block, "cache", Note("a", log))
    block.forward = lambda hidden: hidden + 1
    assert torch.equal(block(HIDDEN), HIDDEN + 1)
    assert log == [("enter", "a"), ("leave", "a")]
    release(block, "cache")
    assert torch.equal(block(HIDDEN), HIDDEN + 1)


def test_error_reaches_the_caller_after_every_handler_has_failed(block):
    log = []
    for name in "ab":
        intercept(block, name, Note(name, log))
    with pytest.raises(ValueError, match="no scale"):
        block(HIDDEN, scale=None)
    assert log == [("enter", "b"), ("enter", "a"), ("fail", "a"), ("fail", "b")]
    block(HIDDEN)
    assert log[4:] == [("enter", "b"), ("enter", "a"), ("leave", "a"), ("leave", "b")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_are_failures_too(block, error):
    handler = Note()

    def stop(*_):
        raise error

    block.register_forward_hook(stop)
    intercept(block, "cache", handler)
    with pytest.raises(error):
        block(HIDDEN)
    assert handler.log == [("enter", "a"), ("fail", "a")]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_nothing_is_left_after_release_in_any_order(block, order):
    before, attributes = dict(block.__dict__), list(block.__dict__)
    for name in "abc":
        intercept(block, name, Note(name))
    for count, name in enumerate(order, 1):
        release(block, name)
        log = []
        for left in sorted(set("abc") - set(order[:count])):
            intercept(block, left, Note(left, log))
        block(HIDDEN)
        assert [entry for entry in log if entry[0] == "enter"] == [
            ("enter", n) for n in sorted(set("abc") - set(order[:count]), reverse=True)
        ]
    assert type(block) is Block
    assert block.__dict__ == before
    assert list(block.__dict__) == attributes


def test_release_is_harmless_twice_for_another_kind_and_for_a_module_that_has_nothing(block):
    release(block, "cache")
    intercept(block, "cache", handler := Note())
    release(block, "attention")
    block(HIDDEN)
    assert handler.log
    release(block, "cache")
    release(block, "cache")
    assert type(block) is Block


def test_handler_of_a_kind_replaces_the_one_before(block):
    log = []
    for kind, name in (("cache", "old"), ("attention", "other"), ("cache", "new")):
        intercept(block, kind, Note(name, log))
    block(HIDDEN)
    assert [entry for entry in log if entry[0] == "enter"] == [("enter", "new"), ("enter", "other")]
    release(block, "cache")
    release(block, "attention")
    assert type(block) is Block


def test_other_instances_and_the_class_are_left_alone(block):
    attributes = dict(vars(Block))
    other = Block()
    handler = Note()
    intercept(block, "cache", handler)
    other(HIDDEN)
    Block()(HIDDEN)
    assert handler.log == []
    assert type(other) is Block
    assert dict(vars(Block)) == attributes
    assert "__call__" not in vars(Block)


def test_instances_of_a_class_get_one_type_and_get_it_again(block):
    """So that compiled code is valid for all blocks of a model, and after a patch is applied again."""
    other = Block()
    intercept(block, "cache", Note())
    intercept(other, "attention", Note())
    first = type(block)
    assert type(other) is first
    release(block, "cache")
    intercept(block, "cache", Note())
    assert type(block) is first


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda m, n=n: pickle.loads(pickle.dumps(m, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_free_of_handlers_and_of_the_original_class(block, way):
    intercept(block, "cache", handler := Note())
    intercept(block.linear, "cache", Note())
    made = COPIES[way](block)
    assert type(made) is Block
    assert set(made.__dict__) == set(Block().__dict__)
    if way != "copy":  # which shares the children
        assert type(made.linear) is nn.Linear
    assert torch.equal(made(HIDDEN), block(HIDDEN))
    assert handler.log == [("enter", "a"), ("leave", "a")]
    intercept(made, "cache", Note())
    release(made, "cache")
    assert type(made) is Block


def test_copy_of_a_module_with_its_own_way_to_be_rebuilt():
    class Rebuilt(Block):
        def __reduce__(self):
            return type(self), (4,)

    module = Rebuilt()
    intercept(module, "cache", Note())
    assert type(copy.deepcopy(module)) is Rebuilt


def test_saved_module_loads_free_of_handlers(block):
    intercept(block, "cache", Note())
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is Block
    assert torch.equal(loaded.linear.weight, block.linear.weight)


def test_module_stays_a_module_behind_a_handler(block):
    """Moves, casts, parameters and hooks are those of the class."""
    intercept(block, "cache", handler := Note())
    block.half().float().eval()
    assert not block.training
    assert sum(parameter.numel() for parameter in block.parameters()) == 20
    assert [name for name, _ in nn.Sequential(block).named_modules()] == ["", "0", "0.linear"]
    block(HIDDEN)
    assert handler.log


class Foreign:
    """What another library mixes into an instance's class, as fully sharded data parallelism does."""

    def shards(self):
        return 4


def test_class_that_another_library_put_on_top_survives_the_release(block):
    expected = block(HIDDEN)
    intercept(block, "cache", handler := Note())
    block.__class__ = type("ForeignBlock", (Foreign, type(block)), {})
    release(block, "cache")
    assert block.shards() == 4
    assert torch.equal(block(HIDDEN), expected)
    assert handler.log == []


def test_cache_context_is_heard_and_still_entered():
    module = Contextual()
    intercept(module, "cache", Note())
    assert cache_context_of(module) is None
    with module.cache_context("cond") as entered:
        assert entered is module
        assert module.entered == "cond"
        assert cache_context_of(module) == ("cond", {})
        with module.cache_context("uncond", step_index=3):
            assert cache_context_of(module) == ("uncond", {"step_index": 3})
        assert cache_context_of(module) == ("cond", {})
    assert cache_context_of(module) is None
    assert module.entered is None


def test_cache_context_ends_with_an_error():
    module = Contextual()
    intercept(module, "cache", Note())
    with contextlib.suppress(RuntimeError), module.cache_context("cond"):
        raise RuntimeError
    assert cache_context_of(module) is None


def test_cache_context_belongs_to_its_module():
    one, two = Contextual(), Contextual()
    for module in (one, two):
        intercept(module, "cache", Note())
    with one.cache_context("cond"):
        assert cache_context_of(two) is None
        with two.cache_context("uncond"):
            assert cache_context_of(one) == ("cond", {})


def test_module_without_a_cache_context_gets_none(block):
    intercept(block, "cache", Note())
    assert not hasattr(block, "cache_context")
    assert cache_context_of(block) is None


# Other methods than the call


class Stepper:
    """As a scheduler: no module, and copied by pipelines."""

    def __init__(self):
        self.count = 0

    def step(self, amount, *, twice=False):
        """Counts."""
        if amount is None:
            raise ValueError("no amount")
        self.count += amount * (2 if twice else 1)
        return self.count


def test_method_of_any_object_passes_through_its_handlers():
    stepper = Stepper()
    intercept(stepper, "profile", inner := Note("inner"), method="step")
    intercept(stepper, "other", Note("outer", inner.log), method="step")
    assert stepper.step(2, twice=True) == 4
    assert inner.log == [("enter", "outer"), ("enter", "inner"), ("leave", "inner"), ("leave", "outer")]
    with pytest.raises(ValueError, match="no amount"):
        stepper.step(None)
    assert inner.log[-2:] == [("fail", "inner"), ("fail", "outer")]
    release(stepper, "profile", method="step")
    release(stepper, "other", method="step")
    release(stepper, "other", method="step")
    assert type(stepper) is Stepper
    assert vars(stepper) == {"count": 4}


def test_method_looks_the_same_behind_a_handler():
    stepper = Stepper()
    intercept(stepper, "profile", Note(), method="step")
    assert inspect.signature(stepper.step) == inspect.signature(Stepper().step)
    assert stepper.step.__doc__ == "Counts."
    assert not callable(stepper)
    assert type(stepper).__name__ == "Stepper"
    assert type(stepper) == Stepper  # noqa: E721


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copy_of_an_object_steps_itself(way):
    stepper = Stepper()
    intercept(stepper, "profile", handler := Note(), method="step")
    made = way(stepper)
    assert type(made) is Stepper
    assert made.step(1) == 1
    assert stepper.count == 0
    assert handler.log == []


def test_call_and_methods_are_intercepted_side_by_side(block):
    block.__dict__["kept"] = 1
    intercept(block, "cache", calls := Note())
    intercept(block, "profile", extras := Note(), method="extra_repr")
    assert torch.equal(block(HIDDEN), block(HIDDEN))
    block.extra_repr()
    assert len(calls.log) == 4
    assert len(extras.log) == 2
    release(block, "profile", method="extra_repr")
    block.extra_repr()
    assert len(extras.log) == 2
    assert len(calls.log) == 4
    release(block, "cache")
    assert type(block) is Block
    assert "kept" in vars(block)


def test_method_interception_leaves_the_class_of_other_patches(block):
    """`torch.compile` looks at the class: it is the same one before and after."""
    intercept(block, "cache", Note())
    own = type(block)
    intercept(block, "profile", Note(), method="extra_repr")
    release(block, "profile", method="extra_repr")
    assert type(block) is own
    release(block, "cache")
    assert type(block) is Block


def test_class_reads_as_the_original(block):
    intercept(block, "cache", Note())
    assert block.__class__ is Block
    assert type(block) is not Block
    assert type(block) in [Block]
    assert {Block: 1}[type(block)] == 1
    assert isinstance(block, Block)


TABLE = {}


def mix_in(module):
    """What `fully_shard` does: a class for each class, kept in a table, assigned to the instance."""
    cls = module.__class__
    if cls not in TABLE:
        TABLE[cls] = type(f"Foreign{cls.__name__}", (Foreign, cls), {})
    module.__class__ = TABLE[cls]


@pytest.mark.parametrize("first", ["intercept", "mix in"])
@pytest.mark.parametrize("known", [False, True])
def test_class_from_a_table_is_intercepted_in_its_turn(block, first, known):
    """Whether or not the table knows the class, and in either order: the same classes."""
    TABLE.clear()
    if known:
        mix_in(Block())
    steps = [lambda: intercept(block, "cache", handler), lambda: mix_in(block)]
    handler = Note()
    for step in steps if first == "intercept" else reversed(steps):
        step()
    expected = block.linear(HIDDEN)
    assert torch.equal(block(HIDDEN), expected)
    assert handler.log == [("enter", "a"), ("leave", "a")]
    assert block.shards() == 4
    assert {Block: TABLE[Block]} == TABLE
    assert [*TABLE] == [Block]
    assert next(iter(TABLE)) is Block
    assert TABLE[Block].__mro__ == (TABLE[Block], Foreign, Block, *Block.__mro__[1:])
    other = Block()
    mix_in(other)
    assert type(other) is TABLE[Block]
    release(block, "cache")
    assert type(block) is TABLE[Block]
    intercept(block, "cache", handler)
    release(block, "cache")
    assert type(block) is TABLE[Block]


def test_class_that_is_given_back_is_intercepted_too(block):
    intercept(block, "cache", handler := Note())
    before = block.__class__
    mix_in(block)
    block.__class__ = before
    block(HIDDEN)
    assert handler.log == [("enter", "a"), ("leave", "a")]
    assert not hasattr(block, "shards")
    release(block, "cache")
    assert type(block) is Block


def test_class_that_cannot_be_assigned_is_refused_as_ever(block):
    intercept(block, "cache", handler := Note())
    with pytest.raises(TypeError, match="__class__ assignment"):
        block.__class__ = int
    block(HIDDEN)
    assert handler.log == [("enter", "a"), ("leave", "a")]


def test_class_on_top_of_an_intercepted_one_is_no_stand_in_for_the_original(block):
    intercept(block, "cache", handler := Note())
    on_top = type("OnTop", (Foreign, type(block)), {})
    assert on_top != Block
    assert {Block: 1}.get(on_top) is None
    block.__class__ = on_top
    assert block.__class__ is type(block) is on_top
    intercept(block, "attention", Note("b", handler.log))
    block(HIDDEN)
    assert handler.log == [("enter", "b"), ("enter", "a"), ("leave", "a"), ("leave", "b")], "each handler once"


def test_sibling_of_an_intercepted_class_is_intercepted_by_itself(block):
    """A derived class is not taken for one that has been put on top."""
    intercept(block, "cache", Note())
    derived = Contextual()
    intercept(derived, "cache", handler := Note())
    derived(HIDDEN)
    assert handler.log == [("enter", "a"), ("leave", "a")]


def test_class_that_its_base_registers_is_made():
    registered = {}

    class Registry(nn.Module):
        def __init_subclass__(cls):
            registered[cls] = cls.__name__

        def forward(self, hidden):
            return hidden

    class Registered(Registry):
        pass

    module = Registered()
    intercept(module, "cache", handler := Note())
    module(HIDDEN)
    assert handler.log == [("enter", "a"), ("leave", "a")]


class Change(Note):
    """A handler that gives the module another scale."""

    is_inmost = True

    def __init__(self, scale, **more):
        super().__init__(**more)
        self.scale = scale

    def enter(self, module, args, kwargs):
        token = super().enter(module, args, kwargs)
        self.seen = kwargs
        return With(args, {**kwargs, "scale": self.scale}, token)


def test_handler_gives_the_module_other_arguments(block):
    expected = block(HIDDEN, scale=3.0)
    given = {"scale": 2.0}
    intercept(block, "lossless", Change(3.0))
    assert torch.equal(block(HIDDEN, **given), expected)
    assert given == {"scale": 2.0}
    intercept(block, "lossless", Change(None))
    with pytest.raises(ValueError, match="no scale"):
        block(HIDDEN, scale=2.0)


@pytest.mark.parametrize("order", list(itertools.permutations(["cache", "lossless", "spare", "watch"])))
def test_what_changes_arguments_is_innermost_and_what_watches_outermost_in_any_order(block, order):
    log = []
    kinds = {name: Note(name, log) for name in order}
    kinds["lossless"] = Change(3.0, name="lossless", log=log)
    kinds["watch"].is_watching = kinds["spare"].is_outer = True
    for kind in order:
        intercept(block, kind, kinds[kind])
    block(HIDDEN, scale=2.0)
    assert [name for what, name in log if what == "enter"] == ["watch", "spare", "cache", "lossless"]
    assert [name for what, name in log if what == "leave"] == ["lossless", "cache", "spare", "watch"]
    assert kinds["lossless"].seen == {"scale": 2.0}


def test_short_way_is_that_of_the_handler_that_decides(block):
    cache, change = Note("cache"), Change(3.0)
    cache.detour = object()
    slot_of = lambda: block.__dict__["_sgl_diffusion_accel"]  # noqa: E731
    intercept(block, "lossless", change)
    assert slot_of().detour is None
    intercept(block, "cache", cache)
    assert slot_of().detour is cache.detour
    intercept(block, "other", Note())
    assert slot_of().detour is None
