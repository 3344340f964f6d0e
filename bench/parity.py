"""How far a merged model is from the one that was trained: every architecture that a recipe names, by each route.

    python bench/parity.py [ARCHITECTURE ...]

For each architecture and quantisation of the shipped recipes a small model is trained on tales, an adapter on riddle
tales after it, and the two are merged through the disk, loaded afresh and compared on held-out rows. It prints a table
in Markdown; a minute for each line on one core is plenty.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft import facts
from sft.files import read_json
from sft.merge import Options, merge
from sft.recipe import Recipe, load, shipped
from sft.train import train

TALES = str(Path(__file__).parents[1] / "recipes" / "data" / "tales.py")
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
                         "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {}, "openai-gpt": {}, "falcon": {},
    "gpt_neo": {"intermediate_size": 128, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {"intermediate_size": 128}, "gptj": {"rotary_dim": 8}, "gpt_bigcode": {"n_inner": 128},
    "mistral": {"intermediate_size": 128, "num_key_value_heads": 2, "sliding_window": 64},
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 128, "num_key_value_heads": 4},
    "gemma": {"intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 16,
              "hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {"intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
"""What the shape of each architecture needs besides."""

SHAPED = ("use_parallel_residual", "multi_query", "parallel_attn", "bias", "alibi", "hidden_act",
          "new_decoder_architecture", "activation_function", "tie_word_embeddings")  # fmt: skip
"""Keys of a published config that make the architecture what it is, whatever its size."""

FIGURES = {"logits, largest": "largest_logit_difference", "of their spread": "relative_difference",
           "KL, mean": "mean_kl", "KL, largest": "largest_kl", "loss": "loss_difference"}  # fmt: skip
"""Column -> figure of `sft.parity.measure`."""


def cases() -> dict[tuple[str, str], dict[str, Any]]:
    """(architecture, quantisation) -> the config of a small model of it; as the shipped recipes have them, and 8bit."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in shipped():
        recipe = load(path)
        if recipe.lora is None:
            continue
        model: Any = recipe.base.model if recipe.base else (facts.known(str(recipe.model)) or {})["config"]
        kind = str(model["model_type"])
        config = SIZES | OWN[kind] | {key: model[key] for key in SHAPED if model.get(key) is not None}
        found.setdefault((kind, recipe.quantization), {"model_type": kind} | config)
    return found | {("llama", "8bit"): found["llama", "4bit"], ("gpt2", "8bit"): found["gpt2", "4bit"]}


def trained(folder: Path, config: dict[str, Any], quantization: str, steps: int = 40, rows: int = 200) -> Recipe:
    """A small model trained on tales, once for a `folder`, and an adapter on riddle tales after it."""
    shared: dict[str, Any] = {"max_length": 256, "max_steps": steps, "per_device_train_batch_size": 8, "bf16": False}
    shared |= {"use_cpu": True, "logging_steps": steps}
    base = {
        "model": config, "tokenizer": {"vocab_size": 512}, "template": "running_text", "output": str(folder / "base"),
        "data": {"train": TALES, "test": TALES, "options": {"kind": "mixed"}, "limit": rows},
        "trainer": shared | {"learning_rate": 5e-3}, "check": {"max_dropped": 0.5},
    }  # fmt: skip
    adapter = {
        "model": str(folder / "base.yaml"), "template": "story", "template_options": {"separator": " "},
        "data": {"train": TALES, "test": TALES, "options": {"kind": "riddle"}, "limit": rows},
        "lora": {"r": 8}, "quantization": quantization, "output": str(folder / quantization),
        "trainer": shared | {"learning_rate": 5e-3}, "check": {"max_dropped": 0.5}, "eval": {"rows": 4},
    }  # fmt: skip
    for name, recipe in (("base", base), ("adapter", adapter)):
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        train(load(folder / f"{name}.yaml"))
    return load(folder / "adapter.yaml")


def routes(quantization: str) -> Iterator[Options]:
    """The ways to merge that are compared."""
    for dtype in ("float32", "bfloat16", "float16"):
        yield Options("dequantized", dtype)
    if quantization != "none":
        yield Options("original", "float32")


def line(kind: str, quantization: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [kind, quantization, found["route"] or "", found["dtype"]]
    cells += [f"{found[name]:.1e}" for name in FIGURES.values()] + ["past it" if found["problems"] else ""]
    return f"| {' | '.join(cells)} |"


def main(wanted: list[str]) -> None:
    """Print the table, a line as soon as it is known."""
    header = ["architecture", "base", "route", "dtype", *FIGURES, "tolerance"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for (kind, quantization), config in cases().items():
        if wanted and kind not in wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            recipe = trained(Path(name), config, quantization)
            for options in routes(quantization):
                with contextlib.redirect_stdout(io.StringIO()):
                    folder = merge(recipe, options)
                print(line(kind, quantization, read_json(folder / "parity.json")), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
