"""Settings are checked when they are made, named in every refusal, and never changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from sgl_diffusion_accel import CacheDiTConfig, ConfigError, ConfigTypeError, StepsMask
from sgl_diffusion_accel.errors import AccelError

COUNTS = {
    "fn_compute_blocks": 0,
    "bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "taylorseer_order": 0,
}
LIMITS = ("max_continuous_cached_steps", "max_cached_steps")
REALS = ("residual_diff_threshold", "max_accumulated_residual_diff")
KNOBS = CacheDiTConfig.names()
GOOD = {
    "fn_compute_blocks": 8,
    "bn_compute_blocks": 2,
    "max_warmup_steps": 8,
    "warmup_interval": 2,
    "residual_diff_threshold": 0.08,
    "max_continuous_cached_steps": 5,
    "max_cached_steps": 20,
    "max_accumulated_residual_diff": 1.5,
    "taylorseer_order": 2,
    "taylorseer_spacing": "sigma",
    "steps_mask": StepsMask.preset("fast"),
    "steps_policy": "static",
    "secondary": {"fn_compute_blocks": 4},
    "enabled": False,
    "tolerance": None,  # not beside a static mask; it has its own tests
}


def test_defaults_are_those_of_sglang():
    assert dataclasses.asdict(CacheDiTConfig()) == {
        "fn_compute_blocks": 1,
        "bn_compute_blocks": 0,
        "max_warmup_steps": 4,
        "warmup_interval": 1,
        "residual_diff_threshold": 0.24,
        "max_continuous_cached_steps": 3,
        "max_cached_steps": None,
        "max_accumulated_residual_diff": None,
        "taylorseer_order": 0,
        "taylorseer_spacing": "step",
        "steps_mask": None,
        "steps_policy": "dynamic",
        "secondary": None,
        "enabled": True,
        "tolerance": None,
    }


def test_every_knob_is_taken():
    assert set(GOOD) == set(KNOBS) == {field.name for field in dataclasses.fields(CacheDiTConfig)}
    config = CacheDiTConfig(**GOOD)
    assert {name: getattr(config, name) for name in KNOBS} == GOOD


@pytest.mark.parametrize("name", LIMITS)
def test_minus_one_and_none_are_no_limit(name):
    assert getattr(CacheDiTConfig(**{name: -1}), name) is None
    assert getattr(CacheDiTConfig(**{name: None}), name) is None
    assert getattr(CacheDiTConfig(**{name: 0}), name) == 0
    assert CacheDiTConfig(**{name: -1}) == CacheDiTConfig(**{name: None})


@pytest.mark.parametrize(("name", "lowest"), [*COUNTS.items(), *((name, 0) for name in LIMITS)])
def test_count_below_its_lowest_is_refused_with_what_is_allowed(name, lowest):
    seen = lowest - (2 if name in LIMITS else 1)
    with pytest.raises(ConfigError, match=rf"^{name}={seen}; allowed: .* {lowest}\b"):
        CacheDiTConfig(**{name: seen})


@pytest.mark.parametrize("name", [*COUNTS, *LIMITS])
@pytest.mark.parametrize("wrong", [1.0, 1.5, "1", True, [1]])
def test_count_of_another_type_is_refused_as_such(name, wrong):
    with pytest.raises(ConfigTypeError, match=f"^{name}=.*{type(wrong).__name__}.*whole number"):
        CacheDiTConfig(**{name: wrong})


@pytest.mark.parametrize("name", COUNTS)
def test_count_of_none_is_refused(name):
    with pytest.raises(ConfigTypeError, match=f"^{name}=None"):
        CacheDiTConfig(**{name: None})


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("wrong", [-0.01, -1, math.inf, math.nan])
def test_number_out_of_range_is_refused_with_what_is_allowed(name, wrong):
    with pytest.raises(ConfigError, match=f"^{name}={wrong}; allowed: a finite number from 0"):
        CacheDiTConfig(**{name: wrong})


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("wrong", ["0.2", True, [0.2]])
def test_number_of_another_type_is_refused_as_such(name, wrong):
    with pytest.raises(ConfigTypeError, match=f"^{name}=.*{type(wrong).__name__}"):
        CacheDiTConfig(**{name: wrong})


def test_whole_numbers_are_numbers():
    assert CacheDiTConfig(residual_diff_threshold=0).residual_diff_threshold == 0
    assert CacheDiTConfig(residual_diff_threshold=1).residual_diff_threshold == 1


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("steps_policy", "statik", "static"),
        ("steps_policy", "dynamc", "dynamic"),
        ("taylorseer_spacing", "sigmas", "sigma"),
    ],
)
def test_unknown_choice_is_refused_with_the_nearest(name, wrong, nearest):
    with pytest.raises(ConfigError, match=rf"{name}.*'{wrong}'.*Did you mean '{nearest}'.*Known: "):
        CacheDiTConfig(**{name: wrong})


@pytest.mark.parametrize("name", ["steps_policy", "taylorseer_spacing"])
@pytest.mark.parametrize("wrong", [None, 1, ["static"]])
def test_choice_of_another_type_is_refused(name, wrong):
    with pytest.raises(AccelError, match=name):
        CacheDiTConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [0, 1, "false", None])
def test_enabled_is_true_or_false(wrong):
    with pytest.raises(ConfigTypeError, match=r"^enabled=.*True and False"):
        CacheDiTConfig(enabled=wrong)


@pytest.mark.parametrize("mask", ["slow", [1, 0, 1], (1, 0, 1), StepsMask([1], [1])])
def test_mask_in_any_form_becomes_a_mask(mask):
    assert CacheDiTConfig(steps_mask=mask).steps_mask == StepsMask.of(mask)


@pytest.mark.parametrize("wrong", ["slw", [0, 1], [1, 2], [], 5, {"slow": 1}])
def test_wrong_mask_is_refused_when_the_config_is_made(wrong):
    with pytest.raises(AccelError, match="steps_mask"):
        CacheDiTConfig(steps_mask=wrong)


def test_static_policy_without_a_mask_is_refused_with_what_to_type():
    with pytest.raises(ConfigError, match=r"steps_policy='static' needs a steps_mask. Type: steps_mask="):
        CacheDiTConfig(steps_policy="static")


def test_no_first_blocks_only_where_no_signal_is_needed():
    with pytest.raises(ConfigError, match=r"fn_compute_blocks=0.*Type: fn_compute_blocks=1"):
        CacheDiTConfig(fn_compute_blocks=0)
    with pytest.raises(ConfigError, match="fn_compute_blocks=0"):
        CacheDiTConfig(fn_compute_blocks=0, steps_mask="slow")
    assert CacheDiTConfig(fn_compute_blocks=0, steps_mask="slow", steps_policy="static").fn_compute_blocks == 0
    assert CacheDiTConfig(fn_compute_blocks=0, residual_diff_threshold=0).fn_compute_blocks == 0


@pytest.mark.parametrize("value", [0, 0.002, 1, np.float32(0.5)])
def test_tolerance_from_0_to_1_is_taken_and_needs_no_first_block(value):
    config = CacheDiTConfig(fn_compute_blocks=0, tolerance=value)
    assert config.tolerance == float(value)
    assert type(config.tolerance) is float
    assert CacheDiTConfig(secondary={"tolerance": value}).for_component("transformer_2").tolerance == float(value)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.inf, math.nan, 10**400])
def test_tolerance_out_of_range_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match=r"^tolerance=.*allowed: a number from 0 .*to 1, such as 0.002"):
        CacheDiTConfig(tolerance=wrong)


@pytest.mark.parametrize("wrong", ["0.1", True, [0.1], 1j])
def test_tolerance_of_another_type_is_refused_as_such(wrong):
    with pytest.raises(ConfigTypeError, match=r"^tolerance.*allowed: a number from 0"):
        CacheDiTConfig(tolerance=wrong)


def test_tolerance_beside_what_it_cannot_go_with_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"tolerance=0.01 .*steps_policy='static'.*Type: steps_policy='dynamic'"):
        CacheDiTConfig(tolerance=0.01, steps_mask="slow", steps_policy="static")
    with pytest.raises(ConfigError, match=r"max_accumulated_residual_diff=1.5 .*tolerance=0.01.*Leave one of them out"):
        CacheDiTConfig(tolerance=0.01, max_accumulated_residual_diff=1.5)


def test_unknown_name_is_a_type_error_as_of_any_dataclass():
    with pytest.raises(TypeError, match="max_warmup"):
        CacheDiTConfig(max_warmup=3)


@pytest.mark.parametrize("name", KNOBS)
def test_config_cannot_be_changed(name):
    config = CacheDiTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, GOOD[name])
    assert config == CacheDiTConfig()


def test_config_is_not_changed_through_what_it_was_made_of():
    bins, secondary, mask = [2, 1], {"fn_compute_blocks": 4}, [1, 0, 1]
    config = CacheDiTConfig(steps_mask=StepsMask(bins, [1]), secondary=secondary)
    from_list = CacheDiTConfig(steps_mask=mask)
    bins.append(7)
    secondary["fn_compute_blocks"] = 9
    mask[1] = 1
    assert config.steps_mask.resolve(4) == (1, 1, 0, 1)
    assert config.secondary == {"fn_compute_blocks": 4}
    assert from_list.steps_mask.resolve(3) == (1, 0, 1)


def test_config_is_not_changed_through_its_secondary_settings():
    config = CacheDiTConfig(secondary={"fn_compute_blocks": 4})
    with contextlib.suppress(TypeError):
        config.secondary["fn_compute_blocks"] = -7
    assert config.secondary == {"fn_compute_blocks": 4}
    assert config.for_component("transformer_2").fn_compute_blocks == 4


@pytest.mark.parametrize("config", [CacheDiTConfig(), CacheDiTConfig(**GOOD), CacheDiTConfig(steps_mask=[1, 0, 1])])
def test_configs_can_be_compared_copied_pickled_and_replaced(config):
    same = dataclasses.replace(config)
    assert same == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, max_warmup_steps=11) != config


@pytest.mark.parametrize("config", [CacheDiTConfig(), CacheDiTConfig(**GOOD), CacheDiTConfig(steps_mask=[1, 0, 1])])
def test_configs_can_be_keys(config):
    assert {config: "fast"}[dataclasses.replace(config)] == "fast"


def test_settings_of_the_second_transformer_go_over_the_first_s():
    config = CacheDiTConfig(fn_compute_blocks=2, taylorseer_order=1, secondary={"fn_compute_blocks": 5})
    first, second = config.for_component("transformer"), config.for_component("transformer_2")
    assert (first.fn_compute_blocks, second.fn_compute_blocks) == (2, 5)
    assert first.taylorseer_order == second.taylorseer_order == 1
    assert first.secondary is None
    assert second.secondary is None
    assert config.secondary == {"fn_compute_blocks": 5}


def test_second_transformer_is_like_the_first_without_settings_of_its_own():
    config = CacheDiTConfig(max_warmup_steps=6)
    assert config.for_component("transformer_2") == config.for_component("transformer") == config


@pytest.mark.parametrize("name", sorted(set(KNOBS) - {"secondary", "enabled", "steps_mask", "steps_policy"}))
def test_every_knob_but_the_mask_s_has_a_second_setting(name):
    config = CacheDiTConfig(secondary={name: GOOD[name]})
    assert getattr(config.for_component("transformer_2"), name) == GOOD[name]


@pytest.mark.parametrize("name", ["steps_mask", "steps_policy"])
def test_second_mask_is_refused_because_a_mask_counts_the_steps_of_both(name):
    with pytest.raises(ConfigError, match=f"secondary cannot have {name}"):
        CacheDiTConfig(secondary={name: GOOD[name]})


@pytest.mark.parametrize("name", ["secondary", "enabled"])
def test_second_setting_that_makes_no_sense_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' in secondary"):
        CacheDiTConfig(secondary={name: GOOD[name]})


def test_unknown_second_setting_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'fn_compute_block' in secondary.*Did you mean 'fn_compute_blocks'"):
        CacheDiTConfig(secondary={"fn_compute_block": 2})


@pytest.mark.parametrize("wrong", [3, "fn_compute_blocks=3", [("fn_compute_blocks", 3)]])
def test_second_settings_that_are_no_dict_are_refused(wrong):
    with pytest.raises(ConfigTypeError, match=f"secondary is a {type(wrong).__name__}"):
        CacheDiTConfig(secondary=wrong)


def test_wrong_second_value_is_refused_when_the_config_is_made():
    with pytest.raises(ConfigError, match="max_warmup_steps=-3"):
        CacheDiTConfig(secondary={"max_warmup_steps": -3})
