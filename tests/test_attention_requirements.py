"""What a backend cannot take is told with a reason; what is not known yet is held against nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts, Requirements, capability, facts_of

HOPPER = {"device": "cuda", "capability": (9, 0)}

REFUSED: list[tuple[Requirements, dict[str, Any], str]] = [
    (Requirements(devices=("cuda",)), {"device": "cpu"}, "it runs on cuda, not on cpu"),
    (Requirements(devices=("cuda", "xpu")), {"device": "mps"}, "it runs on cuda and xpu, not on mps"),
    (Requirements(is_hip=False), {"device": "cuda", "is_hip": True}, "it runs on NVIDIA GPUs alone"),
    (Requirements(is_hip=True), {"device": "cuda", "is_hip": False}, "it runs on AMD GPUs alone"),
    (
        Requirements(min_capability=(10, 0)),
        HOPPER,
        "it needs compute capability 10.0 or higher, and the GPU has 9.0",
    ),
    (Requirements(max_capability=(8, 9)), HOPPER, "it runs up to compute capability 8.9, and the GPU has 9.0"),
    (
        Requirements(dtypes=(torch.float16, torch.bfloat16)),
        {"dtype": torch.float32},
        "it takes float16, bfloat16, not float32",
    ),
    (Requirements(head_sizes=(64, 128)), {"head_size": 96}, "it takes heads of size 64, 128, not 96"),
    (Requirements(head_multiple=8), {"head_size": 60}, "it takes head sizes that are multiples of 8, not 60"),
    (Requirements(max_head_size=256), {"head_size": 320}, "it takes heads up to size 256, not 320"),
    (Requirements(), {"dropout": True}, "it has no dropout"),
    (Requirements(), {"mask": "other"}, "the mask is not a tensor"),
    (Requirements(masks=False), {"mask": "bool"}, "it takes no mask"),
    (Requirements(masks=False), {"mask": "float"}, "it takes no mask"),
    (Requirements(causal=False), {"is_causal": True}, "it cannot be causal"),
    (Requirements(), {"is_causal": True, "mask": "bool"}, "it takes no mask in a causal call"),
    (
        Requirements(causal_square=True),
        {"is_causal": True, "is_square": False},
        "it can be causal for as many queries as keys alone",
    ),
    (Requirements(gqa=False), {"enable_gqa": True}, "it needs as many heads of the key as of the query"),
]


@pytest.mark.parametrize(("requirements", "facts", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_refused_with_the_reason(requirements: Requirements, facts: dict[str, Any], reason: str) -> None:
    assert requirements.refuses(AttentionFacts(**facts)) == reason
    assert requirements.refuses(AttentionFacts()) is None, "what is not known is no reason"


TAKEN: list[tuple[Requirements, dict[str, Any]]] = [
    (Requirements(devices=("cuda",)), {"device": "cuda"}),
    (Requirements(is_hip=False), {"device": "cpu", "is_hip": True}),
    (Requirements(min_capability=(9, 0), max_capability=(9, 0)), HOPPER),
    (Requirements(min_capability=(9, 0)), {"device": "cpu"}),
    (Requirements(dtypes=(torch.float16,)), {"dtype": torch.float16}),
    (Requirements(head_sizes=(64, 128), head_multiple=8, max_head_size=128), {"head_size": 128}),
    (Requirements(dropout=True), {"dropout": True}),
    (Requirements(masks=False), {"mask": ""}),
    (Requirements(), {"mask": "float"}),
    (Requirements(causal_square=True), {"is_causal": True, "is_square": True}),
    (Requirements(causal_square=True), {"is_causal": False, "is_square": False}),
    (Requirements(mask_and_causal=True), {"is_causal": True, "mask": "bool"}),
    (Requirements(gqa=False), {"enable_gqa": False}),
    (Requirements(), {"enable_gqa": True}),
]


@pytest.mark.parametrize(("requirements", "facts"), TAKEN)
def test_taken_at_the_limits(requirements: Requirements, facts: dict[str, Any]) -> None:
    assert requirements.refuses(AttentionFacts(**facts)) is None


def test_reasons_about_the_device_come_first() -> None:
    """So that somebody without a GPU is not sent to look for another head size."""
    needs = Requirements(devices=("cuda",), dtypes=(torch.float16,), head_sizes=(64,), masks=False)
    facts = AttentionFacts(device="cpu", dtype=torch.float32, head_size=3, mask="bool")
    assert needs.refuses(facts) == "it runs on cuda, not on cpu"


def test_facts_of_a_call() -> None:
    query, key = torch.zeros(2, 4, 7, 16), torch.zeros(2, 2, 11, 16)
    facts = facts_of(query, key, None, 0.0, False, True)
    assert facts == AttentionFacts(
        device="cpu",
        dtype=torch.float32,
        head_size=16,
        mask="",
        is_causal=False,
        is_square=False,
        enable_gqa=True,
        dropout=False,
    )
    assert facts_of(query, query, None, 0.1, True, True) == AttentionFacts(
        device="cpu",
        dtype=torch.float32,
        head_size=16,
        mask="",
        is_causal=True,
        is_square=True,
        enable_gqa=False,  # as many heads: nothing is shared
        dropout=True,
    )
    for mask, kind in ((torch.ones(7, 11, dtype=torch.bool), "bool"), (torch.ones(7, 11), "float"), ([1], "other")):
        assert facts_of(query, key, mask, 0.0, False, False).mask == kind


def test_capability_is_that_of_cuda_devices_alone() -> None:
    assert capability(torch.device("cpu")) is None
    assert capability(torch.device("meta")) is None


@pytest.mark.gpu
def test_capability_of_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    assert capability(torch.device("cuda")) == torch.cuda.get_device_capability()
