"""The evaluation stage: base and tuned model on the same held-out rows with the same decoding, then their scores."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from eval.ngrams import NAMES, ngram_losses
from eval.score import score
from eval.table import in_words
from sft import UserError
from sft.files import made_already, mark_made, whole_folder, write_json
from sft.model.load import decoding, keep_freed_memory, load_base, load_trained
from sft.recipe import Recipe
from sft.run import check_owner, finished
from sft.show import say
from sft.tokens.opened import Opened
from sft.tokens.prepare import Tokens
from sft.write.generate import answering, as_base
from sft.write.predict import chosen, predict


def evaluate_run(recipe: Recipe) -> Path:
    """Predict and score into `runs/NAME/eval` and return that folder. What is there already and fits is kept."""
    if not finished(recipe):
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    opened = Opened(recipe)
    tokenizer, template, tokens, codec = opened.tokenizer, opened.template, opened.tokens, opened.codec
    check_owner(opened, tokens.digests)
    made_of = {
        "rows": dict(tokens.digests),
        "generation": recipe.generation,
        "eval": recipe.eval.model_dump(),
        "trained": (recipe.folder / "train.json").stat().st_mtime,
    }
    if recipe.scratch is not None:
        made_of["scratch"] = _trained_scratch(recipe.scratch)
    folder = recipe.folder / "eval"
    if made_already(folder, made_of):
        say(f"{folder}: up to date")
        return folder

    keep_freed_memory()
    config = decoding(recipe, codec)
    shown = bool(template.metrics or template.picture)
    rows = chosen(tokens.test, recipe.eval.rows if shown else min(recipe.eval.rows, 4), recipe.eval.seed)
    with whole_folder(folder) as part:
        if recipe.scratch is not None:  # first, as it may not know all of the rows
            _predict_scratch(recipe, recipe.scratch, tokens.test, rows, part)
        if recipe.lora is None and not isinstance(recipe.model, dict):
            predict(load_base(recipe, tokenizer), codec, tokens.test, rows, config, recipe, part / "base")
        model = load_trained(recipe, tokenizer)
        if recipe.lora is not None:
            with as_base(model):
                predict(model, codec, tokens.test, rows, config, recipe, part / "base")
        with answering(model):
            predict(model, codec, tokens.test, rows, config, recipe, part / "tuned")
        for order in recipe.eval.ngrams:
            counted = ngram_losses(tokens.train, list(tokens.test), order, len(tokenizer))
            write_json(part / NAMES.get(order, f"{order}-gram") / "losses.json", counted)
        write_json(part / "scores.json", in_words(score(part, template, recipe.eval.seed, _others(recipe))))
        mark_made(part, made_of)
    return folder


def _others(recipe: Recipe) -> list[str]:
    """The columns beside base and tuned."""
    scratch = ["scratch"] if recipe.scratch is not None else []
    return scratch + [NAMES.get(order, f"{order}-gram") for order in recipe.eval.ngrams]


def _trained_scratch(scratch: Recipe) -> float:
    """When the third model was trained."""
    if not finished(scratch):
        raise UserError(f"{scratch.folder}: `eval.scratch` is not trained yet; ./launch.sh trains it first")
    return (scratch.folder / "train.json").stat().st_mtime


def _predict_scratch(recipe: Recipe, scratch: Recipe, test: Dataset, rows: Dataset, folder: Path) -> None:
    """The same for the model that was trained from nothing on the same data, with a tokenizer of its own."""
    opened = Opened(scratch)
    tokens, codec = opened.tokens, opened.codec
    check_owner(opened, tokens.digests)
    model, config = load_trained(scratch, opened.tokenizer), decoding(recipe, codec)
    predict(model, codec, _matched(test, tokens), _matched(rows, tokens), config, recipe, folder / "scratch")
    write_json(folder / "bytes.json", [len(text.encode()) for text in test["reference"]])


def _matched(rows: Dataset, tokens: Tokens) -> Dataset:
    """The same held-out rows, in the same order, as another recipe tokenised them."""

    def names(some: Dataset) -> list[tuple[Any, ...]]:
        return list(zip(*(some[column] for column in ("where", "prompt", "reference")), strict=True))

    theirs = {name: i for i, name in enumerate(names(tokens.test))}
    if missing := [name[0] for name in names(rows) if name not in theirs]:
        raise UserError(
            f"{len(missing)} held-out rows are too long for the model of `eval.scratch`, the first is {missing[0]}; "
            "raise its `trainer.max_length`, or remove `eval.scratch`"
        )
    return tokens.test.select([theirs[name] for name in names(rows)])
