"""What must hold for every patch on every pipeline, as checks that take the function that applies the patch.

An `Apply` takes a pipeline and returns a `Patch`. `CACHES` lists the ones that skip steps, `NEVER_SKIPPING` those that
must change nothing; a new kind of cache joins by one entry in `caches.py`.
`families`, `chosen` and `cross` say which cells run by default, and which in the long matrix (`matrix.py`).
"""

from __future__ import annotations

import torch

from .caches import CACHES, NEVER_SKIPPING, Apply, skips_some
from .families import TWO_BRANCH, families, family, family_params
from .fresh import Interrupted, check_unaffected, failing_at, fresh_output
from .matrix import chosen, cross, in_matrix
from .recording import FixedPath, count_blocks, transformer_outputs
from .snapshot import Snapshot, assert_same

torch.set_num_threads(1)  # tests run in several processes, and sums are compared bit by bit

__all__ = [
    "CACHES",
    "NEVER_SKIPPING",
    "TWO_BRANCH",
    "Apply",
    "FixedPath",
    "Interrupted",
    "Snapshot",
    "assert_same",
    "check_unaffected",
    "chosen",
    "count_blocks",
    "cross",
    "failing_at",
    "families",
    "family",
    "family_params",
    "fresh_output",
    "in_matrix",
    "skips_some",
    "transformer_outputs",
]
