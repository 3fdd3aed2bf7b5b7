"""Calls can be made again: same seeds, untouched inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ConfigError, ConfigTypeError
from sgl_diffusion_accel import calls as calls_module


class Pipe:
    """Stands where a pipeline would: its components and the signature of its call are looked at."""

    components: dict = {}  # noqa: RUF012

    def __call__(
        self, prompt=None, generator=None, latents=None, num_inference_steps=28, timesteps=None, sigmas=None, extra=None
    ):
        """Is not called."""


class WithoutGenerator(Pipe):
    def __call__(self, prompt=None, num_inference_steps=4):
        """Is not called."""


pipe = Pipe()


def read_calls(pipe, calls):
    return calls_module.read_calls(pipe, calls, "calibrate(pipe, calls=…)")


def draw(call):
    return torch.rand(3, generator=call.fresh()["generator"])


def test_a_generator_is_cloned_for_every_run_and_left_where_it_stands():
    generator = torch.Generator().manual_seed(5)
    torch.rand(7, generator=generator)
    state = generator.get_state()
    (call,) = read_calls(pipe, [{"generator": generator}])
    first, again = draw(call), draw(call)
    assert torch.equal(first, again)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.rand(3, generator=generator), first)


def test_a_list_of_generators_is_cloned_one_by_one():
    given = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    (call,) = read_calls(pipe, [{"generator": given}])
    found = call.fresh()["generator"]
    assert [each.initial_seed() for each in found] == [1, 2]
    assert all(one is not other for one, other in zip(found, given, strict=True))


def test_a_seed_becomes_a_generator_and_is_no_argument():
    (call,) = read_calls(pipe, [{"seed": 11}])
    fresh = call.fresh()
    assert fresh["generator"].initial_seed() == 11
    assert "seed" not in fresh


def test_without_a_seed_each_call_has_its_own():
    calls = read_calls(pipe, [{}, {}])
    assert not torch.equal(draw(calls[0]), draw(calls[1]))
    assert torch.equal(draw(calls[1]), draw(calls[1]))


def test_a_pipeline_that_takes_no_generator_is_given_none():
    (call,) = read_calls(WithoutGenerator(), [{"seed": 3}])
    assert call.fresh() == {}
    assert call.seed == 3


def test_what_a_run_writes_into_its_inputs_does_not_reach_the_next():
    latents, array = torch.ones(2), np.ones(2)
    (call,) = read_calls(pipe, [{"latents": latents, "extra": {"a": [array]}}])
    fresh = call.fresh()
    fresh["latents"].zero_()
    fresh["extra"]["a"][0][:] = 0
    assert torch.equal(latents, torch.ones(2))
    assert array.tolist() == [1, 1]
    assert torch.equal(call.fresh()["latents"], torch.ones(2))


def test_steps_are_the_calls_or_the_pipelines_own_and_unknown_for_a_schedule_of_ones_own():
    calls = read_calls(pipe, [{"num_inference_steps": 9}, {}, {"sigmas": [1.0, 0.5]}])
    assert [call.steps for call in calls] == [9, 28, None]
    assert calls[0].fresh(steps=4)["num_inference_steps"] == 4


def test_the_label_is_the_prompt():
    assert [call.label for call in read_calls(pipe, [{"prompt": "a cat"}, {}])] == ["a cat", "call 2"]


@pytest.mark.parametrize("calls", [{"prompt": "a"}, "a", 3])
def test_calls_that_are_no_list_are_refused(calls):
    with pytest.raises(ConfigTypeError, match="a list of dicts"):
        read_calls(pipe, calls)


@pytest.mark.parametrize(
    ("calls", "error", "message"),
    [
        ([], ConfigError, "calls is empty"),
        (["a"], ConfigTypeError, "calls holds a str"),
        ([{"seed": "x"}], ConfigError, "an integer"),
        ([{"seed": True}], ConfigError, "an integer"),
        ([{"seed": 1, "generator": torch.Generator()}], ConfigError, "Give one of them"),
    ],
)
def test_wrong_calls_are_told(calls, error, message):
    with pytest.raises(error, match=message):
        read_calls(pipe, calls)


def test_what_cannot_be_called_is_told_with_what_to_type():
    with pytest.raises(
        ConfigTypeError, match=r"^calibrate needs a pipeline.*got object. Type: calibrate\(pipe, calls=\[dict"
    ):
        read_calls(object(), [{}])
