"""The account of all rows, for the terminal: a line, a table, a histogram."""

from collections.abc import Mapping, Sequence
from itertools import chain

from sft.rows.notes import Note
from sft.show import table
from sft.tokens.counts import Counts

COUNT_LABELS = {
    "rows": "rows kept",
    "tokens": "tokens",
    "supervised": "tokens learned",
    "ended": "rows whose end token is learned",
    "longest": "longest row, tokens",
    "trimmed": "prompts trimmed to fit",
    "dropped": "rows dropped, too long",
    "repeated": "left out, held out already",
    "duplicates": "duplicates of a row before",
    "seams": "seams that would have merged",
    "changed": "outputs the tokenizer changes",
    "prompts_changed": "prompts the tokenizer changes",
    "weighted": "rows with loss weights",
    "empty": "rows with an empty field",
    "damaged": "rows that look damaged",
}


def counts_line(side: str, counts: Counts) -> str:
    """What became of the rows of one side, in one line; what was lost is always said."""
    return (
        f"{side}: {counts.rows:,} rows, {counts.tokens:,} tokens, "
        f"{counts.supervised / max(counts.tokens, 1):.0%} of them learned, longest {counts.longest:,}; "
        f"{counts.trimmed:,} prompts trimmed, {counts.dropped:,} rows too long and dropped"
        + (f", {counts.repeated:,} left out as they are held out too" if counts.repeated else "")
        + "".join(f"; {number:,} {what}" for what, number in counts.differences.items())
    )


def counts_table(sides: Mapping[str, Counts]) -> str:
    """Everything that was counted, one line a thing, with the first row it was found in."""
    names = ["train", "test"]
    rows, notes = [], []
    for name, words in COUNT_LABELS.items():
        rows.append([words, *(f"{getattr(sides[side], name):,}" for side in names)])
        if name == "supervised":
            shares = (sides[side].supervised / max(sides[side].tokens, 1) for side in names)
            rows.append(["share learned", *(f"{share:.1%}" for share in shares)])
    for of in ("differences", "suspicious"):
        found = [getattr(sides[side], of) for side in names]
        for what in dict.fromkeys(chain(*found)):
            rows.append([what, *(f"{some.get(what, 0):,}" for some in found)])
    for side in names:
        notes += [f"  {COUNT_LABELS.get(name, name)}: {where}" for name, where in sides[side].examples.items()]
    return table(["", *names], rows) + ("\n\nfirst examples\n" + "\n".join(notes) if notes else "")


def notes_lines(notes: Sequence[Note]) -> str:
    """What was noticed of the files, one line a thing."""
    return "\n".join(f"  {note.number:,} {note.what}; the first: {note.first}" for note in notes)


def histogram(counts: Counts, bars: int = 12, width: int = 40) -> str:
    """Rows by length in tokens, in at most so many bars."""
    step = 16 * max(1, -(-counts.longest // (16 * bars)))
    rows: dict[int, int] = {}
    for length, number in counts.lengths.items():
        upper = -(-int(length) // step) * step
        rows[upper] = rows.get(upper, 0) + number
    most = max(rows.values())
    return "\n".join(
        f"{upper - step + 1:>6,}-{upper:<6,} {'█' * -(-rows.get(upper, 0) * width // most)} {rows.get(upper, 0):,}"
        for upper in range(min(rows), max(rows) + 1, step)
    )
