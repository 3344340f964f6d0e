"""A recipe, opened once: its template, tokenizer, codec and tokens, each made when it is first asked for."""

from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_templates import Template, Vocabulary
from sft import UserError
from sft.files import read_json
from sft.recipe import Recipe
from sft.rows.template import Loaded, has_prompt, load_template
from sft.rows.watch import Files
from sft.tokens.codec import Codec
from sft.tokens.prepare import Tokens, prepare
from sft.tokens.provenance import asked_by
from sft.tokens.tokenizer import load_tokenizer
from sft.tokens.vocabulary import given_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Opened:
    """What goes down through the stages. Raises UserError where a part of it that is asked for cannot be had."""

    recipe: Recipe

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Of the user's own, where the recipe names one."""
        return given_vocabulary(self.recipe)

    @cached_property
    def loaded(self) -> Loaded:
        """The template, with what it reads."""
        return load_template(self.recipe, self.vocabulary)

    @property
    def template(self) -> Template:
        """How a row is read."""
        return self.loaded.template

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """With a pad token, and tried out."""
        return load_tokenizer(self.recipe, self.loaded, self.vocabulary)

    @cached_property
    def date(self) -> date:
        """The day that a chat template prints: that of the recipe, of the run in its folder, or today."""
        day = self.recipe.prompt_date or self._claimed.get("prompt_date")
        try:
            return date.fromisoformat(day) if day else date.today()
        except ValueError:
            raise UserError(f"`prompt_date` is {day!r}; write a day as YYYY-MM-DD") from None

    @cached_property
    def codec(self) -> Codec:
        """Text to ids. A template without a prompt, as for running text, has no turns for a chat template."""
        running = self.recipe.prompt_format == "auto" and not has_prompt(self.template)
        return Codec(self.tokenizer, "plain" if running else self.recipe.prompt_format, self.date)

    @cached_property
    def tokens(self) -> Tokens:
        """The rows."""
        return prepare(self.recipe, self.loaded, self.tokenizer, self.codec)

    @property
    def called(self) -> Files:
        """What the template reads while it is called, as far as the run's folder or the rows that were read say so."""
        return {**self._claimed.get("called", {}), **self.loaded.when_called()}

    @cached_property
    def asked_by(self) -> dict[str, Any]:
        """What decides how the model is asked, for which no row is read."""
        return asked_by(self.recipe, self.loaded, self.tokenizer, self.codec)

    @property
    def _claimed(self) -> dict[str, Any]:
        """What the tokens of the run in the recipe's folder followed from, where there is one that kept it."""
        run = self.recipe.folder / "run.json"
        return read_json(run).get("made_of", {}) if run.is_file() else {}
