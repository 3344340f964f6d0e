"""`sft generate`: what the tuned model writes after a prompt, a row, or what it wrote itself before."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from data_templates import Row, Template
from sft import UserError
from sft.decoding import of_whole_texts
from sft.model.adapter import as_base
from sft.model.artifact import load_artifact, open_artifact
from sft.model.load import decoding, load_base, load_trained
from sft.recipe import Recipe
from sft.rows.read import encodable
from sft.rows.template import has_prompt, read_prompt, samples
from sft.run import check_owner
from sft.show import say
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.write.generate import write
from sft.write.stream import Text, stream


@dataclass(frozen=True)
class Answerer:
    """A model that can be asked, with the code that built its prompts in training."""

    opened: Opened
    load: Callable[[], Any]
    base: bool = False
    """Whether the base answers, not the tuned model."""

    @cached_property
    def model(self) -> Any:
        """The weights, loaded when first needed: mistakes that show without them are reported at once."""
        return self.load()


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer."""

    step: int
    sample: int
    text: str
    end: str | None
    """What ended the answer after this piece: `stop` (its end token) or `length` (the limit). None where it goes on."""


def open_run(recipe: Recipe, base: bool = False) -> Answerer:
    """The model of a run, or its base. Raises UserError where the run is not finished or another recipe's."""
    if base and isinstance(recipe.model, dict):
        raise UserError(f"{recipe.folder}: was trained from nothing, so there is no base to ask; leave --base out")
    opened = Opened(recipe)
    check_owner(opened)
    load = load_base if base and not recipe.has_adapter else load_trained
    return Answerer(opened, lambda: load(recipe, opened.tokenizer), base)


def open_folder(folder: Path, overrides: Sequence[str] = (), base: bool = False) -> Answerer:
    """The model of a folder outside its run, such as `sft merge` writes."""
    if base:
        raise UserError(f"{folder}: holds no base model; ask the run that it was merged from")
    opened = open_artifact(folder, overrides)
    return Answerer(opened, lambda: load_artifact(opened))


def ask(answerer: Answerer, questions: Iterable[str | Row], samples: int = 1, steps: int = 1) -> Iterator[Piece]:
    """What the model writes; a question is a row, or text for the template's first field. One sample comes in pieces as
    it is written, several come whole.

    A template with `next_row` can go on: the first of a step's samples that it can read becomes the history of the
    next step. Raises UserError for questions that cannot be read, and where no sample can be gone on from.
    """
    opened = answerer.opened
    recipe, template, codec = opened.recipe, opened.template, opened.codec
    if steps > 1 and template.next_row is None:
        raise UserError(f"template `{recipe.template}` has no `next_row`, so --steps cannot go on")
    if samples > 1 and not recipe.generation.get("do_sample"):
        raise UserError("greedy decoding writes the same each time; give --temperature 1 with --samples")
    config = decoding(recipe, codec)
    model, seeds = answerer.model, count(recipe.eval.seed)
    torch.manual_seed(recipe.eval.seed)
    with as_base(model) if answerer.base else nullcontext():
        for question in questions:
            row = question if isinstance(question, Mapping) else row_of(template, question)
            for step in range(1, steps + 1):
                ids = fitting(recipe, codec, config, prompt_ids(codec, template, row, str(question)))
                texts: list[str] = []
                if samples == 1 and not of_whole_texts(config.to_diff_dict()):
                    text = Text(codec, ids, config, next(seeds))
                    for piece in stream(model, text):
                        yield Piece(step, 1, piece, text.end)
                    texts.append(text.text)
                else:
                    written = write(model, codec, [ids] * samples, config, recipe.eval.batch_tokens)
                    for sample, (whole, ended) in enumerate(written, 1):
                        yield Piece(step, sample, whole, "stop" if ended else "length")
                        texts.append(whole)
                if step < steps and row is not None:
                    row = _next(template, row, texts, step)


def row_of(template: Template, question: str) -> Row | None:
    """The row that a text means: its first field. None is a text to be gone on with, where a template has no prompt."""
    return {next(iter(template.fields)): question} if has_prompt(template) else None


def prompt_ids(codec: Codec, template: Template, row: Row | None, text: str) -> list[int]:
    """The ids the model reads for a row, or for a text that it shall go on with."""
    if not encodable(text if row is None else row):
        raise UserError("the prompt holds half a character (a lone surrogate); mend it")
    if row is not None and not has_prompt(template):
        raise UserError("this template has no prompt that a row could fill; give the text to go on with by --prompt")
    return codec.going_on(text) if row is None else codec.prompts([read_prompt(template, row, "the row")])[0]


def fitting(recipe: Recipe, codec: Codec, config: Any, ids: list[int]) -> list[int]:
    """The ids without their oldest where they leave no room for what shall be written."""
    room = recipe.max_length - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"{config.max_new_tokens} new tokens leave no room for a prompt within the {recipe.max_length} tokens of "
            "`trainer.max_length`; ask for fewer with --max-new-tokens"
        )
    if len(ids) <= room:
        return ids
    if (trimmed := codec.trimmed(ids, room)) is None:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and {room} fit beside {config.max_new_tokens} new ones; shorten it, or "
            "ask for fewer with --max-new-tokens"
        )
    say(f"the prompt lost its first {len(ids) - len(trimmed)} tokens to leave room for the answer")
    return trimmed


def from_terminal(template: Template) -> Iterator[str | Row]:
    """What a person types: lines for the template's first field, or each field in turn where its prompt has several."""
    fields = _asked_for(template)
    if len(fields) < 2:
        yield from typed("> ")
        return
    answers = typed(*(f"{name}> " for name in fields))
    while len(lines := list(islice(answers, len(fields)))) == len(fields):
        yield {name: _value(line) for name, line in zip(fields, lines, strict=True) if line}


class Conversation:
    """What a person and the model said so far, where the template reads conversations."""

    def __init__(self, template: Template) -> None:
        self._field = next(iter(template.fields))
        self._turns: list[dict[str, str]] = []

    def questions(self) -> Iterator[Row]:
        """The turns up to each line that is typed."""
        say("the turns so far are remembered; an empty line begins a new conversation")
        for line in typed("> "):
            if line.strip():
                self._turns.append({"role": "user", "content": line})
                yield {self._field: [*self._turns]}
            else:
                self._turns.clear()

    def answered(self, text: str) -> None:
        """Remember an answer; where there is none, the question is forgotten, as a template reads no empty turns."""
        if text.strip():
            self._turns.append({"role": "assistant", "content": text})
        else:
            self._turns.pop()


def takes_turns(template: Template) -> bool:
    """Whether the template's first field is a conversation. The example shows it."""
    turns = template.example.get(next(iter(template.fields)))
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)


def typed(*signs: str) -> Iterator[str]:
    """Lines from the terminal after each of these signs in turn, until Ctrl-D."""
    import readline  # noqa: F401  # with it, input() has a history and can be edited

    while True:
        for sign in signs:
            if not sys.stdout.isatty():
                print(sign, end="", file=sys.stderr, flush=True)
            try:
                yield input(sign if sys.stdout.isatty() else "")
            except EOFError:
                print(file=sys.stderr)
                return


def _asked_for(template: Template) -> list[str]:
    """The fields of the example that its prompt cannot do without, or would be another one without."""
    row = next(iter(samples(template, template.example, "the template's example") if template.example else []), {})

    def prompt(fields: Row) -> Any:
        try:
            return read_prompt(template, fields, "")
        except UserError:
            return None

    return [name for name in row if prompt({k: v for k, v in row.items() if k != name}) != prompt(row)]


def _value(line: str) -> Any:
    """What was typed for a field: a list or an object where it is JSON of one, else text."""
    try:
        return json.loads(line) if line[0] in "[{" else line
    except ValueError:
        return line


def _next(template: Template, row: Row, texts: list[str], step: int) -> Row:
    """The row that asks for the step after this one, from the first text that can be read."""
    assert template.next_row is not None
    problems: list[Any] = []
    for text in texts:
        following = template.next_row(row, text)
        try:
            read_prompt(template, following, f"step {step}")
        except UserError as error:
            problems.append(error)
        else:
            return following
    raise UserError(f"cannot go on: no sample of step {step} can be read by the template ({problems[0]})")
