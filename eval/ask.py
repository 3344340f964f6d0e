"""`sft generate`: what the tuned model writes after a prompt, a row, or what it wrote itself before."""

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from data_templates import Row, Template
from eval.generate import as_base, write
from sft import UserError
from sft.codec import Codec
from sft.model import decoding, load_base, load_trained
from sft.recipe import Recipe
from sft.rows import encodable
from sft.template import load_template, read_prompt
from sft.tokenizer import load_tokenizer


def ask(
    recipe: Recipe, questions: Iterable[str], base: bool = False, samples: int = 1, steps: int = 1
) -> Iterator[tuple[int, int, str]]:
    """Step, sample and text of what the model writes; a question is text, or a row as JSON.

    A template with `next_row` can go on: the first of a step's samples that it can read becomes the history of the
    next step. Raises UserError for questions that cannot be read, and where no sample can be gone on from.
    """
    template = load_template(recipe)
    if steps > 1 and template.next_row is None:
        raise UserError(f"template `{recipe.template}` has no `next_row`, so --steps cannot go on")
    if samples > 1 and not recipe.generation.get("do_sample"):
        raise UserError("greedy decoding writes the same each time; set generation.do_sample=true for --samples")
    tokenizer = load_tokenizer(recipe)
    codec = Codec(tokenizer, recipe.prompt_format)
    config = decoding(recipe, codec)
    model = load_base(recipe, tokenizer) if base and recipe.lora is None else load_trained(recipe, tokenizer)
    torch.manual_seed(recipe.eval.seed)
    with as_base(model) if base else nullcontext():
        for question in questions:
            row: Row | None = _row(template, question)
            for step in range(1, steps + 1):
                prompt = question if row is None else read_prompt(template, row, "the row")
                ids = codec.prompts([prompt])[0]
                texts = [text for text, _ in write(model, codec, [ids] * samples, config, recipe.eval.batch_tokens)]
                yield from ((step, sample, text) for sample, text in enumerate(texts, 1))
                if step < steps and row is not None:
                    row = _next(template, row, texts, step)


def _row(template: Template, question: str) -> Row | None:
    """The row that a question means: JSON, or text for the template's first field. None is a text to be gone on with,
    which it is for a template that has no prompt."""
    if not encodable(question):
        raise UserError("the prompt holds half a character (a lone surrogate); mend it")
    if question.lstrip().startswith("{"):
        try:
            return dict(json.loads(question))
        except json.JSONDecodeError as error:
            raise UserError(f"the row is broken JSON at column {error.colno}: {error.msg}") from None
    example = next(iter(template.samples(template.example)))
    return {next(iter(template.fields)): question} if template.prompt(example) else None


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
