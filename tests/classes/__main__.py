"""Runs every class with every kind of patch, about two minutes, and writes `verdicts.json`.

PYTHONPATH=.:tests python -m classes             # then: python -m benchmarks.table, for docs/models.md
PYTHONPATH=.:tests python -m classes Flux3 Wan   # those whose name holds one of these; the others stay as they are
"""

from __future__ import annotations

import logging
import sys
import warnings

import torch

from . import ROWS
from .verdict import FILE, keep, kept, verdict_of


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    asked = sys.argv[1:]
    verdicts = {key: each for key, each in kept().items() if key in ROWS} if asked and FILE.exists() else {}
    for key, row in ROWS.items():
        if asked and not any(each in key for each in asked):
            continue
        if row.missing:
            sys.exit(f"{row.missing}: verdicts are of a diffusers that has all of them.")
        verdicts[key] = verdict_of(row)
        sys.stdout.write(f"{key}: {verdicts[key]['verdict']}\n")
    keep(verdicts)


if __name__ == "__main__":
    main()
