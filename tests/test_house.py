"""The house: pinned versions and what the documents say agree with the files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_version_is_pinned_once(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pinned = [re.fullmatch(r"([\w.-]+)==([\w.]+)( ; python_version >= \"3.11\")?", line) for line in lines]
    assert [line for line, match in zip(lines, pinned, strict=True) if match is None] == []
    packages = [match[1].lower().replace("_", "-") for match in pinned if match]
    assert len(packages) == len(set(packages))


def test_documented_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run") if (ROOT / name).exists()]
    named = {
        name for path in documents for name in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert sorted(named - set(targets)) == []


def test_paths_in_the_table_of_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:sgl_diffusion_accel|tests|miniatures|benchmarks)/[\w/.]*)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() and "results" not in path] == []
