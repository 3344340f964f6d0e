"""The evaluation stage: base and tuned model on the same held-out rows with the same decoding, then their scores."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from eval.generate import as_base, write
from eval.score import score
from sft import UserError
from sft.codec import Codec
from sft.data import codec_of, prepare
from sft.files import damage, read_json, sizes, whole_folder, write_json, write_text
from sft.loss import output_losses
from sft.model import decoding, load_base, load_trained
from sft.recipe import Recipe
from sft.run import check_owner, finished
from sft.show import say
from sft.template import load_template
from sft.tokenizer import load_tokenizer


def evaluate_run(recipe: Recipe) -> Path:
    """Predict and score into `runs/NAME/eval` and return that folder. What is there already and fits is kept."""
    if not finished(recipe):
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    tokenizer, template = load_tokenizer(recipe), load_template(recipe)
    tokens, codec = prepare(recipe, tokenizer), codec_of(recipe, tokenizer)
    check_owner(recipe, tokens.key)
    made_of = {
        "tokens": tokens.key,
        "generation": recipe.generation,
        "eval": recipe.eval.model_dump(),
        "trained": (recipe.folder / "train.json").stat().st_mtime,
    }
    folder = recipe.folder / "eval"
    if (folder / "made_of.json").is_file():
        before = read_json(folder / "made_of.json")
        if before["made_of"] == made_of and damage(folder, before["files"]) is None:
            say(f"{folder}: up to date")
            return folder

    config = decoding(recipe, codec)
    rows = chosen(tokens.test, recipe.eval.rows if template.metrics else min(recipe.eval.rows, 4), recipe.eval.seed)
    with whole_folder(folder) as part:
        if recipe.lora is None and not isinstance(recipe.model, dict):
            predict(load_base(recipe, tokenizer), codec, tokens.test, rows, config, recipe, part / "base")
        model = load_trained(recipe, tokenizer)
        if recipe.lora is not None:
            with as_base(model):
                predict(model, codec, tokens.test, rows, config, recipe, part / "base")
        predict(model, codec, tokens.test, rows, config, recipe, part / "tuned")
        write_json(part / "scores.json", score(part, template, recipe.eval.seed))
        write_json(part / "made_of.json", {"made_of": made_of, "files": sizes(part)})
    return folder


def chosen(test: Dataset, count: int, seed: int) -> Dataset:
    """The held-out rows to generate from: all, or so many drawn by the seed, in the order of the file."""
    drawn = np.random.default_rng(seed).permutation(len(test))[:count]
    return test.select(sorted(drawn.tolist()))


def predict(model: Any, codec: Codec, test: Dataset, rows: Dataset, config: Any, recipe: Recipe, folder: Path) -> None:
    """Losses on all held-out rows, and what the model writes after the prompts of the chosen ones."""
    started = time.monotonic()
    losses = output_losses(model, test, recipe.eval.batch_tokens, codec.pad)
    torch.manual_seed(recipe.eval.seed)
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    written = write(model, codec, prompts, config, recipe.eval.batch_tokens)
    lines = [
        json.dumps(
            {
                "where": row["where"],
                "prompt": row["prompt"],
                "reference": row["reference"],
                "prediction": text,
                "ended": ended,
            },
            ensure_ascii=False,
        )
        for row, (text, ended) in zip(rows, written, strict=True)
    ]
    write_json(folder / "losses.json", losses)
    write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    say(f"{folder.name}: loss of {len(test)} rows and {len(rows)} predictions in {time.monotonic() - started:.0f} s")
