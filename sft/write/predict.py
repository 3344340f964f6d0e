"""Losses on held-out rows, and what a model writes after their prompts, as files that scores are made of."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sft.files import write_json, write_text
from sft.model.loss import output_losses
from sft.recipe import Recipe
from sft.show import say
from sft.tokens.codec import Codec
from sft.write.generate import write


def rows_to_ask(test: Dataset, count: int, seed: int) -> Dataset:
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
