"""adapter: the adapter as a folder for the hub, with a model card that is made from the run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft import UserError
from sft.export import Options, Source
from sft.files import read_json, write_json, write_text
from sft.model import parity
from sft.model.adapter import as_base, open_adapter
from sft.model.artifact import furnish
from sft.model.gain import bound, logits_in
from sft.model.load import load_base
from sft.show import say
from sft.train.card import FOLDER, base_of, card, how_to_load

NEEDS: dict[str, str] = {}
MERGED = False
READS = ("eval/scores.json",)
OPTIONS = {"push": "repository on the hub to send the folder to"}

TOLERANCE = {"largest_logit_difference": 0.0}
"""The same files on the same base give the same logits."""

ASKED = """
import json, numpy, torch
ids = torch.tensor([json.load(open("ids.json"))], device=model.device)
with torch.no_grad():
    numpy.save("logits.npy", model(input_ids=ids).logits[0].float().cpu().numpy())
"""
"""Run behind the code of the card, for logits of its `model`."""


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write adapter, tokenizer, recipe and card; load it with PEFT, then by the code of its card, and compare both with
    the adapter of the run."""
    recipe = source.recipe
    if not recipe.has_adapter:
        raise UserError(f"{recipe.folder}: all weights were trained, there is no adapter; write --to safetensors")
    base = base_of(recipe)
    shutil.copyfile(recipe.trained / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    settings = read_json(recipe.trained / "adapter_config.json")
    write_json(
        folder / "adapter_config.json", settings | {"base_model_name_or_path": base.name, "revision": base.commit}
    )
    furnish(source.opened, folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        reference, found, limit = _compare(source, folder, Path(scratch))
        found["problems"] = parity.past_tolerance(found, TOLERANCE)
        use = how_to_load(recipe, (folder / "chat_template.jinja").is_file())
        compared = f"Loaded with PEFT from this folder, against the run: {_apart(found)}."
        if (merged := recipe.folder / "merged" / "parity.json").is_file():
            compared += f"\nMerged into one model: {read_json(merged).get('sentence', 'by an earlier version')}."
        write_text(folder / "README.md", card(recipe, compared, use))
        by_card = _follow_card(source, folder, Path(scratch), reference)
    past = parity.past_tolerance(by_card, {"relative_difference": limit})
    found["problems"] += [f"README.md's code: {what}" for what in past]
    lines = (
        f"\nthe code of README.md, in a process of its own: {by_card['relative_difference']:.2g} of the logits' spread"
    )
    return found | {"by_card": by_card, "table": parity.as_table(found, TOLERANCE) + lines}


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


def _compare(source: Source, folder: Path, scratch: Path) -> tuple[parity.Logits, dict[str, Any], float]:
    """The logits of the run's adapter, how far those of the folder's are from them, and how far those by the card's
    code may be: transformers opens the base in the dtype that it is stored in, which may be half as wide."""
    base = load_base(source.recipe, source.opened.tokenizer, exact=True)
    model = open_adapter(base, source.recipe.trained)
    reference = parity.recorded(source.rows, parity.of_model(model), scratch / "logits")
    with as_base(model):
        moved = parity.differences(source.rows[:1], logits_in(model, torch.float32), logits_in(model, torch.bfloat16))
    again = open_adapter(model.unload(), folder)
    return reference, parity.differences(source.rows, reference, parity.of_model(again)), bound(moved)


def _follow_card(source: Source, folder: Path, scratch: Path, reference: parity.Logits) -> dict[str, Any]:
    """Run the code of the card as a reader would, without the hub, and compare its model on one row.

    Raises UserError where the code fails: a folder with such a card must not be sent anywhere.
    """
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    code, row = blocks[-1].replace(f'"{FOLDER}"', json.dumps(str(folder))), source.rows[0]
    write_json(scratch / "ids.json", row["input_ids"])
    base = base_of(source.recipe)
    if base.folder:
        (scratch / base.name).symlink_to(base.folder)
    ran = subprocess.run([sys.executable, "-c", code + ASKED], cwd=scratch, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    if ran.returncode:
        raise UserError(
            f"{source.recipe.folder}: the code of the adapter's README.md does not run here, so that the folder is not "
            f"written: {(ran.stderr.strip() or f'status {ran.returncode}').splitlines()[-1]}"
        )
    logits = np.load(scratch / "logits.npy")
    return parity.differences([row], reference, lambda _: logits)


def _apart(compared: dict[str, Any]) -> str:
    return (
        f"{compared['positions']:,} positions of {compared['rows']} held-out rows, largest difference of a logit "
        f"{compared['largest_logit_difference']:.2g}, another first choice at {compared['disagreement']:.2%}"
    )
