"""Measures later calls of a run with their text's keys and values computed again and, by `apply_lossless`, kept.

    python -m benchmarks.constants [--pairs 3] [--only ltx2 sana]

Blocks of LTX-2.0, Sana and Wan at true width and text length, with random weights and a small picture, on one thread of
a CPU. Both sides run in turn, each as a loop of two calls of which the second is timed, and both cut padding alike.
Since with one block what lies outside of them weighs more than it does, a call as deep as the released model is
computed from the times of blocks. What share of a call that is at the released model's usual size, and what a run then
holds, is the library's own estimate. Writes `benchmarks/results/constants.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from sgl_diffusion_accel import apply_lossless, branch, denoising_steps, environment
from sgl_diffusion_accel.lossless.constants.constant_table import ONCE_A_RUN
from sgl_diffusion_accel.lossless.constants.worth import Worth

from .call_parts import block_seconds
from .gpu.models import Place
from .gpu.padded import Blocks, BuiltPadded, Grid, Padded, Text, build_padded
from .gpu.timing import relative_difference
from .turns import RESULTS, be_quiet, parser, quartiles, take_turns, write

AGAIN, KEPT = "computed again", "kept"
_STEPS = (900.0, 500.0)


@dataclass(frozen=True)
class Row:
    """A model, and whether its padding is cut, on both sides.

    Attributes:
        model: Which one.
        padding: Whether.
    """

    model: Padded
    padding: bool


@dataclass(frozen=True)
class Seen:
    """The second call of a loop.

    Attributes:
        cpu: Seconds of the thread.
        released: The same in a call as deep as the released model.
        output: What it gave.
        spared: Layers and parts that were not computed.
        held: Bytes that were kept.
    """

    cpu: float
    released: float
    output: Tensor
    spared: int
    held: int


def main() -> None:
    """Runs the measurement from the command line."""
    command = parser(__doc__, pairs=3)
    command.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    given = command.parse_args()
    be_quiet()
    path, place = RESULTS / "constants.json", Place(torch.device("cpu"), torch.float32)
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    result |= {"environment": environment.describe(place.device), "dtype": "float32"}
    for name in given.only:
        row = measure(ROWS[name], place, given.pairs)
        rows = {**result["rows"], name: row}
        result["rows"] = {known: rows[known] for known in ROWS if known in rows}
        write("constants", result)
        print(f"{row['title']}: {row['times']['cpu']['median']:.3f} times as fast, {row['relative_difference']:.1e}")


def measure(row: Row, place: Place, pairs: int) -> dict[str, Any]:
    """One model with keys and values computed in each call, and kept.

    Args:
        row: Which one.
        place: Where.
        pairs: Rounds of both sides.
    """
    built = build_padded(row.model, place, row.model.small)
    sides = {AGAIN: partial(_second_call, built, row, False), KEPT: partial(_second_call, built, row, True)}
    seen = take_turns(sides, pairs)
    both = list(zip(seen[AGAIN], seen[KEPT], strict=True))
    valid = built.texts[0][1] if row.padding else built.texts[0][0]
    return {
        "title": row.model.title,
        "transformer": row.model.transformer,
        "padding": row.padding,
        "pairs": pairs,
        "blocks": {each.path: [built.depths[each.path], each.released] for each in row.model.lists},
        "picture_tokens": built.pixels,
        "text_tokens": valid,
        "cpu_s": {side: quartiles(each.cpu for each in seen[side]) for side in sides},
        "released_s": {side: quartiles(each.released for each in seen[side]) for side in sides},
        "times": {
            "cpu": quartiles(again.cpu / kept.cpu for again, kept in both),
            "released": quartiles(again.released / kept.released for again, kept in both),
        },
        "spared": seen[KEPT][-1].spared,
        "held_mib": seen[KEPT][-1].held / 2**20,
        "relative_difference": relative_difference(seen[KEPT][-1].output, seen[AGAIN][-1].output),
        "at_usual_size": _at_usual_size(row, row.model.texts[0][int(row.padding)]),
    }


def _second_call(built: BuiltPadded, row: Row, constants: bool) -> Seen:
    given = {name: value for name, value in built.given.items() if name != "timestep"}
    with apply_lossless(built.transformer, padding=row.padding, constants=constants) as patch, torch.no_grad():
        for timestep in denoising_steps(torch.tensor(_STEPS)):
            with branch("cond"), block_seconds(built.transformer, list(built.depths)) as spent:
                cpu = time.thread_time()
                output = built.transformer(**given, timestep=timestep[None], return_dict=False)[0]
                cpu = time.thread_time() - cpu
            held = patch.held_bytes()
        spared = sum(patch.stats.spared.values())
    missing = sum(spent[each.path] * (each.released / built.depths[each.path] - 1) for each in row.model.lists)
    return Seen(cpu, cpu + missing, output, spared, held)


def _at_usual_size(row: Row, text: int) -> dict[str, Any]:
    """The library's estimates of the released model, in bfloat16."""
    model = row.model
    place = Place(torch.device("meta"), torch.bfloat16)
    with torch.device("meta"):
        transformer: Any = getattr(diffusers, model.transformer)(**model.config).to(torch.bfloat16)
    constants = ONCE_A_RUN[model.transformer]
    worth = Worth(transformer, constants)
    given = model.call(_OnMeta(place.device, place.dtype), transformer.config, model.grid, model.texts)
    texts = {each.part: text for each in constants.parts}
    last = [each for each in constants.parts if each.layers]
    held = sum(worth.nbytes(each.part, torch.empty(1, text, 1, device="meta", dtype=torch.bfloat16)) for each in last)
    return {
        "size": model.size,
        "picture_tokens": model.pixels(model.grid),
        "share": worth.share(texts, given),
        "held_mib": held / 2**20,
        "weights_mib": sum(each.nbytes for each in transformer.parameters()) / 2**20,
    }


class _OnMeta(Place):
    """Where tensors have shapes and no numbers."""

    def draw(self, *shape: int) -> Tensor:
        """Of this shape."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)


def _ltx2(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    """All tokens of the text count: the pads are filled with registers."""
    frames, rows, columns = grid
    text = place.draw(1, texts[0][0], config.caption_channels)
    seconds = ((frames - 1) * 8 + 1) / 24
    sound = max(round(seconds * 25), 2)
    return {
        "hidden_states": place.draw(1, frames * rows * columns, config.in_channels),
        "audio_hidden_states": place.draw(1, sound, config.audio_in_channels),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text.clone(),
        "timestep": torch.tensor([500.0], device=place.device),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "audio_num_frames": sound,
    }


def _sana(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    ((fed, valid),) = texts
    return {
        "hidden_states": place.draw(1, config.in_channels, *grid),
        "encoder_hidden_states": place.draw(1, fed, config.caption_channels),
        "encoder_attention_mask": (torch.arange(fed, device=place.device) < valid).long()[None],
        "timestep": torch.tensor([500.0], device=place.device),
    }


def _wan(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    """All tokens of the text count: the model has no mask."""
    return {
        "hidden_states": place.draw(1, config.in_channels, *grid),
        "encoder_hidden_states": place.draw(1, texts[0][0], config.text_dim),
        "timestep": torch.tensor([500.0], device=place.device),
    }


_HEADS: Mapping[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
_LTX2 = Padded(
    title="LTX-2.0",
    transformer="LTX2VideoTransformer3DModel",
    lists=(Blocks("transformer_blocks", "num_layers", 48, 1),),
    texts=((1024, 1024),),
    grid=(16, 16, 24),
    size="512×768, 121 frames",
    small=(2, 16, 24),
    call=_ltx2,
    tiny={
        **_HEADS,
        "cross_attention_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "caption_channels": 24,
    },
    config={},
)
_SANA = Padded(
    title="Sana 1.6B",
    transformer="SanaTransformer2DModel",
    lists=(Blocks("transformer_blocks", "num_layers", 20, 1),),
    texts=((300, 60),),
    grid=(32, 32),
    size="1024²",
    small=(32, 32),
    call=_sana,
    tiny={
        **_HEADS,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "in_channels": 4,
        "caption_channels": 24,
    },
    config={},
)
_WAN = Padded(
    title="Wan 1.3B",
    transformer="WanTransformer3DModel",
    lists=(Blocks("blocks", "num_layers", 30, 1),),
    texts=((512, 512),),
    grid=(1, 60, 104),
    size="480×832, one frame",
    small=(1, 60, 104),
    call=_wan,
    tiny={**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64},
    config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    patch=2,
)

ROWS: dict[str, Row] = {
    "ltx2": Row(_LTX2, padding=True),
    "sana": Row(_SANA, padding=False),
    "sana_cut": Row(_SANA, padding=True),
    "wan": Row(_WAN, padding=True),
}
"""By name."""


if __name__ == "__main__":
    main()
