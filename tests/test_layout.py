"""The house: which folder may import which, no cycles, names that occur once, rooms of a readable size."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

NAME = "sgl_diffusion_accel"
ROOT = Path(__file__).parent.parent / NAME
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}

FLOORS = [
    ["_version", "errors"],
    ["frames", "validate", "environment", "slots", "cache_contexts", "clocks", "reporting/", "calls"],
    ["caching/parts/"],
    ["intercept", "targets", "shadow"],
    ["loop/", "patch"],
    ["attention/backends/"],
    ["attention/"],
    ["lossless/"],
    [
        "caching/cache_handler",
        "caching/cache_config",
        "caching/run_log",
        "caching/guided_step",
        "caching/foreign",
        "caching/full_calls",
        "caching/patch_summary",
        "caching/blocks/",
        "caching/outputs/",
    ],
    ["caching/cache_patch"],
    ["caching/adaptive", "caching/apply_block_cache", "caching/cache_dit/", "caching/magcache/", "caching/teacache/"],
    ["calibration/"],
    ["profiling/"],
    ["comparing/"],
    ["auto/"],
    ["__init__", "__main__"],
]
"""From the ground up: a file imports from its own floor and from those below. A name with / is a whole folder."""

APART = [
    ("attention/", "caching/", "caching/parts/"),
    ("lossless/", "caching/", "caching/parts/"),
    ("lossless/constants/", "lossless/padding/trimming", ""),
    ("caching/cache_dit/", "caching/teacache/", ""),
    ("caching/cache_dit/", "caching/magcache/", ""),
    ("caching/teacache/", "caching/cache_dit/", ""),
    ("caching/teacache/", "caching/magcache/", ""),
    ("caching/magcache/", "caching/cache_dit/", ""),
    ("caching/magcache/", "caching/teacache/", ""),
    ("caching/blocks/", "caching/outputs/", ""),
    ("auto/", "profiling/", ""),
    ("auto/", "comparing/", ""),
    ("auto/checking/", "auto/", "auto/checking/"),
]
"""Neighbours that know nothing of each other: (who, whom, but for this folder)."""

MOST_ROOMS, MOST_LINES = 16, 345


def imports(name: str) -> set[str]:
    """The files of the package that a file imports from, wherever in it, for types as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
            folder = "/".join(node.module.split(".")[1:])
            for alias in node.names:
                inner = f"{folder}/{alias.name}" if folder else alias.name
                found.add(inner if inner in FILES else folder or "__init__")
        elif isinstance(node, ast.Import):
            found |= {"/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith(f"{NAME}.")}
    return {each for each in found if each in FILES} - {name}


GRAPH = {name: imports(name) for name in FILES}


def is_in(name: str, place: str) -> bool:
    return name.startswith(place) if place.endswith("/") else name == place


def floor_of(name: str) -> int:
    """The most exact of the places that a file is in decides."""
    found = [(len(place), floor) for floor, places in enumerate(FLOORS) for place in places if is_in(name, place)]
    assert found, f"{name} is on no floor: give it one"
    return max(found)[1]


def of_rooms() -> list[str]:
    return sorted(name for name in FILES if name.endswith("__init__") is False or name == "__init__")


@pytest.mark.parametrize("name", of_rooms())
def test_nothing_is_imported_from_a_floor_above(name: str) -> None:
    assert [each for each in GRAPH[name] if floor_of(each) > floor_of(name) and each != "_version"] == []


@pytest.mark.parametrize(("who", "whom", "but"), APART)
def test_neighbours_know_nothing_of_each_other(who: str, whom: str, but: str) -> None:
    assert [name for name in FILES if is_in(name, who)], "nobody lives there"
    wrong = [
        f"{name} imports {each}"
        for name in FILES
        if is_in(name, who)
        for each in GRAPH[name]
        if is_in(each, whom) and not (but and is_in(each, but))
    ]
    assert wrong == []


def test_no_file_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for each in sorted(GRAPH[name]):
                visit(each, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_parts_know_no_pipeline() -> None:
    for name, path in FILES.items():
        if is_in(name, "caching/parts/"):
            assert "diffusers" not in path.read_text().replace("diffusers'", ""), name


def test_names_of_files_occur_once() -> None:
    names = Counter(name.rpartition("/")[2] for name in FILES if not name.endswith("__init__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_rooms_and_folders_are_of_a_readable_size() -> None:
    folders = Counter(name.rpartition("/")[0] for name in FILES if not name.endswith("__init__"))
    assert {folder: count for folder, count in folders.items() if count > MOST_ROOMS} == {}
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_every_folder_says_what_is_in_it() -> None:
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
