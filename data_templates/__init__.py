"""What a dataset template is: how a row becomes a prompt and what the model shall learn to write after it.

A template is one file in this folder, or any `.py` file that a recipe names by its path. It holds one function
`template(...)` that returns a `Template`; the function's keyword arguments are what a recipe may set under
`template_options:`. See `story.py` for the smallest one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Row = Mapping[str, Any]
"""One record of the data file, its columns already renamed to the template's fields."""


Message = Mapping[str, str]
"""A turn of a conversation: its `role` (system, user, assistant) and its `content`."""

Prompt = str | Sequence[Message]
"""What the model is given: a text, or the turns so far of a conversation."""


def as_text(prompt: Prompt) -> str:
    """A prompt as plain text: what a base model is given, which has no chat template for turns."""
    if isinstance(prompt, str):
        return prompt
    turns = [f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in prompt]
    return "".join([*turns, "Assistant:\n"])


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a user's own and their ids, 0 to one below their number: what `template(vocabulary=...)` is given."""

    ids: Mapping[str, int]
    special: Mapping[str, str]
    """Role (pad, start, end, unknown) -> its token. One token may have several roles."""

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens in the order of their ids."""
        return sorted(self.ids, key=self.ids.__getitem__)


@dataclass(frozen=True)
class Segment:
    """A named part of what the model writes, with its weight in the loss."""

    name: str
    text: str
    weight: float = 1.0
    """0 masks the segment, 1 is the ordinary loss, 2 counts each of its tokens double."""


def one_row(row: Row) -> Iterable[Row]:
    """The usual case: a record of the file is one sample."""
    return (row,)


def no_keys(row: Row) -> Iterable[str]:
    """The usual case: rows may fall on either side of the split, whatever they share."""
    return ()


def no_problems(row: Row) -> Iterable[tuple[str, str]]:
    """The usual case: what is wrong with a row is found when it is read."""
    return ()


@dataclass(frozen=True)
class Template:
    """How a row is read: the same object serves training, checking, generation, scoring and export."""

    fields: Mapping[str, str]
    """Field name -> what stands in it. Each must be a column of the data, or be mapped to one by `data.columns`."""

    prompt: Callable[[Row], Prompt]
    """Row -> what the model is given. At inference the row may lack the fields that only `completion` reads."""

    completion: Callable[[Row], str | Sequence[Segment]]
    """Row -> the text the model learns to write, without its end token; or that text in weighted segments."""

    example: Row = field(default_factory=dict)
    """One row as it might stand in a user's file: documentation and test fixture alike."""

    metrics: tuple[str, ...] = ()
    """Folders in `eval/metrics/`, or paths of other metric folders, each opened with `evaluate.load`."""

    answer: Callable[[str], str] = str.strip
    """Generated text -> what the metrics compare. It must accept any text and never raise."""

    samples: Callable[[Row], Iterable[Row]] = one_row
    """Record of the file -> rows; for records that hold several samples, such as a chain of algorithms."""

    keys: Callable[[Row], Iterable[str]] = no_keys
    """Record -> keys; records that share a key are kept on the same side of the split."""

    next_row: Callable[[Row, str], Row] | None = None
    """Row, and what the model wrote -> the row that asks for what comes after it; for `sft generate --steps`."""

    problems: Callable[[Row], Iterable[tuple[str, str]]] = no_problems
    """Row -> what makes it unusable, as its kind and what was found there. All rows are tried, and listed by kind at
    once, before any is used. What this does not find may still be an error of its row."""

    label: Callable[[Row], Any] | None = None
    """Row -> its class, a whole number or a text, for `task: classification`; None where it has none."""

    picture: Callable[[str], Sequence[Sequence[float]] | None] | None = None
    """Text -> lines of grey values from 0 (paper) to 1 (ink), which the report draws; None for other texts."""
