"""What would come in unseen while files are read: columns, files and keys that nothing reads. Named, never refused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data_templates import Row

TWICE = "records of JSON with a key that stands twice in an object, of which the last counts"
UNREAD_FILES = "files of the folder that are not read"
OTHER_SPLIT = "files that are read as training rows, though their names say that they are for testing"
BAD = "records that say of themselves that they are bad, in a column that the template does not read"
VERDICTS = ("label", "accepted", "correct", "is_correct", "passed", "desirable")
"""Columns whose `false` says that the answer of the record is a bad one, as in unpaired preference data."""


class Note(NamedTuple):
    """What was found, in how many records or files, and the first of them."""

    what: str
    number: int
    first: str


class Notes:
    """What is noticed while records are read. Only columns that nothing was seen to read yet cost time."""

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        """`columns` are those that stand under the name of a field too: field -> column."""
        self._fields = {column: field for field, column in (columns or {}).items()}
        self._found: dict[tuple[str, str | None], Note] = {}
        self._read = set[str]()
        self._filled = dict[str, Note]()

    def add(self, what: str, where: str, column: str | None = None) -> None:
        """Note something at a place; of a column, it counts where the template does not read it."""
        before = self._found.get((what, column), Note(what, 0, where))
        self._found[what, column] = before._replace(number=before.number + 1)

    def watched(self, where: str, record: Row) -> Row:
        """The same record; which of its columns are asked for is noted, and which of the others are filled."""
        for column in self._unread(record):
            value = record[column]
            if value is not None and value != "" and value != [] and value != {}:
                what = f"records with `{column}`, which the template does not read"
                before = self._filled.get(column, Note(what, 0, where))
                self._filled[column] = before._replace(number=before.number + 1)
            if value is False and column in VERDICTS:
                self.add(f"{BAD}: `{column}`", where, column)
        return self.watching(record)

    def watching(self, row: Row) -> Row:
        """The same row; which of its columns are asked for is noted."""
        return WatchedRecord(row, self._read) if not isinstance(row, WatchedRecord) and self._unread(row) else row

    def all(self) -> list[Note]:
        """What was noticed."""
        unread = self._unread(self._filled)
        found = [note for column, note in self._filled.items() if column in unread]
        told = [note for (_, column), note in self._found.items() if column is None or self._unread([column])]
        return found + told

    def _unread(self, columns: Iterable[str]) -> list[str]:
        """Those that nothing was seen to read, under their own name or that of their field."""
        of = self._fields
        return [c for c in columns if c not in self._read and of.get(c) not in self._read and c not in of.values()]


class WatchedRecord(dict[str, Any]):
    """A record that notes which columns are asked for: all of them where it is copied or walked through."""

    def __init__(self, record: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(record)
        self._read = read

    def __getitem__(self, column: str) -> Any:
        self._read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self._read.add(column)
        return super().get(column, default)

    def __iter__(self) -> Iterator[str]:
        self._read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self._read.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self._read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._read.update(super().keys())
        return super().values()
