"""Trains a miniature on one processor core: `python -m miniatures.train wan`.

Flow matching on the procedural world: at noise level sigma the transformer sees (1 - sigma) data + sigma noise and
predicts noise - data. A run that was interrupted goes on where its last saved state stands.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from .checkpoint import Fact, export
from .forward import soft_start, velocity
from .latents import pack
from .specs import DRAWN, TEXT_DIM, Spec, spec_of

logger = logging.getLogger(__name__)

STATE_FOLDER = Path(__file__).resolve().parent.parent / "out" / "miniatures"
"""Where states of unfinished runs are kept; not part of the repository."""


@dataclass(frozen=True)
class Recipe:
    """What decides a training run, besides the miniature's `Spec`."""

    steps: int = 2600
    batch: int = 16
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 80
    ema: float = 0.997
    clip: float = 1.0
    threads: int = 1


class Learner(nn.Module):
    """A transformer and the word vectors learned with it; the table's last row is the empty caption's word."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer: nn.Module = getattr(diffusers, spec.transformer)(**spec.config)
        self.words = nn.Embedding(len(spec.world.words) + 1, TEXT_DIM)
        soft_start(spec, self.transformer)

    def loss(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Flow-matching loss of a fresh batch: mean square error of the velocity."""
        world = self.spec.drawn
        choices = world.choose(batch, generator)
        data = world.render(choices, generator)
        data = pack(data) if self.spec.packed else data
        rows = world.rows(choices)
        dropped = torch.rand(batch, generator=generator) < self.spec.dropout
        rows[dropped] = len(world.words)
        sigma = noise_levels(batch, generator)
        noise = torch.randn(data.shape, generator=generator)
        level = sigma.view(-1, *[1] * (data.dim() - 1))
        noisy = (1 - level) * data + level * noise
        predicted = velocity(self.spec, self.transformer, noisy, sigma, self.words(rows))
        return (predicted - (noise - data)).square().mean()


def noise_levels(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels `[batch]`: logit-normal, leaning towards noise; one in five uniform, so that the ends are seen."""
    normal = torch.sigmoid(torch.randn(batch, generator=generator) * 1.1 + 0.3)
    uniform = torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.2, uniform, normal)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """A training run that can be saved and resumed."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.name, self.recipe = name, recipe
        self.learner = Learner(spec_of(name)).train()
        self.average = {key: value.detach().clone() for key, value in self.learner.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.plans: list[list[int]] = [[0, recipe.steps, recipe.batch]]
        self.path = STATE_FOLDER / f"{name}.pt"

    def advance(self) -> None:
        """One optimizer step."""
        began, step = time.perf_counter(), len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step)
        loss = self.learner.loss(self.recipe.batch, self.generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learner.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        keep = min(self.recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in self.learner.state_dict().items():
                self.average[key].lerp_(value, 1 - keep)
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - began

    def save(self) -> None:
        """Keeps the state, and exports the averaged weights as a checkpoint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "learner": self.learner.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "seconds": self.seconds,
            "plans": self.plans,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def resume(self) -> None:
        """Goes back to the kept state, if there is one; notes it when steps or batch planned have changed."""
        if not self.path.exists():
            return
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.plans = state["plans"]
        if self.plans[-1][1:] != [self.recipe.steps, self.recipe.batch]:
            self.plans.append([len(self.losses), self.recipe.steps, self.recipe.batch])
        logger.info("%s: going on at step %d", self.name, len(self.losses))

    def facts(self) -> dict[str, Fact]:
        """What a reader of the checkpoint should know about the run."""
        ends = [*(plan[0] for plan in self.plans[1:]), len(self.losses)]
        samples = sum((end - first) * batch for end, (first, _, batch) in zip(ends, self.plans, strict=True))
        return {
            **asdict(self.recipe),
            "samples_seen": samples,
            "steps_done": len(self.losses),
            "dropout": self.learner.spec.dropout,
            "plans": "; ".join(f"from step {a}: cosine to step {b}, batch {c}" for a, b, c in self.plans),
            "optimizer": "AdamW(betas=(0.9, 0.99), weight_decay=0.01), warm-up, cosine to 0",
            "minutes": round(self.seconds / 60, 1),
            "seconds_per_step": round(self.seconds / max(1, len(self.losses)), 3),
        }


def train(run: Run, out: Path, every: int) -> None:
    """Trains to the recipe's last step; saves and exports every `every` steps and at the end."""
    while len(run.losses) < run.recipe.steps:
        run.advance()
        step = len(run.losses)
        if step % 25 == 0:
            recent = sum(run.losses[-25:]) / 25
            logger.info("%s step %d loss %.4f, %.2f s a step", run.name, step, recent, run.seconds / step)
        if step % every == 0:
            run.save()
            export(run.name, run.average, run.facts(), run.losses, out)
    run.save()
    export(run.name, run.average, run.facts(), run.losses, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=DRAWN)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--every", type=int, default=250, help="steps between two exports")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "checkpoints")
    parser.add_argument("--fresh", action="store_true", help="do not go on from a kept state")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    recipe = Recipe(steps=chosen.steps, batch=chosen.batch, seed=chosen.seed, threads=chosen.threads)
    run = Run(chosen.name, recipe)
    if not chosen.fresh:
        run.resume()
    train(run, chosen.out, chosen.every)


if __name__ == "__main__":
    main()
