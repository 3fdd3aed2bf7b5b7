"""A patch knows what it changed, and undoes it exactly."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from sgl_diffusion_accel import ConfigTypeError, Patch, remove
from sgl_diffusion_accel.patch import PatchHandler, patches_of


class Note(PatchHandler):
    """Counts its calls."""

    def __init__(self, patch, log=None):
        self.patch = patch
        self.log = [] if log is None else log

    def enter(self, module, args, kwargs):
        self.log.append(self.patch.kind)

    def leave(self, module, token, output):
        return output

    def fail(self, module, token):
        pass


class Listed(Patch):
    """A patch that writes down when it is removed."""

    def __init__(self, kind, removed):
        super().__init__(kind)
        self._removed = removed

    def _on_removed(self):
        self._removed.append(self.kind)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, hidden):
        return self.two(self.one(hidden))


class Pipe(DiffusionPipeline):
    _optional_components = ("text_encoder",)

    def __init__(self, transformer, scheduler, text_encoder=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)


def put(patch, *modules):
    for module in modules:
        patch.intercept(module, Note(patch))
    return patch


def state(*modules):
    return [(type(module), dict(module.__dict__)) for module in modules]


@pytest.fixture
def model():
    return Model()


def test_remove_undoes_everything(model):
    parts = list(model.modules())
    before, output = state(*parts), model(torch.ones(2))
    patch = put(Patch("cache"), *parts)
    assert patch.active
    assert all(type(part) is not original for part, (original, _) in zip(parts, before, strict=True))
    patch.remove()
    assert not patch.active
    assert state(*parts) == before
    assert torch.equal(model(torch.ones(2)), output)


def test_second_remove_does_nothing(model):
    removed = []
    patch = put(Listed("cache", removed), model)
    patch.remove()
    later = put(Patch("cache"), model)
    patch.remove()
    assert removed == ["cache"]
    assert list(patches_of(model)) == [later]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_are_removed_in_any_order(model, order):
    before = state(model, model.one)
    patches = [put(Patch(kind), model, model.one) for kind in ("cache", "attention", "profile")]
    for count, index in enumerate(order, 1):
        patches[index].remove()
        left = [patch for patch in reversed(patches) if patches.index(patch) not in order[:count]]
        assert list(patches_of(model)) == left
    assert state(model, model.one) == before


def test_patch_that_was_replaced_leaves_its_successor_in_place(model):
    old, new = put(Patch("cache"), model), Patch("cache")
    handler = Note(new)
    new.intercept(model, handler)
    old.remove()
    model(torch.ones(2))
    assert handler.log == ["cache"]
    new.remove()
    assert type(model) is Model


def test_patches_of_a_module_are_listed_newest_first(model):
    assert list(patches_of(model)) == []
    first, second = put(Patch("cache"), model), put(Patch("attention"), model)
    assert list(patches_of(model)) == [second, first]


def test_context_manager_undoes_at_its_end(model):
    with put(Patch("cache"), model) as patch:
        assert isinstance(patch, Patch)
        assert type(model) is not Model
    assert type(model) is Model
    assert not patch.active


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_context_manager_undoes_on_an_error_and_lets_it_through(model, error):
    with pytest.raises(error), put(Patch("cache"), model):
        raise error
    assert type(model) is Model


def test_other_instances_are_left_alone(model):
    other = Model()
    patch = Patch("cache")
    handler = Note(patch)
    patch.intercept(model, handler)
    other(torch.ones(2))
    assert handler.log == []
    assert type(other) is Model


def test_patch_keeps_no_module_alive():
    model = Model()
    patch, reference = put(Patch("cache"), model, model.one), weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    patch.remove()
    assert not patch.active


def test_remove_of_a_pipeline_undoes_all_patches_newest_first():
    removed, encoder = [], Model()
    pipe = Pipe(Model(), FlowMatchEulerDiscreteScheduler(), encoder)
    before = state(pipe.transformer, encoder)
    for kind in ("cache", "attention", "profile"):
        put(Listed(kind, removed), pipe.transformer, pipe.transformer.one)
    put(Listed("text", removed), encoder)
    remove(pipe)
    assert removed[:3] == ["profile", "attention", "cache"]
    assert removed[3:] == ["text"]
    assert state(pipe.transformer, encoder) == before
    remove(pipe)
    assert len(removed) == 4


def test_remove_of_a_module_undoes_its_patches(model):
    put(Patch("cache"), model, model.one)
    remove(model)
    assert type(model) is Model
    assert type(model.one) is nn.Linear


def test_remove_reaches_the_module_inside_a_compiled_one(model):
    put(Patch("cache"), model)
    remove(torch.compile(model))
    assert type(model) is Model


def test_remove_where_nothing_was_done_is_harmless(model):
    remove(model)
    remove(Pipe(model, FlowMatchEulerDiscreteScheduler()))
    assert type(model) is Model


@pytest.mark.parametrize("wrong", [None, "pipe", 3, object()])
def test_remove_of_anything_else_is_refused_with_its_type(wrong):
    with pytest.raises(ConfigTypeError, match=type(wrong).__name__):
        remove(wrong)
