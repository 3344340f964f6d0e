"""What the terminal shows: lines, tables, colours."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

GREEN, GREY, OFF = "\033[32m", "\033[90m", "\033[0m"


def say(text: str = "") -> None:
    """Print a line, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def coloured() -> bool:
    """Whether the terminal takes colour; see https://no-color.org."""
    return sys.stderr.isatty() and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns set under each other, the first flush left, the others flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
