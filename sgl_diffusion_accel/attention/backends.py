"""The table of attention backends: names, what they need, how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from sgl_diffusion_accel.attention import kernels
from sgl_diffusion_accel.attention.kernels import Kernel
from sgl_diffusion_accel.attention.requirements import Requirements
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name

_HALF = (torch.float16, torch.bfloat16)
_AMPERE, _HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class Backend:
    """One attention backend.

    Attributes:
        name: Its plain name.
        load: Imports what it needs and returns the kernel.
        aliases: The names of SGLang-Diffusion and diffusers.
        module: The Python module that it needs, None for PyTorch alone.
        package: The package that has the module.
        minimum: Lowest version of the package.
        needs_distribution: Whether the module alone is not enough: another package brings a part of it along.
        install: How to get it.
        is_exact: Whether it computes in the precision of its inputs; quantised ones do not.
        requirements: What it can take.
    """

    name: str
    load: Callable[[], Kernel]
    aliases: tuple[str, ...] = ()
    module: str | None = None
    package: str | None = None
    minimum: str | None = None
    needs_distribution: bool = False
    install: str = ""
    is_exact: bool = True
    requirements: Requirements = field(default_factory=Requirements)

    def lacks(self) -> str | None:
        """What is missing on this machine for it to be loaded, None if nothing is."""
        if self.module is None:
            return None
        if not _is_importable(self.module):
            return f"the package {self.package} is not installed ({self.install})"
        if self.needs_distribution and self.package is not None and installed_version(self.package) is None:
            return f"the package {self.package} is not installed ({self.install})"
        if self.minimum is not None and self.package is not None:
            version = installed_version(self.package)
            if version is not None and version < Version(self.minimum):
                return f"it needs {self.package} {self.minimum} or newer, and {version} is installed ({self.install})"
        return None


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # its parent package is missing, half installed, or made for another CUDA
        return False


def installed_version(package: str) -> Version | None:
    """The version of an installed package, None if there is none or it cannot be read."""
    try:
        return Version(importlib.metadata.version(package))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


_FLASH = Requirements(
    devices=("cuda",),
    min_capability=_AMPERE,
    dtypes=_HALF,
    head_multiple=8,
    max_head_size=256,
    masks=False,
    causal_square=True,
)

_TABLE = (
    Backend("sdpa", kernels.sdpa, ("torch_sdpa", "native"), requirements=Requirements(dropout=True)),
    Backend("math", kernels.math, ("_native_math",)),
    Backend(
        "efficient",
        kernels.efficient,
        ("_native_efficient",),
        requirements=Requirements(devices=("cuda", "cpu"), dtypes=(*_HALF, torch.float32)),
    ),
    Backend(
        "cudnn",
        kernels.cudnn,
        ("_native_cudnn",),
        requirements=Requirements(
            devices=("cuda",),
            is_hip=False,
            min_capability=_AMPERE,
            dtypes=_HALF,
            head_multiple=8,
            max_head_size=128,
        ),
    ),
    Backend("sdpa_flash", kernels.sdpa_flash, ("_native_flash",), requirements=_FLASH),
    Backend("flex", kernels.flex, requirements=Requirements(devices=("cuda", "cpu"), mask_and_causal=True)),
    Backend(
        "flash",
        kernels.flash,
        ("flash_attn", "flash2", "fa2"),
        module="flash_attn.flash_attn_interface",
        package="flash-attn",
        minimum="2.6",
        install="pip install flash-attn --no-build-isolation; builds from source",
        requirements=_FLASH,
    ),
    Backend(
        "flash3",
        kernels.flash3,
        ("fa3", "_flash_3"),
        module="flash_attn_interface",
        package="flash_attn_3",
        install="build it from the folder hopper of https://github.com/Dao-AILab/flash-attention",
        requirements=Requirements(
            devices=("cuda",),
            is_hip=False,
            min_capability=_HOPPER,
            max_capability=_HOPPER,
            dtypes=_HALF,
            head_multiple=8,
            max_head_size=256,
            masks=False,
            causal_square=True,
        ),
    ),
    Backend(
        "flash4",
        kernels.flash4,
        ("fa4",),
        module="flash_attn.cute",
        package="flash-attn-4",
        needs_distribution=True,
        install="pip install --pre flash-attn-4",
        requirements=Requirements(
            devices=("cuda",),
            is_hip=False,
            min_capability=_HOPPER,
            dtypes=_HALF,
            head_multiple=8,
            max_head_size=128,
            masks=False,
            causal_square=True,
        ),
    ),
    Backend(
        "sage",
        kernels.sage,
        ("sage_attn",),
        module="sageattention",
        package="sageattention",
        minimum="1.0.6",
        install="pip install sageattention; 2.1 and newer from https://github.com/thu-ml/SageAttention",
        is_exact=False,
        requirements=Requirements(
            devices=("cuda",),
            is_hip=False,
            capabilities=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
            dtypes=_HALF,
            head_sizes=(64, 96, 128),
            masks=False,
            causal_square=True,
        ),
    ),
    Backend(
        "sage3",
        kernels.sage3,
        ("sage_attn_3",),
        module="sageattn3",
        package="sageattn3",
        install="build it from the folder sageattention3_blackwell of https://github.com/thu-ml/SageAttention",
        is_exact=False,
        requirements=Requirements(
            devices=("cuda",),
            is_hip=False,
            capabilities=((10, 0), (12, 0)),
            dtypes=_HALF,
            head_sizes=(64, 128),
            masks=False,
            causal_square=True,
            gqa=False,
        ),
    ),
    Backend(
        "xformers",
        kernels.xformers,
        module="xformers.ops",
        package="xformers",
        minimum="0.0.28",
        install="pip install xformers",
        requirements=Requirements(devices=("cuda",), dtypes=(*_HALF, torch.float32), head_multiple=8),
    ),
    Backend(
        "aiter",
        kernels.aiter_flash,
        ("aiter_fa2_hub",),
        module="aiter",
        package="aiter",
        install="see https://github.com/ROCm/aiter",
        requirements=Requirements(
            devices=("cuda",),
            is_hip=True,
            dtypes=_HALF,
            head_multiple=8,
            max_head_size=256,
            masks=False,
            causal_square=True,
        ),
    ),
)

_BEST_FLASH = ("flash4", "flash3", "flash", "sdpa_flash")

_SPARSE = "it leaves out parts of the attention by the layout of a model it was trained or tuned for"
_FROM_HUB = "it is downloaded from a hub; install the package and use {}"
_PACKED = "it packs sequences of several lengths into one, which no model here calls for; use {}"
NOT_OFFERED = {
    **dict.fromkeys(
        (
            "sliding_tile_attn",
            "video_sparse_attn",
            "vmoba_attn",
            "sla_attn",
            "sage_sla_attn",
            "sparse_video_gen_2_attn",
        ),
        _SPARSE,
    ),
    "aiter_sage": "it is made for SGLang's own layers; use 'aiter'",
    **dict.fromkeys(("flash_hub", "flash_varlen_hub"), _FROM_HUB.format("'flash'")),
    **dict.fromkeys(("_flash_3_hub", "_flash_3_varlen_hub"), _FROM_HUB.format("'flash3'")),
    "flash_varlen": _PACKED.format("'flash'"),
    "_flash_varlen_3": _PACKED.format("'flash3'"),
    "sage_varlen": _PACKED.format("'sage'"),
    "sage_blackwell_hub": _FROM_HUB.format("'sage3'"),
    "flash_4_hub": _FROM_HUB.format("'flash4'"),
    "sage_hub": _FROM_HUB.format("'sage'"),
    **dict.fromkeys(
        (
            "_sage_qk_int8_pv_fp8_cuda",
            "_sage_qk_int8_pv_fp8_cuda_sm90",
            "_sage_qk_int8_pv_fp16_cuda",
            "_sage_qk_int8_pv_fp16_triton",
        ),
        "SageAttention takes its best kernel for the device by itself; use 'sage'",
    ),
    "_native_npu": "it has never been tried here; use 'sdpa'",
    "_native_xla": "it has never been tried here; use 'sdpa'",
}
"""Names of SGLang-Diffusion and diffusers that are known and not offered, and why."""

_registered: dict[str, Backend] = {}


def all_backends() -> dict[str, Backend]:
    """Name to backend: the table, and what has been registered."""
    return {each.name: each for each in _TABLE} | _registered


def fingerprint(backend: Backend) -> str:
    """What tells one release of a backend from another: the package's version, or the code of a registered function."""
    if backend.package is not None:
        return str(installed_version(backend.package))
    if backend.name not in _registered:
        return ""
    try:
        function: Any = backend.load()
        code = function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except Exception:  # it has no code to look at, or is found not to work where the error can be told
        return ""
    parts = (code.co_code, code.co_names, code.co_consts, function.__defaults__, function.__kwdefaults__, cells)
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def find_backend(name: str) -> Backend:
    """Finds a backend by any of its names.

    Raises:
        ConfigError: The name is unknown, with the nearest known one; or known and not offered, with the reason.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"a backend is named by a string, not by a {type(name).__name__}.")
    known = all_backends()
    low = name.strip().lower()
    if low == "fa":
        return next(each for each in flash_family() if each.lacks() is None)
    for backend in known.values():
        if low == backend.name.lower() or low in backend.aliases:
            return backend
    if low in NOT_OFFERED:
        raise ConfigError(f"attention backend {name!r} is not offered: {NOT_OFFERED[low]}.")
    names = {*known, "fa", "auto", *(alias for backend in known.values() for alias in backend.aliases)}
    raise unknown_name("attention backend", name, names)


def flash_family() -> list[Backend]:
    """What SGLang-Diffusion's `fa` may be, the newest first; the last one comes with PyTorch."""
    known = all_backends()
    return [known[name] for name in _BEST_FLASH]


_OWN = {"mask", "is_causal", "scale", "enable_gqa"}


def register_attention_backend(
    name: str, function: Callable[..., Any], *, is_exact: bool = True, **requirements: Any
) -> None:
    """Adds an attention function of one's own to the table, for this process.

    Args:
        name: The name under which it can be set; registering a name of one's own again replaces it.
        function: `function(query, key, value, *, mask, is_causal, scale, enable_gqa)`, with query `[B, H, Q, D]`, key
            and value `[B, Hkv, K, D]`; returns `[B, H, Q, D]`.
        is_exact: Whether it computes in the precision of its inputs.
        **requirements: What it can take, by the names of `Requirements`: `devices`, `dtypes`, `head_sizes`,
            `masks=False`, `causal=False`, `gqa=False`, ….

    Raises:
        ConfigError: The name is taken, or a requirement is unknown.
        ConfigTypeError: `function` cannot be called like that.

    Example:
        >>> def mine(query, key, value, *, mask, is_causal, scale, enable_gqa):
        ...     return torch.softmax(query @ key.mT * (scale or query.shape[-1] ** -0.5), -1) @ value
        >>> register_attention_backend("mine", mine, masks=False, causal=False, gqa=False)
    """
    taken = {each for backend in _TABLE for each in (backend.name, *backend.aliases)} | {"auto", "fa", *NOT_OFFERED}
    given: object = name
    if not isinstance(given, str) or not name.strip():
        raise ConfigTypeError(f"name={name!r}; allowed: a string.")
    if name.strip().lower() in taken:
        raise ConfigError(f"the name {name!r} belongs to a backend of the library. Take another one.")
    if not callable(function):
        raise ConfigTypeError(f"function is a {type(function).__name__}; allowed: a function of query, key and value.")
    try:
        inspect.signature(function).bind(None, None, None, **dict.fromkeys(_OWN))
    except TypeError as error:
        raise ConfigTypeError(
            f"{name}: the function cannot be called as function(query, key, value, *, mask, is_causal, scale, "
            f"enable_gqa): {error}."
        ) from None
    except ValueError:  # built-in functions have no signature to look at
        pass
    for each in requirements:
        if each not in Requirements.__dataclass_fields__:
            raise unknown_name("requirement", each, Requirements.__dataclass_fields__, "register_attention_backend")
    kernel: Any = function
    for other in [each for each in _registered if each.lower() == name.strip().lower()]:
        del _registered[other]
    _registered[name.strip()] = Backend(
        name.strip(), lambda: kernel, is_exact=is_exact, requirements=Requirements(**requirements)
    )
