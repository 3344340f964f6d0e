"""The folder of a run: whose it is, what was written into it, and whether that is whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft import UserError
from sft.recipe import Recipe, dump


def claim(recipe: Recipe, tokens: str) -> None:
    """Take the run's folder for this recipe and these tokens, or make sure that it was theirs before.

    Raises UserError where the folder holds the run of another recipe, or of other data.
    """
    mine = {"recipe": _trains(recipe), "tokens": tokens, "base": _base(recipe)}
    file = recipe.folder / "run.json"
    if file.is_file() and (theirs := read_json(file)) == mine:
        return
    if file.is_file():
        if recipe.trained.exists() or [*recipe.folder.glob("checkpoints/*/whole.json")]:
            raise UserError(
                f"{recipe.folder}: holds another run ({_difference(theirs, mine)}); name another folder "
                "with output=..., or delete this one"
            )
    elif recipe.folder.is_dir() and any(recipe.folder.iterdir()):
        raise UserError(f"{recipe.folder}: is not empty and holds no run; name another folder with output=...")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe.folder / "recipe.yaml", dump(recipe))
    write_json(file, mine)


def finished(recipe: Recipe) -> bool:
    """Whether training ended and left its model."""
    return recipe.trained.is_dir() and (recipe.folder / "train.json").is_file()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets its name once all is written, and goes away where that fails."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(file, json.dumps(value, ensure_ascii=False, indent=1))


def read_json(file: Path) -> Any:
    """Read JSON. Raises UserError for a file that is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; run the stage before this one") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run its stage again") from None


def _trains(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe training follows from: all but where it goes and how it is scored."""
    return recipe.model_dump(mode="json", exclude={"output", "eval", "generation", "check"})


def _base(recipe: Recipe) -> str:
    """Names and sizes of a local base model's files, so that another model under the same name is noticed."""
    if isinstance(recipe.model, dict):
        return "from scratch"
    folder = recipe.base.trained if recipe.base else Path(recipe.model)
    if not folder.is_dir():
        return recipe.model
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _difference(theirs: Any, mine: Any) -> str:
    """The first few settings in which two runs differ."""
    if theirs.get("recipe") == mine["recipe"]:
        return (
            "made from other data, another template or another version of this program"
            if theirs.get("tokens") != mine["tokens"]
            else "made from another base model"
        )
    old, new = _flat(theirs.get("recipe", {})), _flat(mine["recipe"])
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    return "; ".join(f"`{key}` was {old.get(key)!r}, now {new.get(key)!r}" for key in changed[:3])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for item in items for key, inner in item.items()}
