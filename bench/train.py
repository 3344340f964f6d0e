"""Training against the script that a person would write with TRL: seconds of the whole process, memory, held-out loss.

    python bench/train.py [--repeats 3] [--rows 512] [--method lora|full] [--sides defaults flags sft]

The work: LoRA r=16 on all linear layers of a Llama-shaped model of 23 million random parameters, one epoch of 512
school problems (`REAL_DATA/datasets/gsm8k`, or problems made here of like length), 16 rows a step, loss on outputs
alone. `defaults` is a plain SFTTrainer script, `flags` the same with the best flags known, `sft` is `sft train` of a
recipe. Each run is a process of its own, the sides take turns, and one scorer measures what each learned.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 6, "max_position_embeddings": 1024, "tie_word_embeddings": False}  # fmt: skip
VOCABULARY = 16_384
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SAME: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 2e-3, "max_length": 1024, "logging_steps": 8}
"""What all sides share, with 16 rows a step."""


def plain(folder: Path, out: Path, **flags: Any) -> None:
    """The script of a person who knows TRL, with SFTConfig's defaults."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    args = SFTConfig(output_dir=str(out), use_cpu=not torch.cuda.is_available(), **SAME, **flags)
    full = (folder / "full").exists()
    trainer = SFTTrainer(
        str(folder / "model"), args=args, train_dataset=rows, peft_config=None if full else LoraConfig(**LORA)
    )
    trainer.train()
    trainer.save_model(str(out))


SIDES: dict[str, dict[str, Any]] = {
    "defaults": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "flags": {
        "per_device_train_batch_size": 16,
        "bf16": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "sft": {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=Path, help="keep everything there")
    parser.add_argument("--plain", nargs=3, metavar=("SIDE", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        side, folder, out = options.plain
        plain(Path(folder), Path(out), **SIDES[side])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        tokens = set_up(folder, options.rows, options.method)
        results: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
        for turn in range(options.repeats):
            for side in options.sides:
                results[side].append(measured(side, folder, folder / f"{side}-{turn}" / "run"))
                print(side, {name: round(value, 3) for name, value in results[side][-1].items()}, flush=True)
        rate = matrix_rate()
    show(results, tokens, rate, work(tokens, options.method))


def set_up(folder: Path, count: int, method: str, shape: dict[str, Any] | None = None) -> dict[str, int]:
    """Rows, tokenizer, model and recipe in a folder; and how many tokens the rows have."""
    import torch
    from ruamel.yaml import YAML
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    if method == "full":
        (folder / "full").touch()
    texts = []
    for side, rows in problems(count).items():
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        texts += [row["prompt"] + row["completion"] for row in rows] if side == "train" else []
    tokenizer = plain_tokenizer(texts, VOCABULARY)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **(SHAPE | (shape or {})))).save_pretrained(folder / "model")
    recipe = {
        "model": str(folder / "model"),
        "template": str(folder / "problems.py"),
        "data": {side: str(folder / f"{side}.jsonl") for side in ("train", "test")},
        "lora": LORA,
        "trainer": SAME | SIDES["sft"],
    }
    if method == "full":
        del recipe["lora"]
    YAML().dump(recipe, folder / "recipe.yaml")
    (folder / "problems.py").write_text(
        "from data_templates import Template\n\n"
        "def template():\n"
        '    return Template({"prompt": "", "completion": ""}, lambda r: r["prompt"], lambda r: r["completion"])\n'
    )
    rows = problems(count)["train"]
    pairs = [[len(tokenizer(row[part])["input_ids"]) for part in ("prompt", "completion")] for row in rows]
    return {"rows": len(pairs), "all": sum(a + b + 1 for a, b in pairs), "learned": sum(b + 1 for _, b in pairs)}


def plain_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE as GPT-2 has it, trained on the texts, with an end and a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*special.values()], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def problems(count: int) -> dict[str, list[dict[str, str]]]:
    """Rows to train on, and 128 that are held out: GSM8K's own, or made ones of like length."""
    found = {}
    for side, n in (("train", count), ("test", 128)):
        if os.environ.get("REAL_DATA"):
            path = Path(os.environ["REAL_DATA"]) / "datasets" / "gsm8k" / f"{side}.jsonl"
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:n]]
            found[side] = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]
        else:
            found[side] = [made(Random(f"{side} {i}")) for i in range(n)]
    return found


def made(random: Random) -> dict[str, str]:
    """A problem of one to seven purchases, worked out."""
    who, total, steps, story = random.choice(["Mira", "Tom", "Ada", "Wen"]), 0, [], []
    for _ in range(random.choice([1, 2, 2, 3, 3, 4, 5, 7])):
        n, price = random.randint(2, 40), random.randint(2, 90)
        thing = random.choice(["notebooks", "pencils", "red kites", "lanterns", "boxes of candles", "pairs of boots"])
        story.append(f"Then {who} goes to the market and buys {n} {thing}, each of which costs {price} dollars.")
        total += n * price
        steps.append(
            f"The {thing} cost {n} * {price} = <<{n}*{price}={n * price}>>{n * price} dollars, {total} so far."
        )
    question = f"{who} has saved a lot. {' '.join(story)} How many dollars does {who} spend in all?\n"
    return {"prompt": question, "completion": "\n".join([*steps, f"#### {total}"])}


def measured(side: str, folder: Path, out: Path) -> dict[str, float]:
    """One run of a side: seconds by the wall and by the processor, peak memory in MiB, page faults, held-out loss."""
    if side == "sft":
        command = [sys.executable, "-m", "sft", "train", str(folder / "recipe.yaml"), f"output={out}"]
    else:
        command = [sys.executable, __file__, "--plain", side, str(folder), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent)}
    out.parent.mkdir(exist_ok=True)  # and nothing in it: each run tokenises again
    started = time.monotonic()
    with out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{side} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    trained = next(path for path in (out / "adapter", out / "model", out) if path.is_dir())
    return {
        "seconds": seconds,
        "processor": usage.ru_utime + usage.ru_stime,
        "system": usage.ru_stime,
        "MiB": usage.ru_maxrss / 1024,
        "faults": float(usage.ru_minflt),
        "loss": held_out(folder, trained),
    }


def held_out(folder: Path, trained: Path) -> float:
    """The loss on the outputs of the held-out rows, in fp32: the same tokens whoever trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft.model.loss import output_losses
    from sft.recipe import load
    from sft.tokens.opened import Opened

    recipe = load(folder / "recipe.yaml", [f"output={folder / 'scored'}"])
    adapted = (trained / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "model" if adapted else trained, dtype="float32")
    model = PeftModel.from_pretrained(model, str(trained)) if adapted else model
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    results = output_losses(model, Opened(recipe).tokens.test, 4096, tokenizer.pad_token_id)
    return sum(row.loss for row in results) / sum(row.tokens for row in results)


def work(tokens: dict[str, int], method: str) -> float:
    """Floating point operations of the matrix products that the epoch needs: no padding, the head on outputs alone.

    A product of a layer's weight costs 2 a weight and token forward, as much for the gradient of its input, and, where
    the weight itself is trained, as much again.
    """
    width, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    weights, head = layers * (4 * width**2 + 3 * width * inner), width * VOCABULARY
    return (6 if method == "full" else 4) * (weights * tokens["all"] + head * tokens["learned"])


def matrix_rate() -> float:
    """The best bfloat16 (else float32) matrix product of the card, or of the processor, in operations a second."""
    import torch

    from sft.model.load import has_bf16

    where, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=where) for _ in range(2))

    def seconds() -> float:
        started = time.perf_counter()
        a @ b
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds()  # on a card, it waits for what was drawn
    return float(2 * size**3 / min(seconds() for _ in range(20)))


def show(results: dict[str, list[dict[str, float]]], tokens: dict[str, int], rate: float, useful: float) -> None:
    """Medians, spread, and ratios to the last side."""
    print(f"\n{tokens['rows']} rows, {tokens['all']:,} tokens, {tokens['learned']:,} of them learned; useful work "
          f"{useful:.2e} operations; matrix products here: {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    median = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for side, runs in results.items()
    }
    last = median[list(median)[-1]]
    for side, runs in results.items():
        m, seconds = median[side], [run["seconds"] for run in runs]
        print(
            f"{side:<9} {m['seconds']:6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {m['processor']:6.1f} s of "
            f"processor ({m['system']:.1f} by the system), {m['MiB']:5.0f} MiB, {m['faults'] / 1e6:5.2f} M page faults,"
            f" held-out loss {m['loss']:.4f}; useful work at {useful / m['seconds'] / rate:.0%} of the products' rate; "
            f"x {m['seconds'] / last['seconds']:.2f} time, x {m['processor'] / last['processor']:.2f} processor"
        )


if __name__ == "__main__":
    main()
