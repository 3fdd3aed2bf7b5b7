"""The notebook runs from its first cell to the last, and what it shows in the clone is of its code."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("nbclient", reason="the notebook is run with nbclient: make test")

from examples import notebook as running


def kinds(notebook):
    """What each cell shows, but for the numbers and pictures themselves."""
    return [
        [(out.output_type, out.get("name"), sorted(out.get("data", {}))) for out in cell.outputs]
        for cell in running.code_cells(notebook)
    ]


def texts(notebook):
    for cell in running.code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


@pytest.mark.timeout(1200)  # a minute where nothing else runs
def test_runs_and_shows_what_is_in_the_clone():
    committed = running.read()
    assert kinds(running.execute(running.read())) == kinds(committed)


def test_outputs_are_of_its_code():
    committed = running.read()
    assert running.is_fresh(committed), "its code has changed since it was run: make notebook"
    cells = running.code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_a_change_of_its_code_is_seen():
    changed = running.read()
    running.code_cells(changed)[0].source += "\n"
    assert not running.is_fresh(changed)


def test_shows_pictures_steps_and_no_trouble():
    committed = running.read()
    shown = [kind for cell in kinds(committed) for kind in cell]
    assert not [kind for kind in shown if kind[0] == "error" or kind[1] == "stderr"]
    assert sum("image/png" in kind[2] for kind in shown) >= 4
    assert sum("text/html" in kind[2] for kind in shown) >= 2
    said = "\n".join(texts(committed))
    assert re.search(r"cond .*\d+ of 24 computed", said)
    assert "True" in said.split(), "the pipeline is as it was, bit by bit"
    assert not re.findall(r"(?:^|[\s'\"(])/(?:\w+/)+", said), "a path of the machine it ran on"


def test_its_links_lead_somewhere():
    prose = "\n".join(cell.source for cell in running.read().cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("https:")]
    assert len(links) >= 8
    assert [link for link in links if not (running.PATH.parent / link).exists()] == []
