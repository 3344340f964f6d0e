"""Seconds from the command to the first optimizer step of a tiny model, against a plain script; and of `sft --help`.

python bench/start.py [--repeats 5]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train import ROOT, set_up

PLAIN = """
import sys, time
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("first step", flush=True)
        control.should_training_stop = True

rows = load_dataset("json", data_files=sys.argv[1] + "/train.jsonl", split="train")
args = SFTConfig(output_dir=sys.argv[2], use_cpu=not torch.cuda.is_available(), max_steps=1, save_strategy="no")
SFTTrainer(sys.argv[1] + "/model", args=args, train_dataset=rows, callbacks=[Stop()],
           peft_config=LoraConfig(r=16, target_modules="all-linear")).train()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder, 64, "lora", {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2})
        (folder / "plain.py").write_text(PLAIN)
        recipe, sft = str(folder / "recipe.yaml"), [sys.executable, "-m", "sft"]
        one = ["trainer.max_steps=1", "trainer.logging_steps=1"]
        one += ["trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1"]  # as in the script
        commands = {
            "plain script, first step": ([sys.executable, str(folder / "plain.py"), str(folder)], r"first step"),
            "sft train, first step": ([*sft, "train", recipe, *one], r"step 1/1"),
            "sft check --show 1": ([*sft, "check", recipe, "--show", "1"], None),
            "sft --help": ([*sft, "--help"], None),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(repeats):
            for name, (command, sign) in commands.items():
                out = str(folder / f"{turn}-{name.split()[0]}-{name.split()[1].strip(',-')}" / "run")
                place = [] if name == "sft --help" else [f"output={out}"] if command[1] == "-m" else [out]
                seconds[name].append(until([*command, *place], sign, folder / f"cache-{turn}"))
    for name, times in seconds.items():
        print(f"{name:<26} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})")


def until(command: list[str], sign: str | None, cache: Path) -> float:
    """Seconds until a line with the sign is printed, or until the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    started, seen = time.monotonic(), 0.0
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cache.parent
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if sign and not seen and re.search(sign, line):
            seen = time.monotonic() - started
    if process.wait() or (sign and not seen):
        raise SystemExit("".join(said)[-3000:])
    return seen or time.monotonic() - started


if __name__ == "__main__":
    main()
