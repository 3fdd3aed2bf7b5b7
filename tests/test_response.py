"""A scheduler's response to the outputs of a run, against running the scheduler itself."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sgl_diffusion_accel.intercept import intercept
from sgl_diffusion_accel.loop.scheduler_response import adds_noise, euler, passing_influence, response_of

STEPS = 7

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and NumPy 2

Case = tuple[str, dict[str, Any]]

DETERMINISTIC: list[Case] = [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0, "use_karras_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMParallelScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("CogVideoXDDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    (
        "CogVideoXDDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepInverseScheduler", {}),
]

NOT_FOUND: list[Case] = [  # deterministic and linear as well, yet no response is found
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("IPNDMScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]

STOCHASTIC: list[Case] = [
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DDPMScheduler", {}),
    ("LCMScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("TCDScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("SASolverScheduler", {}),
    ("CogVideoXDPMScheduler", {}),
]

CLIPPING: list[Case] = [  # what they do to small outputs is linear, what they do to real ones is not
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("UniPCMultistepScheduler", {"thresholding": True}),
]


def named(cases: list[Case]) -> Any:
    params = [pytest.param(case, id=" ".join([case[0].removesuffix("Scheduler"), *case[1]])) for case in cases]
    return pytest.mark.parametrize("case", params)


def made(case: Case, steps: int = STEPS) -> Any:
    name, config = case
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(scheduler: Any, outputs: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The latents before each step of a run and at its end, `[S + 1, …]`."""
    runner = copy.deepcopy(scheduler)
    found = [start]
    for output, timestep in zip(outputs, runner.timesteps, strict=True):
        found.append(runner.step(output, timestep, found[-1], return_dict=False)[0])
    return torch.stack(found)


def check(scheduler: Any, response: np.ndarray | None) -> None:
    """Asserts that a run is the response to its outputs plus what comes of the starting noise alone."""
    total = len(scheduler.timesteps)
    assert response is not None
    assert response.shape == (total + 1, total)
    outputs, start = normal(total, 1, 3, 4, 4), normal(1, 3, 4, 4, seed=1)
    from_noise = latents(scheduler, torch.zeros_like(outputs), start)
    expected = from_noise + torch.einsum("st,tbchw->sbchw", torch.from_numpy(response.copy()), outputs)
    torch.testing.assert_close(latents(scheduler, outputs, start), expected, rtol=1e-4, atol=1e-4)


def state(scheduler: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(scheduler).items()}


def test_euler_is_the_running_sum_of_the_widths() -> None:
    sigmas = [1.0, 0.7, 0.3, 0.0]
    expected = [[0, 0, 0], [-0.3, 0, 0], [-0.3, -0.4, 0], [-0.3, -0.4, -0.3]]
    np.testing.assert_allclose(euler(sigmas), expected, atol=1e-12)


def test_flow_matching_euler_is_euler_on_its_sigmas() -> None:
    scheduler = made(("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}))
    found = response_of(scheduler, STEPS)
    np.testing.assert_allclose(found, euler(scheduler.sigmas.tolist()), atol=1e-6)


@named(DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_run_is_the_response_to_its_outputs(case: Case, steps: int) -> None:
    scheduler = made(case, steps)
    check(scheduler, response_of(scheduler, len(scheduler.timesteps)))


@named(NOT_FOUND)
def test_run_is_the_response_to_its_outputs_on_odd_schedulers(case: Case) -> None:
    scheduler = made(case)
    check(scheduler, response_of(scheduler, len(scheduler.timesteps)))


@named(STOCHASTIC)
def test_no_response_of_a_scheduler_that_adds_noise(case: Case) -> None:
    scheduler = made(case)
    assert response_of(scheduler, len(scheduler.timesteps)) is None


@named(CLIPPING)
def test_no_response_of_a_scheduler_that_clips(case: Case) -> None:
    scheduler = made(case)
    assert response_of(scheduler, len(scheduler.timesteps)) is None


@named(DETERMINISTIC)
def test_scheduler_stays_as_it_is(case: Case) -> None:
    scheduler = made(case)
    before, objects = state(scheduler), dict(vars(scheduler))
    response_of(scheduler, len(scheduler.timesteps))
    assert state(scheduler) == before
    assert all(vars(scheduler)[name] is value for name, value in objects.items())


def test_class_of_the_scheduler_stays_as_it_is() -> None:
    class Mine(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        pass

    scheduler = Mine()
    scheduler.set_timesteps(STEPS)
    before = dict(vars(Mine))
    assert response_of(scheduler, STEPS) is not None
    assert dict(vars(Mine)) == before


MIDPOINTS: Case = ("KDPM2DiscreteScheduler", {})


def test_outputs_that_lead_to_a_midpoint_have_no_weight_at_all_in_the_end() -> None:
    scheduler = made(MIDPOINTS)
    found = response_of(scheduler, 2 * STEPS - 1)
    assert found is not None
    assert (found[-1, :-1:2] == 0).all(), "not even by rounding"
    assert (found[-1, 1::2] < 0).all()
    passing = passing_influence(found)
    weights = np.abs(found[-1]) / np.abs(found[-1]).sum()
    assert (passing[:-1:2] > 0).all()
    assert (passing[:-1:2] < weights[1::2]).all(), "less than the answer itself that is given at the midpoint"
    assert (passing[1::2] == 0).all()
    assert passing[-1] == 0


def test_influence_of_an_output_that_passes_is_that_of_the_answer_that_it_puts_off() -> None:
    response = np.array([[0, 0, 0], [-3, 0, 0], [0, -6, 0], [0, -6, -2]], dtype=float)
    left, share = (1.0, 0.75), (0.0, 0.75)  # before the second output, and its part of the move of 8
    np.testing.assert_allclose(passing_influence(response), [3 / 8 / left[0] * share[1], 0, 0])


@named([case for case in [*DETERMINISTIC, *NOT_FOUND] if case != MIDPOINTS])
def test_no_influence_besides_their_weights_on_other_schedulers(case: Case) -> None:
    scheduler = made(case)
    found = response_of(scheduler, len(scheduler.timesteps))
    assert found is not None
    assert not passing_influence(found).any()


def walked(case: Case, steps: int) -> Any:
    """A scheduler in mid-run."""
    scheduler = made(case)
    sample = normal(1, 3, 4, 4)
    for index in range(steps):
        sample = scheduler.step(normal(1, 3, 4, 4, seed=index), scheduler.timesteps[index], sample, return_dict=False)[
            0
        ]
    return scheduler


SECOND_ORDER = ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")


@named([case for case in DETERMINISTIC if case[0] not in SECOND_ORDER])
@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_response_in_mid_run_is_that_of_a_fresh_run(case: Case, steps: int) -> None:
    scheduler = walked(case, steps)
    before = state(scheduler)
    np.testing.assert_array_equal(response_of(scheduler, STEPS), response_of(made(case), STEPS))
    assert state(scheduler) == before


@named([case for case in DETERMINISTIC if case[0] in SECOND_ORDER])
def test_response_of_second_order_in_mid_run_is_that_of_a_fresh_run(case: Case) -> None:
    scheduler = walked(case, 3)
    total = len(scheduler.timesteps)
    found = response_of(scheduler, total)
    assert found is not None
    np.testing.assert_array_equal(found, response_of(made(case), total))


def test_step_of_the_instance_is_not_called() -> None:
    scheduler = made(DETERMINISTIC[0])
    expected = response_of(scheduler, STEPS)
    calls: list[Any] = []
    scheduler.step = lambda *args, **_: calls.append(args)
    np.testing.assert_array_equal(response_of(scheduler, STEPS), expected)
    assert not calls
    assert "step" in vars(scheduler)


def test_who_intercepts_the_step_is_not_called() -> None:
    class Handler:
        calls = 0

        def enter(self, *_: Any) -> None:
            self.calls += 1

        def leave(self, _: Any, token: Any, output: Any) -> Any:
            return output

        def fail(self, *_: Any) -> None:
            pass

    scheduler, handler = made(DETERMINISTIC[0]), Handler()
    expected = response_of(scheduler, STEPS)
    intercept(scheduler, "watch", handler, "step")
    np.testing.assert_array_equal(response_of(scheduler, STEPS), expected)
    assert not adds_noise(scheduler)
    assert handler.calls == 0
    scheduler.step(normal(1, 1, 1, 1), scheduler.timesteps[0], normal(1, 1, 1, 1))
    assert handler.calls == 1


@pytest.mark.parametrize("is_told", [True, False])
def test_response_of_the_last_steps_of_a_schedule(is_told: bool) -> None:
    """Picture to picture: the pipeline takes the last steps, and may tell the scheduler where it begins."""
    scheduler = made(DETERMINISTIC[0])
    if is_told:
        scheduler.set_begin_index(3)
    found = response_of(scheduler, STEPS - 3)
    assert found is not None
    np.testing.assert_allclose(found, euler(scheduler.sigmas.tolist()[3:]), atol=1e-6)


def test_no_response_of_something_that_is_no_scheduler() -> None:
    for other in (None, object(), torch.nn.Linear(1, 1)):
        assert response_of(other, STEPS) is None


def test_no_response_where_the_steps_are_others() -> None:
    assert response_of(made(DETERMINISTIC[0]), STEPS + 1) is None


def test_gradients_and_random_numbers_are_left_alone() -> None:
    scheduler = made(DETERMINISTIC[0])
    before = torch.get_rng_state()
    response_of(scheduler, STEPS)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_are_left_alone_by_a_stochastic_scheduler() -> None:
    scheduler = made(("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}))
    before = torch.get_rng_state()
    response_of(scheduler, STEPS)
    assert torch.equal(torch.get_rng_state(), before)
