"""Which records are held out: never the same row on both sides, nor records that their template ties together."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_templates import Prompt, Row, Segment, Template, as_text
from sft import UserError
from sft.recipe.schema import Data
from sft.rows.notes import Notes
from sft.rows.read import Record, read
from sft.rows.template import TemplateFails, keys, read_sample, samples
from sft.rows.unusable import Unusable

GIVE_UP = 1000
"""Records after which reading stops where none of them can be used."""
TRAIN, TEST, REPEATED = range(3)
"""The side of a record: REPEATED is a training record that is left out, for being held out too."""


class Sample(NamedTuple):
    """A row as its template reads it."""

    record: int
    """Number of the record that it is of."""
    where: str
    row: Row
    prompt: Prompt
    segments: Sequence[Segment]
    text: str
    """The prompt as text."""
    output: str
    """The segments as one text."""


class Split:
    """Reads all records through their template, and then says on which side each stands."""

    def __init__(self, data: Data, template: Template) -> None:
        self._data, self._template, self._drawn = data, template, data.test is None
        self.notes = Notes(data.columns)
        """What was noticed while the records were read."""
        self._held: set[int] = set()
        self._sides = array("b")
        self._first = array("Q")  # of each record, the first key
        self._parent: dict[int, int] = {}  # of keys that share a record

    def samples(self) -> Iterator[Sample]:
        """The rows of all records, those of `data.test` first.

        Raises UserError about all that cannot be used, at the end, or where none of the first thousand can.
        """
        unusable, number = Unusable(), 0
        for number, (held, (where, read_record)) in enumerate(self._records(), 1):
            record = self.notes.watched(where, read_record)
            try:
                rows = samples(self._template, record, where)
                found = [self._sample(number - 1, where, self.notes.watching(row)) for row in rows]
                self._see(held, self._keys(where, record, found))
            except TemplateFails:
                raise
            except UserError as error:
                unusable.add(where, error, {*record, *self._template.fields})
            if not unusable.number:
                yield from found
            elif unusable.number == number == GIVE_UP:
                break
        unusable.refuse(self._data.train, number)

    def sides(self) -> NDArray[np.int8]:
        """The side of each record. Where nothing is named to be held out, records that share a key, or a prompt, go
        together, and the draw follows from the content and `data.seed`, not from the order of the file."""
        if not self._drawn:
            return np.array(self._sides, dtype=np.int8)
        first = [self._root(key) for key in self._first] if self._parent else self._first
        groups = np.array(first, dtype=np.uint64)
        unique, sizes = np.unique(groups, return_counts=True)
        if len(unique) < 2:
            raise UserError(
                f"{self._data.train}: "
                + (
                    "its one record cannot"
                    if len(groups) == 1
                    else f"all {len(groups)} records share a prompt or key, so none can"
                )
                + " be held out; add others, or name a file in `data.test`"
            )
        order = np.random.default_rng(self._data.seed).permutation(len(unique))
        wanted = max(1, round(len(groups) * self._data.test_fraction))
        enough = int(np.searchsorted(sizes[order].cumsum(), wanted)) + 1
        side = np.full(len(unique), TRAIN, dtype=np.int8)
        side[order[: min(enough, len(unique) - 1)]] = TEST
        return side[np.searchsorted(unique, groups)]

    def _records(self) -> Iterator[tuple[bool, Record]]:
        """All records, each with whether it stands in `data.test`."""
        if self._data.test is not None:
            yield from ((True, place) for place in read(self._data, "test", self.notes))
        yield from ((False, place) for place in read(self._data, "train", self.notes))

    def _sample(self, number: int, where: str, row: Row) -> Sample:
        prompt, segments = read_sample(self._template, row, where)
        output = "".join([segment.text for segment in segments])
        return Sample(number, where, row, prompt, segments, as_text(prompt), output)

    def _keys(self, where: str, record: Row, found: Sequence[Sample]) -> list[int]:
        """What a record shares with others, hashed: its template's keys, its prompts, or its whole samples."""
        texts = keys(self._template, record, where)
        if not texts:
            for sample in found:
                output = "\0".join([segment.text for segment in sample.segments])
                by_prompt = self._drawn and sample.text.strip()
                texts.append(sample.text if by_prompt else f"{sample.text}\0{output}")
        return [hashed(text) for text in texts or [where]]

    def _see(self, held: bool, keys: Sequence[int]) -> None:
        """The keys of the next record."""
        if self._drawn:
            one, *others = keys
            for other in others:
                if self._root(other) != self._root(one):
                    self._parent[self._root(other)] = self._root(one)
            self._first.append(one)
        elif held:
            self._held.update(keys)
            self._sides.append(TEST)
        else:
            self._sides.append(TRAIN if self._held.isdisjoint(keys) else REPEATED)

    def _root(self, key: int) -> int:
        while key in self._parent:
            key = self._parent[key]
        return key


def hashed(text: str) -> int:
    """64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
