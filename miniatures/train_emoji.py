"""Trains the emoji miniature: `python -m miniatures.train_emoji --seconds 180 --device cuda`.

Flow matching as for the drawn ones (`train.py`), on given pictures: 2,557 of Noto Emoji at 64 x 64 pixels
(https://github.com/googlefonts/noto-emoji, Apache-2.0), as JPEG in `emoji/pictures.npz`. It is for a GPU: three minutes
there are some days on a core. A run is as long as it is told; the learning rate follows a cosine over that time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from .captioned import FOLDER, TOKENS
from .checkpoint import in_eight_bits
from .latents import pack
from .specs import Spec, spec_of
from .train import noise_levels

PICTURES = FOLDER / "pictures.npz"

_RATE, _WARM_UP, _AVERAGE = 1e-3, 300, 0.9995
_NO_CAPTION, _NO_WORD = 0.15, 0.1
_BRIGHTNESS = 0.1  # half of the pictures are made darker or lighter by up to this share
_ZEROED = ("img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out")  # so that every block starts as the identity


def pictures(path: Path = PICTURES) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures `[N, 3, 64, 64]` in [-1, 1], and the rows `[N, 8]` of their captions' words."""
    with np.load(path) as kept:
        blob, ends, rows = kept["blob"], kept["off"], kept["cap"]
    read = [
        np.asarray(Image.open(io.BytesIO(blob[ends[index] : ends[index + 1]].tobytes()))) for index in range(len(rows))
    ]
    data = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return data, torch.from_numpy(rows.astype(np.int64))


class Learner(nn.Module):
    """The transformer and its word vectors; the table's last row is the empty caption's word."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer: nn.Module = getattr(diffusers, spec.transformer)(**spec.config)
        self.words = nn.Embedding(len(spec.world.words) + 2, int(spec.config["joint_attention_dim"]))
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(_ZEROED):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def loss(self, data: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean square error of the velocity for pictures `[B, 3, 64, 64]` and captions `[B, 8]`."""
        device, batch, last = data.device, len(data), self.words.num_embeddings - 1
        change = 1 + (torch.rand(batch, 1, 1, 1, device=device) * 2 - 1) * _BRIGHTNESS
        changed = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, change, torch.ones_like(change))
        packed = pack(((data + 1) * changed - 1).clamp(-1, 1).unsqueeze(2), self.spec.patch)
        gone = (torch.rand(batch, TOKENS, device=device) < _NO_WORD) | (
            torch.rand(batch, 1, device=device) < _NO_CAPTION
        )
        sigma = noise_levels(batch, torch.Generator().manual_seed(int(torch.randint(2**31, ())))).to(device)
        level, noise = sigma.view(-1, 1, 1), torch.randn_like(packed)
        side = data.shape[-1] // self.spec.patch
        with torch.autocast(device.type, torch.bfloat16):
            predicted: torch.Tensor = self.transformer(
                hidden_states=(1 - level) * packed + level * noise,
                timestep=sigma,
                encoder_hidden_states=self.words(rows.masked_fill(gone, last)),
                img_shapes=[[(1, side, side)]] * batch,
                return_dict=False,
            )[0]
        off: torch.Tensor = (predicted.float() - (noise - packed)).square().mean()
        return off


def train(seconds: float, batch: int, device: str, most: int | None = None) -> tuple[dict[str, torch.Tensor], Any]:
    """Trains for some time.

    Args:
        seconds: How long.
        batch: Pictures a step.
        device: Such as "cuda".
        most: Most steps, for a trial.

    Returns:
        The averaged weights, and facts of the run.
    """
    torch.manual_seed(0)
    data, rows = (each.to(device) for each in pictures())
    learner = Learner(spec_of("emoji")).to(device).train()
    parameters = dict(learner.named_parameters())
    average = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    begin, step, loss = time.perf_counter(), 0, torch.zeros(())
    while (share := (time.perf_counter() - begin) / seconds) < 1 and (most is None or step < most):
        rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(data), (batch,), device=device)
        loss = learner.loss(data[chosen], rows[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(_AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in parameters.items():
                average[name].lerp_(value, 1 - keep)
        step += 1
    facts = {
        "steps": step,
        "batch": batch,
        "samples": step * batch,
        "seconds": round(time.perf_counter() - begin),
        "loss": round(float(loss.detach()), 5),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "pictures": f"Noto Emoji, {len(data):,} at 64 x 64, Apache-2.0",
        "bits": 8,
    }
    return {name: value.cpu() for name, value in average.items()}, facts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=None, help="stop after as many steps")
    parser.add_argument("--out", type=Path, default=Path("out/miniatures"))
    given = parser.parse_args()
    weights, facts = train(given.seconds, given.batch, given.device, given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    save_file(in_eight_bits(weights), given.out / "emoji.safetensors", metadata={"format": "pt"})
    (given.out / "emoji.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
