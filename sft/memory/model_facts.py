"""What is known of the models that recipes name: their configs, so that no hub has to be reached to know their size.

`sft/memory/models/*.json` holds, for each, those fields of its config.json that its shape follows from, and the type
its weights are published in. What the hub or its cache says comes first where it can be reached.
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft import UserError
from sft.files import write_json
from sft.hub import PATIENCE_SECONDS, advice, check_weights, offline
from sft.show import say

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = Path(__file__).with_name("models")
NOT_OF_SHAPE = {"architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache",
                "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
                "task_specific_params"}  # fmt: skip
"""Fields of a config from which neither its memory nor its speed follows."""


class Download(NamedTuple):
    """What is fetched of a model before it is trained."""

    bytes: int
    published: bool
    """Whether the hub or a folder says so; else it is parameters times the size of one."""


def config(model: str, revision: str = "main") -> tuple["PreTrainedConfig", str]:
    """The config of a model on the hub or in a folder, and where it is from.

    Raises UserError where it is in neither, nor known.
    """
    from transformers import AutoConfig

    if (Path(model) / "config.json").is_file():
        return AutoConfig.from_pretrained(model), "its folder"
    if os.path.isdir(model) or model.startswith((".", "/", "~")):
        raise UserError(f"{model}: no config.json there; `model` is a local folder, an id on the hub, or a recipe")
    if (file := _from_hub(model, revision)) is not None:
        return AutoConfig.from_pretrained(os.path.dirname(file)), "the hub"
    if (fact := known(model)) is not None:
        return AutoConfig.for_model(**fact["config"]), "sft/memory/models"
    raise UserError(
        f"{model}: has no config.json that can be read, and its config is not among those shipped; put it "
        "into a folder and name that: model=path/to/folder"
    )


def download(model: str, parameters: int, revision: str = "main") -> Download:
    """The size of a model's weights as they are published. Raises UserError where they are not to be had."""
    folder = Path(model)
    if folder.is_dir():
        check_weights(model, os.listdir(model))
        return Download(sum(file.stat().st_size for file in folder.glob("*.safetensors")), True)
    if not offline():
        from huggingface_hub import HfApi

        try:
            found = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=PATIENCE_SECONDS)
        except Exception:  # the hub client raises dozens of classes, and each means that the hub does not say
            files = []
        else:
            files = found.siblings or []
        check_weights(model, [file.rfilename for file in files])
        if size := sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors")):
            return Download(size, True)
    fact = known(model)
    wide = fact is None or fact["published"] == "float32"
    return Download(parameters * (4 if wide else 2), False)


def add(model: str, folder: str | None = None) -> Path:
    """Keep what is known of a model, from the hub or a folder with its config.json, and return the file.

    Raises UserError where the config is not to be had, or no causal language model follows from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UserError(f"{model}: is not an id on the hub; write ORG/NAME")
    found, _ = config(folder or model)
    with torch.device("meta"):
        try:
            skeleton = AutoModelForCausalLM.from_config(found)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{model}: no causal language model can be made of its config: {error}") from error
    kept = {name: value for name, value in found.to_diff_dict().items() if name not in NOT_OF_SHAPE}
    fact = {"model": model, "published": str(found.dtype or "float32").removeprefix("torch."),
            "parameters": sum(p.numel() for p in skeleton.parameters())}  # fmt: skip
    file = FOLDER / f"{model.removeprefix('openai-community/').replace('/', '--')}.json"
    write_json(file, fact | {"config": {"model_type": found.model_type} | kept})
    known.cache_clear()
    return file


@cache
def known(model: str) -> dict[str, Any] | None:
    """The shipped facts of a model, by its id with or without the name of GPT-2's organisation."""
    file = FOLDER / f"{model.removeprefix('openai-community/').replace('/', '--')}.json"
    files = (file, FOLDER / f"{model.replace('/', '--')}.json")
    return next((json.loads(path.read_text("utf-8")) for path in files if path.is_file()), None)


def _from_hub(model: str, revision: str) -> str | None:
    """The hub's config.json as a file in the cache, or None where it is not to be had and the facts are shipped.

    Raises UserError where the hub has no such model or revision, and where nothing is known of it here.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return hf_hub_download(model, "config.json", revision=revision, local_files_only=offline())
    except Exception as error:  # the hub client raises dozens of classes
        said = advice(model, "model", revision, error)
        wrong = isinstance(error, HfHubHTTPError) and not isinstance(error, GatedRepoError)
        if said and (wrong or known(model) is None):
            raise UserError(said) from error
        if said and not offline():
            say(f"{said} (What it takes is known here.)")
        return None
