"""Which records are held out: never the same row on both sides, nor records that their template ties together."""

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_templates import Template, as_text
from sft import UserError
from sft.recipe import Recipe
from sft.rows import Record, read
from sft.template import keys, read_sample, samples


class Split:
    """The two sides of a recipe's data. `repeated` counts the training records left out for being held out too."""

    def __init__(self, recipe: Recipe, template: Template) -> None:
        self._data, self._template, self.repeated = recipe.data, template, 0
        self._held_keys: set[int] = set()
        self._held_records: Any = None
        if recipe.data.test is None:
            self._held_records = self._draw()
        else:
            for where, record in read(recipe.data, "test"):
                self._held_keys.update(self._keys(record, where))

    def records(self) -> Iterator[tuple[str, Record]]:
        """Every record with its side, `test` or `train`, in the order of the files."""
        if self._held_records is not None:
            for held, place in zip(self._held_records, read(self._data, "train"), strict=True):
                yield "test" if held else "train", place
            return
        yield from (("test", place) for place in read(self._data, "test"))
        for where, record in read(self._data, "train"):
            if self._held_keys.isdisjoint(self._keys(record, where)):
                yield "train", (where, record)
            else:
                self.repeated += 1

    def _draw(self) -> Any:
        """Which records to hold out, a flag each. Records that share a key, or a prompt, go together; the draw follows
        from the content and `data.seed`, not from the order of the file."""
        parent: dict[int, int] = {}

        def root(key: int) -> int:
            while key in parent:
                key = parent[key]
            return key

        first = array("Q")
        for where, record in read(self._data, "train"):
            one, *others = self._keys(record, where, by_prompt=True)
            for other in others:
                if root(other) != root(one):
                    parent[root(other)] = root(one)
            first.append(one)
        groups = np.array([root(key) for key in first] if parent else first, dtype=np.uint64)
        unique, sizes = np.unique(groups, return_counts=True)
        if len(unique) < 2:
            raise UserError(
                f"{self._data.train}: its {len(groups)} records belong together, so none can be held out; "
                "add rows, or name a file in `data.test`"
            )
        order = np.random.default_rng(self._data.seed).permutation(len(unique))
        wanted = max(1, round(len(groups) * self._data.test_fraction))
        enough = int(np.searchsorted(sizes[order].cumsum(), wanted)) + 1
        return np.isin(groups, unique[order[: min(enough, len(unique) - 1)]])

    def _keys(self, record: dict[str, Any], where: str, by_prompt: bool = False) -> list[int]:
        """What a record shares with others, hashed: its template's keys, its prompts, or its whole samples."""
        texts = keys(self._template, record, where)
        if not texts:
            for row in samples(self._template, record, where):
                prompt, segments = read_sample(self._template, row, where)
                prompt = as_text(prompt)
                output = "\0".join(segment.text for segment in segments)
                texts.append(prompt if by_prompt and prompt.strip() else f"{prompt}\0{output}")
        return [hashed(text) for text in texts or [where]]


def hashed(text: str) -> int:
    """64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
