"""Rows a second from a file to masked tokens, beside TRL's own preparation of the same rows; memory; the second start.

    python bench/prepare.py [--rows 60000] [--repeats 3] [--memory]

Each measurement is a process of its own, the sides take turns, and imports are not counted. TRL reads the file with
`datasets`, tokenises and masks in SFTTrainer's constructor (of a model of two layers, width 8), in one process, its
default. Ours also checks each row, counts, and draws the held-out rows. The tokenizer is GPT-2's where
REAL_DATA/tokenizers/gpt2 is there, else a byte-level BPE trained on the rows.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train import plain_tokenizer

WORDS = ["the", "a", "fox", "hen", "ran", "into", "old", "forest", "where", "they", "met", "three", "small", "bears",
         "were", "cooking", "soup", "for", "dinner", "and", "said", "nothing", "about", "it", "because"]  # fmt: skip


def main() -> None:
    options = _options()
    if options.side:
        print(json.dumps({"ours": _ours, "second": _ours, "trl": _trl}[options.side](options.folder, options.rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder, options.rows)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "second": [], "trl": []}
        for _ in range(options.repeats):
            for side, results in found.items():  # "second" comes after "ours" and finds its cache
                results.append(_measure(side, folder, options.rows))
        speed = {side: [options.rows / each["seconds"] for each in results] for side, results in found.items()}
        tokens = found["ours"][0]["tokens"] / options.rows
        print(f"{options.rows:,} rows of {tokens:.0f} tokens, {options.repeats} times, median (lowest to highest)")
        for side, name in (("ours", "this project"), ("trl", "TRL")):
            some = sorted(speed[side])
            print(f"  {name:<14}{statistics.median(some):>10,.0f} rows/s ({some[0]:,.0f} to {some[-1]:,.0f})")
        ratios = sorted(a / b for a, b in zip(speed["ours"], speed["trl"], strict=True))
        print(f"  ratio         {statistics.median(ratios):>10.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
        again = statistics.median(each["seconds"] for each in found["second"])
        print(f"  second start  {again:>10.2f} s, from the cache")
        if options.memory:
            for rows in (10_000, 100_000, 1_000_000):
                _make(folder, rows)
                peak = _measure("ours", folder, rows)["peak"] / 2**20
                print(f"  {rows:>9,} rows: {peak:,.0f} MiB at the peak")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peaks of 10 thousand to 1 million rows as well")
    parser.add_argument("--side", choices=["ours", "second", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(folder: Path, rows: int) -> None:
    """A file of short rows, no two alike."""
    random.seed(rows)
    with (folder / f"{rows}.jsonl").open("w") as file:
        for i in range(rows):
            prompt, output = " ".join(random.choices(WORDS, k=8)), " ".join(random.choices(WORDS, k=11))
            file.write(json.dumps({"prompt": f"{prompt} {i}.\n", "completion": f"{output}."}) + "\n")


def _measure(side: str, folder: Path, rows: int) -> dict[str, float]:
    """One side in a process of its own."""
    if side != "second":
        for old in (folder / "runs", folder / "cache"):
            subprocess.run(["rm", "-rf", str(old)], check=True)
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rows", str(rows)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _tokenizer(folder: Path, rows: int) -> Path:
    """The folder of a tokenizer."""
    real = Path(os.environ.get("REAL_DATA", "")) / "tokenizers" / "gpt2"
    if "REAL_DATA" in os.environ and real.is_dir():
        return real
    made = folder / "tokenizer"
    if not made.is_dir():
        plain_tokenizer((folder / f"{rows}.jsonl").read_text().splitlines(), 4096).save_pretrained(made)
    return made


def _ours(folder: Path, rows: int) -> dict[str, float]:
    import gc

    import datasets  # noqa: F401  # which is imported when it is needed
    import transformers  # noqa: F401

    from sft.recipe import load
    from sft.tokens.opened import Opened

    gc.set_threshold(100_000, 50, 100)  # as the command line does
    recipe = folder / "recipe.yaml"
    tokenizer = _tokenizer(folder, rows)
    settings = {"model": str(tokenizer), "template": "story", "data": {"train": str(folder / f"{rows}.jsonl")}}
    settings["data"] |= {"columns": {"output": "completion"}}  # type: ignore[operator]
    recipe.write_text(json.dumps(settings | {"template_options": {"separator": ""}, "output": str(folder / "runs/r")}))
    loaded = load(recipe)
    opened = Opened(loaded)
    _ = opened.tokenizer  # is not timed
    started = time.perf_counter()
    tokens = opened.tokens
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": _peak(), "tokens": sum(c.tokens for c in tokens.counts.values())}


def _trl(folder: Path, rows: int) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(_tokenizer(folder, rows))
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=8, eos_token_id=tokenizer.eos_token_id)
    model = GPT2LMHeadModel(config)
    args = SFTConfig(output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none")
    started = time.perf_counter()
    data = load_dataset("json", data_files=str(folder / f"{rows}.jsonl"), split="train")
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    return {"seconds": time.perf_counter() - started, "peak": _peak()}


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
