"""What the terminal shows: lines, tables, histograms, and examples with their mask in colour."""

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from sft.codec import Codec
from sft.counts import Counts
from sft.data import MASKED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GREEN, GREY, OFF = "\033[32m", "\033[90m", "\033[0m"
WORDS = {
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
    "weighted": "rows with loss weights",
    "empty": "rows with an empty field",
    "damaged": "rows that look damaged",
}


def say(text: str = "") -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def coloured() -> bool:
    """Whether the terminal takes colour; see https://no-color.org."""
    return sys.stderr.isatty() and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def pieces(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """Stretches of a row's text, each with whether it is learned. They join to the row's whole text."""
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or (labels[i] == MASKED) != (labels[i - 1] == MASKED)]
    return [(text, labels[end - 1] != MASKED) for end, text in zip(ends, _grown(tokenizer, ids, ends), strict=True)]


def masked_example(codec: Codec, ids: Sequence[int], labels: Sequence[int]) -> str:
    """One row as the model sees it: learned text green, or between ⟦ and ⟧ where there is no colour."""
    on, off = (GREEN, OFF) if coloured() else ("⟦", "⟧")
    text = "".join(f"{on}{part}{off}" if learned else part for part, learned in pieces(codec.tokenizer, ids, labels))
    return f"{_head(codec, labels)}\n{text}"


def example_by_token(
    codec: Codec, ids: Sequence[int], labels: Sequence[int], weights: Sequence[float] | None = None
) -> str:
    """The same, with a bar between tokens, and behind each stretch its loss weight where there are weights."""
    parts = _grown(codec.tokenizer, ids, range(1, len(ids) + 1))
    kinds = [weights[i] if weights else float(labels[i] != MASKED) for i in range(len(ids))]
    on, off, bar = (GREEN, OFF, f"{GREY}│{OFF}") if coloured() else ("⟦", "⟧", "│")
    stretches = []
    for kind, some in groupby(zip(parts, kinds, strict=True), lambda part: part[1]):
        tokens = [part for part, _ in some]
        text = bar.join(f"{on}{token}{off}" for token in tokens) if coloured() else f"{on}{bar.join(tokens)}{off}"
        stretches.append((text if kind else bar.join(tokens)) + (f"×{kind:.2f}" if weights and kind else ""))
    return f"{_head(codec, labels)}\n{bar.join(stretches)}"


def counts_line(side: str, counts: Counts) -> str:
    """What became of the rows of one side, in one line; what was lost is always said."""
    return (
        f"{side}: {counts.rows:,} rows, {counts.tokens:,} tokens, "
        f"{counts.supervised / max(counts.tokens, 1):.0%} of them learned, longest {counts.longest:,}; "
        f"{counts.trimmed:,} prompts trimmed, {counts.dropped:,} rows too long and dropped"
        + (f", {counts.repeated:,} left out as they are held out too" if counts.repeated else "")
    )


def counts_table(sides: Mapping[str, Counts]) -> str:
    """Everything that was counted, one line a thing, with the first row it was found in."""
    names = ["train", "test"]
    rows, notes = [], []
    for name, words in WORDS.items():
        rows.append([words, *(f"{getattr(sides[side], name):,}" for side in names)])
        if name == "supervised":
            shares = (sides[side].supervised / max(sides[side].tokens, 1) for side in names)
            rows.append(["share learned", *(f"{share:.1%}" for share in shares)])
    for what in dict.fromkeys(what for side in names for what in sides[side].suspicious):
        rows.append([what, *(f"{sides[side].suspicious.get(what, 0):,}" for side in names)])
    for side in names:
        notes += [f"  {WORDS.get(name, name)}: {where}" for name, where in sides[side].examples.items()]
    return table(["", *names], rows) + ("\n\nfirst examples\n" + "\n".join(notes) if notes else "")


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns set under each other, the first flush left, the others flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _head(codec: Codec, labels: Sequence[int]) -> str:
    learned = sum(label != MASKED for label in labels)
    how = "put through the chat template" if codec.chat else "plain text"
    return (
        f"one row as it is trained ({len(labels)} tokens, {learned} learned, shown "
        f"{'green' if coloured() else '⟦so⟧'}; the prompt is {how}):"
    )


def _grown(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """What the text grows by at each end. A character split over tokens appears with the last of them."""
    texts, shown = [], 0
    for end in ends:
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = whole if end == len(ids) else whole.rstrip("\ufffd")
        texts.append(whole[shown:])
        shown = max(shown, len(whole))
    return texts
