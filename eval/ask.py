"""`sft generate`: what the tuned model writes after a prompt, a row, or what it wrote itself before."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from data_templates import Row, Template
from eval.generate import as_base, write
from sft import UserError
from sft.codec import Codec
from sft.data import codec_of, max_length
from sft.model import decoding, load_base, load_trained
from sft.recipe import Recipe
from sft.rows import encodable
from sft.run import check_owner
from sft.show import say
from sft.template import has_prompt, load_template, read_prompt
from sft.tokenizer import load_tokenizer


def ask(
    recipe: Recipe, questions: Iterable[str | Row], base: bool = False, samples: int = 1, steps: int = 1
) -> Iterator[tuple[int, int, str]]:
    """Step, sample and text of what the model writes; a question is a row, or text for the template's first field.

    A template with `next_row` can go on: the first of a step's samples that it can read becomes the history of the
    next step. Raises UserError for questions that cannot be read, and where no sample can be gone on from.
    """
    template = load_template(recipe)
    if steps > 1 and template.next_row is None:
        raise UserError(f"template `{recipe.template}` has no `next_row`, so --steps cannot go on")
    if samples > 1 and not recipe.generation.get("do_sample"):
        raise UserError("greedy decoding writes the same each time; set generation.do_sample=true for --samples")
    tokenizer = load_tokenizer(recipe)
    codec = codec_of(recipe, tokenizer)
    check_owner(recipe)
    config = decoding(recipe, codec)
    model = load_base(recipe, tokenizer) if base and recipe.lora is None else load_trained(recipe, tokenizer)
    torch.manual_seed(recipe.eval.seed)
    with as_base(model) if base else nullcontext():
        for question in questions:
            row = question if isinstance(question, Mapping) else _row(template, question)
            for step in range(1, steps + 1):
                ids = _ids(recipe, codec, config, template, row, str(question))
                texts = [text for text, _ in write(model, codec, [ids] * samples, config, recipe.eval.batch_tokens)]
                yield from ((step, sample, text) for sample, text in enumerate(texts, 1))
                if step < steps and row is not None:
                    row = _next(template, row, texts, step)


def _row(template: Template, question: str) -> Row | None:
    """The row that a text means: its first field. None is a text to be gone on with, where a template has no prompt."""
    return {next(iter(template.fields)): question} if has_prompt(template) else None


def _ids(recipe: Recipe, codec: Codec, config: Any, template: Template, row: Row | None, text: str) -> list[int]:
    """The ids the model reads, without their oldest where they leave no room for what it shall write."""
    if not encodable(text if row is None else row):
        raise UserError("the prompt holds half a character (a lone surrogate); mend it")
    if row is None:  # as in training: what stands before every text, then the text
        ids = codec.prompts([""])[0] + codec.outputs([text])[0]
    else:
        ids = codec.prompts([read_prompt(template, row, "the row")])[0]
    room = max_length(recipe) - config.max_new_tokens
    if len(ids) <= room:
        return ids
    if (trimmed := codec.trimmed(ids, room)) is None:
        raise UserError(f"the prompt has {len(ids)} tokens, where {room} leave room for the answer; shorten it")
    say(f"the prompt lost its first {len(ids) - len(trimmed)} tokens to leave room for the answer")
    return trimmed


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
