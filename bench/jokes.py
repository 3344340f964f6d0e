"""A published tutorial's work: GPT-2 (124M) on 3,000 one-line jokes for 10 epochs, 44 h 36 min on a CPU.

    python bench/jokes.py [--method lora full] [--epochs 10]

The architecture is GPT-2's with random weights, and the jokes are those of recipes/data/jokes.py: the time is that of
the real thing, the loss is not. `--epochs 1` runs a tenth and says what ten would take by it.
"""

import argparse
import csv
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML
from train import ROOT, plain_tokenizer

TUTORIAL = 44 * 3600 + 36 * 60
COUNT, EPOCHS, VOCABULARY = 3000, 10, 50_257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder)
        for method in options.method:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            recipe, epochs = folder / f"{method}.yaml", f"trainer.num_train_epochs={options.epochs}"
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "sft", "train", str(recipe), epochs], env=environment, check=True)
            seconds = time.monotonic() - started
            record = json.loads((folder / "runs" / method / "train.json").read_text())
            around = seconds - record["seconds"]
            whole = around + record["seconds"] * EPOCHS / options.epochs
            said = f"{whole / 60:.1f} minutes"
            if options.epochs != EPOCHS:
                said = f"{seconds / 60:.1f} minutes for {options.epochs:g} epochs, so about {said} for {EPOCHS}"
            print(
                f"{method}: {said}, whole process ({around:.0f} s of it around training); the tutorial's time is x "
                f"{TUTORIAL / whole:.0f}; peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB", flush=True
            )  # fmt: skip


def set_up(folder: Path) -> None:
    """3,000 jokes as a CSV, a tokenizer of theirs, a model of GPT-2's size, and a recipe of either method."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = runpy.run_path(str(ROOT / "recipes" / "data" / "jokes.py"))["rows"]
    made = [row["text"] for row in rows("train")]
    jokes = Random(0).choices(made, k=COUNT)
    with (folder / "jokes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([joke] for joke in jokes)])
    plain_tokenizer(jokes, VOCABULARY).save_pretrained(folder / "model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY)).save_pretrained(folder / "model")
    for method in ("lora", "full"):
        trainer: dict[str, Any] = {"per_device_train_batch_size": 16, "max_length": 256, "logging_steps": 50}
        recipe: dict[str, Any] = {
            "model": str(folder / "model"),
            "template": "running_text",
            "data": {"train": str(folder / "jokes.csv"), "test_fraction": 0.01},
            "trainer": trainer | {"learning_rate": 2e-4 if method == "lora" else 5e-5, "save_strategy": "no"},
            "check": {"max_duplicates": 1.0},
            "output": str(folder / "runs" / method),
        }
        if method == "lora":
            recipe["lora"] = {"r": 16, "lora_alpha": 32}
        YAML().dump(recipe, folder / f"{method}.yaml")


if __name__ == "__main__":
    main()
