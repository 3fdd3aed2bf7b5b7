"""Kernels of a hub: fetched when their backend is set by name, and never otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from invariants.families import present
from sgl_diffusion_accel import MissingPackageError, UnsupportedModelError
from sgl_diffusion_accel.attention.backends import backend_table as table
from sgl_diffusion_accel.attention.backends.packages import is_there
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts, Requirements, facts_of
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice
from sgl_diffusion_accel.attention.select import attention_backends, set_attention_backend
from sgl_diffusion_accel.profiling.machine import describe

torch.set_num_threads(1)

FROM_HUB = {name: backend for name, backend in all_backends().items() if backend.hub is not None}
MORE: dict[str, Any] = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}


class Hub:
    """Stands for the package `kernels`, as of 0.17: notes what it is asked for."""

    def __init__(self) -> None:
        self.fetched: list[tuple[str, dict[str, Any]]] = []
        self.trusted = {"kernels-community"}

    def get_kernel(
        self, repo_id: str, *, revision: Any = None, version: Any = None, trust_remote_code: Any = False
    ) -> Any:
        if not trust_remote_code and repo_id.partition("/")[0] not in self.trusted:
            raise ValueError(f"Kernel repository '{repo_id}' is not from a trusted publisher.")
        self.fetched.append((repo_id, {"version": version, "revision": revision}))
        return SimpleNamespace(flash_attn_func=flash, sageattn=sage, sageattn3_blackwell=sage3)


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None, causal: Any = False
) -> Any:
    parts = (part.transpose(1, 2) for part in (q, k, v))
    output = F.scaled_dot_product_attention(*parts, scale=softmax_scale, is_causal=causal).transpose(1, 2)
    return output, None


def sage(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: Any = None
) -> Tensor:
    assert tensor_layout == "HND"
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)


def sage3(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
    assert attn_mask is None
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """`kernels` is installed, and its cache empty."""
    if is_there("kernels"):
        pytest.skip("the real kernels is installed")
    made, stand_in = Hub(), ModuleType("kernels")
    vars(stand_in)["get_kernel"] = made.get_kernel
    stand_in.__spec__ = SimpleNamespace(name="kernels")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    info = tmp_path / "site" / "kernels-0.17.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("KERNELS_CACHE", "LOCAL_KERNELS", "DIFFUSERS_TRUST_REMOTE_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels of the hub run on a CPU, where their stand-ins do."""
    changed = [
        each if each.hub is None else table.replace(each, requirements=Requirements(masks=False))
        for each in table.TABLE
    ]
    monkeypatch.setattr("sgl_diffusion_accel.attention.backends.registry.TABLE", tuple(changed))


def in_cache(root: Path, repository: str, version: int, kind: str = "kernel") -> None:
    folder = root / f"{kind}s--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / f"v{version}").write_text("abc\n")
    (folder / "snapshots" / "abc" / "build" / "torch213-cxx11-cu130-x86_64-linux").mkdir(parents=True)


# The table


def test_repositories_are_those_of_the_installed_diffusers() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    known = getattr(dispatch, "_HUB_KERNELS_REGISTRY", {})
    if "version" not in getattr(getattr(dispatch, "_HubKernelConfig", None), "__dataclass_fields__", {}):
        pytest.skip("this diffusers names kernels by revision")
    for key, config in known.items():
        if "VARLEN" in key.name:
            continue
        hub = find_backend(key.value).hub
        assert hub is not None
        assert (hub.repository, hub.version, hub.function) == (config.repo_id, config.version, config.function_attr)


@pytest.mark.parametrize("name", FROM_HUB)
def test_it_takes_what_the_installed_package_takes(name: str) -> None:
    installed = find_backend(name.removesuffix("_hub"))
    backend = FROM_HUB[name]
    assert backend.is_exact == installed.is_exact
    if name != "aiter_hub":
        assert backend.requirements == installed.requirements
    facts = AttentionFacts(device="cuda", is_hip=name == "aiter_hub", dtype=torch.float16)
    assert (backend.requirements.refuses(facts) is not None) == (name == "aiter_hub")


def test_without_the_package_it_is_not_usable() -> None:
    if is_there("kernels"):
        pytest.skip("the real kernels is installed")
    pipe = present("wan").make(num_layers=1)
    rows = {row.name: row for row in attention_backends(pipe)}
    assert {rows[name].reason for name in FROM_HUB} == {"the package kernels is not installed (pip install kernels)"}
    with pytest.raises(MissingPackageError, match="the package kernels is not installed"):
        set_attention_backend(pipe, "flash_hub")


def test_package_of_another_kind_with_that_name_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if is_there("kernels"):
        pytest.skip("the real kernels is installed")
    mine = ModuleType("kernels")
    mine.__spec__ = SimpleNamespace(name="kernels")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "kernels", mine)
    assert find_backend("flash_hub").lacks() == "the package kernels is not installed (pip install kernels)"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("name", FROM_HUB)
def test_table_tells_what_would_be_downloaded_and_fetches_nothing(name: str, hub: Hub, tmp_path: Path) -> None:
    kernel = FROM_HUB[name].hub
    assert kernel is not None
    pipe = present("wan").make(num_layers=1)

    def row() -> tuple[bool, str]:
        return next((each.is_usable, each.reason) for each in attention_backends(pipe) if each.name == name)

    said = f"it would be downloaded from {kernel.repository} (version {kernel.version}) when set"
    assert row() == (False, said)
    in_cache(tmp_path / "cache", kernel.repository, kernel.version + 1)
    assert row() == (False, said), "another version"
    in_cache(tmp_path / "cache", kernel.repository, kernel.version, kind="model")
    assert row() == (True, "")
    describe()
    assert not hub.fetched


@pytest.mark.parametrize("variable", ["KERNELS_CACHE", "LOCAL_KERNELS"])
def test_places_of_the_package_are_looked_at(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = find_backend("flash_hub").hub
    assert kernel is not None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELS_CACHE", raising=False)
    assert kernel.would_fetch()
    in_cache(tmp_path / "other", kernel.repository, kernel.version)
    value = {"KERNELS_CACHE": tmp_path / "other", "LOCAL_KERNELS": f"a/b=/c:{kernel.repository}=/d"}[variable]
    monkeypatch.setenv(variable, str(value))
    assert kernel.would_fetch() is None


# Setting


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("name", FROM_HUB)
def test_setting_it_by_name_fetches_it_and_computes_the_same(
    name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FROM_HUB[name].hub
    assert kernel is not None
    hub.trusted.add(kernel.repository.partition("/")[0])
    family = present("wan")
    expected = family.run(pipe := family.make(num_layers=1), steps=1)
    alias = FROM_HUB[name].aliases[0] if FROM_HUB[name].aliases else name
    with set_attention_backend(pipe, alias, verify=True) as patch:
        output = family.run(pipe, steps=1)
    assert patch.backends == {"transformer": name}
    assert patch.calls == {"transformer": {name: 4}}
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert hub.fetched == [(kernel.repository, {"version": kernel.version, "revision": None})]


def test_what_does_not_go_with_the_model_is_not_fetched(hub: Hub) -> None:
    with pytest.raises(UnsupportedModelError, match="'flash_hub' does not go with transformer"):
        set_attention_backend(present("wan").make(num_layers=1), "flash_hub")
    assert not hub.fetched


@pytest.mark.usefixtures("anywhere")
def test_publisher_that_is_not_trusted_is_refused_with_what_to_type(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = present("wan").make(num_layers=1)
    with pytest.raises(
        MissingPackageError, match=r"'sage_hub' cannot be loaded: .*DIFFUSERS_TRUST_REMOTE_KERNELS=true"
    ):
        set_attention_backend(pipe, "sage_hub")
    assert not hub.fetched
    monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_KERNELS", "true")
    set_attention_backend(pipe, "sage_hub")
    assert hub.fetched


@pytest.mark.usefixtures("anywhere")
def test_auto_and_fa_never_take_it(hub: Hub, tmp_path: Path) -> None:
    for backend in FROM_HUB.values():
        assert backend.hub is not None
        in_cache(tmp_path / "cache", backend.hub.repository, backend.hub.version)
    choice = MeasuredChoice(allow_quantised=True, store=None)
    parts = (torch.randn(1, 2, 4, 16),) * 3
    choice.pick(facts_of(parts[0], parts[1], None, 0.0, False, False), parts, MORE)
    timed = {each.backend for found in choice.timings.values() for each in found}
    assert timed
    assert not timed & {*FROM_HUB}
    assert find_backend("fa").name not in FROM_HUB
    assert not hub.fetched


@pytest.mark.usefixtures("anywhere", "hub")
def test_what_would_be_downloaded_is_not_advised_in_an_error(tmp_path: Path) -> None:
    family = present("ltx")  # whose cross-attention has a mask
    kernel = find_backend("flash_hub").hub
    assert kernel is not None
    set_attention_backend(pipe := family.make(num_layers=1), "flash_hub")
    with pytest.raises(UnsupportedModelError, match=r"it takes no mask\. Usable there: ") as caught:
        family.run(pipe, steps=1)
    assert "_hub" not in str(caught.value).partition("Usable there: ")[2]
