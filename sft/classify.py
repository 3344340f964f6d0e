"""Classification: the same backbone with a head on the last token, trained to tell the class of a sequence."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, PrinterCallback, Trainer

from sft import UserError
from sft.check import refuse
from sft.choices import by_machine, settle
from sft.codec import Codec
from sft.data import max_length, prepare
from sft.model import check_model, keep_freed_memory, load_classifier
from sft.recipe import Recipe
from sft.run import claim, finished
from sft.show import say
from sft.split import TEST, TRAIN, Split
from sft.template import load_template
from sft.tokenizer import load_tokenizer
from sft.train import MarkWhole, Progress, arguments, run, use_all_cores
from sft.unusable import refuse_unusable


@dataclass(frozen=True)
class Labelled:
    """Rows with their classes: columns input_ids, label (a number), and where, text and name (of the class)."""

    train: Dataset
    test: Dataset
    classes: list[str]
    """The names of the classes, in the order of their numbers."""
    key: str
    """Hash of the rows."""


def train(recipe: Recipe) -> Path:
    """Train a classifier into the run folder and return the folder of the model.

    It starts from the recipe's model, or from nothing where that is a mapping. A run that is finished is left as it
    is; one that was interrupted goes on from its last whole checkpoint.
    """
    keep_freed_memory()
    choices = by_machine(recipe)
    settled = settle(recipe, choices)
    args = arguments(settled)
    use_all_cores(args)
    with PartialState().main_process_first():
        tokenizer = load_tokenizer(recipe)
        check_model(recipe, tokenizer)
        rows = labelled(recipe, tokenizer)
        tokens = prepare(recipe, tokenizer)
        refuse(recipe, tokens)
        claim(recipe, rows.key)
    if finished(recipe):
        say(f"{recipe.trained}: trained already; delete {recipe.folder} to train again")
        return recipe.trained
    say(_told(rows))
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
    if recipe.eval.training_rows:
        drawn = np.random.default_rng(recipe.eval.seed).permutation(len(rows.train))[: recipe.eval.training_rows]
        trainer.seen = rows.train.select(sorted(drawn.tolist()))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(trainer))
    trainer.add_callback(MarkWhole())
    first = rows.train[0]
    data = {
        "counts": {side: vars(replace(counts, supervised=counts.rows)) for side, counts in tokens.counts.items()},
        "tokens": rows.key,
        "prompt_format": "plain",
        "choices": [vars(choice) for choice in choices],
        "example": [(f"{first['text']} → ", False), (first["name"], True)],
    }
    return run(settled, trainer, tokenizer, data)


def check(recipe: Recipe) -> None:
    """What `sft check` tells beside the tokens. Raises UserError as `labelled` does."""
    say(_told(labelled(recipe, load_tokenizer(recipe))))


def labelled(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Labelled:
    """The rows of a recipe with their classes, on the side of the split where a language model of the same data has
    them: what it was trained on is never held out here.

    Raises UserError where a label is missing, is met on the held-out side alone or is the only one, or where a row is
    too long.
    """
    template = load_template(recipe)
    if template.label is None:
        raise UserError(f"template `{recipe.template}` has no `label`, which `task: classification` learns to tell")
    refuse_unusable(recipe, template)
    codec, split = Codec(tokenizer, "plain"), Split(recipe.data, template)
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
    key = hashlib.sha256(json.dumps([train.to_dict(), test.to_dict()]).encode()).hexdigest()[:16]
    return Labelled(train, test, classes, key)


def _told(rows: Labelled) -> str:
    return f"{len(rows.train):,} rows to train on and {len(rows.test):,} held out, of {len(rows.classes)} classes"


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
    if long := [row for row, some in zip(rows, ids, strict=True) if len(some) > max_length(recipe)]:
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
