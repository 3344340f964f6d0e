"""On a GPU: speed and memory of 7B and 8B LoRA and QLoRA steps, the longest context in 24 GiB, and what `fit` foresaw.

    python bench/gpu.py [--models llama mistral] [--steps 6]

It has not been run yet: no GPU was at hand. Weights are random, in the shape of Llama-3.1-8B and Mistral-7B; rows are
random ids of full length, all learned. Each measurement is a process of its own, in which the trainer is that of
`sft train`. Published marks: torchtune on a 4090, QLoRA 7.4 GiB and 2413 tokens/s, LoRA 16.2 GiB and 3083; unsloth, 78
thousand tokens of context for an 8B QLoRA in 24 GB, where a plain stack with flash attention has some 5.8 thousand.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from train import ROOT, matrix_rate, plain_tokenizer

from sft.memory.fit import GIB, fit, solve_length
from sft.recipe import load
from sft.tokens.opened import Opened
from sft.train.choices import by_machine, settle

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "max_position_embeddings": 131_072, "rope_theta": 500_000.0},
    "mistral": {"model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 32_768, "sliding_window": None},
}  # fmt: skip
CARD = 24 * GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", nargs=4, metavar=("RECIPE", "CAP", "LENGTH", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        recipe, cap, length, steps = options.one
        print(json.dumps(one(recipe, int(cap), int(length), int(steps))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: there is no GPU here")
    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bfloat16 matrix products")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            folder = Path(temporary) / name
            save(folder, SHAPES[name])
            for method in ("QLoRA", "LoRA"):
                recipe = write_recipe(folder, method, 2, 2048)
                found = measured(recipe, 0, 2048, options.steps)
                tell(f"{name} {method}, 2 x 2048", found, foreseen(recipe), rate)
            recipe = write_recipe(folder, "QLoRA", 1, 131_072)
            length = solve_length(load(recipe), CARD)
            print(f"{name} QLoRA: `sft fit` foresees {length:,} tokens in 24 GiB")
            while length and (found := measured(recipe, CARD, length, 2)) is None:
                print(f"  {length:,} tokens did not fit")
                length = length * 95 // 100 // 64 * 64
            if length:
                longest = load(recipe, [f"trainer.max_length={length}"])
                tell(f"{name} QLoRA, 1 x {length:,} in 24 GiB", found, fit(longest).memory.peak, rate)


def write_recipe(folder: Path, method: str, rows: int, length: int) -> str:
    """A recipe of r=8 on all linear layers, its rows and tokenizer beside it."""
    from ruamel.yaml import YAML

    (folder / "rows.jsonl").write_text('{"text": "a"}\n' * 20)
    recipe = {
        "model": str(folder), "template": "running_text", "data": {"train": str(folder / "rows.jsonl")},
        "quantization": "4bit" if method == "QLoRA" else "none", "lora": {"r": 8, "lora_alpha": 16},
        "trainer": {"per_device_train_batch_size": rows, "max_length": length, "learning_rate": 1e-4},
        "output": str(folder / "run"),
    }  # fmt: skip
    file = folder / f"{method}-{rows}.yaml"
    YAML().dump(recipe, file)
    return str(file)


def save(folder: Path, shape: dict[str, Any]) -> None:
    """Random bf16 weights as safetensors, so that they are quantised as real ones are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    plain_tokenizer(["a b c"], 300).save_pretrained(folder)


def measured(recipe: str, cap: int, length: int, steps: int) -> dict[str, float] | None:
    """One measurement in its own process; None where memory did not suffice."""
    command = [sys.executable, __file__, "--one", recipe, str(cap), str(length), str(steps)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return None
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(file: str, cap: int, length: int, steps: int) -> dict[str, float]:
    """Train some steps with the trainer of `sft train`; the first is not timed."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from sft.model.adapter import add_adapter
    from sft.model.load import load_base
    from sft.tokens.prepare import Tokens
    from sft.train.arguments import arguments
    from sft.train.trainer import make_trainer

    if cap:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
    settings = [f"trainer.max_length={length}", f"trainer.max_steps={steps}", "trainer.logging_steps=1000"]
    recipe = load(file, settings + (["trainer.activation_checkpointing=true"] if cap else []))
    recipe = settle(recipe, by_machine(recipe))
    tokenizer = Opened(recipe).tokenizer
    ids = torch.randint(300, (64, length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    model = add_adapter(load_base(recipe, tokenizer, training=True), recipe)
    trainer = make_trainer(recipe, model, tokenizer, Tokens(rows, rows, {}, ""), arguments(recipe))
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    tokens = trainer.args.per_device_train_batch_size * length
    timed = (times[-1] - times[0]) / (len(times) - 1)
    return {
        "seconds": timed, "tokens": tokens, "peak": float(torch.cuda.max_memory_allocated()),
        "checkpointing": float(trainer.args.activation_checkpointing),
    }  # fmt: skip


def tell(what: str, found: dict[str, float] | None, predicted: int, rate: float) -> None:
    if found is None:
        print(f"{what}: did not fit")
        return
    speed = found["tokens"] / found["seconds"]
    weights = 32 * 4096 * (4096 * 2.5 + 3 * 14_336)  # of both shapes' layers: q, k, v, o and the MLP
    work = 4 * weights * found["tokens"]
    print(
        f"{what}: {speed:,.0f} tokens/s, {found['peak'] / GIB:.2f} GiB (foreseen {predicted / GIB:.2f}), "
        f"{work / found['seconds'] / rate:.0%} of the matrix rate, checkpointing {bool(found['checkpointing'])}"
    )


def foreseen(file: str) -> int:
    """The peak by `sft fit`, with what training chooses on this card."""
    recipe = load(file)
    return fit(settle(recipe, by_machine(recipe))).memory.peak


if __name__ == "__main__":
    main()
