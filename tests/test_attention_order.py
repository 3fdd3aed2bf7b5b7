"""Set before or after anything else that is done to a pipeline, a backend gives the same result."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from invariants import CACHES, Snapshot, assert_same, chosen, cross, families, skips_some
from invariants.families import present
from sgl_diffusion_accel import remove
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.select import set_attention_backend
from zoo import Family

torch.set_num_threads(1)
CPU = torch.device("cpu")


def half(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Something else than attention, so that where it ran is seen."""
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1) * 0.5


def no_mask(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> Any:
    return torch.softmax(query @ key.mT * (scale or query.shape[-1] ** -0.5), -1) @ value


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("half", half, mask_and_causal=True)
    register_attention_backend("no mask", no_mask, masks=False, causal=False, gqa=False)


def near(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def run(family: Family, pipe: Any, steps: int = 1) -> Tensor:
    """A short run in the transformer's type."""
    given, dtype = family.call(pipe, steps=steps), pipe.transformer.dtype
    floats = {k: v.to(dtype) for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return family.run(pipe, steps=steps, **floats)


# torch.compile


class Counting:
    """A compiler backend that runs the captured graph as it is and counts how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def blocks_compiled(pipe: Any) -> Counting:
    backend = Counting()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return backend


FEW_BLOCKS: dict[str, dict[str, int]] = {
    "wan": {"num_layers": 2},
    "flux": {"num_layers": 2, "num_single_layers": 2},
    "ltx": {"num_layers": 2},
}
"""Compiled code is that of a class of blocks, however many there are."""


@functools.cache
def graphs_unpatched(name: str) -> int:
    backend = blocks_compiled(pipe := present(name).make(**FEW_BLOCKS[name]))
    present(name).run(pipe, steps=1)
    torch._dynamo.reset()
    return backend.graphs


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend", "first"),
    [
        ("wan", "math", "compile first"),
        ("flux", "math", "patch first"),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in (
                ("wan", "math", "patch first"),
                ("wan", "no mask", "patch first"),
                ("wan", "efficient", "compile first"),
                ("wan", "flex", "patch first"),
            )
        ),
    ],
)
def test_compiled_blocks_have_no_break_and_no_graph_more(name: str, backend: str, first: str) -> None:
    """As many graphs as unpatched, once for each that has run: for each class of block, however many there are."""
    family, few = present(name), FEW_BLOCKS[name]
    expected, once = family.run(family.make(**few), steps=2), graphs_unpatched(name)
    pipe = family.make(**few)
    if first == "patch first":
        set_attention_backend(pipe, backend)
    compiled = blocks_compiled(pipe)
    if first == "compile first":
        family.run(pipe, steps=1)
        set_attention_backend(pipe, backend)
    near(family.run(pipe, steps=2), expected)
    assert compiled.graphs <= once * (1 if first == "patch first" else 2)
    before = compiled.graphs
    near(family.run(pipe, steps=2), expected)
    assert compiled.graphs == before, "compiled again"
    assert not torch._dynamo.utils.counters["graph_break"]
    remove(pipe)
    assert torch.equal(family.run(pipe, steps=2), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["set", "run"])
def test_backend_goes_and_comes_where_its_layers_are_compiled_in_pieces(first: str) -> None:
    """As hooks cut them: layerwise casting, offloading. A piece must not serve the layer with the other attention."""
    family = present("wan")
    set_attention_backend(eager := family.make(num_layers=2), "half")
    expected = {"unpatched": run(family, family.make(num_layers=2)), "half": run(family, eager)}
    pipe = family.make(num_layers=2)
    for block in pipe.transformer.blocks:
        block.attn1.to_q.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    pipe.transformer.compile(backend="eager")
    for turn in range(3):
        patched = (turn % 2 == 0) == (first == "set")
        if patched:
            set_attention_backend(pipe, "half")
        near(run(family, pipe), expected["half" if patched else "unpatched"])
        remove(pipe)


@pytest.mark.usefixtures("fresh_compiler")
def test_backend_is_in_the_compiled_code() -> None:
    family = present("wan")
    set_attention_backend(eager := family.make(num_layers=2), "half")
    pipe = family.make(num_layers=2)
    blocks_compiled(pipe)
    unpatched = family.run(pipe, steps=2)
    patch = set_attention_backend(pipe, "half")
    near(family.run(pipe, steps=2), family.run(eager, steps=2))
    assert patch.calls == {"transformer": {}}, "calls in compiled code are not counted"
    patch.remove()
    assert torch.equal(family.run(pipe, steps=2), unpatched)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_code_for_all_blocks() -> None:
    family, graphs = present("wan"), []
    for layers in (2, 8):
        torch._dynamo.reset()
        pipe = family.make(num_layers=layers)
        set_attention_backend(pipe, "math")
        compiled = blocks_compiled(pipe)
        family.run(pipe, steps=1)
        graphs.append(compiled.graphs)
    assert graphs == [1, 1]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["patch first", "compile first"])
def test_compiled_blocks_with_steps_left_out(first: str) -> None:
    """One graph more: the steps with the backend, and those without."""
    family = present("wan")
    set_attention_backend(eager := family.make(num_layers=2), "half", skip_first_steps=1, skip_last_steps=1)
    expected = family.run(eager, steps=4)
    pipe = family.make(num_layers=2)
    if first == "patch first":
        set_attention_backend(pipe, "half", skip_first_steps=1, skip_last_steps=1)
    compiled = blocks_compiled(pipe)
    if first == "compile first":
        set_attention_backend(pipe, "half", skip_first_steps=1, skip_last_steps=1)
    near(family.run(pipe, steps=4), expected)
    near(family.run(pipe, steps=4), expected)
    assert compiled.graphs == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_call_that_cannot_be_taken_goes_to_pytorch() -> None:
    family, few = present("ltx"), FEW_BLOCKS["ltx"]
    expected, once = family.run(family.make(**few), steps=1), graphs_unpatched("ltx")
    pipe = family.make(**few)
    set_attention_backend(pipe, "no mask", on_unsupported="native")
    compiled = blocks_compiled(pipe)
    near(family.run(pipe, steps=1), expected)
    assert compiled.graphs == once
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_call_that_cannot_be_taken_is_refused_with_the_reason() -> None:
    family = present("ltx")
    pipe = family.make(**FEW_BLOCKS["ltx"])
    set_attention_backend(pipe, "no mask")
    blocks_compiled(pipe)
    with pytest.raises(Exception, match=r"it takes no mask|UnsupportedModelError"):  # torch 2.8 names the class alone
        family.run(pipe, steps=1)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("first", "steps_left_out"),
    [("compile first", 1), ("wrapper first", 0), pytest.param("wrapper after", 1, marks=pytest.mark.matrix)],
)
def test_compiled_transformer(first: str, steps_left_out: int) -> None:
    family = present("wan")

    def patched(pipe: Any) -> Any:
        return set_attention_backend(pipe, "half", skip_first_steps=steps_left_out)

    unpatched = family.run(family.make(num_layers=1), steps=2)
    patched(eager := family.make(num_layers=1))
    expected = family.run(eager, steps=2)
    assert not torch.allclose(expected, unpatched, atol=1e-2)
    pipe = family.make(num_layers=1)
    patch = patched(pipe) if first == "wrapper after" else None
    if "wrapper" in first:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    patch = patch or patched(pipe)
    near(family.run(pipe, steps=2), expected)
    patch.remove()
    near(family.run(pipe, steps=2), unpatched)


@pytest.mark.usefixtures("fresh_compiler")
def test_whole_transformer_in_one_graph() -> None:
    family = present("wan")
    expected = family.run(family.make(num_layers=1), steps=2)
    pipe = family.make(num_layers=1)
    set_attention_backend(pipe, "math")
    pipe.transformer.compile(backend="eager", fullgraph=True)
    near(family.run(pipe, steps=2), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_auto_in_compiled_code_takes_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    family = present("wan")
    pipe = family.make(num_layers=1)
    expected = family.run(pipe, steps=1)
    patch = set_attention_backend(pipe, "auto")
    near(family.run(pipe, steps=1), expected)
    picked = patch.choices
    assert picked
    blocks_compiled(pipe)
    near(family.run(pipe, steps=1), expected)
    assert patch.choices == picked
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_auto_in_compiled_code_tells_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    family = present("wan")
    pipe = family.make(num_layers=1)
    patch = set_attention_backend(pipe, "auto")
    before = str(patch)
    blocks_compiled(pipe)
    family.run(pipe, steps=1)
    assert str(patch) != before


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("order", list(itertools.permutations(("cache", "attention", "compile")))[::2])
def test_cache_attention_and_compiled_blocks_in_any_order(order: tuple[str, ...]) -> None:
    family = present("wan")
    CACHES["reuse"](eager := family.make())
    set_attention_backend(eager, "half")
    expected = family.run(eager)
    pipe = family.make()
    done = {
        "cache": CACHES["reuse"],
        "attention": lambda pipe: set_attention_backend(pipe, "half"),
        "compile": blocks_compiled,
    }
    patches = {name: done[name](pipe) for name in order}
    near(family.run(pipe), expected)
    assert skips_some(patches["cache"])
    assert patches["compile"].graphs == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", chosen(["math", "flex"], "flex"))
def test_blocks_compiled_to_machine_code(backend: str) -> None:
    family = present("wan")
    expected = family.run(family.make(num_layers=2), steps=2)
    pipe = family.make(num_layers=2)
    set_attention_backend(pipe, backend)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(family.run(pipe, steps=2), expected, rtol=0, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


# Offload, adapters, types


def sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def model_offload(pipe: Any) -> None:
    _, pipe.kept_hook = accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


def group_offload(pipe: Any) -> None:
    try:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    except AttributeError:
        if torch.accelerator.current_accelerator() is None and diffusers.__version__ < "0.42":
            pytest.skip(f"group offloading of diffusers {diffusers.__version__} needs an accelerator")
        raise


def adapter(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )


def bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


DONE = [sequential_offload, model_offload, group_offload, adapter, bfloat16, layerwise_casting, fused]


@cross(
    "name, do, patch_first",
    [
        pytest.param(name, do, id=f"{name}-{do.__name__}")
        for name, do in [
            *(("wan", do) for do in DONE),
            ("flux", adapter),
            ("flux", fused),
            ("cogvideox", group_offload),
        ]
    ],
    {"patch first": True, "patch after": False},
)
def test_before_and_after(name: str, do: Callable[[Any], None], patch_first: bool) -> None:
    family = present(name)
    unpatched = family.make()
    do(unpatched)
    before = run(family, unpatched)
    outputs = []
    for backend in ("sdpa", "half"):
        pipe = family.make()
        if not patch_first:
            do(pipe)
        patch = set_attention_backend(pipe, backend)
        if patch_first:
            do(pipe)
        outputs += [run(family, pipe) for _ in range(2)]
        assert patch.calls["transformer"][backend] > 0
        assert not patch.fallbacks
        patch.remove()
        assert torch.equal(run(family, pipe), before)
    assert torch.equal(outputs[0], before)
    assert torch.equal(outputs[1], before)
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[2], before)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch first", "patch after"])
def test_fused_projections_of_a_model_off_the_dispatcher(patch_first: bool) -> None:
    """Fusing puts processors of its own in place: the patch says that it is gone there."""
    family = present("cogvideox")
    pipe = family.make()
    pipe.transformer.fuse_qkv_projections()
    before = family.run(pipe, steps=2)
    pipe = family.make()
    if not patch_first:
        fused(pipe)
    patch = set_attention_backend(pipe, "half")
    assert "other processors" not in str(patch)
    if patch_first:
        fused(pipe)
        assert "6 layers were given other processors since, and use no backend" in str(patch)
    assert torch.allclose(family.run(pipe, steps=2), before, atol=1e-2) is patch_first


def test_removed_patch_is_not_brought_back_by_unfusing() -> None:
    family = present("cogvideox")
    expected = family.run(family.make(), steps=2)
    pipe = family.make()
    patch = set_attention_backend(pipe, "half")
    pipe.transformer.fuse_qkv_projections()
    patch.remove()
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(family.run(pipe, steps=2), expected)


@families("wan", "flux")
def test_patch_under_offload_and_adapter_is_undone_exactly(family: Family) -> None:
    for do in (group_offload, adapter):
        pipe = family.make()
        do(pipe)
        family.run(pipe, steps=2)
        before = Snapshot(pipe)
        with set_attention_backend(pipe, "half"):
            family.run(pipe, steps=2)
        assert_same(before, pipe)


# diffusers' own setting


@pytest.fixture
def restored_default() -> Iterator[None]:
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.usefixtures("restored_default")
def test_diffusers_own_setting_before() -> None:
    """Ours is used while it is there, and theirs is back when it is removed."""
    family = present("wan")
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    pipe.transformer.set_attention_backend("_native_math")
    theirs = family.run(pipe, steps=2)
    assert not torch.equal(theirs, expected)
    before = Snapshot(pipe)
    with set_attention_backend(pipe, "sdpa") as patch:
        assert torch.equal(family.run(pipe, steps=2), expected)
        assert patch.calls == {"transformer": {"sdpa": 48}}
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe, steps=2), theirs)


@pytest.mark.usefixtures("restored_default")
def test_diffusers_own_setting_after() -> None:
    """Ours goes on, and their setting is there when it is removed."""
    family = present("wan")
    theirs = family.make()
    theirs.transformer.set_attention_backend("_native_math")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half")
    ours = family.run(pipe, steps=2)
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.equal(family.run(pipe, steps=2), ours)
    patch.remove()
    for block in pipe.transformer.blocks:
        for layer in (block.attn1, block.attn2):
            assert layer.processor._attention_backend == "_native_math"
    assert torch.equal(family.run(pipe, steps=2), family.run(theirs, steps=2))
    pipe.transformer.reset_attention_backend()
    assert {block.attn1.processor._attention_backend for block in pipe.transformer.blocks} == {None}


@pytest.mark.usefixtures("restored_default")
def test_call_that_falls_back_has_the_backend_that_diffusers_was_given() -> None:
    family = present("ltx")
    theirs = family.make()
    theirs.transformer.set_attention_backend("_native_math")
    expected = family.run(theirs, steps=2)
    _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE
    with set_attention_backend(theirs, "no mask", on_unsupported="native") as patch:
        output = family.run(theirs, steps=2)
    assert sum(patch.fallbacks.values()) == 12
    near(output, expected)


# Copies


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize(
    "copied",
    [
        "deepcopy",
        "pickle",
    ],
)
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_copy_of_the_transformer_is_unpatched_and_the_original_stays(name: str, copied: str) -> None:
    family = present(name)
    unpatched = family.make()
    expected = family.run(unpatched, steps=2)
    pipe = family.make()
    patch = set_attention_backend(pipe, "half")
    ours = family.run(pipe, steps=2)
    other = family.make()
    other.transformer = COPIES[copied](pipe.transformer)
    types = [type(m.processor) for m in unpatched.transformer.modules() if getattr(m, "processor", None) is not None]
    assert [
        type(m.processor) for m in other.transformer.modules() if getattr(m, "processor", None) is not None
    ] == types
    assert torch.equal(family.run(other, steps=2), expected)
    assert patch.active
    assert torch.equal(family.run(pipe, steps=2), ours)


def test_copy_of_the_pipeline_is_unpatched() -> None:
    family = present("wan")
    expected = family.run(family.make(), steps=2)
    pipe = family.make()
    set_attention_backend(pipe, "half")
    assert torch.equal(family.run(copy.deepcopy(pipe), steps=2), expected)


@families("wan", "flux", "cogvideox")
def test_saved_model_is_the_unpatched_one(family: Family, tmp_path: Path) -> None:
    unpatched = family.make()
    unpatched.transformer.save_pretrained(tmp_path / "unpatched")
    pipe = family.make()
    names = list(pipe.transformer.state_dict()), repr(pipe.transformer)
    set_attention_backend(pipe, "half")
    assert (list(pipe.transformer.state_dict()), repr(pipe.transformer)) == names
    pipe.transformer.save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "unpatched").iterdir()):
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    loaded = type(unpatched.transformer).from_pretrained(tmp_path / "patched")
    processors = [m.processor for m in loaded.modules() if getattr(m, "processor", None) is not None]
    assert processors
    assert not [each for each in processors for key in vars(each) if "accel" in key]


def test_pipeline_that_takes_the_transformer_over_has_the_backend() -> None:
    """Of another class, made before or after."""
    family, image = present("flux"), present("flux_img2img")
    donor = image.make()
    set_attention_backend(alone := image.make(), "half")
    expected = image.run(alone, steps=2)

    def taken_over(pipe: Any) -> Any:
        other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe, vae=donor.vae, scheduler=donor.scheduler)
        other.set_progress_bar_config(disable=True)
        assert other.transformer is pipe.transformer
        return other

    pipe = family.make()
    first = taken_over(pipe)
    patch = set_attention_backend(pipe, "half")
    second = taken_over(pipe)
    for other in (first, second):
        assert torch.equal(image.run(other, steps=2), expected)
    remove(second)
    assert not patch.active
    assert not torch.equal(image.run(first, steps=2), expected)


# Autocast


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("wan", "efficient"),
        ("sd3", "sdpa"),
        ("sd3", "efficient"),
        ("sd3", "math"),
        ("hunyuan", "efficient"),
        ("hunyuan", "math"),
    ],
)
def test_pipeline_under_autocast(name: str, backend: str) -> None:
    family = present(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = family.run(family.make(), steps=1)
        set_attention_backend(pipe := family.make(), backend, verify=True)
        output = family.run(pipe, steps=1)
    assert float((output - expected).norm() / expected.norm()) < 0.03
