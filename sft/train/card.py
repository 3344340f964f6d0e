"""The model card of an adapter: what it was trained on, from what, how it scored, and how it is loaded."""

import json
from pathlib import Path
from typing import NamedTuple

from sft import UserError
from sft.files import read_json
from sft.model.adapter import hub_tags
from sft.recipe import Recipe
from sft.tokens.tokenizer import described_base
from sft.train.summary import short_name, summary

FOLDER = "this folder"
"""Stands in the code of a card for the place of the folder, which whoever reads it knows."""


class Base(NamedTuple):
    """The base of an adapter as others know it."""

    name: str
    """Its id on the hub, or the name of its folder."""
    commit: str | None
    """Of the hub."""
    folder: Path | None
    """Where it lies, if it is not from the hub."""


def base_of(recipe: Recipe) -> Base:
    """The base that a finished run was trained on."""
    if recipe.base is not None:
        return Base(recipe.base.folder.name, None, recipe.base.trained)
    if (found := described_base(recipe)) is not None:
        return Base(found["model"], found["commit"], None)
    return Base(Path(str(recipe.model)).name, None, Path(str(recipe.model)))


def card(recipe: Recipe, compared: str, use: str) -> str:
    """The model card: front matter that the hub reads, then base, data, scores, comparisons and how to use it."""
    trained, scored = read_json(recipe.folder / "train.json"), recipe.folder / "eval" / "scores.json"
    scores = read_json(scored) if scored.is_file() else None
    if scores and "sentence" not in scores:
        raise UserError(f"{scored}: was written by an earlier version; run `sft eval` again for the card")
    lines = summary(recipe, trained, scores or {"generated": 0})
    base = base_of(recipe)
    lines[1:1] = [("Commit", base.commit)] if base.commit else []
    parts = [
        f"---\n{_front_matter(recipe)}---\n\n# {recipe.folder.name}\n",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in lines)]) + "\n",
        f"## Scores\n\n{scores['sentence']}\n\n{_markdown(*scores['table'])}\n" if scores else "Not scored.\n",
        f"## Comparison\n\n{compared}\n" if compared else "",
        f"## Use\n\n{use}",
    ]
    return "\n".join(part for part in parts if part)


def of_run(recipe: Recipe) -> str:
    """The card of the adapter in a run's folder, beside the tokenizer of the base."""
    run = short_name(str(recipe.folder))
    commands = f"sft generate {run}\nsft export {run} --to adapter\n"
    lead = "This is the adapter as training left it. Ask it by its run, or write a folder that others can load, with "
    return card(recipe, "", f"{lead}a chat template that builds the prompt of training:\n\n```bash\n{commands}```\n")


def how_to_load(recipe: Recipe, has_chat_template: bool) -> str:
    """Code that loads an exported adapter on its base, and asks it."""
    base, loading = base_of(recipe), ""
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if recipe.quantization != "none":
        lines[1] += ", BitsAndBytesConfig"
        lines += _quantized(recipe.quantization)
        loading = ", quantization_config=bits"
        if recipe.quantization == "4bit":
            lines.insert(0, "import torch")
    if base.commit:
        loading += f', revision="{base.commit}"'
    lines += [f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base.name)}{loading})"]
    lines += [f'model = PeftModel.from_pretrained(base, "{FOLDER}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")']
    if has_chat_template:
        lines += ['turns = [{"role": "user", "content": "..."}]']
        lines += ['ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")']
        lead = "The chat template builds the prompt that the model was trained on, also where the base has none:"
    else:
        lines += ['ids = tokenizer("...", return_tensors="pt")']
        lead = (
            "No chat template builds the prompt that the model was trained on; `sft generate` does, from recipe.yaml:"
        )
    lines += ["print(tokenizer.decode(model.generate(**ids.to(model.device))[0]))"]
    note = f"The base, `{base.name}`, was a local folder.\n\n" if base.folder else ""
    return f"{note}{lead}\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _quantized(kind: str) -> list[str]:
    if kind == "8bit":
        return ["bits = BitsAndBytesConfig(load_in_8bit=True)"]
    return [
        'bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",',
        "                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)",
    ]


def _front_matter(recipe: Recipe) -> str:
    from huggingface_hub import ModelCardData

    base = base_of(recipe)
    name = None if base.folder else base.name
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=hub_tags(recipe), base_model=name)
    return str(data.to_yaml()) + "\n"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
