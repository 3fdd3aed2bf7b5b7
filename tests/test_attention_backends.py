"""The table of attention backends: its names, the packages it asks for, and what is added to it."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from invariants.families import present
from sgl_diffusion_accel import ConfigError, ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.backend_table import NOT_OFFERED, Backend
from sgl_diffusion_accel.attention.backends.packages import installed_version
from sgl_diffusion_accel.attention.backends.registry import (
    all_backends,
    find_backend,
    register_attention_backend,
)
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts
from sgl_diffusion_accel.attention.select import attention_backends, set_attention_backend


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})


def plain(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> Any:
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


Put = Callable[..., Path]


@pytest.fixture
def put_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Installs an empty package for a backend, as far as the import system and the metadata can tell."""

    def forget(root: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == root]:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]

    def put(backend: Backend, version: str = "9.9") -> Path:
        module, package = backend.module or "", backend.package or ""
        folder = tmp_path / f"{package} {version}"
        file = folder / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True)
        for parent in file.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        file.touch()
        metadata = folder / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        if backend.name == "flash4":  # the language that its kernels are written in
            (folder / "cutlass" / "cute").mkdir(parents=True)
        forget(module.partition(".")[0])
        monkeypatch.syspath_prepend(folder)
        return folder

    yield put
    for backend in PACKAGES.values():
        forget((backend.module or "").partition(".")[0])


# Names

SGLANG = {
    "fa3": "flash3",
    "fa4": "flash4",
    "torch_sdpa": "sdpa",
    "sage_attn": "sage",
    "sage_attn_3": "sage3",
    "aiter": "aiter",
}
SGLANG_NOT_OFFERED = (
    "sliding_tile_attn",
    "video_sparse_attn",
    "vmoba_attn",
    "sla_attn",
    "sage_sla_attn",
    "sparse_video_gen_2_attn",
    "aiter_sage",
)
DIFFUSERS = {
    "native": "sdpa",
    "_native_flash": "sdpa_flash",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "flex": "flex",
    "flash": "flash",
    "_flash_3": "flash3",
    "sage": "sage",
    "xformers": "xformers",
    "aiter_fa2_hub": "aiter_hub",
    "flash_hub": "flash_hub",
    "_flash_3_hub": "flash3_hub",
    "flash_4_hub": "flash4_hub",
    "sage_hub": "sage_hub",
    "sage_blackwell_hub": "sage3_hub",
}
PLAIN = (
    *("flash", "flash3", "flash4", "sage", "sage3", "xformers"),
    *("sdpa", "cudnn", "efficient", "math", "flex", "aiter"),
)


@pytest.mark.parametrize(("name", "expected"), [*SGLANG.items(), *DIFFUSERS.items(), *zip(PLAIN, PLAIN, strict=True)])
def test_name_stands_for_its_backend(name: str, expected: str) -> None:
    assert find_backend(name).name == expected
    assert find_backend(f" {name.upper()} ").name == expected


@pytest.mark.parametrize("name", sorted({*SGLANG_NOT_OFFERED, *NOT_OFFERED}))
def test_name_that_is_not_offered_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is not offered: it|'{name}' is not offered: Sage"):
        find_backend(name)


@pytest.mark.parametrize("name", sorted(each.value for each in AttentionBackendName))
def test_every_name_of_the_installed_diffusers_is_known(name: str) -> None:
    known = {alias for backend in all_backends().values() for alias in (backend.name, *backend.aliases)}
    assert name in known or NOT_OFFERED.get(name)


@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_what_is_advised_instead_can_be_found(name: str) -> None:
    reason = NOT_OFFERED[name]
    advised = reason.split("use '")[1].split("'")[0] if "use '" in reason else "sdpa"
    assert find_backend(advised).name == advised


def test_reasons_are_true_of_the_names() -> None:
    for name in ("flash_varlen", "_flash_varlen_3", "sage_varlen"):  # of packages that are installed
        assert "hub" not in NOT_OFFERED[name]
    for name in ("flash_varlen_hub", "_flash_3_varlen_hub"):
        assert "_hub'" in NOT_OFFERED[name]


def test_no_name_stands_for_two_backends() -> None:
    names = [name for backend in all_backends().values() for name in (backend.name, *backend.aliases)]
    assert len(names) == len(set(names))
    assert not set(names) & {*NOT_OFFERED, "auto", "fa"}


@pytest.mark.parametrize(("name", "nearest"), [("mat", "math"), ("sdap", "sdpa"), ("sage2", "sage"), ("flsh", "flash")])
def test_unknown_name_is_told_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown attention backend '{name}'. Did you mean '{nearest}\w*'\?"):
        find_backend(name)


def test_name_of_another_type() -> None:
    with pytest.raises(ConfigTypeError, match="named by a string, not by a int"):
        find_backend(5)  # type: ignore[arg-type]


# Packages

PACKAGES = {name: backend for name, backend in all_backends().items() if backend.module}


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package_is_named_with_its_installation(name: str) -> None:
    backend = PACKAGES[name]
    if backend.lacks() is None:
        pytest.skip(f"{backend.package} is installed")
    assert backend.lacks() == f"the package {backend.package} is not installed ({backend.install})"
    assert backend.install


@pytest.mark.parametrize("name", PACKAGES)
def test_package_is_found_once_it_is_installed(name: str, put_package: Put) -> None:
    backend = PACKAGES[name]
    put_package(backend)
    assert backend.lacks() is None
    assert backend.module not in sys.modules, "looking for it must not import it"


@pytest.mark.parametrize("name", [name for name, backend in PACKAGES.items() if backend.minimum])
def test_package_that_is_too_old_is_named_with_both_versions(name: str, put_package: Put) -> None:
    backend = PACKAGES[name]
    put_package(backend, "0.0.1")
    assert backend.lacks() == (
        f"it needs {backend.package} {backend.minimum} or newer, and 0.0.1 is installed ({backend.install})"
    )
    put_package(backend, backend.minimum or "")
    assert backend.lacks() is None


def test_version_that_cannot_be_read_is_not_held_against_a_package(put_package: Put) -> None:
    put_package(PACKAGES["sage"], "unreadable")
    assert installed_version("sageattention") is None
    assert PACKAGES["sage"].lacks() is None
    assert installed_version("no-such-package-anywhere") is None


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_broken_package_is_missing_and_breaks_nothing_else(error: str, put_package: Put) -> None:
    """A wheel for another CUDA or torch fails at import, and each in its own way."""
    folder = put_package(PACKAGES["flash"])
    (folder / "flash_attn" / "__init__.py").write_text(f"raise {error}('libcudart.so.12: cannot open')")
    table = {row.name: row for row in attention_backends(present("wan").make())}
    assert not table["flash"].is_usable
    said = f"the package flash-attn is installed and cannot be imported: {error}: libcudart.so.12: cannot open"
    assert table["flash"].reason.startswith(said)
    assert table["math"].is_usable


def test_fa_is_the_newest_flash_attention_that_is_installed(put_package: Put) -> None:
    if any(PACKAGES[name].lacks() is None for name in ("flash", "flash3", "flash4")):
        pytest.skip("a real one is installed")
    assert find_backend("fa").name == "sdpa_flash", "torch brings one along"
    for name in ("flash", "flash3", "flash4"):
        put_package(PACKAGES[name])
        assert find_backend("fa").name == name
        assert find_backend("FA").name == name


def test_fa_is_one_that_the_model_goes_with(put_package: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put_package(PACKAGES["flash4"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the model may still be moved
    assert find_backend("flash4").requirements.refuses(AttentionFacts(head_size=256))
    assert find_backend("sdpa_flash").requirements.refuses(AttentionFacts(head_size=256)) is None
    pipe = present("wan").make(num_layers=1, attention_head_dim=256)
    assert set_attention_backend(pipe, "fa").backends == {"transformer": "sdpa_flash"}


# Adding one's own


def test_registered_function_is_found_and_used() -> None:
    family = present("wan")
    register_attention_backend("Mine", plain)
    assert find_backend("mine").name == "Mine"
    pipe = family.make()
    expected = family.run(pipe, steps=1)
    with set_attention_backend(pipe, "MINE", verify=True) as patch:
        assert torch.equal(family.run(pipe, steps=1), expected)
    assert patch.calls == {"transformer": {"Mine": 24}}
    assert [row.is_usable for row in attention_backends(pipe) if row.name == "Mine"] == [True]


def test_registered_function_gets_the_documented_arguments() -> None:
    family, seen = present("wan"), []

    def mine(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        seen.append((query.shape, key.shape, value.shape, more))
        return plain(query, key, value, **more)

    register_attention_backend("mine", mine)
    set_attention_backend(pipe := family.make(), "mine", layers="blocks.0.attn2")
    family.run(pipe, steps=1)
    shapes = ((1, 2, 32, 16), (1, 2, 7, 16), (1, 2, 7, 16))
    assert seen == [(*shapes, {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False})] * 2


def test_registering_again_replaces_and_leaves_patches_in_place_alone() -> None:
    family, ran = present("wan"), []

    def noting(word: str) -> Any:
        def run(*sides: Tensor, **more: Any) -> Any:
            ran.append(word)
            return plain(*sides, **more)

        return run

    register_attention_backend("mine", noting("old"))
    set_attention_backend(old := family.make(), "mine")
    register_attention_backend("mine", noting("new"))
    set_attention_backend(new := family.make(), "mine")
    family.run(old, steps=1)
    family.run(new, steps=1)
    assert ran == ["old"] * 24 + ["new"] * 24


@pytest.mark.parametrize("name", ["sdpa", "Native", "auto", "fa", " FA3 ", "sla_attn", "flash_hub", "_native_math"])
def test_names_of_the_library_cannot_be_taken(name: str) -> None:
    with pytest.raises(ConfigError, match="belongs to a backend of the library"):
        register_attention_backend(name, plain)
    assert not backends._registered


def without_mask(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: Any, enable_gqa: bool) -> Any:
    raise AssertionError


def with_more(query: Tensor, key: Tensor, value: Tensor, window: int, *, mask: Any, **more: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("function", [without_mask, with_more, lambda query, key: None, "sdpa", None])
def test_function_that_cannot_be_called_so_is_refused(function: Any) -> None:
    with pytest.raises(ConfigTypeError, match="function"):
        register_attention_backend("mine", function)
    assert not backends._registered


def test_unknown_requirement_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown requirement 'mask'.*Did you mean 'masks'\?"):
        register_attention_backend("mine", plain, mask=False)
    assert not backends._registered


@pytest.mark.parametrize("name", ["", "  ", 5, None])
def test_name_to_be_registered_is_a_string(name: Any) -> None:
    with pytest.raises(ConfigTypeError, match="allowed: a string"):
        register_attention_backend(name, plain)


@pytest.mark.parametrize(
    "requirement",
    [
        {"devices": "cuda"},
        {"devices": ["cuda"]},
        {"head_sizes": 64},
        {"head_sizes": ("64",)},
        {"dtypes": torch.float16},
        {"min_capability": 8},
    ],
)
def test_requirement_of_a_wrong_type_is_refused_when_registering(requirement: dict[str, Any]) -> None:
    with pytest.raises((ConfigTypeError, ConfigError), match=next(iter(requirement))):
        register_attention_backend("mine", plain, **requirement)


def test_names_that_differ_in_case_alone_are_one() -> None:
    register_attention_backend("mine", plain)
    register_attention_backend("Mine", lambda query, key, value, **more: plain(query, key, value, **more))
    assert len(backends._registered) == 1


@pytest.mark.parametrize(
    ("requirements", "reason"),
    [
        ({"devices": ("cuda",)}, "it runs on cuda, not on cpu"),
        ({"dtypes": (torch.float16,)}, "it takes float16, not float32"),
        ({"head_sizes": (64, 128)}, "it takes heads of size 64, 128, not 16"),
        ({"head_multiple": 32}, "it takes head sizes that are multiples of 32, not 16"),
        ({"max_head_size": 8}, "it takes heads up to size 8, not 16"),
    ],
)
def test_registered_requirement_is_honoured_when_set(requirements: dict[str, Any], reason: str) -> None:
    register_attention_backend("mine", plain, **requirements)
    pipe = present("wan").make()
    with pytest.raises(UnsupportedModelError, match=rf"'mine' does not go with transformer \(\w+\): {reason}\. Usable"):
        set_attention_backend(pipe, "mine")
    assert [row.reason for row in attention_backends(pipe) if row.name == "mine"] == [reason]


def test_documented_example_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(
        register_attention_backend,
        globs={"torch": torch, "register_attention_backend": register_attention_backend},
    )
    assert doctest.DocTestRunner().run(example, clear_globs=False).attempted == 2
    family = present("wan")
    expected = family.run(pipe := family.make(), steps=1)
    with set_attention_backend(pipe, "mine", verify=True) as patch:
        torch.testing.assert_close(family.run(pipe, steps=1), expected, rtol=0, atol=1e-5)
    assert patch.calls == {"transformer": {"mine": 24}}
