"""What is known of the models that recipes name: their configs, so that no hub has to be reached to know their size.

`sft/memory/models/*.json` holds, for each, those fields of its config.json that its shape follows from, and the type
its weights are published in. What the hub or its cache says comes first where it can be reached.
"""

import json
import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from sft import UserError
from sft.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = Path(__file__).with_name("models")
PATIENCE_SECONDS = 2.0
"""How long the hub is waited for."""
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
        f"{model}: the hub cannot be reached, and its config is not among those shipped; put its config.json "
        "into a folder and name that: model=path/to/folder"
    )


def download(model: str, parameters: int) -> Download:
    """The size of a model's weights as they are published."""
    folder = Path(model)
    if folder.is_dir():
        return Download(sum(file.stat().st_size for file in folder.glob("*.safetensors")), True)
    if not offline():
        from huggingface_hub import HfApi

        try:
            files = HfApi().model_info(model, files_metadata=True, timeout=PATIENCE_SECONDS).siblings or []
            if size := sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors")):
                return Download(size, True)
        except Exception:  # the hub client raises dozens of classes, and each means that the hub does not say
            pass
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


@cache
def offline() -> bool:
    """Whether the hub is not to be asked, or does not answer: its client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        return True
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), PATIENCE_SECONDS).close()
    except OSError:
        return True
    return False


def _from_hub(model: str, revision: str) -> str | None:
    """The hub's config.json as a file in the cache, or None where neither has it."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(model, "config.json", revision=revision, local_files_only=offline())
    except Exception:  # the hub client raises dozens of classes, each of which means that it is not to be had
        return None
