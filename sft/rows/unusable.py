"""Rows that cannot be used: all rows are tried first; what is wrong is reported at once, by kind, with its places."""

import re
from collections.abc import Collection, Iterable, Sequence

from data_templates import Template, no_problems
from sft import UserError
from sft.recipe import Recipe
from sft.rows.read import read
from sft.rows.template import call, samples

LISTED = 10
"""Places that are named of each kind."""
VALUES = re.compile(r"`([^`]*)`|'[^']*'|\"[^\"]*\"|\d+")
"""What differs between messages of one kind, unless it is the name of a column."""


def refuse_unusable(recipe: Recipe, template: Template) -> None:
    """Raise UserError where the template finds something wrong with a row, or where a class is asked for and is not
    there."""
    label = template.label if recipe.task == "classification" else None
    if template.problems is no_problems and label is None:
        return
    found: dict[str, list[str]] = {}
    places, rows = set[str](), 0
    for side in ("train", "test") if recipe.data.test else ("train",):
        for where, record in read(recipe.data, side):
            for row in samples(template, record, where):
                rows += 1
                problems = call(lambda row: list(template.problems(row)), row, where)
                problems += _of_label(call(label, row, where)) if label is not None else []
                for kind, what in problems:
                    found.setdefault(kind, []).append(f"{where} ({what})" if what else where)
                    places.add(where)
    if not found:
        return
    if len(places) == 1:
        (place,) = places
        kinds = ", ".join(f"{kind}{found[kind][0].removeprefix(place)}" for kind in found)
        raise UserError(f"{place}: this row cannot be used: {kinds}; mend it or take it out")
    worded = [(f"with {kind}", some) for kind, some in found.items()]
    raise UserError(_by_kind(f"{recipe.data.train}: {len(places):,} of {rows:,} rows", worded))


class Unusable:
    """Records whose rows cannot be read: their errors, by kind. Those that differ in values and numbers are of one."""

    def __init__(self) -> None:
        self.first: UserError | None = None
        self.number = 0
        self._kinds: dict[str, tuple[str, list[str]]] = {}  # its first message, and all its places

    def add(self, where: str, error: UserError, columns: Collection[str]) -> None:
        """An error about one record, which has these columns."""
        self.first, self.number = self.first or error, self.number + 1
        said = str(error).removeprefix(f"{where}: ")
        kind = VALUES.sub(lambda found: found[0] if found[1] in columns else "", said)
        self._kinds.setdefault(kind, (said, []))[1].append(where)

    def refuse(self, source: str, records: int) -> None:
        """Raise UserError where a record could not be read: its own message, or that about all by kind."""
        if self.first is None:
            return
        if self.number == 1:
            raise self.first
        kinds = [(f"where {said}", places) for said, places in self._kinds.values()]
        raise UserError(_by_kind(f"{source}: {self.number:,} of {records:,} records", kinds)) from self.first


def _by_kind(which: str, found: Iterable[tuple[str, Sequence[str]]]) -> str:
    lines = [f"{which} cannot be used; mend them or take them out"]
    for kind, places in found:
        more = f" and {len(places) - LISTED:,} more" if len(places) > LISTED else ""
        lines.append(f"  {len(places):,} {kind}: {', '.join(places[:LISTED])}{more}")
    return "\n".join(lines)


def _of_label(label: object) -> list[tuple[str, str]]:
    if label is None or (isinstance(label, str) and not label.strip()):
        return [("a missing label", "")]
    right = isinstance(label, int | str) and not isinstance(label, bool)
    return [] if right else [("a label that is neither a whole number nor a text", str(label))]
