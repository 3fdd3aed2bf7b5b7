"""What is installed on this machine, and what keeps an installed package from working; nothing is imported for it.

`importlib.util.find_spec` of a module inside of a package imports the package around it, which is where packages that
do not go with this PyTorch already fail, each in its own way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import all_suffixes
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version


def installed_version(package: str) -> Version | None:
    """The version of an installed package, None if there is none or it cannot be read."""
    try:
        return Version(importlib.metadata.version(package))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def is_installed(package: str) -> bool:
    """Whether the metadata of a package is there."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def import_failure(module: str, package: str | None) -> str | None:
    """Why a module is not there: its package is missing, half installed, or made for another CUDA. None if it is."""
    missing = f"the package {package} is not installed"
    try:
        return missing if importlib.util.find_spec(module) is None else None
    except Exception as error:  # of the packages around it, which may raise anything
        names = [module[:end] for end, letter in enumerate(f"{module}.") if letter == "."]
        if isinstance(error, ModuleNotFoundError) and error.name in names:
            return missing
        return f"the package {package} is installed and cannot be imported: {type(error).__name__}: {error}"


def is_there(module: str) -> bool:
    """Whether the files of a module are there; not even the packages around it are imported."""
    package, *inside = module.split(".")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a finder of somebody's that fails, or a stand-in without a spec
        return False
    if found is None:
        return False
    places = [Path(place) for place in found.submodule_search_locations or ()]
    for name in inside:
        files = [place / f"{name}{suffix}" for place in places for suffix in ("", *all_suffixes())]
        places = [file for file in files if file.exists()]
    return bool(places) or not inside


def flash4_beside_xformers() -> str | None:
    """Tells whether flash-attn-4 and xformers are in each other's way, which breaks `import diffusers`.

    xformers 0.0.35 imports `flash_attn.flash_attn_interface`, which is FlashAttention 2's, wherever there is a folder
    `flash_attn`; flash-attn-4 has its files in a folder of that name, without that module. diffusers imports xformers
    wherever it is installed.
    """
    if "xformers.ops" in sys.modules:  # it could be imported, so they are not
        return None
    if not (is_installed("flash-attn-4") and is_there("xformers") and is_there("flash_attn")):
        return None
    if is_there("flash_attn.flash_attn_interface"):
        return None
    return (
        "flash-attn-4 is installed beside xformers, which takes its folder flash_attn for that of FlashAttention 2 and "
        "cannot be imported then; nor can diffusers, which imports xformers (pip uninstall xformers)"
    )


def xformers_lacks() -> str | None:
    """Why an installed xformers has no kernels: its library is made for another PyTorch, CUDA or Python.

    It imports all the same and says so in `xformers._cpp_lib`, which is imported with the package; its first call
    raises NotImplementedError.
    """
    clash = flash4_beside_xformers()
    if clash is not None:
        return clash
    library = sys.modules.get("xformers._cpp_lib")
    failure = getattr(library, "_cpp_library_load_exception", None)
    if failure is not None:
        said = " ".join(line.strip() for line in str(failure).splitlines()[:3]).partition("extensions. ")
        return f"the CUDA operators of xformers cannot be loaded: {said[2] or said[0]} ({_XFORMERS_MATCHING})"
    if torch.version.hip is None and getattr(library, "_built_with_cuda", True) is False:
        return f"this xformers was built without CUDA operators ({_XFORMERS_MATCHING})"
    return None


_XFORMERS_MATCHING = "pip install the release of xformers that was made for this PyTorch"

_CUTLASS, _CUTLASS_CUDA_13 = "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13"


def flash4_lacks() -> str | None:
    """What else flash-attn-4 needs: the language that its kernels are written in, for the CUDA of this PyTorch."""
    clash = flash4_beside_xformers()
    if clash is not None:
        return clash
    if not is_there("cutlass.cute"):
        return f"the module cutlass.cute of {_CUTLASS} is missing (pip install --force-reinstall {_CUTLASS})"
    if (torch.version.cuda or "").split(".")[0] == "13" and not is_installed(_CUTLASS_CUDA_13):
        return (
            f"on CUDA {torch.version.cuda} it also needs the package {_CUTLASS_CUDA_13} "
            f"(pip install {_CUTLASS_CUDA_13})"
        )
    return None
