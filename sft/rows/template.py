"""A recipe's template, found by its name or path, and the reading of rows through it with errors that name the row."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import data_templates
from data_templates import Prompt, Row, Segment, Template, Vocabulary
from sft import UserError
from sft.recipe import Recipe
from sft.recipe.fields import shown
from sft.rows.notes import WatchedRecord
from sft.rows.read import load_python
from sft.rows.watch import Files, Watch

TURN = {"role", "content"}


def template_names() -> list[str]:
    """The templates that come with the project."""
    folder = Path(data_templates.__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if not p.name.startswith("_"))


def template_file(recipe: Recipe) -> Path:
    """The file that holds the recipe's template. Raises UserError where there is none."""
    if recipe.template.endswith(".py"):
        if not Path(recipe.template).is_file():
            raise UserError(
                f"{recipe.template}: no such template file; `template` is a path or one of "
                f"{', '.join(template_names())}"
            )
        return Path(recipe.template)
    if recipe.template not in template_names():
        near = difflib.get_close_matches(recipe.template, template_names(), n=1)
        raise UserError(
            f"unknown template `{recipe.template}`; "
            + (f"did you mean `{near[0]}`?" if near else f"there are {', '.join(template_names())}.")
            + " Your own is named by its path: template=my_template.py"
        )
    return Path(data_templates.__file__).parent / f"{recipe.template}.py"


class Loaded(NamedTuple):
    """A template, and what was read to make it and whenever it was called."""

    template: Template
    home: Path
    """The folder of its file, from which the files that it reads are named."""
    at_load: Files
    """What was read while it was loaded, its own file among it."""
    watch: Watch

    def when_called(self) -> Files:
        """What it has read since it was loaded."""
        return {name: held for name, held in self.watch.files(self.home).items() if name not in self.at_load}


def load_template(recipe: Recipe, vocabulary: Vocabulary | None = None) -> Loaded:
    """The recipe's template with its options applied, watched for the files that it reads.

    `vocabulary` is given to a template that takes one. Raises UserError where the file cannot be loaded, has no
    `template`, or does not take the recipe's `template_options`.
    """
    file, watch = template_file(recipe), Watch()
    with watch.on():
        template = _made(recipe, file, vocabulary)
    watch.places[str(file.resolve())] = None  # for a template of the project, which is not watched
    at_load = watch.files(file.parent)
    watched: dict[str, Any] = {name: watch.during(made) for name, made in vars(template).items() if _is_own(made)}
    return Loaded(replace(template, **watched), file.parent, at_load, watch)


def _is_own(function: Any) -> bool:
    """Whether it is a function of the template's file, not one that stands for the usual case."""
    return callable(function) and getattr(function, "__module__", None) not in (None, data_templates.__name__)


def _made(recipe: Recipe, file: Path, vocabulary: Vocabulary | None) -> Template:
    make = getattr(load_python(file), "template", None)
    if not callable(make):
        raise UserError(f"{file}: a template file has a function `template(...)` that returns a Template")
    known = list(inspect.signature(make).parameters)
    own = {"vocabulary": vocabulary} if "vocabulary" in known else {}
    known = [name for name in known if name not in own]
    for option in recipe.template_options:
        if option not in known:
            raise UserError(
                f"unknown key `{option}` under `template_options`; "
                f"{recipe.template} takes {', '.join(f'`{name}`' for name in known) or 'none'}"
            )
    try:
        template = make(**recipe.template_options, **own)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: `template_options`: {error}") from error
    except Exception as error:
        raise UserError(f"{file}: template() failed: {type(error).__name__}: {error}") from error
    if not isinstance(template, Template):
        raise UserError(f"{file}: `template()` returns a {type(template).__name__}, not a data_templates.Template")
    return template


def samples(template: Template, record: Row, where: str) -> Sequence[Row]:
    """The rows of a record."""
    rows: list[Row] = call(lambda record: list(template.samples(record)), record, where)
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise UserError(f"{where}: the template's `samples` gives {shown(wrong[0])}; it gives rows, field -> value")
    return rows


def keys(template: Template, record: Row, where: str) -> list[str]:
    """What ties a record to others on its side of the split."""
    found = call(template.keys, record, where)
    names = [] if isinstance(found, str) else call(lambda _: list(found), record, where)
    if isinstance(found, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: the template's `keys` gives {shown(found)}; it gives a list of texts")
    return names


def read_prompt(template: Template, row: Row, where: str) -> Prompt:
    """The prompt of a row, which may lack what only the output is made of."""
    prompt = call(template.prompt, row, where)
    turns = isinstance(prompt, list) and all(isinstance(turn, dict) and turn.keys() == TURN for turn in prompt)
    if not isinstance(prompt, str) and not (turns and prompt):
        raise UserError(f"{where}: the prompt is {shown(prompt)}, not text; see `data.columns`")
    return prompt


def has_prompt(template: Template) -> bool:
    """Whether there is a prompt before what the model writes: not so for running text. The example shows it."""
    rows = samples(template, template.example, "the template's example") if template.example else []
    return not rows or bool(read_prompt(template, rows[0], "the template's example"))


def read_sample(template: Template, row: Row, where: str) -> tuple[Prompt, list[Segment]]:
    """Prompt and output of a row; an output is never empty."""
    for field in template.fields:
        if field in row and row[field] is None:
            raise UserError(f"{where}: `{field}` is null; fill it in or remove the row")
        if field not in row:
            raise _missing(field, row, where)
    prompt = read_prompt(template, row, where)
    completion = call(template.completion, row, where)
    segments = [Segment("output", completion)] if isinstance(completion, str) else completion
    if not isinstance(segments, Sequence) or not all(
        isinstance(segment, Segment) and isinstance(segment.text, str) for segment in segments
    ):
        raise UserError(f"{where}: the output is {shown(completion)}, not text; `completion` returns text or Segments")
    for segment in segments:
        if not isinstance(segment.weight, int | float) or not 0 <= segment.weight < float("inf"):
            raise UserError(
                f"{where}: segment `{segment.name}` weighs {shown(segment.weight)}; write a number from 0 up"
            )
    if not any(segment.text.strip() and segment.weight for segment in segments):
        raise UserError(f"{where}: the output is empty, there is nothing to learn; fill it in or remove the row")
    return prompt, list(segments)


def _missing(field: str, row: Row, where: str) -> UserError:
    """The message about a column that is not there."""
    if {"chosen", "rejected"} <= row.keys():
        return UserError(
            f"{where}: a preference pair; this trains on one right output a row: map `chosen` to the template's field "
            "with `data.columns`, or use a trainer for preferences"
        )
    have = ", ".join(f"`{name}`" for name in row)
    return UserError(
        f"{where}: no column `{field}`; there are {have or 'none'}: name the right one in the recipe, "
        f"`data: {{columns: {{{field}: ...}}}}`"
    )


def call(function: Any, row: Row, where: str) -> Any:
    """What a template's function makes of a row; an exception in it is a message about the row."""
    try:
        return function(row)
    except KeyError as error:
        raise _missing(str(error.args[0]), row, where) from error
    except Exception as error:
        wrong = _not_text(function, row) if isinstance(error, TypeError | AttributeError) else ""
        kind = UserError if isinstance(error, OF_ROWS) else TemplateFails
        raise kind(
            f"{where}: the template cannot read this row: {wrong or f'{type(error).__name__}: {error}'}"
        ) from error


OF_ROWS = (ValueError, TypeError, AttributeError, LookupError)
"""What a row that is not as a template wants it makes the template raise."""


class TemplateFails(UserError):
    """The template's own code fails, which is no mistake of the rows."""


KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def _not_text(function: Any, row: Row) -> str:
    """What a function asks of a row that is no text, in words."""
    asked = set[str]()
    with suppress(Exception):  # it failed before, and fails again
        function(WatchedRecord(row, asked))
    found = {name: row[name] for name in row if name in asked and not isinstance(row[name], str)}
    return " and ".join(
        f"`{name}` is {'null' if value is None else KINDS.get(type(value), 'no text')}, not text"
        for name, value in found.items()
    )
