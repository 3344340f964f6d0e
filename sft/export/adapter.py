"""adapter: the adapter as a folder for the hub, with a model card that is made from the run."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sft import UserError
from sft.export import Options, Source
from sft.files import read_json, write_json, write_text
from sft.model import parity
from sft.model.adapter import hub_tags, open_adapter
from sft.model.artifact import furnish
from sft.model.load import load_base
from sft.recipe import Recipe
from sft.show import say
from sft.train.summary import summary

NEEDS: dict[str, str] = {}
MERGED = False
READS = ("eval/scores.json",)
OPTIONS = {"push": "repository on the hub to send the folder to"}

TOLERANCE = {"largest_logit_difference": 0.0}
"""The same files on the same base give the same logits."""


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write adapter, tokenizer, recipe and card; load it with PEFT, and compare with the adapter of the run."""
    recipe = source.recipe
    if not recipe.has_adapter:
        raise UserError(f"{recipe.folder}: all weights were trained, there is no adapter; write --to safetensors")
    shutil.copyfile(recipe.trained / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    settings = read_json(recipe.trained / "adapter_config.json")
    write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": _base(recipe)})
    furnish(source.opened, folder)
    found = _compare(source, folder)
    found["problems"] = parity.past_tolerance(found, TOLERANCE)
    write_text(folder / "README.md", card(recipe, found))
    return found | {"table": parity.as_table(found, TOLERANCE)}


def finish(folder: Path, options: Options) -> None:
    """Send the folder to a repository on the hub, which is made if there is none, where `push` names one."""
    from huggingface_hub import HfApi

    if not (repository := options.get("push")):
        return
    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        where = hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["files.json"])
    except Exception as error:  # the hub client raises dozens of classes
        raise UserError(f"{repository}: the hub did not take {folder}: {' '.join(str(error).split())[:300]}") from error
    say(f"sent to {where}")


def _compare(source: Source, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        base = load_base(source.recipe, source.opened.tokenizer, exact=True)
        model = open_adapter(base, source.recipe.trained)
        reference = parity.recorded(source.rows, parity.of_model(model), Path(scratch) / "logits")
        again = open_adapter(model.unload(), folder)
        return parity.differences(source.rows, reference, parity.of_model(again))


def card(recipe: Recipe, compared: dict[str, Any]) -> str:
    """The model card: front matter that the hub reads, then base, data, scores, comparison and how to load it."""
    trained, scored = read_json(recipe.folder / "train.json"), recipe.folder / "eval" / "scores.json"
    scores = read_json(scored) if scored.is_file() else None
    if scores and "sentence" not in scores:
        raise UserError(f"{scored}: was written by an earlier version; run `sft eval` again for the card")
    lines = summary(recipe, trained, scores or {"generated": 0})
    merged = recipe.folder / "merged" / "parity.json"
    parts = [
        f"---\n{_front_matter(recipe)}---\n\n# {recipe.folder.name}\n",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in lines)]) + "\n",
        f"## Scores\n\n{scores['sentence']}\n\n{_markdown(*scores['table'])}\n" if scores else "Not scored.\n",
        f"## Comparison\n\nLoaded with PEFT from this folder, against the run: {_apart(compared)}.",
        f"Merged into one model: {_merged(read_json(merged))}.\n" if merged.is_file() else "",
        f"## Use\n\n{_how_to(recipe)}",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(recipe: Recipe) -> str:
    from huggingface_hub import ModelCardData

    base = None if _is_local(recipe) else str(recipe.model)
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=hub_tags(recipe), base_model=base)
    return str(data.to_yaml()) + "\n"


def _is_local(recipe: Recipe) -> bool:
    return recipe.base is not None or Path(str(recipe.model)).exists()


def _base(recipe: Recipe) -> str:
    """The base as others know it: its id on the hub, or the name of its folder."""
    if recipe.base is not None:
        return recipe.base.folder.name
    return Path(str(recipe.model)).name if _is_local(recipe) else str(recipe.model)


def _how_to(recipe: Recipe) -> str:
    quantized = recipe.quantization == "4bit"
    base = f"AutoModelForCausalLM.from_pretrained({json.dumps(_base(recipe))}" + (
        ", quantization_config=four)" if quantized else ")"
    )
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if quantized:
        lines[1] += ", BitsAndBytesConfig"
        lines += ['four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",']
        lines += ["                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"]
        lines.insert(0, "import torch")
    lines += [f"base = {base}", 'model = PeftModel.from_pretrained(base, "this folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("this folder")']
    lines += ['turns = [{"role": "user", "content": "..."}]']
    lines += ['ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**ids)[0]))"]
    lead = "The chat template builds the prompt that the model was trained on, also where the base has none of its own:"
    note = f"The base, `{_base(recipe)}`, was a local folder.\n\n" if _is_local(recipe) else ""
    return f"{note}{lead}\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _apart(compared: dict[str, Any]) -> str:
    return (
        f"{compared['positions']:,} positions of {compared['rows']} held-out rows, largest difference of a logit "
        f"{compared['largest_logit_difference']:.2g}, another first choice at {compared['disagreement']:.2%}"
    )


def _merged(found: dict[str, Any]) -> str:
    return str(found["sentence"]) if "sentence" in found else _apart(found)  # of an earlier version


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
