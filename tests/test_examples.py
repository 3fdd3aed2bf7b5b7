"""The examples: each runs on a small model as on a large one, and calls the large one by arguments that it has."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image

from sgl_diffusion_accel.patch import patches_on

NAMES = ("wan", "hunyuan_video", "qwen_image", "flux", "z_image")
STEPS = 16
"""Enough for a cache to act."""

TRAINED = ("wan", "qwen_image", "flux")
LEAST_PSNR = 45.0
"""Of the pictures of a miniature, in dB. Random weights show no picture to measure."""

RUNS = [
    *[(name, "--miniature") for name in TRAINED],
    ("hunyuan_video", "--tiny"),
    ("hunyuan_video", "--tiny --model 1"),
    ("z_image", "--tiny"),
]

CALLS = {
    "wan": {"": "WanPipeline", "--model 2.2": "WanPipeline"},
    "hunyuan_video": {"": "HunyuanVideo15Pipeline", "--model 1": "HunyuanVideoPipeline"},
    "qwen_image": {"": "QwenImagePipeline", "--edit picture.png": "QwenImageEditPlusPipeline"},
    "flux": {"": "FluxPipeline", "--model 2": "Flux2Pipeline"},
    "z_image": {"": "ZImagePipeline", "--model turbo": "ZImagePipeline"},
}
"""Options to the pipeline that they lead to."""


def example(name: str, pipeline: str | None = None) -> ModuleType:
    """The module of an example, where this diffusers has the pipeline."""
    for needed in [pipeline] if pipeline else CALLS[name].values():
        if not hasattr(diffusers, needed):
            pytest.skip(f"diffusers {diffusers.__version__} has no {needed}")
    return importlib.import_module(f"examples.{name}")


class Watched:
    """Stands before an example's `load`: keeps the pipeline, with what it gave before the example touched it."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self._load = module.load
        monkeypatch.setattr(module, "load", self)

    def __call__(self, given: Any) -> Any:
        self.job = self._load(given)
        self.unpatched = self.run()
        return self.job

    def run(self) -> torch.Tensor:
        return self.job.pipe(**self.job.call, generator=torch.Generator().manual_seed(0))[0]


def run(name: str, options: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Watched, dict[str, Any]]:
    """Runs an example; the pipeline with its output before, and the comparison's rows."""
    module = example(name)
    watched = Watched(module, monkeypatch)
    module.main([*options.split(), "--compare", "--output", str(folder / "shown.png")])
    report = json.loads((folder / "shown.json").read_text())
    return watched, {row["name"]: row for row in report["rows"]}


@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda value: value.replace("--", "").replace(" ", "_"))
def test_skips_steps_and_leaves_the_pipeline_as_it_was(name, options, monkeypatch, tmp_path, capsys):
    watched, rows = run(name, f"{options} --steps {STEPS}", monkeypatch, tmp_path)
    printed = capsys.readouterr().out

    computed, of = map(int, re.search(r"(\d+) of (\d+) computed", printed).groups())
    assert of == STEPS
    assert computed <= 0.75 * STEPS
    mine = rows["apply_auto"]
    assert mine["compute_ratio"] == pytest.approx(STEPS / computed, rel=0.02)
    if name in TRAINED:
        (fewer,) = (row["psnr"] for label, row in rows.items() if label == f"{computed} steps")
        assert mine["psnr"] > max(LEAST_PSNR, fewer)
    if name == "hunyuan_video":
        assert re.search(r"encoder_hidden_states (24|8) → 7", printed), "its padding is left out"

    assert not patches_on(watched.job.pipe)
    assert torch.equal(watched.run(), watched.unpatched)
    shown = next(path for path in tmp_path.iterdir() if path.suffix in (".png", ".gif"))
    assert f"saved {shown}" in printed
    with Image.open(shown) as picture:
        assert getattr(picture, "n_frames", 1) == watched.job.decode((watched.unpatched,)).shape[1]


def test_z_image_turbo_has_no_cache_and_says_why(monkeypatch, tmp_path, capsys):
    _, rows = run("z_image", "--tiny --model turbo", monkeypatch, tmp_path)
    assert "of 8 steps there are none to spare" in capsys.readouterr().out
    assert rows["apply_auto"]["psnr"] == "inf"


@pytest.mark.parametrize("name", ["wan", "z_image"])
def test_shows_what_the_prompt_says(name, tmp_path):
    pictures = {}
    for prompt in ("large red circle left", "small blue ring left"):
        module = example(name)
        small = "--miniature" if name in TRAINED else "--tiny"
        module.main([small, "--steps", "4", "--prompt", prompt, "--output", str(tmp_path / prompt / "shown.png")])
        pictures[prompt] = next((tmp_path / prompt).iterdir()).read_bytes()
    assert len(set(pictures.values())) == 2


class Loaded(SimpleNamespace):
    """What `from_pretrained` gives where there is no model to load: it can be offloaded and tiled."""

    def enable_model_cpu_offload(self) -> None: ...

    def enable_tiling(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "options", "pipeline"), [(name, *item) for name, items in CALLS.items() for item in items.items()]
)
def test_calls_the_large_model_by_arguments_that_it_has(name, options, pipeline, monkeypatch, tmp_path):
    """Without its weights: the class, the name on the Hub, and the arguments of the call."""
    module = example(name, pipeline)
    loaded = []

    def from_pretrained(cls, path, **given):
        inspect.signature(cls.load_config).bind(path)
        loaded.append((cls.__name__, path))
        return Loaded(cls=cls, vae=Loaded())

    for kind in (DiffusionPipeline, ModelMixin):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("picture.png")
    jobs = []
    load = module.load

    class StopError(Exception):
        """Ends the example once the model is loaded."""

    def stop(given):
        jobs.append(load(given))
        raise StopError

    monkeypatch.setattr(module, "load", stop)
    with pytest.raises(StopError):
        module.main(options.split())
    (job,) = jobs
    assert loaded[-1][0] == pipeline
    assert {path for _, path in loaded} == {loaded[-1][1]}
    assert re.fullmatch(r"[\w-]+/[\w.-]+", loaded[-1][1])
    arguments = inspect.signature(job.pipe.cls.__call__).bind(job.pipe, **job.call).arguments
    assert arguments["num_inference_steps"] >= 8


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_its_page_are_understood(name, monkeypatch):
    module = importlib.import_module(f"examples.{name}")
    commands = re.findall(r"^    (python -m .*?)(?:  +#.*)?$", module.__doc__, re.MULTILINE)
    assert len(commands) == 3
    seen = []
    monkeypatch.setattr(module, "load", lambda given: seen.append(given) or (_ for _ in ()).throw(KeyError))
    for command in commands:
        _, _, called, *options = shlex.split(command)
        assert called == f"examples.{name}"
        with pytest.raises(KeyError):
            module.main(options)
    assert sum(given.small for given in seen) == 1
