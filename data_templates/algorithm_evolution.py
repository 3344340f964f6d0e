"""algorithm_evolution: a chain of algorithms, each made from the last; from every prefix, write the next one.

A record is a chain: its `field`, its `steps` from the oldest to the newest, and, for messages, its short name `chain`.
A step has a `name` and `pseudocode`; `authors`, `year`, `paper`, `ideas`, `weaknesses` and `drove` (what drove the
next step) may be missing. Any of them may be a list of texts in place of one text.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import unified_diff
from itertools import groupby
from typing import Any

from data_templates import Row, Segment, Template

Step = Mapping[str, Any]

KEYS = ("name", "pseudocode", "authors", "year", "paper", "ideas", "weaknesses", "drove")
HEADING = re.compile(
    r"^## (Algorithm|Source|Pseudocode|Diff|Ideas|Reasons|Weaknesses)[ \t]*$|^# Step [0-9]+[ \t]*$", re.M
)


def template(innovation_weight: float = 1.0, remember: int = 0) -> Template:
    """`innovation_weight` is the loss weight of what is new: the ideas, and the lines the step before does not have.
    Only the last `remember` steps stand in the prompt, where chains are longer than the context; 0 is all of them."""
    return Template(
        fields={"field": "what the algorithms are for", "steps": "the algorithms, oldest first"},
        prompt=lambda row: prompt(row, remember),
        completion=lambda row: list(completion(row, innovation_weight)),
        metrics=("rouge", "chrf"),
        answer=lambda written: "\n".join(filter(None, read_step(written).values())) or written.strip(),
        samples=samples,
        keys=keys,
        next_row=next_row,
        example=EXAMPLE,
    )


def samples(record: Row) -> Iterator[Row]:
    """One row for every prefix of the chain: `steps` is the history, `next` the step to write."""
    steps = checked(record)
    if len(steps) < 2:
        raise ValueError(f"chain `{called(record)}`: has {len(steps)} step; write two or more, oldest first")
    for end in range(1, len(steps)):
        yield {**record, "steps": steps[:end], "next": steps[end]}


def keys(record: Row) -> Iterator[str]:
    """The names of the chain's algorithms; letter case, spaces and hyphens make no difference."""
    yield from map(key, checked(record))


def prompt(row: Row, remember: int = 0) -> str:
    """The history, up to where the next step begins. A whole chain is a history too: it asks for the step after it."""
    steps = checked(row)
    lines = ["Each algorithm below improves on the one before it. Write the next one.", "Field: " + row["field"]]
    for number in range(max(0, len(steps) - remember) if remember else 0, len(steps)):
        lines += ["", f"# Step {number + 1}", *history(steps[number], steps[number - 1] if number else None)]
    lines += [*section("Weaknesses", text(steps[-1], "weaknesses")), "", f"# Step {len(steps) + 1}", ""]
    return "\n".join(lines)


def history(step: Step, last: Step | None) -> Iterator[str]:
    """A known step in lines: the parts that the model writes, its source, and the diff from the last one."""
    by, paper = [text(step, "authors"), text(step, "year")], text(step, "paper")
    yield from section("Algorithm", text(step, "name"))
    yield from section("Source", ". ".join(filter(None, [", ".join(filter(None, by)), paper])))
    yield from section("Pseudocode", text(step, "pseudocode"))
    if last:
        before, after = (text(s, "pseudocode").split("\n") for s in (last, step))
        diff = unified_diff(before, after, text(last, "name"), text(step, "name"), n=1, lineterm="")
        yield from section("Diff", "\n".join(diff))
    yield from section("Ideas", text(step, "ideas"))
    yield from section("Reasons", text(last, "drove") if last else "")


def completion(row: Row, innovation_weight: float) -> Iterator[Segment]:
    """The next step in segments; `innovation` holds lines of its pseudocode that the step before does not have."""
    last, step = checked(row)[-1], row["next"]
    known = set(text(last, "pseudocode").split("\n"))
    parts = [Segment("algorithm", f"## Algorithm\n{text(step, 'name')}"), Segment("pseudocode", "## Pseudocode")]
    for old, lines in groupby(text(step, "pseudocode").split("\n"), known.__contains__):
        name, weight = ("pseudocode", 1.0) if old else ("innovation", innovation_weight)
        parts.append(Segment(name, "\n".join(lines), weight))
    for heading, body, weight in (
        ("Ideas", text(step, "ideas"), innovation_weight),
        ("Reasons", text(last, "drove"), 1.0),
        ("Weaknesses", text(step, "weaknesses"), 1.0),
    ):
        if body:
            parts.append(Segment(heading.lower(), "\n".join(section(heading, body)), weight))
    yield from (replace(part, text=part.text + "\n") for part in parts[:-1])
    yield parts[-1]


def section(heading: str, body: str) -> list[str]:
    """A heading and what stands under it, or nothing where there is nothing to say."""
    return [f"## {heading}", body] if body else []


def read_step(generated: str) -> dict[str, str]:
    """Generated text -> name, pseudocode, ideas, reasons and weaknesses; a part not found is empty. Never raises."""
    parts: dict[str | None, str] = {"Algorithm": ""}
    _, *found = HEADING.split(generated)
    for heading, body in zip(found[::2], found[1::2], strict=True):
        if parts["Algorithm"] and heading in (None, "Algorithm"):
            break  # the model went on to a step after this one
        parts[heading] = parts.get(heading) or body.strip("\r\n").rstrip()
    read = {name: parts.get(name.capitalize(), "") for name in ("pseudocode", "ideas", "reasons", "weaknesses")}
    return {"name": parts["Algorithm"].strip().split("\n")[0].strip(), **read}


def next_row(row: Row, generated: str) -> dict[str, Any]:
    """The row with the generated step at its end: its prompt asks for the step after that. Never raises.

    The prompt of the new row raises ValueError when the model wrote no usable step: no name or pseudocode, or a
    repeated one.
    """
    step = read_step(generated)
    *earlier, last = row["steps"]
    steps = [*earlier, {**last, "drove": step.pop("reasons")}, step]
    return {name: value for name, value in row.items() if name != "next"} | {"steps": steps}


def checked(record: Row) -> Sequence[Step]:
    """The steps of a chain, or a ValueError that names chain and step."""
    steps, seen = record["steps"], dict[str, int]()
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise ValueError(f"chain `{called(record)}`: `steps` is not a list of steps")
    for number, step in enumerate(steps, 1):
        where = f"chain `{called(record)}`, step {number}"
        if not isinstance(step, Mapping):
            raise ValueError(f"{where}: is not an object; write at least its `name` and `pseudocode`")
        for name in KEYS:
            try:
                value = text(step, name)
            except TypeError as error:
                raise ValueError(f"{where}: `{name}` is not text: {error}") from None
            if name in ("name", "pseudocode") and not value:
                raise ValueError(f"{where}: has no `{name}`")
            if name == "name" and "\n" in value:
                raise ValueError(f"{where}: `name` has more than one line: {value!r}")
            if found := HEADING.search(value):
                raise ValueError(f"{where}: `{name}` has the line `{found[0]}`, which the template writes itself")
        for same in (key(step), text(step, "pseudocode")):
            if (first := seen.setdefault(same, number)) != number:
                raise ValueError(f"{where}: `{text(step, 'name')}` has the name or pseudocode of step {first}")
    return steps


def called(record: Row) -> str:
    """What messages call a chain."""
    return str(record.get("chain") or record.get("field"))


def key(step: Step) -> str:
    """The name without letter case, spaces and hyphens; other signs stay, as k-means++ is not k-means."""
    return re.sub(r"[\s_\u2010-\u2015-]+", "", unicodedata.normalize("NFKC", text(step, "name")).casefold())


def text(step: Step, name: str) -> str:
    """A part of a step as text; nothing is written for a part that is missing."""
    value = step.get(name)
    if isinstance(value, list | tuple):
        value = (", " if name == "authors" else "\n").join(value)
    if value is not None and not isinstance(value, str | int):
        raise TypeError(f"it is {value!r}")
    return "" if value is None else str(value).replace("\r\n", "\n").strip("\n").rstrip()


EXAMPLE: Row = {
    "field": "search in a sorted list",
    "chain": "sorted-search",
    "steps": [
        {
            "name": "Linear search",
            "pseudocode": "i <- 0\nwhile i < n and a[i] != x:\n    i <- i + 1\nreturn i",
            "ideas": "Look at one place after the other.",
            "weaknesses": "It may look at all n places, though the list is sorted.",
            "drove": "One look in the middle tells which half cannot hold x.",
        },
        {
            "name": "Binary search",
            "pseudocode": "lo, hi <- 0, n\nwhile lo < hi:\n    i <- (lo + hi) / 2\n"
            "    if a[i] < x: lo <- i + 1\n    else: hi <- i\nreturn lo",
            "ideas": "Halve the part that can hold x; log n looks are enough.",
            "weaknesses": "It looks in the middle even where the values say that x is near one end.",
        },
    ],
}
