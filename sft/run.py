"""The folder of a run: whose it is, and whether what was written into it is finished."""

import hashlib
from pathlib import Path
from typing import Any

from sft import UserError
from sft.files import altered, damage, read_json, write_json, write_text
from sft.recipe import Recipe, VocabularyFile, dump


def claim(recipe: Recipe, key: str) -> None:
    """Take the run's folder for this recipe and the tokens of this key, or make sure that it was theirs before.

    Raises UserError where the folder holds the run of another recipe, of other data or on another base.
    """
    folder, file = recipe.folder, recipe.folder / "run.json"
    if file.is_file():
        if recipe.trained.exists() or any(folder.glob("checkpoints/*/whole.json")):
            check_owner(recipe, key)
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no run; name another folder with output=...")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, _mine(recipe, key))
    write_text(folder / "recipe.yaml", dump(recipe))


def check_owner(recipe: Recipe, key: str | None = None) -> None:
    """Raise UserError where the folder's run was made by other settings, on another base, or from other rows, as far as
    the key of the rows is known."""
    if not (recipe.folder / "run.json").is_file():
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    theirs = read_json(recipe.folder / "run.json")
    mine = _mine(recipe, key or theirs.get("tokens"))
    if theirs != mine:
        again = f"give the same settings again, use {recipe.folder / 'recipe.yaml'} as the recipe"
        if theirs.get("recipe") == mine["recipe"]:
            again = "put that back as it was"
        raise UserError(
            f"{recipe.folder}: holds another run ({_difference(theirs, mine)}); {again}, name another folder with "
            "output=..., or delete this one"
        )


def finished(recipe: Recipe) -> bool:
    """Whether training ended and left its model. Raises UserError where the model's files are not as they were left."""
    if not (recipe.folder / "train.json").is_file():
        return False
    if broken := damage(recipe.trained, read_json(recipe.folder / "train.json")["files"]):
        raise UserError(
            f"{recipe.trained / broken}: missing, or not of the size it was written with; put it back, or delete "
            f"{recipe.folder} and train again"
        )
    return True


def check_language_model(recipe: Recipe) -> None:
    """Raise UserError for the run of a classifier."""
    if recipe.task == "classification":
        raise UserError(f"{recipe.folder}: is a classifier, which writes nothing; name the run of a language model")


def check_files(recipe: Recipe) -> None:
    """Raise UserError for a run that is not finished, or whose model is not to the byte what training wrote."""
    if not finished(recipe):
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    if broken := altered(recipe.trained, read_json(recipe.folder / "train.json")["sha256"]):
        raise UserError(
            f"{recipe.trained / broken}: was altered since it was written; put it back, or delete {recipe.folder} and "
            "train again"
        )


def _mine(recipe: Recipe, key: str) -> dict[str, Any]:
    """What a run follows from: the recipe but for where it goes and how it is checked and scored; rows; base."""
    settings = recipe.model_dump(mode="json", exclude={"output", "eval", "generation", "check"})
    mine = {"recipe": settings, "tokens": key, "base": _base(recipe)}
    if isinstance(recipe.tokenizer, VocabularyFile):
        mine["vocabulary"] = hashlib.sha256(Path(recipe.tokenizer.vocab).read_bytes()).hexdigest()[:16]
    return mine


def _base(recipe: Recipe) -> str:
    """What tells a local base model from another one in the same place: sizes, and the ends of its files."""
    if isinstance(recipe.model, dict):
        return "from scratch"
    folder = recipe.base.trained if recipe.base else Path(recipe.model)
    if not folder.is_dir():
        return recipe.model
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**16))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _difference(theirs: Any, mine: Any) -> str:
    """The first few settings in which two runs differ."""
    if theirs.get("recipe") == mine["recipe"]:
        if theirs.get("vocabulary") != mine.get("vocabulary"):
            return "with another vocabulary in the same file"
        return "from other rows or another template" if theirs.get("tokens") != mine["tokens"] else "on another base"
    old, new = _flat(theirs.get("recipe", {})), _flat(mine["recipe"])
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    return "; ".join(f"`{key}` was {old.get(key)!r}, now {new.get(key)!r}" for key in changed[:3])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for item in items for key, inner in item.items()}
