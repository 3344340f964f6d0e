"""Handwritten digits as sequences of tokens, from the 1,797 pictures of 8 x 8 that scikit-learn carries (UCI ML, 1998).

A token is a patch of 3 x 3 pixels, ink or paper: 2^9 patches, named by their pixels (`000010000`), and four special
tokens make the 516 entries of digits.vocab.json. A picture is the 64 patches around its pixels in raster order, so that
the centres give it back. A patch shares six pixels with the one before it and six with the one above: mostly one pixel
of it is new. `python recipes/data/digits.py` prints the vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
INK = 8
"""Grey values go from 0 to 16; from here on a pixel is ink."""


def vocabulary() -> dict[str, int]:
    """Token -> id: the special tokens, then every patch by its nine pixels read as a binary number."""
    return {token: i for i, token in enumerate((*SPECIAL, *(f"{patch:09b}" for patch in range(2**9))))}


def ids(ink: NDArray[np.bool_]) -> list[int]:
    """The tokens of a picture [height, width], one a pixel; beyond its edge is paper."""
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(ink, 1), (3, 3)).reshape(-1, 9)
    return [len(SPECIAL) + int(patch) for patch in patches @ (1 << np.arange(9)[::-1])]


def picture(tokens: Sequence[int], width: int = 8) -> NDArray[np.bool_]:
    """The picture [height, width] that `ids` made the tokens of: their centres."""
    return np.array([(token - len(SPECIAL)) >> 4 & 1 for token in tokens], dtype=bool).reshape(-1, width)


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Every picture as {"sequence": [64 ids], "label": 0 to 9}. There is no `test`: the recipe holds rows out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for image, label in zip(digits.images, digits.target, strict=True):
        yield {"sequence": ids(image >= INK), "label": int(label)}


if __name__ == "__main__":
    print(json.dumps(vocabulary(), indent=0))
