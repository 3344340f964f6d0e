"""Rows that cannot be used: all rows are tried first; what is wrong is reported at once, by kind, with its places."""

from data_templates import Template, no_problems
from sft import UserError
from sft.recipe import Recipe
from sft.rows.read import read
from sft.rows.template import call, samples

LISTED = 10
"""Places that are named of each kind."""


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
    lines = [f"{recipe.data.train}: {len(places):,} of {rows:,} rows cannot be used; mend them or take them out"]
    for kind, all_of_it in found.items():
        more = f" and {len(all_of_it) - LISTED:,} more" if len(all_of_it) > LISTED else ""
        lines.append(f"  {len(all_of_it):,} with {kind}: {', '.join(all_of_it[:LISTED])}{more}")
    raise UserError("\n".join(lines))


def _of_label(label: object) -> list[tuple[str, str]]:
    if label is None or (isinstance(label, str) and not label.strip()):
        return [("a missing label", "")]
    right = isinstance(label, int | str) and not isinstance(label, bool)
    return [] if right else [("a label that is neither a whole number nor a text", str(label))]
