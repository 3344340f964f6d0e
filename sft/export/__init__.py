"""Export: the merged model as other programs read it, each form compared with it in the program that it is for."""

import hashlib
import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import UserError
from sft.files import read_json, seal, sealed, whole_folder, write_json
from sft.merge import MergeOptions, merge, options_of
from sft.model import parity
from sft.model.artifact import load_artifact, open_artifact
from sft.recipe import Recipe
from sft.rows.read import load_python
from sft.rows.watch import Files, Watch
from sft.run import check_files, check_language_model, check_owner
from sft.show import say
from sft.tokens.opened import Opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Options = Mapping[str, str]
"""Settings of targets, each name declared by one of them."""


@dataclass(frozen=True)
class Target:
    """A file of this folder, or one of the user's, that exports.

    It has `NEEDS`, the packages it imports -> the extra of this project that brings them, and
    `write(source, folder)`, which writes into a folder, reads that back, and returns what it compared: JSON with
    `problems`, a list of sentences, and `table`, a text. It may have more, as follows.
    """

    name: str
    write: Callable[["Source", Path], dict[str, Any]]
    needs: Mapping[str, str]
    options: Mapping[str, str]
    """`OPTIONS`: the names of its settings -> a sentence on each."""
    merged: bool
    """`MERGED`: whether it is made from the merged model; it is unless this says False."""
    reads: Sequence[str]
    """`READS`: files of the run's folder that it reads beside the model."""
    check: Callable[[Options], None]
    """`check(options)`: raises UserError for options that cannot be, before anything is written."""
    finish: Callable[[Path, Options], None]
    """`finish(folder, options)`: what is done with the folder each time, such as sending it."""
    files: Files
    """What was read to load a target of the user's; after an edit of it the folder is written again."""


@dataclass(frozen=True)
class Source:
    """What is exported, opened where a target asks for it."""

    opened: Opened
    """The run."""

    merged: Path
    """The folder that `sft merge` wrote; that of the adapter, where no target needs a merged model."""

    options: Options = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.opened.recipe

    @cached_property
    def rows(self) -> list[dict[str, list[int]]]:
        """Held-out rows to compare on."""
        return parity.rows_to_compare(self.opened.tokens)

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model of the merged folder, its files proven to be those that were written, in fp32 on the CPU."""
        model: Any = load_artifact(open_artifact(self.merged), "float32")
        return model.cpu()


def target_names() -> list[str]:
    """The targets that come with the project."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))


def export(
    recipe: Recipe, targets: Sequence[str], options: Options | None = None, merging: Mapping[str, Any] | None = None
) -> list[str]:
    """Write `runs/NAME/export/TARGET` for each target, and return what of them is past its tolerance.

    The merged folder that is there is taken as it is; `merging` has the `MergeOptions` that it should have instead.

    A target is a name, or the path of a `.py` file of the user's. A folder that is there already for the same model and
    options is kept. Raises UserError for an unknown target, for packages that are missing, and for what the target's
    program cannot run.
    """
    options = options or {}
    found = _targets(targets, options)
    if merging and not any(target.merged for target in found):
        raise UserError(f"--{next(iter(merging))} is of a merged model, and --to {','.join(targets)} needs none")
    check_language_model(recipe)
    check_files(recipe)
    opened = Opened(recipe)
    check_owner(opened)
    how = replace(options_of(recipe.folder / "merged") or MergeOptions(), **(merging or {}))
    merged = merge(recipe, how) if any(target.merged for target in found) else recipe.trained
    source = Source(opened, merged, options)
    problems = [f"{merged}: {problem}" for problem in _problems(merged)]
    for target in found:
        folder = recipe.folder / "export" / target.name
        made_of = _made_of(source, target)
        if sealed(folder, made_of):
            say(f"{folder}: up to date")
        else:
            with whole_folder(folder) as part:
                write_json(part / "parity.json", target.write(source, part))
                seal(part, made_of)
            say(f"{folder}: written")
        print(read_json(folder / "parity.json")["table"])
        problems += [f"{folder}: {problem}" for problem in _problems(folder)]
        target.finish(folder, options)
    return problems


def _targets(names: Sequence[str], options: Options) -> list[Target]:
    """The targets of these names; what cannot work is reported now, before anything is merged."""
    if not names:
        raise UserError(f"--to names no target; there are {', '.join(target_names())}")
    targets = [_target(name) for name in names]
    known = {option for target in targets for option in target.options}
    if unknown := [option for option in options if option not in known]:
        owner = next(
            (name for name in target_names() if name not in names and unknown[0] in _target(name).options), None
        )
        hint = f"it goes with --to {owner}" if owner else f"known here are {', '.join(sorted(known)) or 'none'}"
        raise UserError(f"`{unknown[0]}` is not an option of --to {','.join(names)}; {hint}")
    for target in targets:
        if missing := [package for package in target.needs if find_spec(package) is None]:
            extra = target.needs[missing[0]]
            raise UserError(f"--to {target.name} needs {', '.join(missing)}; run: pip install 'sft-recipes[{extra}]'")
        for package in target.needs:
            try:
                importlib.import_module(package)
            except (ImportError, OSError, RuntimeError) as error:  # a library of the system that it was built with
                raise UserError(
                    f"--to {target.name}: {package} is installed but does not load: {error}; reinstall it"
                ) from error
        target.check(options)
    return targets


def _target(name: str) -> Target:
    """The target of this name, from the file that it is."""
    watch = Watch()
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--to {name}: no such file, from {Path.cwd()}")
        with watch.on():
            module = load_python(Path(name))
    elif name in target_names():
        module = importlib.import_module(f"sft.export.{name}")
    else:
        near = get_close_matches(name, target_names(), n=1)
        hint = f"did you mean `{near[0]}`" if near else f"there are {', '.join(target_names())}"
        raise UserError(f"unknown target `{name}`; {hint}; your own is named by its path: --to my_target.py")
    has = vars(module)
    if not callable(has.get("write")) or not isinstance(has.get("NEEDS"), dict):
        raise UserError(f"--to {name}: a target has `NEEDS`, a mapping, and a function `write(source, folder)`")
    return Target(
        Path(name).stem, module.write, module.NEEDS, has.get("OPTIONS", {}), has.get("MERGED", True),
        has.get("READS", ()), has.get("check", lambda options: None), has.get("finish", lambda folder, options: None),
        watch.files(Path(name).parent),
    )  # fmt: skip


def travel(source: Source, folder: Path, *names: str) -> None:
    """Copy what a model is prompted by, tokenizer, chat template, recipe and decoding: all but weights and their
    records; or the files of these names alone, with `template.py` what the template reads."""
    ours = {"parity.json", "files.json"}
    if "template.py" in names:
        read = {**source.opened.loaded.at_load, **source.opened.called}
        names += tuple(Path(name).parts[0] for name in read if not Path(name).is_absolute())
    for file in sorted(source.merged.iterdir()):
        if file.name not in (names or {file.name} - ours) or ".safetensors" in file.name:
            continue
        if file.is_dir():  # of files that the template reads
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _problems(folder: Path) -> list[str]:
    file = folder / "parity.json"
    return list(read_json(file)["problems"]) if file.is_file() else []


def _made_of(source: Source, target: Target) -> dict[str, Any]:
    """What a target's folder follows from: the run, the merged model, how it is asked, and the target's settings."""
    run = source.recipe.folder
    files = [run / "train.json", run / "merged" / "files.json", *(run / name for name in target.reads)]
    made_of: dict[str, Any] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    made_of["options"] = {name: value for name, value in source.options.items() if name in target.options}
    return made_of | {"generation": source.recipe.generation, "files": target.files}
