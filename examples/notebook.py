"""Runs `quickstart.ipynb` from the first cell to the last and keeps what it shows: `make notebook`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).with_name("quickstart.ipynb")
_SOURCE = "source_of_outputs"


def main() -> None:
    """Runs the notebook in place."""
    notebook = execute(read())
    notebook.metadata[_SOURCE] = source_digest(notebook)
    nbformat.write(notebook, PATH)
    print(f"{PATH.name}: {sum(len(cell.outputs) for cell in code_cells(notebook))} outputs")


def read() -> Any:
    """The notebook as it is in the clone."""
    return nbformat.read(PATH, as_version=4)


def execute(notebook: Any) -> Any:
    """Runs all cells in a new kernel, in the folder of the notebook.

    Raises:
        CellExecutionError: A cell raised.
    """
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    # Times of day would make each run another file.
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": PATH.parent}},
        extra_arguments=["--log-level=ERROR"],
    )
    # tqdm warns, with its path, where ipywidgets is missing: its bars are then plain ones.
    done = client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"})
    done.metadata.language_info = {"name": "python"}  # the kernel adds its exact version
    return done


def code_cells(notebook: Any) -> list[Any]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source_digest(notebook: Any) -> str:
    """Of all code, so that it is seen when outputs are those of older code."""
    source = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def is_fresh(notebook: Any) -> bool:
    """Whether its outputs are those of its code."""
    return bool(notebook.metadata.get(_SOURCE) == source_digest(notebook))


if __name__ == "__main__":
    main()
