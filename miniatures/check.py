"""How often a miniature shows what its caption asks: `python -m miniatures.check wan --samples 200 --record`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .checker import accuracy, read
from .checkpoint import read_card, write_card
from .pipelines import call_kwargs, captions, load_miniature, to_frames
from .specs import DRAWN, spec_of
from .world import World


def sample(
    pipe: Any,
    name: str,
    wanted: list[str],
    *,
    steps: int,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 20,
) -> npt.NDArray[np.float32]:
    """Samples of the given captions, `[B, F, 16, 16, 3]` in [0, 1]."""
    parts = []
    for start in range(0, len(wanted), batch):
        given = call_kwargs(name, wanted[start : start + batch], seed=seed + start, steps=steps, guidance=guidance)
        parts.append(to_frames(name, pipe(**given)))
    return np.concatenate(parts)


def renders(world: World, count: int, seed: int) -> tuple[list[str], npt.NDArray[np.float32]]:
    """True scenes of the world and their captions: what the checker itself is checked on."""
    generator = torch.Generator().manual_seed(seed)
    choices = world.choose(count, generator)
    scenes = world.render(choices, generator)
    frames: npt.NDArray[np.float32] = (scenes.permute(0, 2, 3, 4, 1) / 2 + 0.5).numpy()
    return [world.caption(choice) for choice in choices], frames


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=DRAWN)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale; usual one if left out")
    parser.add_argument("--scheduler", default="euler")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write the result into the checkpoint's JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    spec = spec_of(chosen.name)
    truth, frames = renders(spec.drawn, 1000, chosen.seed)
    on_truth = accuracy(spec.drawn, truth, read(spec.drawn, frames))
    wanted = captions(chosen.name, chosen.samples, chosen.seed)
    pipe = load_miniature(chosen.name, scheduler=chosen.scheduler)
    guidance = spec.guidance if chosen.guidance is None else chosen.guidance
    seen = read(spec.drawn, sample(pipe, chosen.name, wanted, steps=chosen.steps, guidance=guidance, seed=chosen.seed))
    shares = accuracy(spec.drawn, wanted, seen)
    print(f"{chosen.name}: {chosen.samples} samples, {chosen.steps} steps, {chosen.scheduler}, guidance {guidance:g}")
    for word, share in shares.items():
        print(f"  {word:7s} {share:7.1%}   (true scenes {on_truth[word]:.1%})")
    if chosen.record:
        card = read_card(chosen.name)
        card["check"] = {
            "samples": chosen.samples,
            "steps": chosen.steps,
            "scheduler": chosen.scheduler,
            "guidance": guidance,
            "seed": chosen.seed,
            "shows": shares,
            "checker_on_true_scenes": on_truth,
        }
        write_card(chosen.name, card)


if __name__ == "__main__":
    main()
