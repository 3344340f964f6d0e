"""The evaluation stage: what base and tuned model write on the same held-out rows, decoded alike; then its scores."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from eval.ngrams import ngram_losses, order_name
from eval.score import score, scored
from sft import UserError
from sft.files import altered, read_json, seal, sealed, whole_folder, write_json
from sft.model.adapter import as_base, in_weights
from sft.model.load import decoding, keep_freed_memory, load_base, load_trained
from sft.recipe import Recipe
from sft.run import check_owner, finished
from sft.tokens.opened import Opened
from sft.tokens.prepare import Tokens
from sft.write.predict import predict, rows_to_ask


def evaluate_run(recipe: Recipe) -> Path:
    """Let base and tuned model write into `runs/NAME/eval`, score that, and return the folder.

    Predictions are whole before a metric runs, and kept where they follow from the same run, rows and settings.
    """
    if not finished(recipe):
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    opened = Opened(recipe)
    check_owner(opened, opened.tokens.digests)
    folder, made_of = recipe.folder / "eval", _made_of(opened)
    if not sealed(folder, made_of):
        keep_freed_memory()
        with whole_folder(folder) as part:
            _predict(opened, part)
            seal(part, made_of)
    return _scored(opened)


def score_run(recipe: Recipe) -> Path:
    """Score what base and tuned model wrote, without a model, and return the folder.

    Raises UserError where there are no predictions, and where a metric cannot be opened, fails or gives no numbers.
    """
    opened = Opened(recipe)
    check_owner(opened)
    return _scored(opened)


def _scored(opened: Opened) -> Path:
    """The same for a run that is known to be this recipe's."""
    recipe, folder = opened.recipe, predictions_of(opened.recipe)
    return scored(opened, folder, lambda: score(folder, opened.template, recipe.eval.seed, _others(recipe)))


def predictions_of(recipe: Recipe) -> Path:
    """The folder of a run's predictions. Raises UserError where they are not there, or not as they were written."""
    folder = recipe.folder / "eval"
    if (folder / "made_of.json").is_file():
        raise UserError(f"{folder}: an earlier version wrote it; run `sft eval`, which writes and scores it again")
    if not (folder / "files.json").is_file():
        raise UserError(f"{folder}: holds no predictions to score; run `sft eval` first")
    if broken := altered(folder, read_json(folder / "files.json")["sha256"]):
        raise UserError(f"{folder / broken}: missing, or not as it was written; run `sft eval` again")
    return folder


def _made_of(opened: Opened) -> dict[str, Any]:
    """What predictions follow from: the model and the rows, how they are asked, and by which settings."""
    recipe = opened.recipe
    made_of = {
        "rows": dict(opened.tokens.digests),
        "generation": recipe.generation,
        "eval": recipe.eval.model_dump(),
        "asked": _asked(opened),
        "trained": read_json(recipe.folder / "train.json")["sha256"],
    }
    return made_of if recipe.scratch is None else made_of | {"scratch": _trained_scratch(recipe.scratch)}


def _asked(opened: Opened) -> int:
    """Prompts to generate from: a few for a report's samples where nothing is made of them."""
    rows = opened.recipe.eval.rows
    return rows if opened.template.metrics or opened.template.picture else min(rows, 4)


def _predict(opened: Opened, part: Path) -> None:
    """Losses and predictions of all models, each in a folder of its own."""
    recipe, tokenizer, tokens, codec = opened.recipe, opened.tokenizer, opened.tokens, opened.codec
    config = decoding(recipe, codec)
    rows = rows_to_ask(tokens.test, _asked(opened), recipe.eval.seed)
    if recipe.scratch is not None:  # first, as it may not know all of the rows
        _predict_scratch(recipe, recipe.scratch, tokens.test, rows, part)
    if not recipe.has_adapter and not isinstance(recipe.model, dict):
        predict(load_base(recipe, tokenizer), codec, tokens.test, rows, config, recipe, part / "base")
    model = load_trained(recipe, tokenizer)
    if recipe.has_adapter:
        with as_base(model):
            predict(model, codec, tokens.test, rows, config, recipe, part / "base")
    with in_weights(model):
        predict(model, codec, tokens.test, rows, config, recipe, part / "tuned")
    for order in recipe.eval.ngrams:
        counted = ngram_losses(tokens.train, list(tokens.test), order, len(tokenizer))
        write_json(part / order_name(order) / "losses.json", counted)


def _others(recipe: Recipe) -> list[str]:
    """The columns beside base and tuned."""
    return (["scratch"] if recipe.scratch is not None else []) + [order_name(order) for order in recipe.eval.ngrams]


def _trained_scratch(scratch: Recipe) -> dict[str, str]:
    """The files of the third model."""
    if not finished(scratch):
        raise UserError(f"{scratch.folder}: `eval.scratch` is not trained yet; ./launch.sh trains it first")
    return dict(read_json(scratch.folder / "train.json")["sha256"])


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
