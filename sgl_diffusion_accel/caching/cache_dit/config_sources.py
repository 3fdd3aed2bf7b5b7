"""Reads the settings of `apply_cache_dit` from SGLang's environment variables and SGLang's or cache-dit's files."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.caching.parts.masks import StepsMask
from sgl_diffusion_accel.errors import ConfigError, MissingPackageError, unknown_name

logger = logging.getLogger(__name__)

_PREFIX = "SGLANG_CACHE_DIT_"
_SECONDARY = "SECONDARY_"
_ATTENTION = "attention_backend"


def _flag(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("true or false")


def _bins(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# environment name → (knob, how to read it); the knobs with a _ in front are combined further below
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "FN": ("fn_compute_blocks", int),
    "BN": ("bn_compute_blocks", int),
    "WARMUP": ("max_warmup_steps", int),
    "RDT": ("residual_diff_threshold", float),
    "MC": ("max_continuous_cached_steps", int),
    "TAYLORSEER": ("_taylorseer", _flag),
    "TS_ORDER": ("_order", int),
}
_ONLY_PRIMARY: dict[str, tuple[str, Callable[[str], Any]]] = {
    "ENABLED": ("enabled", _flag),
    "SCM_PRESET": ("_preset", str),
    "SCM_COMPUTE_BINS": ("_compute_bins", _bins),
    "SCM_CACHE_BINS": ("_cache_bins", _bins),
    "SCM_POLICY": ("steps_policy", str),
}
# file name → knob; None: told apart or read from the run without being asked for
_FILE_KEYS: dict[str, str | None] = {
    "Fn_compute_blocks": "fn_compute_blocks",
    "Bn_compute_blocks": "bn_compute_blocks",
    "max_warmup_steps": "max_warmup_steps",
    "warmup_interval": "warmup_interval",
    "residual_diff_threshold": "residual_diff_threshold",
    "max_continuous_cached_steps": "max_continuous_cached_steps",
    "max_cached_steps": "max_cached_steps",
    "max_accumulated_residual_diff_threshold": "max_accumulated_residual_diff",
    "enable_taylorseer": "_taylorseer",
    "taylorseer_order": "_order",
    "steps_computation_mask": "steps_mask",
    "steps_computation_policy": "steps_policy",
    "cache_type": "_cache_type",
    "num_inference_steps": None,
    "enable_separate_cfg": None,
    "cfg_compute_first": None,
    "cfg_diff_compute_separate": None,
}


def knobs_from_env(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the knobs that `SGLANG_CACHE_DIT_*` variables set; see `CacheDiTConfig.from_env`."""
    environ = os.environ if environ is None else environ
    primary: dict[str, Any] = {}
    secondary: dict[str, Any] = {}
    known = {**_VARIABLES, **_ONLY_PRIMARY}
    allowed = [_PREFIX + name for name in known] + [_PREFIX + _SECONDARY + name for name in _VARIABLES]
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        name = variable.removeprefix(_PREFIX)
        table, knobs = (known, primary)
        if name.startswith(_SECONDARY):
            name, table, knobs = name.removeprefix(_SECONDARY), _VARIABLES, secondary
        if name not in table:
            raise unknown_name("environment variable", variable, allowed)
        knob, read = table[name]
        try:
            knobs[knob] = read(text)
        except ValueError as error:
            raise ConfigError(f"{variable}={text!r} cannot be read: expected {_expected(read)}.") from error
    mask = _mask_of(primary)
    if mask is not None:
        primary["steps_mask"] = mask
    elif "steps_policy" in primary:
        _check_policy(primary.pop("steps_policy"))  # without a mask it says nothing
    if secondary:
        inherited = {key: value for key, value in primary.items() if key in ("_taylorseer", "_order")}
        primary["secondary"] = _with_order(inherited | secondary)
    return _with_order(primary)


def _expected(read: Callable[[str], Any]) -> str:
    expected = {int: "a whole number", float: "a number", _flag: "true or false", _bins: "numbers such as 8,3,3,2,2"}
    return expected.get(read, "text")


def _check_policy(policy: str) -> None:
    if policy not in ("dynamic", "static"):
        raise unknown_name("steps_policy", policy, ("dynamic", "static"))


def _mask_of(knobs: dict[str, Any]) -> StepsMask | None:
    preset = knobs.pop("_preset", "none")
    compute, cache = knobs.pop("_compute_bins", None), knobs.pop("_cache_bins", None)
    if (compute is None) != (cache is None):
        seen, missing = ("COMPUTE", "CACHE") if cache is None else ("CACHE", "COMPUTE")
        raise ConfigError(
            f"{_PREFIX}SCM_{seen}_BINS is set and {_PREFIX}SCM_{missing}_BINS is not. Set both, for example "
            f"{_PREFIX}SCM_COMPUTE_BINS=8,3,3,2,2 and {_PREFIX}SCM_CACHE_BINS=1,2,2,2,3, or neither."
        )
    if compute is not None and cache is not None:
        return StepsMask(compute, cache)
    return None if preset.strip().lower() in ("none", "") else StepsMask.preset(preset.strip().lower())


def _with_order(knobs: dict[str, Any]) -> dict[str, Any]:
    """Turns "Taylor on or off" and "its order" into one number."""
    on, order = knobs.pop("_taylorseer", None), knobs.pop("_order", 1)
    if on is not None:
        knobs["taylorseer_order"] = order if on else 0
    return knobs


def knobs_from_file(path: str) -> dict[str, Any]:
    """Returns the knobs that a YAML or JSON file sets; see `CacheDiTConfig.from_file`."""
    section = _cache_section(_load(Path(path)), path)
    knobs: dict[str, Any] = {}
    for key, value in section.items():
        if key not in _FILE_KEYS:
            raise unknown_name("key", str(key), _FILE_KEYS, path)
        knob = _FILE_KEYS[key]
        if knob == "_taylorseer" and value is not None and not isinstance(value, bool):
            raise ConfigError(f"{path}: {key}={value!r} cannot be read: expected true or false.")
        if knob is not None and value is not None:
            knobs[knob] = value
    if knobs.pop("_cache_type", "DBCache") != "DBCache":
        raise ConfigError(f"{path}: cache_type={section['cache_type']!r}; allowed: DBCache.")
    return _with_order(knobs)


def _cache_section(content: Any, path: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with the key cache_config, found a {type(content).__name__}.")
    if "cache_config" not in content and not _misspelt(content):
        content = {
            "cache_config": {key: value for key, value in content.items() if key != _ATTENTION},
            **{key: value for key, value in content.items() if key == _ATTENTION},
        }
    for key in content:
        if key not in ("cache_config", _ATTENTION):
            raise unknown_name("key", str(key), ("cache_config", _ATTENTION), path)
    if _ATTENTION in content:
        logger.warning(
            "%s: %s=%r is not part of a cache; set it on the pipeline.", path, _ATTENTION, content[_ATTENTION]
        )
    section = content["cache_config"]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: cache_config must be a mapping of settings, found a {type(section).__name__}.")
    return section


def _misspelt(content: dict[Any, Any]) -> bool:
    """Whether a key looks like `cache_config`: then the file is not a flat one."""
    unknown = [str(key).lower().replace("-", "_") for key in content if key not in _FILE_KEYS]
    return bool(difflib.get_close_matches("cache_config", unknown, cutoff=0.75))


def _load(path: Path) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}.") from error
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: unknown kind of file {path.suffix!r}. Allowed: .yaml, .yml, .json.")
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError(
            "reading a YAML file needs PyYAML. Type: pip install 'sgl-diffusion-accel[yaml]', or use JSON."
        ) from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from error
