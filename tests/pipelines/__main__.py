"""Runs every pipeline with every kind of patch, about four minutes, and writes `verdicts.json`.

PYTHONPATH=.:tests python -m pipelines             # then: python -m benchmarks.table, for docs/models.md
PYTHONPATH=.:tests python -m pipelines Flux Wan    # those whose name holds one of these; the others stay as they are
"""

from __future__ import annotations

import logging
import sys
import warnings

import torch

from . import CASES
from .left_out import LEFT_OUT
from .verdict import FILE, keep, kept, verdict_of


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    asked = sys.argv[1:]
    verdicts = {key: each for key, each in kept().items() if key in CASES} if asked and FILE.exists() else {}
    wrong = []
    for key, case in CASES.items():
        if asked and not any(each in key for each in asked):
            continue
        if case.missing:
            sys.exit(f"{case.missing}: verdicts are of a diffusers that has all of them.")
        try:
            verdicts[key] = verdict_of(case)
            sys.stdout.write(f"{key}: {verdicts[key]['run']}\n")
        except AssertionError as error:
            wrong.append(f"{key}: {error}")
            sys.stdout.write(f"{wrong[-1]}\n")
        keep(verdicts, LEFT_OUT)
    if wrong:
        sys.exit("\n".join(["What is wrong:", *wrong]))


if __name__ == "__main__":
    main()
