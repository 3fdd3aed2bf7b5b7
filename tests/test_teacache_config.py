"""TeaCache's settings are checked when they are made, named in every refusal, and never changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from sgl_diffusion_accel import (
    AccelError,
    ConfigError,
    ConfigTypeError,
    TeaCacheCoefficients,
    TeaCacheConfig,
)
from sgl_diffusion_accel.caching.teacache.skip_window import Window

TEACACHE_KNOBS = TeaCacheConfig.names()
FIVE = (3.0, -2.0, 1.0, 0.5, -0.25)
OTHER = (1.0, 1.0, 1.0, 1.0, 1.0)
SECOND = TeaCacheCoefficients(OTHER, {1.5: 0.5})
FITTED = TeaCacheCoefficients(FIVE, {2.0: 0.2, 1.5: 0.1, 3.0: 0.4}, 0.01, 0.3, 0.9, True, SECOND)
GOOD = {
    "teacache_thresh": 0.1,
    "coefficients": FITTED,
    "start_skipping": 4,
    "end_skipping": -2,
    "use_ret_steps": True,
    "variant": "flux.1-dev",
    "taylorseer_order": 1,
    "secondary": {"teacache_thresh": 0.3},
}
TOGETHER = {name: value for name, value in GOOD.items() if name != "variant"}


# Thresholds


def test_everything_is_the_model_s_own_by_default():
    config = TeaCacheConfig()
    assert {name: getattr(config, name) for name in TEACACHE_KNOBS} == {
        "teacache_thresh": None,
        "coefficients": None,
        "start_skipping": None,
        "end_skipping": None,
        "use_ret_steps": None,
        "variant": None,
        "taylorseer_order": 0,
        "secondary": None,
    }


def test_every_knob_is_taken():
    assert set(GOOD) == set(TEACACHE_KNOBS) == {field.name for field in dataclasses.fields(TeaCacheConfig)}
    config = TeaCacheConfig(**TOGETHER)
    assert {name: getattr(config, name) for name in TOGETHER} == TOGETHER
    assert TeaCacheConfig(variant="flux.1-dev").variant == "flux.1-dev"


@pytest.mark.parametrize("wrong", [0, 0.0, -0.0, -0.1, -3, math.nan, math.inf, -math.inf, np.float64("nan")])
def test_threshold_that_is_not_positive_and_finite_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match=r"^teacache_thresh=.*; allowed: a positive number such as 0\.1.*'1\.6x'"):
        TeaCacheConfig(wrong)


@pytest.mark.parametrize("wrong", [True, False, [0.1], {"2x": 1}, 1j, b"2x", np.array([0.1, 0.2])])
def test_threshold_of_another_type_is_refused_as_such(wrong):
    with pytest.raises(ConfigTypeError, match=rf"^teacache_thresh=.* is a {type(wrong).__name__}; allowed"):
        TeaCacheConfig(wrong)


@pytest.mark.parametrize(
    "wrong", ["", "x", "fast", "0.1", "2", "2 times", "-2x", "2x faster", "1.6.1x", "infx", "nanx"]
)
def test_word_that_is_no_speedup_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match=r"^teacache_thresh=.*; allowed: a positive number.*speed-up such as '1\.6x'"):
        TeaCacheConfig(wrong)


@pytest.mark.parametrize("number", [1, np.float32(0.25), np.int64(3), 1e-9, 1e9])
def test_any_positive_number_is_a_threshold(number):
    threshold = TeaCacheConfig(number).teacache_thresh
    assert (type(threshold), threshold) == (float, float(number))


def test_config_in_the_place_of_the_threshold_is_refused():
    with pytest.raises(ConfigTypeError, match=r"^teacache_thresh=.* is a TeaCacheConfig; allowed"):
        TeaCacheConfig(TeaCacheConfig())


@pytest.mark.parametrize(
    ("wanted", "threshold", "word"),
    [
        ("1.5x", 0.1, "for 1.5x"),
        ("2x", 0.2, "for 2x"),
        (" 2X ", 0.2, "for 2x"),
        ("2.0 x", 0.2, "for 2x"),
        ("2.1x", 0.2, "for 2x"),
        ("2.6x", 0.4, "for 3x"),
        ("1.45x", 0.1, "for 1.5x"),
        ("3.1x", 0.4, "for 3x"),
    ],
)
def test_speedup_finds_the_nearest_known_threshold(wanted, threshold, word):
    assert FITTED.threshold(wanted) == (threshold, f" {word}")


@pytest.mark.parametrize("wanted", ["1.4x", "1x", "0x", "3.2x", "10x"])
def test_speedup_beyond_those_known_is_refused_with_the_known_ones(wanted):
    with pytest.raises(ConfigError, match=rf"'{wanted}': none is known.*'2x' \(0\.2\), '1\.5x' \(0\.1\), '3x'.*number"):
        FITTED.threshold(wanted)


def test_default_threshold_is_that_of_the_smallest_speedup():
    assert FITTED.threshold(None) == (0.1, " for 1.5x")


def test_number_is_the_threshold_itself():
    assert FITTED.threshold(0.123) == (0.123, "")
    assert TeaCacheCoefficients(FIVE).threshold(0.123) == (0.123, "")


@pytest.mark.parametrize("wanted", ["2x", None])
def test_coefficients_without_thresholds_need_a_number(wanted):
    with pytest.raises(ConfigError, match=r"^no threshold is known for coefficients=\[3\.0, .*teacache_thresh=0\.1"):
        TeaCacheCoefficients(FIVE).threshold(wanted)


# Coefficients


@pytest.mark.parametrize("made", [TeaCacheCoefficients, lambda c: TeaCacheConfig(coefficients=c)])
@pytest.mark.parametrize("count", [0, 4, 6])
def test_other_than_five_coefficients_are_refused(made, count):
    with pytest.raises(ConfigError, match=rf"^coefficients has {count} numbers; allowed: 5"):
        made([0.5] * count)


@pytest.mark.parametrize("made", [TeaCacheCoefficients, lambda c: TeaCacheConfig(coefficients=c)])
@pytest.mark.parametrize("wrong", ["12345", 5, 0.5, [1, 2, 3, 4, "5"], [1, 2, 3, 4, None], [True] * 5])
def test_coefficients_of_another_type_are_refused_as_such(made, wrong):
    with pytest.raises(ConfigTypeError, match=r"^coefficients .*; allowed: 5 numbers"):
        made(wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_coefficient_that_is_not_finite_is_refused(bad):
    with pytest.raises(ConfigError, match=rf"^coefficients has {bad}"):
        TeaCacheConfig(coefficients=[1, 2, bad, 4, 5])


@pytest.mark.parametrize("given", [list(FIVE), FIVE, np.array(FIVE), TeaCacheCoefficients(FIVE)])
def test_five_numbers_in_any_form_become_coefficients(given):
    config = TeaCacheConfig(coefficients=given)
    assert config.fitted == TeaCacheCoefficients(FIVE)
    assert list(config.fitted) == list(FIVE)
    assert len(config.fitted) == 5


def test_no_coefficients_are_none():
    assert TeaCacheConfig().fitted is None


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.1), (-1.0, None), (None, math.nan), (math.inf, math.inf)])
def test_range_that_cannot_be_is_refused(low, high):
    with pytest.raises(ConfigError, match=r"^the fitted range is"):
        TeaCacheCoefficients(FIVE, low=low, high=high)


@pytest.mark.parametrize(
    "thresholds", [{2.0: -0.1}, {2.0: 0.0}, {2.0: math.nan}, {2.0: math.inf}, {0.0: 0.1}, {-2.0: 0.1}, {math.nan: 0.1}]
)
def test_threshold_that_cannot_be_is_refused_in_coefficients(thresholds):
    with pytest.raises(ConfigError, match="thresholds"):
        TeaCacheCoefficients(FIVE, thresholds)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("thresholds", {"2x": 0.1}),
        ("thresholds", {2.0: "0.1"}),
        ("thresholds", [0.1]),
        ("thresholds", None),
        ("r_squared", "0.9"),
        ("use_ret_steps", "yes"),
        ("secondary", [1, 2, 3, 4, 5]),
    ],
)
def test_part_of_coefficients_of_another_type_is_refused_as_such(name, wrong):
    with pytest.raises(ConfigTypeError, match=name):
        TeaCacheCoefficients(FIVE, **{name: wrong})


@pytest.mark.parametrize("end", ["low", "high"])
def test_range_of_another_type_is_refused_as_such(end):
    with pytest.raises(ConfigTypeError, match="range"):
        TeaCacheCoefficients(FIVE, **{end: "0.1"})


@pytest.mark.parametrize("fit", [FITTED, SECOND, TeaCacheCoefficients(np.array(FIVE), low=0.0, use_ret_steps=False)])
def test_repr_can_be_typed_in_again(fit):
    again = eval(repr(fit))
    assert again == fit
    assert dataclasses.asdict(again) == dataclasses.asdict(fit)


def test_repr_leaves_out_what_is_not_known():
    assert repr(TeaCacheCoefficients(FIVE)) == f"TeaCacheCoefficients(coefficients={FIVE})"


# The other settings


def test_variant_and_coefficients_exclude_each_other():
    with pytest.raises(ConfigError, match=r"^variant='flux\.1-dev' and coefficients exclude each other"):
        TeaCacheConfig(coefficients=FIVE, variant="flux.1-dev")


@pytest.mark.parametrize("wrong", [5, b"flux", ["flux.1-dev"], True])
def test_variant_of_another_type_is_refused_as_such(wrong):
    with pytest.raises(ConfigTypeError, match=f"^variant is a {type(wrong).__name__}"):
        TeaCacheConfig(variant=wrong)


@pytest.mark.parametrize("wrong", [0, 1, "yes", 0.5])
def test_use_ret_steps_is_true_false_or_none(wrong):
    with pytest.raises(ConfigTypeError, match=r"^use_ret_steps=.*: allowed are True, False and None"):
        TeaCacheConfig(use_ret_steps=wrong)


@pytest.mark.parametrize(("wrong", "error"), [(-1, ConfigError), (1.0, ConfigTypeError), (True, ConfigTypeError)])
def test_order_is_a_whole_number_from_0(wrong, error):
    with pytest.raises(error, match=f"^taylorseer_order={wrong}"):
        TeaCacheConfig(taylorseer_order=wrong)


@pytest.mark.parametrize("name", ["start_skipping", "end_skipping"])
@pytest.mark.parametrize(
    ("wrong", "error"), [("5", ConfigTypeError), (True, ConfigTypeError), (1.5, ConfigError), (math.nan, ConfigError)]
)
def test_window_is_checked_when_the_config_is_made(name, wrong, error):
    with pytest.raises(error, match=f"^{name}="):
        TeaCacheConfig(**{name: wrong})


def test_window_that_is_always_empty_is_refused_when_the_config_is_made():
    with pytest.raises(ConfigError, match="leave no step to skip"):
        TeaCacheConfig(start_skipping=9, end_skipping=3)


@pytest.mark.parametrize(
    ("given", "retains", "window"),
    [
        ({}, False, Window(1, -1)),
        ({}, True, Window(5, -1)),
        ({"start_skipping": 3}, True, Window(3, -1)),
        ({"end_skipping": 0.9}, True, Window(5, 0.9)),
        ({"start_skipping": 0, "end_skipping": 20}, False, Window(0, 20)),
    ],
)
def test_window_starts_at_step_5_with_retention_steps_and_at_1_else(given, retains, window):
    assert TeaCacheConfig(**given).window(retains) == window


def test_unknown_name_is_a_type_error_as_of_any_dataclass():
    with pytest.raises(TypeError, match="threshold"):
        TeaCacheConfig(threshold=0.1)


# The second transformer


def test_settings_of_the_second_transformer_go_over_the_first_s():
    config = TeaCacheConfig(0.1, start_skipping=3, secondary={"teacache_thresh": 0.3, "taylorseer_order": 2})
    first, second = config.for_component("transformer"), config.for_component("transformer_2")
    assert (first.teacache_thresh, second.teacache_thresh) == (0.1, 0.3)
    assert (first.taylorseer_order, second.taylorseer_order) == (0, 2)
    assert first.start_skipping == second.start_skipping == 3
    assert first.secondary is None
    assert second.secondary is None


def test_second_transformer_is_like_the_first_without_settings_of_its_own():
    config = TeaCacheConfig("2x", FIVE, start_skipping=3)
    assert config.for_component("transformer_2") == config.for_component("transformer") == config


def test_second_fit_goes_to_the_second_transformer():
    config = TeaCacheConfig("2x", FITTED)
    assert config.for_component("transformer").fitted == FITTED
    assert config.for_component("transformer_2").fitted == SECOND
    assert TeaCacheConfig("2x", SECOND).for_component("transformer_2").fitted == SECOND


def test_own_coefficients_of_the_second_transformer_go_before_the_second_fit():
    config = TeaCacheConfig("2x", FITTED, secondary={"coefficients": FIVE})
    assert config.for_component("transformer_2").fitted == TeaCacheCoefficients(FIVE)


@pytest.mark.parametrize(
    ("given", "secondary"),
    [({"coefficients": FITTED}, {"variant": "flux.1-dev"}), ({"variant": "flux.1-dev"}, {"coefficients": FIVE})],
)
def test_second_transformer_may_take_the_other_kind_of_coefficients(given, secondary):
    second = TeaCacheConfig(**given, secondary=secondary).for_component("transformer_2")
    assert second.variant == secondary.get("variant")
    assert second.fitted == (TeaCacheCoefficients(FIVE) if "coefficients" in secondary else None)


@pytest.mark.parametrize("name", sorted(set(TEACACHE_KNOBS) - {"secondary"}))
def test_every_knob_has_a_second_setting(name):
    config = TeaCacheConfig(secondary={name: GOOD[name]})
    assert getattr(config.for_component("transformer_2"), name) == GOOD[name]
    assert getattr(config.for_component("transformer"), name) == getattr(TeaCacheConfig(), name)


@pytest.mark.parametrize(
    ("name", "nearest"), [("teacache_tresh", "teacache_thresh"), ("coeficients", "coefficients"), ("start", None)]
)
def test_unknown_second_setting_is_refused_with_the_nearest(name, nearest):
    hint = f"Did you mean '{nearest}'" if nearest else "Known: coefficients"
    with pytest.raises(ConfigError, match=f"'{name}' in secondary.*{hint}"):
        TeaCacheConfig(secondary={name: 0.1})


@pytest.mark.parametrize("name", ["secondary", 5])
def test_second_setting_that_makes_no_sense_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' in secondary"):
        TeaCacheConfig(secondary={name: None})


@pytest.mark.parametrize("wrong", [3, "teacache_thresh=3", [("teacache_thresh", 3)], TeaCacheConfig()])
def test_second_settings_that_are_no_dict_are_refused(wrong):
    with pytest.raises(ConfigTypeError, match=f"^secondary is a {type(wrong).__name__}"):
        TeaCacheConfig(secondary=wrong)


@pytest.mark.parametrize(
    ("secondary", "word"),
    [
        ({"teacache_thresh": -1}, "teacache_thresh=-1"),
        ({"coefficients": [1, 2]}, "coefficients has 2 numbers"),
        ({"variant": "flux.1-dev", "coefficients": FIVE}, "exclude each other"),
        ({"start_skipping": 9, "end_skipping": 3}, "leave no step"),
    ],
)
def test_wrong_second_value_is_refused_when_the_config_is_made(secondary, word):
    with pytest.raises(ConfigError, match=word):
        TeaCacheConfig(secondary=secondary)


# Never changed


@pytest.mark.parametrize("name", TEACACHE_KNOBS)
def test_config_cannot_be_changed(name):
    config = TeaCacheConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, GOOD[name])
    assert config == TeaCacheConfig()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TeaCacheCoefficients)])
def test_coefficients_cannot_be_changed(name):
    fit = TeaCacheCoefficients(FIVE, {2.0: 0.2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(fit, name, getattr(FITTED, name))
    with pytest.raises(TypeError, match="never changed"):
        fit.thresholds[2.0] = 0.9
    assert fit == TeaCacheCoefficients(FIVE, {2.0: 0.2})


def test_config_is_not_changed_through_what_it_was_made_of():
    numbers, thresholds, secondary = list(FIVE), {2.0: 0.2}, {"teacache_thresh": 0.3}
    config = TeaCacheConfig(coefficients=TeaCacheCoefficients(numbers, thresholds), secondary=secondary)
    numbers[0], thresholds[2.0], secondary["teacache_thresh"] = 99, 99, 99
    assert config.fitted == TeaCacheCoefficients(FIVE, {2.0: 0.2})
    assert config.secondary == {"teacache_thresh": 0.3}


def test_config_is_not_changed_through_a_list_in_secondary():
    numbers = list(FIVE)
    config = TeaCacheConfig(secondary={"coefficients": numbers})
    numbers[0] = 99
    assert config.for_component("transformer_2").fitted == TeaCacheCoefficients(FIVE)


def test_config_is_not_changed_through_its_secondary_settings():
    config = TeaCacheConfig(secondary={"teacache_thresh": 0.3})
    with pytest.raises(TypeError, match="never changed"):
        config.secondary["teacache_thresh"] = -7
    assert config.secondary == {"teacache_thresh": 0.3}


CONFIGS = [
    TeaCacheConfig(),
    TeaCacheConfig(**TOGETHER),
    TeaCacheConfig("2x", FITTED),
    TeaCacheConfig(coefficients=list(FIVE)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_can_be_compared_copied_pickled_and_replaced(config):
    same = dataclasses.replace(config)
    assert same == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert dataclasses.replace(config, taylorseer_order=3) != config


@pytest.mark.parametrize("config", [*CONFIGS, TeaCacheConfig(secondary={"coefficients": list(FIVE)})])
def test_configs_can_be_keys(config):
    assert {config: "fast"}[dataclasses.replace(config)] == "fast"


@pytest.mark.parametrize("config", CONFIGS)
def test_repr_of_a_config_can_be_typed_in_again(config):
    assert eval(repr(config)) == config


def test_refusals_are_caught_as_the_built_in_errors():
    with pytest.raises(ValueError, match="teacache_thresh=0") as value:
        TeaCacheConfig(0)
    with pytest.raises(TypeError, match="teacache_thresh=True") as kind:
        TeaCacheConfig(True)
    assert isinstance(value.value, AccelError)
    assert isinstance(kind.value, AccelError)


def test_nearest_threshold_is_taken_and_of_two_the_more_careful():
    fit = TeaCacheCoefficients(FIVE, {1.4: 0.1, 1.8: 0.2, 2.0: 0.3})
    assert [fit.threshold(wanted)[0] for wanted in ("1.6x", "1.61x", "1.7x", "2x", np.float32(0.5), 1)] == [
        0.1, 0.2, 0.2, 0.3, 0.5, 1.0,
    ]  # fmt: skip


def test_fit_can_be_kept_as_json():
    fit = TeaCacheCoefficients(FIVE, {2.0: 0.1}, 0.0, 1.0, 0.9, True, TeaCacheCoefficients(FIVE, {2.5: 0.2}), 50)
    assert TeaCacheCoefficients(**json.loads(json.dumps(dataclasses.asdict(fit)))) == fit
