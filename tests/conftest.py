"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_searched_for_garbage() -> None:
    """Takes what was imported out of the garbage collector's sight.

    Many tests collect to see that nothing is held. Each would walk through the million objects of PyTorch and of its
    compiler, which takes longer than the test; what a test makes itself is found all the same.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Kernels of small models lose far more by waiting for a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
