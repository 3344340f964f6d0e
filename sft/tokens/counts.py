"""What became of every row: a line of facts for each, and the sums over them that a person reads."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sft.tokens.conversation import DOUBLED, LOST

IDS, TEXT = pa.list_(pa.int32()), pa.string()
FACTS = pa.schema(
    {
        "record": pa.int64(),  # its number in the data
        "where": TEXT,
        "prompt": TEXT,
        "reference": TEXT,
        "hash": pa.uint64(),  # of prompt and output
        "input_ids": IDS,
        "labels": IDS,
        "weights": pa.list_(pa.float32()),  # null where all weigh 1
        "prompt_tokens": pa.int32(),
        "tokens": pa.int32(),
        "learned": pa.int32(),
        "whole": pa.int32(),  # tokens before it was trimmed or dropped
        "output_tokens": pa.int32(),
        "kept": pa.bool_(),
        "ended": pa.bool_(),
        "changed": pa.bool_(),
        "prompt_changed": pa.bool_(),
        "seam": pa.bool_(),
        "empty": TEXT,  # name of a field that holds nothing
        "differences": pa.list_(pa.struct({"kind": TEXT, "shown": TEXT})),  # from what its chat template makes of it
        "looks": pa.list_(TEXT),  # what looks wrong in its prompt, and in its output
    }
)
"""What is known of a row. Those that are left out have no ids."""

SUSPICIOUS = {
    "a replacement character (�): bytes were lost when the text was decoded": re.compile("\ufffd"),
    "a control character": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "a byte order mark inside the text": re.compile("\ufeff"),
    "a text that was decoded with the wrong encoding (mojibake)": re.compile(
        "[\u0080-\u009f]|[\u00c2\u00c3][\u00a0-\u00bf]|Ã[‰ŠŒŽšœžŸƒˆ˜™€]|â€|ã€|å[\u0080-\u00bf]{2}|ðŸ"
    ),
}
RETURNS = "a carriage return, which is learned and read as any other character"
SPECIAL = "the name of a special token, which becomes that token in a chat template"

NUMBERS = ("kept", "tokens", "whole", "learned", "ended", "changed", "prompt_changed", "seam", "hash")
Flags = NDArray[np.bool_]


@dataclass
class Counts:
    """What became of the rows of one side of the split."""

    records: int = 0
    """Records read, after those that are held out already were left out."""
    rows: int = 0
    """Rows that reach the trainer or the scorer."""
    tokens: int = 0
    supervised: int = 0
    """Tokens with a label: those of the outputs and their end tokens."""
    ended: int = 0
    """Rows whose last label is the end token, so that the model learns to stop."""
    trimmed: int = 0
    """Rows whose prompt lost its oldest tokens to fit `trainer.max_length`."""
    dropped: int = 0
    """Rows left out because they do not fit, their outputs being longer than there is room."""
    repeated: int = 0
    """Training records left out because the held-out side has the same row, or one with the same key."""
    duplicates: int = 0
    """Rows that are there more than once, counted without their first."""
    seams: int = 0
    """Rows whose prompt and output, tokenised together, would have merged into one token where they meet."""
    changed: int = 0
    """Rows whose output the tokenizer does not give back exactly."""
    prompts_changed: int = 0
    """Rows whose prompt the tokenizer does not give back."""
    weighted: int = 0
    """Rows with a loss weight other than 1."""
    longest: int = 0
    empty: int = 0
    """Rows with a field that holds nothing."""
    damaged: int = 0
    """Rows with a text that looks wrong."""
    doubled: int = 0
    """Rows whose answer has a block of its own behind that of the chat template."""
    lost_turns: int = 0
    """Rows with a turn that the chat template leaves out."""
    differences: dict[str, int] = field(default_factory=dict)
    """How rows differ from what the chat template makes of their whole conversation -> rows."""
    suspicious: dict[str, int] = field(default_factory=dict)
    """What looks wrong -> texts, of which a row has two."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Length in tokens, rounded up to a multiple of 16 -> rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Count -> the first row that was counted."""


def looks(text: str, special: re.Pattern[str] | None) -> list[str]:
    """What looks wrong in a text; in one for a chat template, the name of a special token too (`special` finds it)."""
    ordinary = text.isascii() and text.replace("\n", "").isprintable()  # as most texts are, which is quickly seen
    found = [] if ordinary else [what for what, pattern in SUSPICIOUS.items() if pattern.search(text)]
    found += [RETURNS] if "\r" in text else []
    return [*found, SPECIAL] if special and special.search(text) else found


class Tally:
    """The counts of one side, of which `records` and `repeated` are not known row by row, and are left at 0."""

    def __init__(self, special: re.Pattern[str]) -> None:
        """`special` finds the name of a special token in a text."""
        self._patterns = SUSPICIOUS | {SPECIAL: special, RETURNS: re.compile("\r")}
        self._counts = Counts()
        self._lengths: Counter[int] = Counter()
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, facts: pa.RecordBatch) -> None:
        """Count some rows of this side. `facts` has the columns of FACTS."""
        counts, column = self._counts, {name: facts[name].to_numpy(zero_copy_only=False) for name in NUMBERS}
        kept, tokens = column["kept"], column["tokens"]
        found: dict[str, tuple[Flags, Callable[[Any], str]]] = {
            "changed": (column["changed"], lambda row: repr(row["reference"][:80])),
            "prompts_changed": (column["prompt_changed"], lambda row: repr(row["prompt"][:80])),
            "seams": (column["seam"], lambda row: f"{row['prompt'][-12:]!r} + {row['reference'][:12]!r}"),
            "empty": (_there(facts["empty"]), lambda row: f"`{row['empty']}`"),
            "trimmed": (kept & (tokens < column["whole"]), _sizes),
            "dropped": (~kept, _sizes),
        }
        counts.rows += int(kept.sum())
        counts.tokens += int(tokens[kept].sum())
        counts.supervised += int(column["learned"][kept].sum())
        counts.ended += int((kept & column["ended"]).sum())
        counts.weighted += int((kept & _there(facts["weights"])).sum())
        counts.longest = max(counts.longest, int(tokens[kept].max(initial=0)))
        self._lengths.update((-(-tokens[kept] // 16) * 16).tolist())
        self._hashes.append(column["hash"])
        for name, (flags, shown) in found.items():
            setattr(counts, name, getattr(counts, name) + int(flags.sum()))
            if flags.any() and name not in counts.examples:
                row = _row(facts, int(flags.argmax()))
                counts.examples[name] = f"{row['where']}: {shown(row)}"
        odd = np.flatnonzero(pc.list_value_length(facts["looks"]).to_numpy() > 0)
        for i, whats in zip(odd, facts["looks"].take(odd).to_pylist(), strict=True):
            counts.damaged += any(what != RETURNS for what in whats)
            for what in whats:
                counts.suspicious[what] = counts.suspicious.get(what, 0) + 1
                if what not in counts.examples:
                    row = _row(facts, int(i))
                    counts.examples[what] = f"{row['where']}: {_around(row, self._patterns[what])}"
        differing = np.flatnonzero(pc.list_value_length(facts["differences"]).to_numpy() > 0)
        for i, some in zip(differing, facts["differences"].take(differing).to_pylist(), strict=True):
            for kind in {each["kind"] for each in some}:
                counts.differences[kind] = counts.differences.get(kind, 0) + 1
            for each in some:
                counts.examples.setdefault(each["kind"], f"{facts['where'][int(i)]}: {each['shown']}")
        counts.doubled, counts.lost_turns = (counts.differences.get(kind, 0) for kind in (DOUBLED, LOST))

    def counts(self) -> Counts:
        """The sums over all rows that were added."""
        hashes = np.concatenate([np.array([], dtype=np.uint64), *self._hashes])
        lengths = {str(length): number for length, number in sorted(self._lengths.items())}
        return replace(self._counts, duplicates=len(hashes) - len(np.unique(hashes)), lengths=lengths)


def _there(column: pa.Array) -> Flags:
    """Which values are not null."""
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _row(facts: pa.RecordBatch, i: int) -> dict[str, Any]:
    return dict(facts.slice(i, 1).to_pylist()[0])


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['whole']} tokens, {row['output_tokens']} of them output"


def _around(row: dict[str, Any], pattern: re.Pattern[str]) -> str:
    """The first place where the row's texts look wrong, with what stands around it."""
    found = next(found for text in (row["prompt"], row["reference"]) if (found := pattern.search(text)))
    return repr(found.string[max(0, found.start() - 20) : found.end() + 20])
