"""What the terminal shows: lines, tables and an example with its mask in colour."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.data import MASKED, Codec, Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GREEN, GREY, BOLD, OFF = "\033[32m", "\033[90m", "\033[1m", "\033[0m"


def say(text: str = "") -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def coloured() -> bool:
    """Whether the terminal takes colour; see https://no-color.org."""
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def pieces(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """Stretches of a row's text, each with whether it is learned. They join to the row's whole text."""
    stretches: list[tuple[str, bool]] = []
    start = shown = 0
    whole = ""
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (labels[i] == MASKED) != (labels[start] == MASKED):
            whole = str(tokenizer.decode(list(ids[:i]), clean_up_tokenization_spaces=False))
            stretches.append((whole[shown:], labels[start] != MASKED))
            start, shown = i, len(whole)
    return stretches


def masked_example(codec: Codec, ids: Sequence[int], labels: Sequence[int]) -> str:
    """One row as the model sees it: learned text green, or between ⟦ and ⟧ where there is no colour."""
    on, off = (GREEN, OFF) if coloured() else ("⟦", "⟧")
    text = "".join(f"{on}{part}{off}" if learned else part for part, learned in pieces(codec.tokenizer, ids, labels))
    learned = sum(label != MASKED for label in labels)
    head = (
        f"one row as it is trained ({len(ids)} tokens, {learned} learned, shown {'green' if coloured() else '⟦so⟧'}; "
    )
    return f"{head}the prompt is {'put through the chat template' if codec.chat else 'plain text'}):\n{text}"


def counts_line(side: str, counts: Counts) -> str:
    """What became of the rows of one side, in one line; what was lost is always said."""
    share = counts.supervised / max(counts.tokens, 1)
    line = (
        f"{side}: {counts.rows:,} rows, {counts.tokens:,} tokens, {share:.0%} of them learned, "
        f"longest {counts.longest:,}; {counts.trimmed:,} prompts trimmed, "
        f"{counts.dropped:,} rows too long and dropped"
    )
    if counts.repeated:
        line += f", {counts.repeated:,} dropped as they are held out too"
    if counts.changed:
        line += f"\n  {counts.changed:,} outputs are not given back exactly by the tokenizer: {counts.changed_example}"
    return line


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns set under each other, the first flush left, the others flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
