"""What tokens follow from: settings, data, tokenizer, every file that the template read, and what it makes of rows."""

import hashlib
import json
from dataclasses import astuple
from itertools import islice
from typing import TYPE_CHECKING, Any

from data_templates import Row, Template, as_text
from sft import UserError
from sft.recipe import Recipe
from sft.rows.read import contents, read
from sft.rows.template import Loaded, read_sample, samples
from sft.tokens.codec import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COMPARED_RECORDS = 3
"""Records that are read again before tokens are used that were made earlier."""


def made_of(recipe: Recipe, loaded: Loaded, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> dict[str, Any]:
    """What the tokens of a recipe follow from, but for what its template reads while it is called."""
    return asked_by(recipe, loaded, tokenizer, codec) | {
        "data": {side: contents(recipe.data, side) for side in ("train", "test") if side == "train" or recipe.data.test}
    }


def asked_by(recipe: Recipe, loaded: Loaded, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> dict[str, Any]:
    """The part of it that decides how a model is asked, for which no row is needed."""
    rows = recipe.data.model_dump(exclude={"train", "test"}, mode="json")
    settings = {"data": rows, "template_options": recipe.template_options, "prompt_format": recipe.prompt_format}
    spec = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)]
    asked = {
        "settings": settings | {"trainer": {"max_length": recipe.max_length}},
        "template": loaded.at_load,
        "tokenizer": digest(spec),
        "chat_template": digest(codec.template),
        "prompt_date": str(codec.date) if codec.prints_date else None,
        "example": _as_read(loaded.template, loaded.template.example, "the template's example"),
    }
    return _in_json(asked)


def first_records(recipe: Recipe, template: Template) -> list[Any]:
    """The first records as the template reads them: what it follows from beside files, such as the clock, shows here.

    Raises UserError where it reads the same record in two ways, as one that draws at random does.
    """
    records = list(islice(read(recipe.data, "train"), COMPARED_RECORDS))
    once, again = ([_as_read(template, record, where) for where, record in records] for _ in range(2))
    for (where, _), one, other in zip(records, once, again, strict=True):
        if one != other:
            raise UserError(
                f"{where}: the template reads this record in another way each time; what it draws at random, draw from "
                "a seed that follows from the row"
            )
    return once


def _as_read(template: Template, record: Row, where: str) -> list[Any]:
    """Prompt and output of each row of a record, as JSON has them."""
    try:
        found = [read_sample(template, row, where) for row in samples(template, record, where)] if record else []
    except UserError as error:
        return [str(error)]  # what is wrong with a row is said where the rows are read
    return _in_json([[as_text(prompt), *map(astuple, segments)] for prompt, segments in found])


def _in_json(value: Any) -> Any:
    """A value as it comes back from JSON, with which it is compared."""
    return json.loads(json.dumps(value))


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
