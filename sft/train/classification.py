"""Classification: the same backbone with a head on the last token, trained to tell the class of a sequence."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer
from trl import SFTConfig

from sft import UserError
from sft.model.load import load_classifier
from sft.recipe import Recipe
from sft.rows.split import TEST, TRAIN, Split
from sft.rows.unusable import refuse_unusable
from sft.show import say
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.tokens.provenance import digest
from sft.train.choices import Choice, settle
from sft.train.trainer import Ready, equip


@dataclass(frozen=True)
class Labelled:
    """Rows with their classes: columns input_ids, label (a number), and where, text and name (of the class)."""

    train: Dataset
    test: Dataset
    classes: list[str]
    """The names of the classes, in the order of their numbers."""
    digests: Mapping[str, str]
    """Side -> hash of its rows and classes."""

    def line(self) -> str:
        """How many there are, for the terminal."""
        return f"{len(self.train):,} rows to train on and {len(self.test):,} held out, of {len(self.classes)} classes"


def ready(opened: Opened, rows: Labelled, choices: Sequence[Choice], args: SFTConfig) -> Ready:
    """The trainer of a classifier. It starts from the recipe's model, or from nothing where that is a mapping."""
    recipe, tokenizer = opened.recipe, opened.tokenizer
    say(rows.line())
    for choice in choices:
        say(f"chosen: {choice}")
    trainer = ClassTrainer(
        model=load_classifier(recipe, tokenizer, rows.classes),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=_accuracy,
    )
    equip(trainer, recipe, rows.train)
    first, counts = rows.train[0], opened.tokens.counts
    about = {
        "counts": {side: vars(replace(some, supervised=some.rows)) for side, some in counts.items()},
        "prompt_format": "plain",
        "choices": [vars(choice) for choice in choices],
        "example": [(f"{first['text']} → ", False), (first["name"], True)],
    }
    return Ready(settle(recipe, choices), trainer, about)


def labelled(opened: Opened) -> Labelled:
    """The rows of a recipe with their classes, on the side of the split where a language model of the same data has
    them: what it was trained on is never held out here.

    Raises UserError where a label is missing, is met on the held-out side alone or is the only one, or where a row is
    too long.
    """
    recipe, template = opened.recipe, opened.template
    if template.label is None:
        raise UserError(f"template `{recipe.template}` has no `label`, which `task: classification` learns to tell")
    refuse_unusable(recipe, template)
    codec, split = Codec(opened.tokenizer, "plain"), Split(recipe.data, template)
    found: list[_Row] = []
    for sample in split.samples():
        text = sample.text + sample.output
        found.append(_Row(sample.record, sample.where, text, str(template.label(sample.row))))
    sides = split.sides()
    classes = sorted({row.name for row in found if sides[row.record] == TRAIN}, key=_in_order)
    if not classes:
        raise UserError(f"{recipe.data.train}: no row is left to train on, all stand in `data.test` too; add others")
    if len(classes) == 1:
        raise UserError(
            f"{recipe.data.train}: all rows to train on are of one class, {classes[0]!r}; add rows of others"
        )
    train, test = (
        _tokenised(recipe, codec, [row for row in found if sides[row.record] == side], classes)
        for side in (TRAIN, TEST)
    )
    arrays = {"train": train, "test": test}
    digests = {side: digest([classes, rows["input_ids"][:], rows["label"][:]]) for side, rows in arrays.items()}
    return Labelled(train, test, classes, digests)


class _Row(NamedTuple):
    record: int
    where: str
    text: str
    name: str


def _tokenised(recipe: Recipe, codec: Codec, rows: Sequence[_Row], classes: Sequence[str]) -> Dataset:
    """The rows of one side, each from its start token to its end token."""
    if unknown := [row for row in rows if row.name not in classes]:
        raise UserError(f"{unknown[0].where}: no row to train on has its label, {unknown[0].name!r}; add some")
    start = codec.prompts([""])[0]
    ids = [start + tail + codec.end for tail in codec.outputs([row.text for row in rows])]
    if long := [row for row, some in zip(rows, ids, strict=True) if len(some) > recipe.max_length]:
        raise UserError(f"{long[0].where}: is one of {len(long)} rows longer than `trainer.max_length`; raise it")
    columns = {name: [getattr(row, name) for row in rows] for name in ("where", "text", "name")}
    return Dataset.from_dict({"input_ids": ids, "label": [classes.index(row.name) for row in rows]} | columns)


class ClassTrainer(Trainer):
    """Trainer that measures a sample of the training side too, and counts what it has seen."""

    tokens_seen = 0
    tokens_learned = 0
    seen: Dataset | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.tokens_seen += int(inputs["attention_mask"].sum())
        self.tokens_learned += len(inputs["labels"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.seen is not None:
            super().evaluate(self.seen, ignore_keys, "seen")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _accuracy(result: Any) -> dict[str, float]:
    return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers before texts, each in their order."""
    number = re.fullmatch(r"-?[0-9]{1,18}", name) is not None
    return not number, int(name) if number else 0, name
