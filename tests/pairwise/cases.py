"""The factors, what does not go together with a reason, and the cases."""

from __future__ import annotations

from itertools import product

from .covering import Case, Factors, Pair, covering, pair
from .model import MODELS
from .quantised import QUANTISED
from .switches import ATTENTION, COMPILE, DTYPE, EVENT, LORA, OFFLOAD, PATCHES

FACTORS: Factors = {
    "patch": [*PATCHES],
    "attention": [*ATTENTION],
    "compile": [*COMPILE],
    "offload": [*OFFLOAD],
    "LoRA": [*LORA],
    "dtype": [*DTYPE],
    "callback": [*EVENT],
    "model": [*MODELS],
    "order": ["patch first", "patch last"],
}

_HOOKED = ("sequential", "group, blocks", "group, leaves", "layerwise casting")
_BY_LAYER = ("sequential", "group, leaves")
_SLOW = "its hooks are compiled layer by layer, until the compiler gives up at its limit of recompilations"

FORBIDDEN: dict[Pair, str] = {
    pair(("offload", "sequential"), ("LoRA", "fuse")): "PEFT merges into weights that lie on no device then",
    pair(("offload", "layerwise casting"), ("LoRA", "load")): "a LoRA that is loaded afterwards gets the storage type",
    pair(("offload", "layerwise casting"), ("LoRA", "fuse")): "PEFT adds nothing to weights in float8",
    **{
        pair(("compile", "regional"), ("offload", offload)): "its hooks cannot be in one graph (`fullgraph=True`)"
        for offload in _HOOKED
    },
    **{pair(("compile", how), ("offload", layers)): _SLOW for how, layers in product(("whole", "wrapper"), _BY_LAYER)},
    **{
        pair(("compile", "wrapper"), ("LoRA", lora)): "the pipeline does not find adapters in `torch.compile(model)`"
        for lora in LORA
        if lora != "none"
    },
    pair(("dtype", "GGUF Q8_0"), ("LoRA", "fuse")): "PEFT merges into no packed weights",
    pair(("dtype", "torchao int8"), ("LoRA", "fuse")): "PEFT merges into no packed weights",
    pair(("dtype", "GGUF Q8_0"), ("offload", "sequential")): "accelerate cannot move packed weights",
    pair(("dtype", "bitsandbytes NF4"), ("offload", "sequential")): "accelerate cannot move packed weights",
    pair(("dtype", "bitsandbytes NF4"), ("LoRA", "load")): "it rounds otherwise once it has run",
    **{
        pair(("dtype", kind), ("offload", "layerwise casting")): "its weights have no type to cast"
        for kind in QUANTISED
    },
}
"""Pairs that diffusers, accelerate, PEFT or the compiler refuse, or do wrongly, without any patch, and why."""


EAGER: list[Case] = covering({**FACTORS, "compile": ["none"]}, FORBIDDEN)
"""Every pair of values but those of the compiler and of packages that quantise."""

COMPILED: list[Case] = covering(FACTORS, FORBIDDEN, given=EAGER)
"""Each way to compile with each value of each other factor."""

_DTYPES: Factors = {**FACTORS, "dtype": [*FACTORS["dtype"], *QUANTISED]}

QUANTISED_CASES: list[Case] = covering(_DTYPES, FORBIDDEN, given=EAGER + COMPILED)
"""Each way to quantise with each value of each other factor."""
