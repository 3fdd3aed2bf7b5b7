"""The documents: their Python runs, their links and commands lead somewhere, their tables are what the files say."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from benchmarks import table
from zoo import FAMILIES

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "examples", "benchmarks", "miniatures")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))
USERS_PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
STEPS = 12
LONGEST = {"README.md": 110, "RESULTS.md": 200}

#: What a page says, and what is run in its place: as many steps as a test has time for, kernels that every machine has.
SHORTER = (
    (r"num_inference_steps=\d+", f"num_inference_steps={STEPS}"),
    (r"set_timesteps\(\d+\)", f"set_timesteps({STEPS})"),
    (r'"text_encoder": "\w+"', '"transformer": "math"'),
    (r'"(sage|flash)"', '"math"'),
    (r", steps=5, nvtx=True", ", trace=False"),
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pipeline() -> Any:
    """A tiny pipeline that is called as one with a text encoder is: the arguments that it needs are filled in."""
    pipe = FAMILIES["wan"].make()
    usual: Any = type(pipe)

    def __call__(self: Any, prompt: str | None = None, **given: Any) -> Any:
        filled = FAMILIES["wan"].call(self, steps=STEPS, seed=len(prompt or ""))
        output = usual.__call__(self, **filled | given)
        output.images = output[0]
        return output

    __call__.__signature__ = inspect.signature(usual.__call__)
    pipe.__class__ = type(usual.__name__, (usual,), {"__call__": __call__, "to": lambda self, *_, **__: self})
    return pipe


class Denoiser(torch.nn.Module):
    """A transformer to be called in a loop of one's own."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return 0.1 * latents * (1 + timestep / 1000) + text[..., None, None]


@pytest.mark.parametrize("path", [page for page in USERS_PAGES if blocks(page, "python")], ids=lambda path: path.name)
def test_python_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first block to the last, as somebody does who types all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *_, **__: pipeline())
    names = {
        "pipe": pipeline(), "prompt": "a lighthouse", "prompts": ["a lighthouse", "a storm"], "another": "a boat",
        "transformer": Denoiser(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "latents": torch.ones(1, 4, 8, 8), "text": torch.ones(1, 4), "no_text": torch.zeros(1, 4),
    }  # fmt: skip
    with torch.no_grad():
        for block in blocks(path, "python"):
            for pattern, instead in SHORTER:
                block = re.sub(pattern, instead, block)
            exec(compile(block, f"{path.name}", "exec"), names)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    wrong = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        found = path.parent / target if target else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_modules_that_are_to_be_run_exist(path: Path) -> None:
    packages = "sgl_diffusion_accel|benchmarks|examples|miniatures"
    named = set(re.findall(rf"python -m ((?:{packages})[\w.]*)", path.read_text()))
    assert [name for name in sorted(named) if importlib.util.find_spec(name.rstrip(".")) is None] == []


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/[a-z]*.md") if page.name not in listed] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"], ids=lambda path: path.name)
def test_a_reader_with_little_time_has_little_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST[path.name]


def test_documents_show_what_the_committed_files_say() -> None:
    made = table.documents()
    assert [str(path) for path, text in made.items() if path.read_text() != text] == [], (
        "run python -m benchmarks.table"
    )


def test_paths_of_the_design_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    files = {path.name for path in (ROOT / "sgl_diffusion_accel").rglob("*.py")}
    named = set(re.findall(r"\b(tests/\w+\.py)", text))
    assert [path for path in named if not (ROOT / path).exists()] == []
    others = [name for name in re.findall(r"\b([a-z_]+\.py)\b", text) if not name.startswith("test_")]
    assert [name for name in others if name not in files] == []
