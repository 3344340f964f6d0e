"""How far a model is from the one that was trained: merged by each route, and in each program that it is exported to.

    python bench/parity.py [ARCHITECTURE ...]

For each architecture of the shipped recipes a small model is trained on tales and an adapter on riddle tales after it,
by LoRA, and by QLoRA where a recipe does that. Adapter and base are merged through the disk, exported, opened afresh
and compared on held-out rows. It prints a table in Markdown: the difference of the logits over their spread, of merged
models to the one that was trained, of exports to the merged one; `*` is past the tolerance, and a greedy text that
differs too. A minute or two for each line on one core; GGUF needs llama-cpp-python.
"""

import contextlib
import io
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft import UserError, export
from sft.files import read_json
from sft.memory import model_facts
from sft.merge import MergeOptions, merge
from sft.recipe import Recipe
from sft.recipe.read import load, shipped
from sft.train.stage import train

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

COLUMNS = {
    "none": {"LoRA, float32": "float32", "LoRA, bfloat16": "bfloat16"},
    "4bit": {"QLoRA, dequantised base": "dequantized", "QLoRA, original base": "original"},
}
"""Quantisation -> column -> dtype or route of the merge."""
TYPES = ("f32", "q8_0")


def cases() -> dict[tuple[str, str], dict[str, Any]]:
    """(architecture, quantisation) -> the config of a small model of it; as the shipped recipes have them, and 8bit."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in shipped():
        recipe = load(path)
        if not recipe.has_adapter:
            continue
        model: Any = recipe.base.model if recipe.base else (model_facts.known(str(recipe.model)) or {})["config"]
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


def merged(recipe: Recipe) -> dict[str, str]:
    """Column -> how far the merged model is from the one that was trained."""
    cells = {}
    for column, how in COLUMNS[recipe.quantization].items():
        options = MergeOptions(dtype=how) if recipe.quantization == "none" else MergeOptions(how, "float32")
        with contextlib.redirect_stdout(io.StringIO()):
            found = read_json(merge(recipe, options) / "parity.json")
        sides = found["trained"]["as_scored"], found["folder"]["in_use"]
        farthest = max(side["relative_difference"] for side in sides)
        cells[column] = cell({"relative_difference": farthest, "problems": found["problems"]})
    return cells


def exported(recipe: Recipe) -> dict[str, str]:
    """Column -> how far an export is from the merged model, the farthest of the files that it is made of."""
    cells = {}
    for target, files in (("onnx", {"ONNX": ()}), ("gguf", {f"GGUF {kind}": (kind,) for kind in TYPES})):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                export.export(recipe, [target], {"gguf": ",".join(TYPES)})
        except UserError:  # what llama.cpp does not run, or it is not installed
            cells |= dict.fromkeys(files, "none")
            continue
        report = read_json(recipe.folder / "export" / target / "parity.json")
        for column, names in files.items():
            found = [v for k, v in report.items() if isinstance(v, dict) and "mean_kl" in v and k in (names or [k])]
            worst = max(found, key=lambda figures: figures["relative_difference"])
            cells[column] = cell(
                worst | {"problems": [p for p in report["problems"] if not names or names[0] in p or ".gguf" not in p]}
            )
    return cells


def cell(found: dict[str, Any]) -> str:
    return f"{found['relative_difference']:.0e}" + ("*" if found["problems"] else "")


def main(wanted: list[str]) -> None:
    """Print the table, a line as soon as it is known."""
    found = cases()
    header = [*COLUMNS["none"], *COLUMNS["4bit"], "ONNX", *(f"GGUF {kind}" for kind in TYPES)]
    print(f"| architecture | {' | '.join(header)} |\n|---|{'---|' * len(header)}")
    for kind in dict.fromkeys(kind for kind, _ in found):
        if wanted and kind not in wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            config = found.get((kind, "none")) or found[kind, "4bit"]
            recipe = trained(Path(name), config, "none")
            cells = merged(recipe) | exported(recipe)
            if (kind, "4bit") in found:
                cells |= merged(trained(Path(name), config, "4bit"))
        print(f"| {kind} | {' | '.join(cells.get(column, '') for column in header)} |", flush=True)
    if not find_spec("llama_cpp"):
        print("\nGGUF was not tried: llama-cpp-python is not installed.")


if __name__ == "__main__":
    main(sys.argv[1:])
