"""Packages that are installed and do not work, or not with each other: the table says so, and so does `info`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel import MissingPackageError
from sgl_diffusion_accel.attention.backends.packages import flash4_beside_xformers, import_failure, is_there
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend
from sgl_diffusion_accel.attention.select import attention_backends, set_attention_backend

BUILT_FOR_ANOTHER = """
class xFormersInvalidLibException(Exception):
    def __str__(self):
        return '''xFormers can't load C++/CUDA extensions. xFormers was built for:
    PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.13.0)
    Python  3.10.19 (you have 3.11.7)
  Please reinstall xformers'''

_cpp_library_load_exception = xFormersInvalidLibException()
_built_with_cuda = False
"""
"""As xformers 0.0.35 tells it."""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package of these files, as far as the import system and the metadata can tell."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)

    def put(package: str, files: dict[str, str] | None = None, version: str = "9.9") -> None:
        for name, code in (files or {}).items():
            file = folder / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code)
        info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        importlib.invalidate_caches()

    yield put
    for name in set(sys.modules) - known:
        if str(folder) in str(
            getattr(sys.modules[name], "__file__", None) or getattr(sys.modules[name], "__path__", "")
        ):
            del sys.modules[name]


def put_flash4(install: Install) -> None:
    """Its folder has no `__init__`: FlashAttention 2 may lie in the same one."""
    install("flash-attn-4", {"flash_attn/cute/__init__": ""})


def put_cutlass(install: Install) -> None:
    install("nvidia-cutlass-dsl", {"cutlass/__init__": "raise RuntimeError('not to be imported')", "cutlass/cute": ""})


def put_xformers(install: Install, library: str = "_cpp_library_load_exception, _built_with_cuda = None, True") -> None:
    install(
        "xformers",
        {
            "xformers/__init__": "from . import _cpp_lib",
            "xformers/_cpp_lib": library,
            "xformers/ops": "import flash_attn.flash_attn_interface",
        },
    )


@pytest.fixture(autouse=True)
def none_is_real() -> None:
    for name in ("xformers", "flash_attn", "cutlass"):
        if is_there(name):
            pytest.skip(f"a real {name} is installed")


# xformers


def test_xformers_of_another_torch_is_not_usable(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    put_xformers(install, BUILT_FOR_ANOTHER)
    reason = (
        "the CUDA operators of xformers cannot be loaded: xFormers was built for: PyTorch 2.10.0+cu128 with CUDA 1208 "
        "(you have 2.13.0) Python  3.10.19 (you have 3.11.7) "
        "(pip install the release of xformers that was made for this PyTorch)"
    )
    assert find_backend("xformers").lacks() == reason
    pipe = present("wan").make(num_layers=1)
    assert [(row.is_usable, row.reason) for row in attention_backends(pipe) if row.name == "xformers"] == [
        (False, reason)
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # so that the device is not held against it
    with pytest.raises(MissingPackageError, match=r"'xformers' cannot be used: the CUDA operators of xformers cannot"):
        set_attention_backend(pipe, "xformers")


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("_cpp_library_load_exception, _built_with_cuda = None, True", None),
        (
            "_cpp_library_load_exception, _built_with_cuda = None, False",
            "this xformers was built without CUDA operators",
        ),
        ("_cpp_library_load_exception = OSError('no library')", "xformers cannot be loaded: no library"),
        ("", None),
        (
            "raise OSError('libcudart.so.12: cannot open')",
            "installed and cannot be imported: OSError: libcudart",
        ),
    ],
    ids=["usable", "without CUDA", "another release", "silent", "broken"],
)
def test_xformers_is_asked_for_its_operators(library: str, said: str | None, install: Install) -> None:
    put_xformers(install, library)
    lacks = find_backend("xformers").lacks()
    assert lacks is None if said is None else said in (lacks or "")
    assert "xformers.ops" not in sys.modules, "looking for it must not import it"


# FlashAttention 4


def test_flash4_needs_the_language_of_its_kernels(install: Install) -> None:
    put_flash4(install)
    said = "the module cutlass.cute of nvidia-cutlass-dsl is missing (pip install --force-reinstall nvidia-cutlass-dsl)"
    assert find_backend("flash4").lacks() == said
    install("cutlass", {"cutlass/__init__": ""})  # another package of that name, or one that is unpacked in part
    assert find_backend("flash4").lacks() == said


@pytest.mark.parametrize(("cuda", "is_needed"), [("13.0", True), ("13.2", True), ("12.8", False), (None, False)])
def test_flash4_needs_libraries_of_its_own_on_cuda_13(
    cuda: str | None, is_needed: bool, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    put_flash4(install)
    put_cutlass(install)
    if is_needed:
        said = f"on CUDA {cuda} it also needs the package nvidia-cutlass-dsl-libs-cu13"
        assert (find_backend("flash4").lacks() or "").startswith(said)
        install("nvidia-cutlass-dsl-libs-cu13")
    assert find_backend("flash4").lacks() is None
    assert "cutlass" not in sys.modules


def test_flash4_beside_xformers_is_told_for_both(install: Install) -> None:
    put_flash4(install)
    put_cutlass(install)
    assert find_backend("flash4").lacks() is None
    put_xformers(install)
    said = flash4_beside_xformers()
    assert said is not None
    assert said.endswith("nor can diffusers, which imports xformers (pip uninstall xformers)")
    assert find_backend("flash4").lacks() == find_backend("xformers").lacks() == said


def test_flash4_beside_flash2_and_xformers_is_all_right(install: Install) -> None:
    put_flash4(install)
    put_cutlass(install)
    put_xformers(install)
    install("flash-attn", {"flash_attn/flash_attn_interface": ""})
    assert flash4_beside_xformers() is None
    assert find_backend("flash4").lacks() is None
    assert find_backend("xformers").lacks() is None


def test_xformers_that_was_imported_shows_that_they_go_together(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_flash4(install)
    put_xformers(install)
    monkeypatch.setitem(sys.modules, "xformers.ops", torch)
    assert flash4_beside_xformers() is None


def test_info_tells_why_diffusers_cannot_be_imported(install: Install, tmp_path: Path) -> None:
    """In a process of its own, where the real diffusers meets what is installed."""
    put_flash4(install)
    put_xformers(install)
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "sgl_diffusion_accel", "info"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems = done.stdout.partition("### Problems")[2].partition("###")[0]
    assert "flash-attn-4 is installed beside xformers" in problems
    assert "`import diffusers` fails: " in problems
    assert "flash_attn.flash_attn_interface" in problems.partition("fails: ")[2]
    for name in ("flash4", "xformers"):
        assert f"| {name} | no | flash-attn-4 is installed beside xformers" in done.stdout


# Looking


def test_module_is_looked_for_without_importing_what_is_around_it(install: Install) -> None:
    fails = "raise RuntimeError('not to be imported')"
    install("outer", {"outer/__init__": fails, "outer/inner/__init__": fails, "outer/inner/leaf": ""})
    assert is_there("outer.inner.leaf")
    assert not is_there("outer.inner.other")
    assert not is_there("outer.inner.leaf.more")
    assert not is_there("nowhere.at.all")
    assert "outer" not in sys.modules


def test_module_without_a_spec_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = type(sys)("bare")
    monkeypatch.setitem(sys.modules, "bare", made)
    assert not is_there("bare")


def test_missing_is_told_from_broken(install: Install) -> None:
    install("outer", {"outer/__init__": "import nothing_like_it"})
    broken = (
        "the package outer is installed and cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'"
    )
    assert import_failure("outer.inner", "outer") == broken
    assert import_failure("nowhere.inner", "nowhere") == "the package nowhere is not installed"
    assert import_failure("json.tool", "json") is None


def test_every_backend_with_a_check_says_nothing_of_what_is_not_installed() -> None:
    for backend in all_backends().values():
        if backend.check is not None:
            assert "is not installed" in (backend.lacks() or "")
