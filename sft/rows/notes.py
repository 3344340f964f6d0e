"""What would come in unseen while files are read: columns, files and keys that nothing reads. Named, never refused."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
    """What is noticed while records are read."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str | None], Note] = {}
        self._read = set[str]()
        self._filled = Counter[str]()
        self._first: dict[str, str] = {}

    def add(self, what: str, where: str, column: str | None = None) -> None:
        """Note something at a place; of a column, it counts where the template does not read it."""
        before = self._found.get((what, column), Note(what, 0, where))
        self._found[what, column] = before._replace(number=before.number + 1)

    def watched(self, where: str, record: Mapping[str, Any]) -> "WatchedRecord":
        """The same record; which of its columns are asked for is noted, and which are filled."""
        for column, value in record.items():
            if value is not None and value != "" and value != [] and value != {}:
                self._filled[column] += 1
                self._first.setdefault(column, where)
            if value is False and column in VERDICTS:
                self.add(f"{BAD}: `{column}`", where, column)
        return self.watching(record)

    def watching(self, row: Mapping[str, Any]) -> "WatchedRecord":
        """The same row; which of its columns are asked for is noted."""
        return row if isinstance(row, WatchedRecord) else WatchedRecord(row, self._read)

    def all(self, columns: Mapping[str, str]) -> list[Note]:
        """What was noticed. `columns` are those that stand under the name of a field too."""
        read = self._read | {column for field, column in columns.items() if field in self._read}
        unread = [column for column in self._filled if column not in (read | columns.keys())]
        found = [
            Note(
                f"records with `{column}`, which the template does not read", self._filled[column], self._first[column]
            )
            for column in unread
        ]
        return found + [note for (_, column), note in self._found.items() if column not in read]


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
