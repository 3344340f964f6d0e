"""safetensors: the merged folder under a name of its own, for transformers and for whatever else reads such folders."""

import os
import shutil
from pathlib import Path
from typing import Any

from sft.export import Source, travel
from sft.model import parity

NEEDS: dict[str, str] = {}


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the folder, its weights as links where the file system has them, and read it back by transformers alone."""
    from transformers import AutoModelForCausalLM

    travel(source, folder)
    for file in source.merged.glob("*.safetensors*"):
        _link(file, folder / file.name)
    back = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", use_safetensors=True)
    found = parity.differences(source.rows, parity.of_model(source.model), parity.of_model(back))
    tolerance = parity.TOLERANCE["float32"]
    return found | {"problems": parity.past_tolerance(found, tolerance), "table": parity.as_table(found, tolerance)}


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, place)
