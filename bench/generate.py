"""The evaluation's generation against a loop over prompts and against plain batches: seconds, and whether texts agree.

    python bench/generate.py [--repeats 3] [--prompts 64]

A small Llama is trained first on made problems, whole and then with LoRA, so that its answers end, and at different
lengths, as answers do. Then the same prompts are answered greedily in fp32 by the adapted model: one by one, in batches
of 16 in the order of the file, and by the function that `sft eval` calls. The three take turns in one process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from ruamel.yaml import YAML
from train import made

from sft.model.adapter import in_weights
from sft.model.load import decoding, keep_freed_memory, load_trained
from sft.recipe import Recipe, load
from sft.tokens.opened import Opened
from sft.train.stage import train
from sft.write.generate import write

NEW = 160
SHAPE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=3000, help="problems to train on")
    parser.add_argument("--folder", type=Path, help="keep the models there, and use those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        recipe = trained(options.folder or Path(temporary), options.rows)
        opened = Opened(recipe)
        tokenizer, codec = opened.tokenizer, opened.codec
        config = decoding(recipe, codec)
        prompts = codec.prompts([made(Random(f"test {i}"))["prompt"] for i in range(options.prompts)])
        ways: dict[str, Any] = {
            "one by one": lambda m: batched(m, codec, prompts, config, 1),
            "batches of 16": lambda m: batched(m, codec, prompts, config, 16),
            "sft eval": lambda m: own(m, codec, prompts, config, recipe.eval.batch_tokens),
        }
        model = load_trained(recipe, tokenizer).eval()
        keep_freed_memory()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        texts: dict[str, list[str]] = {}
        for _ in range(options.repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                texts[name] = way(model)
                seconds[name].append(time.perf_counter() - started)
    tokens = sum(len(ids) for ids in codec.outputs(texts["one by one"]))
    own_time = statistics.median(seconds["sft eval"])
    for name, times in seconds.items():
        same = sum(a == b for a, b in zip(texts[name], texts["one by one"], strict=True))
        m = statistics.median(times)
        print(f"{name:<14} {m:6.2f} s ({min(times):.2f} to {max(times):.2f}), {tokens / m:6,.0f} tokens/s, x "
              f"{m / own_time:.2f}; {same} of {len(prompts)} texts as one by one")  # fmt: skip


@torch.no_grad()
def batched(model: Any, codec: Any, prompts: list[list[int]], config: Any, size: int) -> list[str]:
    """What transformers' documentation shows: prompts in their order, padded on the left, so many at a time."""
    texts = []
    for i in range(0, len(prompts), size):
        some = prompts[i : i + size]
        width = max(map(len, some))
        ids = torch.tensor([[codec.pad] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        end = codec.end[-1]
        texts += codec.text([row[: row.index(end)] if end in row else row for row in output])
    return texts


def own(model: Any, codec: Any, prompts: list[list[int]], config: Any, batch_tokens: int) -> list[str]:
    with in_weights(model):
        return [text for text, _ in write(model, codec, prompts, config, batch_tokens)]


def trained(folder: Path, rows: int) -> Recipe:
    """The recipe of an adapter on a small model, both trained."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(made(Random(f"train {i}"))) + "\n" for i in range(rows)]
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    common: dict[str, Any] = {
        "template": "story",
        "template_options": {"separator": ""},
        "data": {"train": str(folder / "rows.jsonl"), "columns": {"output": "completion"}},
        "trainer": {"learning_rate": 2e-3, "warmup_steps": 10, "max_length": 512, "per_device_train_batch_size": 16},
        "generation": {"max_new_tokens": NEW},
    }
    base = common | {"model": SHAPE, "tokenizer": {"vocab_size": 1024}, "output": str(folder / "base")}
    base["trainer"] = common["trainer"] | {"num_train_epochs": 2}
    top = common | {"model": str(folder / "base.yaml"), "lora": {"r": 16}, "output": str(folder / "top")}
    top["trainer"] = common["trainer"] | {"max_steps": 10}
    for name, recipe in (("base", base), ("top", top)):
        YAML().dump(recipe, folder / f"{name}.yaml")
        train(load(folder / f"{name}.yaml"))
    return load(folder / "top.yaml")


if __name__ == "__main__":
    main()
