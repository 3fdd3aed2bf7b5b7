"""What the settings of all caches have in common: how a call gives them, names and aliases, a second transformer."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import pytest
import torch

import sgl_diffusion_accel as package
from sgl_diffusion_accel import (
    AdaptiveConfig,
    CacheDiTConfig,
    ConfigError,
    ConfigTypeError,
    MagCacheConfig,
    TeaCacheConfig,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_magcache,
    apply_teacache,
)
from sgl_diffusion_accel.caching.adaptive import AdaptiveSettings
from sgl_diffusion_accel.caching.cache_config import CacheConfig
from sgl_diffusion_accel.caching.cache_dit.cache_dit_config import CacheDiTSettings
from sgl_diffusion_accel.caching.magcache.magcache_config import MagCacheSettings
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheSettings
from zoo import FAMILIES

RATIOS = [1.0, 0.9, 1.1, 1.0]
LINE = [0, 0, 0, 1, 0]
CACHES: dict[str, tuple[Any, type[CacheConfig], Any, dict[str, Any]]] = {
    "cache_dit": (apply_cache_dit, CacheDiTConfig, CacheDiTSettings, {"residual_diff_threshold": 0.3}),
    "teacache": (apply_teacache, TeaCacheConfig, TeaCacheSettings, {"teacache_thresh": 0.3, "coefficients": LINE}),
    "magcache": (apply_magcache, MagCacheConfig, MagCacheSettings, {"magnitude_ratios": RATIOS, "threshold": 0.3}),
    "adaptive": (apply_adaptive_cache, AdaptiveConfig, AdaptiveSettings, {"tolerance": 0.3}),
}
each_cache = pytest.mark.parametrize(("apply", "kind", "settings", "given"), CACHES.values(), ids=CACHES)


def pipeline() -> Any:
    return FAMILIES["wan"].make()


@each_cache
def test_config_and_names_are_the_same(apply: Any, kind: Any, settings: Any, given: dict[str, Any]) -> None:
    pipe = pipeline()
    by_name, by_config = apply(pipe, **given), apply(pipe, kind(**given))
    assert by_name.config == by_config.config == kind(**given)
    assert by_name.title == by_config.title


@each_cache
def test_names_go_over_the_config(apply: Any, kind: Any, settings: Any, given: dict[str, Any]) -> None:
    name = next(name for name, value in given.items() if value == 0.3)
    config = kind(**given)
    patch = apply(pipeline(), config, **{name: 0.25})
    assert getattr(patch.config, name) == 0.25
    assert getattr(config, name) == 0.3, "a config is never changed"


@pytest.mark.parametrize("name", ["teacache", "magcache", "adaptive"])
def test_main_setting_may_be_given_alone(name: str) -> None:
    apply, kind, _, given = CACHES[name]
    others = {key: value for key, value in given.items() if key != kind.main}
    assert apply(pipeline(), given[kind.main], **others).config == kind(**given)
    with pytest.raises(ConfigError, match=f"{kind.main} is given twice"):
        apply(pipeline(), given[kind.main], **given)


@each_cache
def test_other_config_is_refused(apply: Any, kind: Any, settings: Any, given: dict[str, Any]) -> None:
    other = TeaCacheConfig() if kind is not TeaCacheConfig else AdaptiveConfig()
    with pytest.raises(
        ConfigTypeError, match=rf"is a {type(other).__name__}; allowed: an? {kind.__name__}.*apply_\w+\("
    ):
        apply(pipeline(), other)


@each_cache
def test_typo_gets_the_nearest_name(apply: Any, kind: Any, settings: Any, given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(ConfigError, match=rf"unknown setting '{name[:-1]}' in {apply.__name__}. Did you mean '{name}'"):
        apply(pipeline(), **{name[:-1]: 1})


@each_cache
def test_typed_names_are_the_fields_and_the_aliases(
    apply: Any, kind: Any, settings: Any, given: dict[str, Any]
) -> None:
    typed = typing.get_type_hints(settings)
    assert list(typed) == [*kind.names(), *kind.aliases]
    fields = {each.name: each.type for each in dataclasses.fields(kind)}
    assert {name: settings.__annotations__[name].__forward_arg__ for name in fields} == fields
    for alias, name in kind.aliases.items():
        assert typed[alias] == typed[name]


@pytest.mark.parametrize(
    ("name", "alias"), [(name, alias) for name, (_, kind, _, _) in CACHES.items() for alias in kind.aliases]
)
def test_alias_is_its_setting(name: str, alias: str) -> None:
    apply, kind, _, given = CACHES[name]
    own = kind.aliases[alias]
    value = {"steps_mask": [1, 0, 1], "steps_policy": "dynamic"}.get(own, given.get(own, 1))
    others = {key: other for key, other in given.items() if key != own}
    assert apply(pipeline(), **{alias: value}, **others).config == kind(**{own: value}, **others)
    with pytest.raises(ConfigError, match=f"{own} is given twice, as {alias} and as {own}"):
        apply(pipeline(), **{alias: value, own: value}, **others)


def test_alias_holds_for_the_second_transformer_as_well() -> None:
    config = CacheDiTConfig(secondary={"Fn_compute_blocks": 3})
    assert config.secondary == {"fn_compute_blocks": 3}
    assert config.for_component("transformer_2").fn_compute_blocks == 3
    with pytest.raises(ConfigError, match="secondary cannot have steps_computation_mask: a mask counts"):
        CacheDiTConfig(secondary={"steps_computation_mask": [1]})


@pytest.mark.parametrize(
    "name",
    [
        "apply_block_cache",
        "apply_cache_plan",
        "attention_backends",
        "calibrate",
        "check_plan",
        "compare",
        "denoising_steps",
        "fit_teacache",
        "nsys_command",
        "profile",
        "set_attention_backend",
    ],
)
def test_misspelt_argument_gets_the_nearest_name(name: str) -> None:
    function = getattr(package, name)
    known = list(inspect.signature(function).parameters)[-1]
    with pytest.raises(ConfigError, match=rf"unknown argument '{known}s' in {name}. Did you mean '{known}'"):
        function(torch.nn.Linear(1, 1), **{f"{known}s": True})


@pytest.mark.parametrize("apply", [apply_teacache, apply_magcache, apply_cache_dit, apply_adaptive_cache])
def test_what_has_no_place_is_told_to_go_by_name(apply: Any) -> None:
    words = rf"{apply.__name__} takes pipe, config by their place, and got 3 arguments.*{apply.__name__}\(pipe, name="
    with pytest.raises(ConfigTypeError, match=words):
        apply(torch.nn.Linear(1, 1), 0.1, [0, 0, 0, 1, 0])


def test_config_by_its_place_and_by_its_name_is_one_too_many() -> None:
    with pytest.raises(ConfigError, match="config is given twice"):
        apply_teacache(torch.nn.Linear(1, 1), 0.1, config=TeaCacheConfig())


@each_cache
def test_help_and_completion_show_the_settings(apply: Any, kind: Any, settings: Any, given: dict[str, Any]) -> None:
    shown = inspect.signature(apply).parameters
    assert [name for name, each in shown.items() if each.kind is each.KEYWORD_ONLY] == list(kind.names())
    fields = {each.name: each.default for each in dataclasses.fields(kind)}
    assert {name: shown[name].default for name in fields} == fields
