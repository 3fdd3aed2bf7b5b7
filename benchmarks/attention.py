"""Measures attention: what redirecting it costs, and on a GPU how fast each backend is at the shapes of real models.

    python -m benchmarks.attention [--pairs 15]

The cost of redirection, on one attention layer that is as small as can be, since it does not depend on the size: the
layer as it is, with its processor redirected (what `set_attention_backend` does), and with a `TorchFunctionMode` around
its call (the other way to do it). On a GPU also the kernels, in bfloat16: milliseconds, TFLOP/s, the share of the peak
of a matrix product measured there, and the error against float32. Writes `benchmarks/results/attention.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel import environment
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend
from sgl_diffusion_accel.attention.backends.requirements import facts_of
from sgl_diffusion_accel.attention.measured_choice import median_ms
from sgl_diffusion_accel.attention.redirect import Redirect
from sgl_diffusion_accel.attention.sites import Scope, find_sites, redirected
from sgl_diffusion_accel.attention.verify import relative_error

from .turns import parser, quartiles, write

HIDDEN, HEADS, TOKENS = 64, 1, 8
CALLS = 500

SHAPES = {
    "Wan2.1 1.3B, 480p, 81 frames": (1, 12, 32760, 128),
    "Wan2.1 14B, 480p, 81 frames": (1, 40, 32760, 128),
    "Wan2.1 14B, 720p, 81 frames": (1, 40, 75600, 128),
    "Qwen-Image, 1024²": (1, 24, 4096 + 128, 128),
    "FLUX.1, 1024²": (1, 24, 4096 + 512, 128),
}
"""Batch, heads, tokens, head size of self-attention."""


def main() -> None:
    """Runs the measurement from the command line."""
    given = parser(__doc__, pairs=15).parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment.describe(),
        "layer": f"hidden {HIDDEN}, {HEADS} heads, {TOKENS} tokens, float32, CPU",
        "pairs": given.pairs,
        "redirection": {name: redirection_cost(make(), given.pairs) for name, make in LAYERS.items()},
    }
    if torch.cuda.is_available():
        device = torch.device("cuda")
        result["peak_tflops"] = matmul_peak(device)
        result["kernels"] = {name: kernels(shape, result["peak_tflops"], device) for name, shape in SHAPES.items()}
    write("attention", result)
    print(json.dumps(result, indent=1))


Layer = tuple[nn.Module, Callable[[], Any]]


def _dispatched() -> Layer:
    """A layer of Wan, which goes through diffusers' dispatcher."""
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    layer = WanAttention(dim=HIDDEN, heads=HEADS, dim_head=HIDDEN // HEADS, processor=WanAttnProcessor()).eval()
    hidden = torch.randn(1, TOKENS, HIDDEN)
    return layer, lambda: layer(hidden)


def _direct() -> Layer:
    """A layer whose processor calls PyTorch's function itself, as those of SD3 do."""
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    layer = Attention(
        query_dim=HIDDEN, heads=HEADS, dim_head=HIDDEN // HEADS, processor=JointAttnProcessor2_0(), bias=True
    ).eval()
    hidden = torch.randn(1, TOKENS, HIDDEN)
    return layer, lambda: layer(hidden)


LAYERS: dict[str, Callable[[], Layer]] = {"on the dispatcher (Wan)": _dispatched, "off it (SD3)": _direct}


def redirection_cost(made: Layer, pairs: int) -> dict[str, dict[str, float]]:
    """Microseconds that a call takes more than the layer as it is, median and quartiles of paired rounds."""
    layer, call = made
    redirect = Redirect("transformer", find_backend("sdpa"), "error")
    site = next(iter(find_sites(layer)))
    processors: dict[str, Any] = {"processor": redirected(site, redirect, {}), "mode": site.processor}
    spent: dict[str, list[float]] = {name: [] for name in processors}
    plain: list[float] = []
    with torch.no_grad():
        for _ in range(pairs):
            base = _seconds(call)
            plain.append(base * 1e6)
            for name, processor in processors.items():
                layer.processor = processor
                spent[name].append((_seconds(call if name == "processor" else _scoped(call, redirect)) - base) * 1e6)
                layer.processor = site.processor
    return {name: quartiles(values) for name, values in {"layer, µs": plain, **_named(spent)}.items()}


def _named(spent: dict[str, list[float]]) -> dict[str, list[float]]:
    return {"redirected processor, µs more": spent["processor"], "TorchFunctionMode, µs more": spent["mode"]}


def _scoped(call: Callable[[], Any], redirect: Redirect) -> Callable[[], Any]:
    def run() -> Any:
        scope: Any = Scope(redirect)
        with scope:
            return call()

    return run


def _seconds(call: Callable[[], Any]) -> float:
    for _ in range(10):
        call()
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """TFLOP/s of a large matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right, left.device) / 1e9


def kernels(
    shape: tuple[int, int, int, int], peak: float, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Every backend at one shape."""
    batch, heads, tokens, size = shape
    sides: tuple[Tensor, Tensor, Tensor] = tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(3))  # type: ignore[assignment]
    more: dict[str, Any] = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    flops = 4 * batch * heads * tokens**2 * size
    rows = []
    for backend in all_backends().values():
        reason = backend.lacks() or backend.requirements.refuses(facts_of(sides[0], sides[1], None, 0.0, False, False))
        row: dict[str, Any] = {"backend": backend.name, "why_not": reason}
        if reason is None and not (backend.name == "math" and tokens > 8192):  # its scores would not fit
            try:
                kernel = backend.load()
                error = relative_error(kernel(*sides, **more), sides, more)
                milliseconds = median_ms(partial(kernel, *sides, **more), sides[0].device)
                tflops = flops / milliseconds / 1e9
                row |= {"ms": milliseconds, "tflops": tflops, "share_of_peak": tflops / peak, "error": error}
            except Exception as failure:  # what fails is a result as well
                row["why_not"] = f"{type(failure).__name__}: {str(failure)[:200]}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
