"""Export: the merged model as other programs read it, each form compared with it in the program that it is for."""

import hashlib
import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import UserError
from sft.files import read_json, whole_folder, write_json
from sft.model import parity
from sft.model.artifact import load_artifact, open_artifact, seal, sealed
from sft.recipe import Recipe
from sft.run import check_files, check_language_model, check_owner
from sft.show import say
from sft.tokens.opened import Opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("safetensors", "gguf", "onnx", "ollama", "adapter")
"""Each a file of this folder with `NEEDS`, packages it imports -> the extra that brings them; and
`write(source, folder) -> parity`, which writes the target into a folder and reads it back."""


@dataclass(frozen=True)
class Options:
    """What a target may be told besides the run."""

    gguf: tuple[str, ...] = ("f16", "q8_0")
    """Types of the weights of GGUF files, the first of them for ollama too; `lora` is the adapter alone."""

    llama_cpp: Path | None = None
    """A checkout of llama.cpp, for its converter. Without it, that of llama-cpp-python's source is fetched once."""

    push: str | None = None
    """Repository on the hub to send the `adapter` folder to."""


@dataclass(frozen=True)
class Source:
    """What is exported, opened where a target asks for it."""

    opened: Opened
    """The run."""

    merged: Path
    """The folder that `sft merge` wrote; that of the adapter, where no target needs a merged model."""

    options: Options = field(default_factory=Options)

    @property
    def recipe(self) -> Recipe:
        return self.opened.recipe

    @cached_property
    def rows(self) -> list[dict[str, list[int]]]:
        """Held-out rows to compare on."""
        return parity.chosen(self.opened.tokens)

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model of the merged folder, its files proven to be those that were written, in fp32 on the CPU."""
        model: Any = load_artifact(open_artifact(self.merged))
        return model.float().cpu()


def export(recipe: Recipe, targets: Sequence[str], options: Options = Options()) -> list[str]:
    """Write `runs/NAME/export/TARGET` for each target, and return what of them is past its tolerance.

    A folder that is there already for the same model and options is kept. Raises UserError for an unknown target, for
    packages that are missing, and for what the target's program cannot run.
    """
    modules = _modules(targets, options)
    check_language_model(recipe)
    check_files(recipe)
    opened = Opened(recipe)
    check_owner(opened)
    source = Source(opened, _merged(recipe, targets), options)
    problems = [f"{source.merged}: {problem}" for problem in _problems(source.merged)]
    for target, module in modules.items():
        folder = recipe.folder / "export" / target
        made_of = _made_of(source, target)
        if sealed(folder, made_of):
            say(f"{folder}: up to date")
        else:
            with whole_folder(folder) as part:
                write_json(part / "parity.json", module.write(source, part))
                seal(part, made_of)
            say(f"{folder}: written")
        print(read_json(folder / "parity.json")["table"])
        problems += [f"{folder}: {problem}" for problem in _problems(folder)]
    if options.push:
        modules["adapter"].push(recipe.folder / "export" / "adapter", options.push)
    return problems


def _modules(targets: Sequence[str], options: Options) -> dict[str, Any]:
    """Target -> its module; what cannot work is told now, before anything is merged."""
    if unknown := [target for target in targets if target not in TARGETS]:
        raise UserError(f"unknown target `{unknown[0]}`; there are {', '.join(TARGETS)}")
    if not targets:
        raise UserError(f"--to names no target; there are {', '.join(TARGETS)}")
    if options.push and "adapter" not in targets:
        raise UserError("--push sends the adapter; add --to adapter")
    modules = {target: importlib.import_module(f"sft.export.{target}") for target in targets}
    for target, module in modules.items():
        if missing := [name for name in module.NEEDS if find_spec(name) is None]:
            raise UserError(
                f"--to {target} needs {', '.join(missing)}; run: pip install 'sft-recipes[{module.NEEDS[missing[0]]}]'"
            )
        for name in module.NEEDS:
            try:
                importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as error:  # a library of the system that it was built with
                raise UserError(
                    f"--to {target}: {name} is installed but does not load: {error}; reinstall it"
                ) from error
        if target in ("gguf", "ollama"):
            module.check(options)
    return modules


def travel(source: Source, folder: Path, *names: str) -> None:
    """Copy what a model is prompted by, tokenizer, chat template, recipe and decoding: all but weights and their
    records; or the files of these names alone."""
    ours = {"parity.json", "files.json"}
    for file in sorted(source.merged.iterdir()):
        if file.name not in (names or {file.name} - ours) or ".safetensors" in file.name:
            continue
        if file.is_dir():  # of files that the template reads
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _merged(recipe: Recipe, targets: Sequence[str]) -> Path:
    from sft.merge import merge

    return recipe.trained if {*targets} == {"adapter"} else merge(recipe)


def _problems(folder: Path) -> list[str]:
    file = folder / "parity.json"
    return list(read_json(file)["problems"]) if file.is_file() else []


def _made_of(source: Source, target: str) -> dict[str, Any]:
    run = source.recipe.folder
    files = [run / "train.json", run / "merged" / "files.json"]
    files += [run / "eval" / "scores.json"] if target == "adapter" else []
    made_of: dict[str, Any] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    made_of |= {"generation": source.recipe.generation}
    return made_of | ({"gguf": list(source.options.gguf)} if target in ("gguf", "ollama") else {})
