"""The house: pinned versions and what the documents say agree with the files."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pins(name: str) -> list[tuple[str, Version]]:
    """Packages and versions of a constraints file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pinned = [re.fullmatch(r"([\w.-]+)==([\w.]+)( ; python_version >= \"3.11\")?", line) for line in lines]
    assert [line for line, match in zip(lines, pinned, strict=True) if match is None] == []
    return [(canonicalize_name(match[1]), Version(match[2])) for match in pinned if match]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt", "constraints-floors.txt"])
def test_every_version_is_pinned_once(name: str) -> None:
    packages = [package for package, _ in pins(name)]
    assert len(packages) == len(set(packages))


SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")


def lowest(requirements: str) -> dict[str, Version]:
    """Package to the lowest version that is allowed, of those that have one."""
    parsed = [Requirement(line) for line in requirements.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(each.name): Version(one.version) for each in parsed for one in each.specifier}


def test_lowest_versions_are_those_that_are_run() -> None:
    """What users install with the lowest versions, the tools of developers with the usual ones."""
    extras = SETTINGS["options.extras_require"]
    of_users = lowest(SETTINGS["options"]["install_requires"]) | lowest(extras["test"])
    of_developers = lowest(extras["dev"]) | lowest(extras["bench"])
    run = dict(pins("constraints.txt")) | {name: dict(pins("constraints-floors.txt"))[name] for name in of_users}
    declared = of_developers | of_users
    assert declared == {name: run[name] for name in declared}
    others = [lowest(extras[name]) for name in ("plots", "compare", "tables", "yaml")]
    assert all(of_users[name] == version for extra in others for name, version in extra.items())


def test_declared_pythons_are_those_that_are_run() -> None:
    declared = re.findall(r"Python :: (3\.\d+)", SETTINGS["metadata"]["classifiers"])
    oldest, others = re.findall(r"^\w+_PYTHONS? := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    run = others.replace("$(OLDEST_PYTHON)", oldest).split()
    assert sorted([*run, USUAL_PYTHON], key=Version) == declared
    assert SETTINGS["options"]["python_requires"] == f">={oldest}"


USUAL_PYTHON = "3.11"
"""Of `make test`."""


def test_tests_of_other_pythons_exist() -> None:
    named = re.findall(r"\btests/[\w/]+\.py", (ROOT / "Makefile").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_documented_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *ROOT.glob("docs/*.md")]
    named = {
        name for path in documents for name in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert sorted(named - set(targets)) == []


def test_paths_in_the_table_of_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", text.partition("## Where do I add")[2])
    assert paths
    roots = (ROOT, ROOT / "sgl_diffusion_accel")
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []
