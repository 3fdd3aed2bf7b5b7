"""A world of captioned pictures that are given, not drawn: emoji.

Its captions are names such as "animals cat face", of up to eight words, one token a word; a token that is not used has
a row of its own. The pictures are those of Noto Emoji (https://github.com/googlefonts/noto-emoji, Apache-2.0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent / "emoji"
TOKENS = 8
"""Words of the longest caption."""


@dataclass(frozen=True)
class Captioned:
    """The captions of a set of pictures.

    Attributes:
        folder: with `words.json`: `vocab`, all words, and `names`, the words of each picture's caption.
        frames: frames of a sample, 1 for pictures.
        side: width and height in pixels.
    """

    folder: Path
    frames: int = 1
    side: int = 64

    @cached_property
    def _lists(self) -> dict[str, list[str] | list[list[str]]]:
        found: dict[str, list[str] | list[list[str]]] = json.loads((self.folder / "words.json").read_text())
        return found

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All words, in the order of the rows of an embedding table.

        Two more rows follow: that of a token that is not used, and the last one, the empty caption's.
        """
        return tuple(str(word) for word in self._lists["vocab"])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The captions of all pictures, in their order; some pictures share one."""
        return tuple(" ".join(words) for words in self._lists["names"])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def caption(self, choice: torch.Tensor) -> str:
        """The caption of `[8]` rows of the embedding table."""
        return " ".join(self.words[int(index)] for index in choice if int(index) < len(self.words))

    def parse(self, caption: str) -> torch.Tensor:
        """The rows `[8]` of a caption's words.

        Raises:
            ValueError: no words or too many, or a word that this world does not have.
        """
        words = caption.split()
        if not 0 < len(words) <= TOKENS:
            raise ValueError(f"caption {caption!r} has {len(words)} words, expected 1 to {TOKENS}")
        for word in words:
            if word not in self._index:
                raise ValueError(f"unknown word {word!r} in caption {caption!r}; known ones are in {self.folder.name}")
        rows = [self._index[word] for word in words] + [len(self.words)] * (TOKENS - len(words))
        return torch.tensor(rows)

    def rows(self, choices: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table for choices `[B, 8]`: the choices themselves."""
        return choices

    def choose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """The captions of random pictures, `[count, 8]`."""
        indices = torch.randint(len(self.names), (count,), generator=generator)
        return torch.stack([self.parse(self.names[int(index)]) for index in indices])


EMOJI = Captioned(FOLDER)
