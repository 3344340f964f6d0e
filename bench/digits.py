"""What the digits of recipes/tiny_gpt_digits.yaml allow: how well their tokens are predicted without a network.

    python bench/digits.py

Neighbouring patches overlap, so most of a token is known from those before it; what is new are its unseen pixels. Two
models know the overlap: one tosses a coin for each unseen pixel, one goes by how often that pixel is ink in training.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.recipe import load
from sft.rows.read import load_python
from sft.show import table
from sft.tokens.opened import Opened

SIZE = 8


def main() -> None:
    """Print perplexity, accuracy and bits a picture of both models, on the recipe's held-out rows."""
    recipe = load("recipes/tiny_gpt_digits.yaml")
    tokens = Opened(recipe).tokens
    digits = load_python(Path(recipe.data.train))
    train, test = (
        np.array([digits.picture(row["input_ids"][1:-1]) for row in rows]) for rows in (tokens.train, tokens.test)
    )
    often = (train.sum(0) + 0.5) / (len(train) + 1)
    lines = [
        [name, *predicted(test, ink)] for name, ink in (("a coin", np.full_like(often, 0.5)), ("each pixel", often))
    ]
    print(table(["predicted by", "perplexity", "tokens right", "bits a picture"], lines))


def predicted(pictures: NDArray[np.bool_], ink: NDArray[np.float64]) -> list[str]:
    """Scores of pictures [n, 8, 8] where each pixel is ink with its own probability, as texts."""
    bits = -np.log2(np.where(pictures, ink, 1 - ink)).sum((1, 2)).mean()
    chance = np.maximum(ink, 1 - ink) if (ink == 0.5).all() else np.where(pictures, ink > 0.5, ink <= 0.5)
    right = [np.broadcast_to(chance, pictures.shape)[:, new].prod(-1).mean() if new.any() else 1.0 for new in unseen()]
    count = SIZE * SIZE + 1  # with the end token, which is always predicted
    return [f"{2 ** (bits / count):.3f}", f"{(sum(right) + 1) / count:.1%}", f"{bits:.1f}"]


def unseen() -> list[NDArray[np.bool_]]:
    """Of each patch in raster order, the pixels [8, 8] that no patch before it has."""
    seen, found = np.zeros((SIZE, SIZE), dtype=bool), []
    for row in range(SIZE):
        for column in range(SIZE):
            patch = np.zeros_like(seen)
            patch[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
            found.append(patch & ~seen)
            seen |= patch
    return found


if __name__ == "__main__":
    main()
