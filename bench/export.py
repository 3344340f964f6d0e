"""How far each export is from the merged model, in the program that it is for: every architecture of the recipes.

    python bench/export.py [ARCHITECTURE ...]

The models are those of bench/parity.py. It prints a table in Markdown; where llama-cpp-python is not installed, GGUF is
left out. A minute for each line on one core is plenty.
"""

import contextlib
import io
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parity import cases, trained

from sft import UserError
from sft.export import Options, export
from sft.files import read_json

TYPES = ("f32", "f16", "q8_0", "q4_k_m", "lora")
HEADER = ("architecture", "base", "file", "logits, largest", "over spread", "mean KL", "loss", "ids of 100 prompts",
          "greedy texts", "tolerance")  # fmt: skip


def lines(report: dict[str, Any]) -> dict[str, list[str]]:
    """File -> figures, of what a target left in its parity.json."""
    found = {}
    for name, figures in report.items():
        if not isinstance(figures, dict) or "mean_kl" not in figures:
            continue
        cells = [f"{figures[key]:.1e}" for key in ("largest_logit_difference", "relative_difference", "mean_kl",
                                                   "loss_difference")]  # fmt: skip
        tokens, greedy = figures.get("tokens"), report.get("greedy")
        cells.append(f"{tokens['prompts'] - tokens['different_prompts']} of {tokens['prompts']}" if tokens else "")
        cells.append(f"{greedy['prompts'] - greedy['different']} of {greedy['prompts']}" if greedy else "")
        past = any(problem.startswith(name) or f"-{name}.gguf" in problem for problem in report["problems"])
        found[name] = [*cells, "past it" if past else ""]
    return found


def main(wanted: list[str]) -> None:
    """Print the table, a line as soon as it is known."""
    targets = ["onnx", "gguf"] if find_spec("llama_cpp") else ["onnx"]
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for (kind, quantization), config in cases().items():
        if wanted and kind not in wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            recipe = trained(Path(name), config, quantization)
            for target in targets:
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        export(recipe, [target], Options(gguf=TYPES))
                except UserError as error:
                    print(f"| {kind} | {quantization} | {target} | {error} {'| ' * (len(HEADER) - 3)}")
                    continue
                report = read_json(recipe.folder / "export" / target / "parity.json")
                for file, cells in lines(report).items():
                    print(f"| {' | '.join([kind, quantization, file, *cells])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
