"""Settings from SGLang's environment variables, and from the files of SGLang and cache-dit."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from sgl_diffusion_accel import CacheDiTConfig, ConfigError, MissingPackageError, StepsMask
from sgl_diffusion_accel.errors import AccelError

PREFIX = "SGLANG_CACHE_DIT_"


def from_env(**variables):
    """A config of variables that are given without their prefix."""
    return CacheDiTConfig.from_env({PREFIX + name: text for name, text in variables.items()})


def test_empty_environment_gives_the_defaults():
    assert CacheDiTConfig.from_env({}) == CacheDiTConfig()
    assert CacheDiTConfig.from_env({"PATH": "/bin", "SGLANG_OTHER": "1", "CACHE_DIT_FN": "x"}) == CacheDiTConfig()


@pytest.mark.parametrize(
    ("variable", "text", "knob", "value"),
    [
        ("FN", "8", "fn_compute_blocks", 8),
        ("BN", "2", "bn_compute_blocks", 2),
        ("WARMUP", "12", "max_warmup_steps", 12),
        ("RDT", "0.08", "residual_diff_threshold", 0.08),
        ("RDT", "1e-1", "residual_diff_threshold", 0.1),
        ("MC", "5", "max_continuous_cached_steps", 5),
        ("MC", "-1", "max_continuous_cached_steps", None),
    ],
)
def test_each_number_is_read_for_the_first_and_for_the_second_transformer(variable, text, knob, value):
    assert from_env(**{variable: text}) == CacheDiTConfig(**{knob: value})
    second = from_env(**{"SECONDARY_" + variable: text})
    assert getattr(second.for_component("transformer_2"), knob) == value
    assert second.for_component("transformer") == CacheDiTConfig()


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", " TRUE "])
def test_flags_that_are_on(text):
    assert from_env(TAYLORSEER=text).taylorseer_order == 1
    assert from_env(ENABLED=text).enabled


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off", ""])
def test_flags_that_are_off(text):
    assert from_env(TAYLORSEER=text).taylorseer_order == 0
    assert not from_env(ENABLED=text).enabled


@pytest.mark.parametrize(
    ("variables", "first", "second"),
    [
        ({"TAYLORSEER": "true"}, 1, 1),
        ({"TAYLORSEER": "true", "TS_ORDER": "2"}, 2, 2),
        ({"TAYLORSEER": "false", "TS_ORDER": "2"}, 0, 0),
        ({"TS_ORDER": "2"}, 0, 0),
        ({"TAYLORSEER": "true", "SECONDARY_TS_ORDER": "2"}, 1, 2),
        ({"TAYLORSEER": "true", "TS_ORDER": "3", "SECONDARY_FN": "2"}, 3, 3),
        ({"TAYLORSEER": "true", "SECONDARY_TAYLORSEER": "false"}, 1, 0),
        ({"SECONDARY_TAYLORSEER": "true"}, 0, 1),
        ({"TS_ORDER": "3", "SECONDARY_TAYLORSEER": "true"}, 0, 3),
        ({"SECONDARY_TAYLORSEER": "true", "SECONDARY_TS_ORDER": "4"}, 0, 4),
    ],
)
def test_taylor_order_is_its_switch_and_its_number_and_the_second_inherits_both(variables, first, second):
    config = from_env(**variables)
    assert config.for_component("transformer").taylorseer_order == first
    assert config.for_component("transformer_2").taylorseer_order == second


@pytest.mark.parametrize("preset", ["slow", "medium", "fast", "ultra", "FAST", " slow "])
def test_mask_preset(preset):
    assert from_env(SCM_PRESET=preset).steps_mask == StepsMask.preset(preset.strip().lower())


@pytest.mark.parametrize("preset", ["none", "None", ""])
def test_no_mask_preset(preset):
    assert from_env(SCM_PRESET=preset) == CacheDiTConfig()


def test_mask_bins_go_over_the_preset():
    config = from_env(SCM_PRESET="slow", SCM_COMPUTE_BINS="8,3,3, 2,2", SCM_CACHE_BINS="1,2,2,2,3")
    assert config.steps_mask == StepsMask([8, 3, 3, 2, 2], [1, 2, 2, 2, 3])


@pytest.mark.parametrize(("seen", "missing"), [("COMPUTE", "CACHE"), ("CACHE", "COMPUTE")])
@pytest.mark.parametrize("more", [{}, {"SCM_PRESET": "slow"}])
def test_one_of_the_bins_alone_is_refused_with_the_other(seen, missing, more):
    with pytest.raises(ConfigError, match=rf"{PREFIX}SCM_{seen}_BINS is set and {PREFIX}SCM_{missing}_BINS is not"):
        from_env(**{f"SCM_{seen}_BINS": "8,3"}, **more)


def test_mask_policy():
    assert from_env(SCM_PRESET="fast", SCM_POLICY="static").steps_policy == "static"
    assert from_env(SCM_PRESET="fast", SCM_POLICY="dynamic").steps_policy == "dynamic"
    assert from_env(SCM_PRESET="fast").steps_policy == "dynamic"
    assert from_env(SCM_POLICY="static") == CacheDiTConfig()  # without a mask it says nothing


@pytest.mark.parametrize("more", [{}, {"SCM_PRESET": "slow"}])
def test_unknown_mask_policy_is_refused_with_the_nearest(more):
    with pytest.raises(ConfigError, match=r"'statc'.*Did you mean 'static'"):
        from_env(SCM_POLICY="statc", **more)


def test_unknown_mask_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'fsat'.*Did you mean 'fast'"):
        from_env(SCM_PRESET="fsat")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("FNN", "FN"),
        ("WARM_UP", "WARMUP"),
        ("TSORDER", "TS_ORDER"),
        ("SCM_COMPUTE_BIN", "SCM_COMPUTE_BINS"),
        ("SECONDARY_WARMUPS", "SECONDARY_WARMUP"),
        ("ENABLE", "ENABLED"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest(wrong, nearest):
    with pytest.raises(ConfigError, match=rf"'{PREFIX}{wrong}'.*Did you mean '{PREFIX}{nearest}'.*Known: "):
        from_env(**{wrong: "1"})


@pytest.mark.parametrize("name", ["SCM_PRESET", "SCM_COMPUTE_BINS", "SCM_CACHE_BINS", "SCM_POLICY", "ENABLED"])
def test_mask_and_switch_have_no_second_setting(name):
    with pytest.raises(ConfigError, match=f"SECONDARY_{name}"):
        from_env(**{"SECONDARY_" + name: "1"})


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("FN", "one", "a whole number"),
        ("BN", "1.5", "a whole number"),
        ("WARMUP", "", "a whole number"),
        ("MC", "none", "a whole number"),
        ("TS_ORDER", "2nd", "a whole number"),
        ("RDT", "0,24", "a number"),
        ("TAYLORSEER", "maybe", "true or false"),
        ("ENABLED", "2", "true or false"),
        ("SCM_COMPUTE_BINS", "8;3", "numbers such as"),
        ("SCM_CACHE_BINS", "1,,2", "numbers such as"),
        ("SECONDARY_FN", "two", "a whole number"),
        ("SECONDARY_TAYLORSEER", "si", "true or false"),
    ],
)
def test_value_that_cannot_be_read_is_refused_with_what_is_expected(variable, text, expected):
    with pytest.raises(ConfigError) as error:
        from_env(**{variable: text})
    assert f"{PREFIX}{variable}={text!r}" in str(error.value)
    assert f"expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("variable", "text"), [("FN", "-1"), ("WARMUP", "-2"), ("RDT", "-0.1"), ("RDT", "nan"), ("MC", "-2")]
)
def test_value_that_is_not_allowed_is_refused(variable, text):
    with pytest.raises(ConfigError, match="allowed"):
        from_env(**{variable: text})


def test_process_environment_is_read_when_asked_for_and_only_then(monkeypatch):
    monkeypatch.setenv(PREFIX + "FN", "3")
    assert CacheDiTConfig().fn_compute_blocks == 1
    assert CacheDiTConfig.from_env().fn_compute_blocks == 3
    monkeypatch.setenv(PREFIX + "FN", "4")
    assert CacheDiTConfig.from_env().fn_compute_blocks == 4
    assert CacheDiTConfig.from_env({}).fn_compute_blocks == 1


FILE = {
    "cache_type": "DBCache",
    "Fn_compute_blocks": 8,
    "Bn_compute_blocks": 2,
    "max_warmup_steps": 6,
    "warmup_interval": 2,
    "residual_diff_threshold": 0.12,
    "max_continuous_cached_steps": 2,
    "max_cached_steps": 30,
    "max_accumulated_residual_diff_threshold": 1.5,
    "enable_taylorseer": True,
    "taylorseer_order": 2,
    "steps_computation_mask": [1, 0, 1],
    "steps_computation_policy": "static",
    "num_inference_steps": 28,
    "enable_separate_cfg": True,
    "cfg_compute_first": False,
    "cfg_diff_compute_separate": True,
}
READ = CacheDiTConfig(
    fn_compute_blocks=8,
    bn_compute_blocks=2,
    max_warmup_steps=6,
    warmup_interval=2,
    residual_diff_threshold=0.12,
    max_continuous_cached_steps=2,
    max_cached_steps=30,
    max_accumulated_residual_diff=1.5,
    taylorseer_order=2,
    steps_mask=[1, 0, 1],
    steps_policy="static",
)


def written(tmp_path, content, suffix=".json"):
    """The path of a file with this content: a text as it is, anything else in the suffix's format."""
    path = tmp_path / f"config{suffix}"
    if not isinstance(content, str):
        if suffix == ".json":
            content = json.dumps(content)
        else:
            content = pytest.importorskip("yaml").safe_dump(content, sort_keys=False)
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".JSON", ".YAML"])
def test_every_key_of_a_file_is_read(tmp_path, suffix):
    if suffix == ".JSON":
        path = written(tmp_path, json.dumps({"cache_config": FILE}), suffix)
    else:
        path = written(tmp_path, {"cache_config": FILE}, suffix)
    assert CacheDiTConfig.from_file(path) == READ


def test_settings_may_stand_at_the_top(tmp_path):
    assert CacheDiTConfig.from_file(written(tmp_path, FILE)) == READ


def test_path_may_be_a_path_object(tmp_path):
    written(tmp_path, FILE)
    assert CacheDiTConfig.from_file(tmp_path / "config.json") == READ


def test_example_of_the_peers_is_read(tmp_path):
    pytest.importorskip("yaml")
    text = """
        # DBCache with TaylorSeer
        cache_config:
          cache_type: DBCache
          max_warmup_steps: 8
          warmup_interval: 2
          max_cached_steps: -1
          max_continuous_cached_steps: 2
          Fn_compute_blocks: 1
          Bn_compute_blocks: 0
          residual_diff_threshold: 0.12
          max_accumulated_residual_diff_threshold: null
          enable_taylorseer: true
          taylorseer_order: 1
          num_inference_steps: 28
          steps_computation_mask: fast
        """
    assert CacheDiTConfig.from_file(written(tmp_path, text, ".yaml")) == CacheDiTConfig(
        max_warmup_steps=8,
        warmup_interval=2,
        max_continuous_cached_steps=2,
        residual_diff_threshold=0.12,
        taylorseer_order=1,
        steps_mask="fast",
    )


@pytest.mark.parametrize(
    ("content", "order"),
    [
        ({"enable_taylorseer": True}, 1),
        ({"enable_taylorseer": True, "taylorseer_order": 3}, 3),
        ({"enable_taylorseer": False, "taylorseer_order": 3}, 0),
        ({"taylorseer_order": 3}, 0),
        ({"enable_taylorseer": None, "taylorseer_order": 2}, 0),
    ],
)
def test_taylor_order_of_a_file_is_its_switch_and_its_number(tmp_path, content, order):
    assert CacheDiTConfig.from_file(written(tmp_path, {"cache_config": content})).taylorseer_order == order


@pytest.mark.parametrize("wrong", ["false", "true", "no", 2, [True]])
def test_switch_of_a_file_that_is_not_true_or_false_is_refused(tmp_path, wrong):
    path = written(tmp_path, {"cache_config": {"enable_taylorseer": wrong}})
    with pytest.raises(AccelError, match="enable_taylorseer"):
        CacheDiTConfig.from_file(path)


@pytest.mark.parametrize("key", [key for key in FILE if key != "cache_type"])
def test_key_without_a_value_keeps_its_default(tmp_path, key):
    assert CacheDiTConfig.from_file(written(tmp_path, {"cache_config": {key: None}})) == CacheDiTConfig()


def test_empty_section_gives_the_defaults(tmp_path):
    assert CacheDiTConfig.from_file(written(tmp_path, {"cache_config": {}})) == CacheDiTConfig()


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("Fn_compute_block", "Fn_compute_blocks"),
        ("residual_diff_treshold", "residual_diff_threshold"),
        ("max_warmup_step", "max_warmup_steps"),
        ("enable_taylorsear", "enable_taylorseer"),
        ("fn_compute_blocks", "Fn_compute_blocks"),
        ("steps_computation_masks", "steps_computation_mask"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_and_the_file(tmp_path, wrong, nearest):
    path = written(tmp_path, {"cache_config": {wrong: 1}})
    with pytest.raises(ConfigError, match=rf"'{wrong}'.*config\.json.*Did you mean '{nearest}'"):
        CacheDiTConfig.from_file(path)


@pytest.mark.parametrize("wrong", ["cache_confg", "cache-config", "cacheconfig"])
def test_misspelt_section_is_refused_with_the_right_name(tmp_path, wrong):
    with pytest.raises(ConfigError, match=f"'{wrong}'.*Did you mean 'cache_config'"):
        CacheDiTConfig.from_file(written(tmp_path, {wrong: FILE}))


def test_unknown_key_beside_the_section_is_refused(tmp_path):
    path = written(tmp_path, {"cache_config": {}, "atention_backend": "sage"})
    with pytest.raises(ConfigError, match=r"'atention_backend'.*Did you mean 'attention_backend'"):
        CacheDiTConfig.from_file(path)


def test_key_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="1"):
        CacheDiTConfig.from_file(written(tmp_path, {"cache_config": {1: 2}}, ".yaml"))


@pytest.mark.parametrize(
    "content", [{"cache_config": FILE, "attention_backend": "sage"}, {**FILE, "attention_backend": "sage"}]
)
def test_attention_backend_of_a_file_is_said_not_to_be_part_of_a_cache(tmp_path, content, caplog):
    with caplog.at_level(logging.WARNING):
        assert CacheDiTConfig.from_file(written(tmp_path, content)) == READ
    assert "attention_backend" in caplog.text
    assert "sage" in caplog.text


@pytest.mark.parametrize("kind", ["FBCache", "dbcache", "DBPrune"])
def test_other_kind_of_cache_is_refused(tmp_path, kind):
    with pytest.raises(ConfigError, match=f"cache_type='{kind}'; allowed: DBCache"):
        CacheDiTConfig.from_file(written(tmp_path, {"cache_config": {"cache_type": kind}}))


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "null", '{"cache_config": [1]}', '{"cache_config": null}'])
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_file_of_another_shape_is_refused_with_what_is_expected(tmp_path, content, suffix):
    if suffix == ".yaml":
        pytest.importorskip("yaml")
    with pytest.raises(ConfigError, match="mapping"):
        CacheDiTConfig.from_file(written(tmp_path, content, suffix))


@pytest.mark.parametrize(("content", "suffix"), [("{", ".json"), ("", ".json"), ("a: [", ".yaml"), ("\tx", ".yaml")])
def test_file_that_cannot_be_read_is_refused_with_its_name(tmp_path, content, suffix):
    if suffix == ".yaml":
        pytest.importorskip("yaml")
    with pytest.raises(ConfigError, match=rf"config\{suffix}: not valid {suffix[1:].upper()}"):
        CacheDiTConfig.from_file(written(tmp_path, content, suffix))


def test_other_kind_of_file_is_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match=r"'\.toml'. Allowed: \.yaml, \.yml, \.json"):
        CacheDiTConfig.from_file(written(tmp_path, "x", ".toml"))


def test_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        CacheDiTConfig.from_file(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Fn_compute_blocks", -1),
        ("residual_diff_threshold", "0.2"),
        ("taylorseer_order", -1),
        ("max_warmup_steps", True),
    ],
)
def test_value_of_a_file_that_is_not_allowed_is_refused(tmp_path, key, value):
    with pytest.raises(AccelError, match="allowed"):
        CacheDiTConfig.from_file(written(tmp_path, {"cache_config": {"enable_taylorseer": True, key: value}}))


def test_yaml_without_its_package_is_refused_with_what_to_type(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("cache_config: {}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'sgl-diffusion-accel\[yaml\]'") as error:
        CacheDiTConfig.from_file(str(path))
    assert isinstance(error.value, ImportError)


def test_json_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert CacheDiTConfig.from_file(written(tmp_path, {"cache_config": FILE})) == READ
