"""The table of attention backends: names, what they need, how to get them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from packaging.version import Version

from sgl_diffusion_accel.attention.backends import kernels
from sgl_diffusion_accel.attention.backends.hub import HubKernel
from sgl_diffusion_accel.attention.backends.kernels import Kernel
from sgl_diffusion_accel.attention.backends.packages import (
    flash4_lacks,
    import_failure,
    installed_version,
    is_installed,
    xformers_lacks,
)
from sgl_diffusion_accel.attention.backends.requirements import Requirements

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
        check: Looks further than at packages and versions: tells what keeps an installed one from working.
        hub: The kernel that is fetched from a hub when it is set by name; None for what is installed.
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
    check: Callable[[], str | None] | None = None
    hub: HubKernel | None = None
    install: str = ""
    is_exact: bool = True
    requirements: Requirements = field(default_factory=Requirements)

    def lacks(self) -> str | None:
        """What is missing on this machine for it to be loaded, None if nothing is."""
        if self.module is None:
            return None
        failure = import_failure(self.module, self.package)
        if failure is None and self.needs_distribution and self.package is not None and not is_installed(self.package):
            failure = f"the package {self.package} is not installed"
        if failure is not None:
            return f"{failure} ({self.install})"
        if self.minimum is not None and self.package is not None:
            version = installed_version(self.package)
            if version is not None and version < Version(self.minimum):
                return f"it needs {self.package} {self.minimum} or newer, and {version} is installed ({self.install})"
        return None if self.check is None else self.check()

    def would_fetch(self) -> str | None:
        """What would be downloaded if it were set, so that it is offered nowhere unasked; None if all is here."""
        return None if self.hub is None else self.hub.would_fetch()


_FLASH = Requirements(
    devices=("cuda",),
    min_capability=_AMPERE,
    dtypes=_HALF,
    head_multiple=8,
    max_head_size=256,
    masks=False,
    causal_square=True,
)

_INSTALLED = (
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
        check=flash4_lacks,
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
        check=xformers_lacks,
        install="pip install xformers",
        requirements=Requirements(devices=("cuda",), dtypes=(*_HALF, torch.float32), head_multiple=8),
    ),
    Backend(
        "aiter",
        kernels.aiter_flash,
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


def _from_hub(
    name: str, alias: str, like: str, hub: HubKernel, adapt: Callable[..., Kernel], **changes: object
) -> Backend:
    """A kernel of a hub that takes what the installed package of the same kernel takes."""
    installed = next(each for each in _INSTALLED if each.name == like)
    return Backend(
        name,
        lambda: adapt(hub.load()),
        (alias,) if alias != name else (),
        module="kernels",
        package="kernels",
        needs_distribution=True,
        minimum="0.14",
        install="pip install kernels",
        hub=hub,
        is_exact=installed.is_exact,
        requirements=replace(installed.requirements, **changes),  # type: ignore[arg-type]
    )


# Repositories, versions and names of functions are those of diffusers 0.42.1.
_HUB = (
    _from_hub(
        "flash_hub",
        "flash_hub",
        "flash",
        HubKernel("kernels-community/flash-attn2", 3, "flash_attn_func"),
        kernels.flash_like,
    ),
    _from_hub(
        "flash3_hub",
        "_flash_3_hub",
        "flash3",
        HubKernel("kernels-community/flash-attn3", 1, "flash_attn_func"),
        kernels.flash_like,
    ),
    _from_hub(
        "flash4_hub",
        "flash_4_hub",
        "flash4",
        HubKernel("kernels-community/flash-attn4", 0, "flash_attn_func"),
        kernels.flash_like,
    ),
    _from_hub(
        "sage_hub", "sage_hub", "sage", HubKernel("SageAttention/sage-attention", 3, "sageattn"), kernels.sage_like
    ),
    _from_hub(
        "sage3_hub",
        "sage_blackwell_hub",
        "sage3",
        HubKernel("SageAttention/sage-blackwell", 1, "sageattn3_blackwell"),
        kernels.sage3_like,
    ),
    _from_hub(
        "aiter_hub",
        "aiter_fa2_hub",
        "aiter",
        HubKernel("kernels-community/aiter-flash-attn-ck", 1, "flash_attn_func"),
        kernels.flash_like,
        dtypes=(torch.bfloat16,),  # it has no others, and fails in C++ at them
    ),
)

TABLE = (*_INSTALLED, *_HUB)

_SPARSE = "it leaves out parts of the attention by the layout of a model it was trained or tuned for"
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
    "flash_varlen": _PACKED.format("'flash'"),
    "flash_varlen_hub": _PACKED.format("'flash_hub'"),
    "_flash_varlen_3": _PACKED.format("'flash3'"),
    "_flash_3_varlen_hub": _PACKED.format("'flash3_hub'"),
    "sage_varlen": _PACKED.format("'sage'"),
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
