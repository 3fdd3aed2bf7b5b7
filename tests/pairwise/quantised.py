"""Weights that other packages keep in fewer bits, put into a model as diffusers' quantisers put them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn


def torchao_int8(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def gguf_q8(pipe: Any) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def made(linear: nn.Linear) -> nn.Module:
        layer = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        packed = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), linear.bias
        return layer

    _replace(pipe, made, multiple=32)


def bitsandbytes_nf4(pipe: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made(linear: nn.Linear) -> nn.Module:
        bias = linear.bias is not None
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        return layer.to("cpu")  # which packs the weights

    _replace(pipe, made, multiple=64)  # its block


def _replace(pipe: Any, made: Callable[[nn.Linear], nn.Module], multiple: int) -> None:
    for parent, name, linear in list(_linears(pipe.transformer)):
        if linear.in_features % multiple == 0:
            setattr(parent, name, made(linear).requires_grad_(False).eval())


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    lists = [blocks for name in ("blocks", "transformer_blocks") if (blocks := getattr(model, name, None)) is not None]
    for blocks in lists:
        for parent in blocks.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    yield parent, name, child


QUANTISED: dict[str, Callable[[Any], None]] = {
    "torchao int8": torchao_int8,
    "GGUF Q8_0": gguf_q8,
    "bitsandbytes NF4": bitsandbytes_nf4,
}
