"""Values that are on their way from the device to the host."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion_accel.loop.host_copy import HostCopy

VALUES = [0.0, 1.5, -2.25, float("inf"), 0.1]


def test_each_value_is_a_plain_number():
    copy = HostCopy(torch.tensor(VALUES))
    assert [copy[index] for index in range(5)] == torch.tensor(VALUES).tolist()
    assert type(copy[1]) is float
    assert copy[-2] == float("inf")


def test_copy_stays_when_the_tensor_is_written_over():
    values = torch.tensor(VALUES)
    copy = HostCopy(values)
    values.zero_()
    assert copy[1] == 1.5


@pytest.mark.parametrize(
    "values",
    [torch.arange(10.0)[::2], torch.arange(5.0, dtype=torch.float64) * 2, torch.arange(5, dtype=torch.bfloat16) * 2],
    ids=["strided", "float64", "bfloat16"],
)
def test_values_in_another_layout_or_precision_are_the_same_numbers(values):
    copy = HostCopy(values)
    assert [copy[index] for index in range(5)] == [0.0, 2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("index", [5, -6])
def test_step_that_is_not_there_is_an_error(index):
    with pytest.raises(IndexError):
        HostCopy(torch.tensor(VALUES))[index]


@pytest.mark.gpu
def test_gpu_is_not_waited_for_when_copying_nor_for_later_work_when_reading():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    values = torch.tensor(VALUES, device="cuda")
    HostCopy(values)[0]  # pinned memory and the like are made at first use
    torch.cuda.synchronize()
    later = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = HostCopy(values)
        torch.cuda._sleep(2_000_000_000)  # in cycles: about a second
        later.record()
        values.zero_()
        read = [copy[index] for index in range(5)]
        still_busy = not later.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert read == torch.tensor(VALUES).tolist()
    assert still_busy


def test_copy_is_in_the_hosts_memory_whatever_the_default_device():
    values = torch.ones(3)
    with torch.device("meta"):
        assert HostCopy(values)[0] == 1.0
