"""The house: what is public, what is imported, and what the documents say agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sgl_diffusion_accel

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "matplotlib",
    "yaml",
    "flash_attn",
    "sageattention",
    "xformers",
    "peft",
    "rich",
    "torchmetrics",
    "cache_dit",
)


def test_all_names_exist_and_are_sorted() -> None:
    names = sgl_diffusion_accel.__all__
    assert [name for name in names if not hasattr(sgl_diffusion_accel, name)] == []
    assert list(names) == sorted(set(names))


def test_everything_public_is_documented() -> None:
    things = [getattr(sgl_diffusion_accel, name) for name in sgl_diffusion_accel.__all__ if name != "__version__"]
    assert [thing for thing in things if not (thing.__doc__ or "").strip()] == []


def test_changelog_is_at_the_version() -> None:
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == sgl_diffusion_accel.__version__


def test_no_optional_package_is_imported_before_it_is_asked_for() -> None:
    code = f"import sys, sgl_diffusion_accel; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_version_is_pinned_once(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pinned = [re.fullmatch(r"([\w.-]+)==([\w.]+)( ; python_version >= \"3.11\")?", line) for line in lines]
    assert [line for line, match in zip(lines, pinned, strict=True) if match is None] == []
    packages = [match[1].lower().replace("_", "-") for match in pinned if match]
    assert len(packages) == len(set(packages))


def test_typed_package() -> None:
    assert (Path(sgl_diffusion_accel.__file__).parent / "py.typed").is_file()


def test_documented_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run") if (ROOT / name).exists()]
    named = {
        name for path in documents for name in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert sorted(named - set(targets)) == []
