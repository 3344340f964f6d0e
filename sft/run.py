"""The folder of a run: whose it is, and whether what was written into it is finished."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sft import UserError
from sft.files import altered, damage, read_json, write_json, write_text
from sft.recipe import Recipe, dump
from sft.recipe.fields import shown
from sft.recipe.schema import VocabularyFile
from sft.rows.watch import unchanged
from sft.show import say
from sft.tokens.opened import Opened

OWN = {"trainer", "lora", "quantization", "task"}
"""The settings of a recipe that decide what is trained, beside the rows and the base."""
IDLE = {"report_to", "run_name", "disable_tqdm", "log_level", "logging_first_step", "logging_steps", "logging_strategy",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"}  # fmt: skip
"""Those of `trainer:` that do not; nor does `max_length`, but for the rows and for packing."""
KEPT_BYTES = 2**16
"""Text files of a template up to this size are kept in the run, to show what became of them."""


def claim(opened: Opened, rows: Mapping[str, str]) -> None:
    """Take the run's folder for this recipe and for rows of these hashes, or make sure that it was theirs before.

    Raises UserError where the folder holds the run of another recipe, of other rows or on another base.
    """
    recipe, folder = opened.recipe, opened.recipe.folder
    if (folder / "run.json").is_file():
        if recipe.trained.exists() or any(folder.glob("checkpoints/*/whole.json")):
            check_owner(opened, rows)
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no run; name another folder with output=...")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "template", ignore_errors=True)
    for name, text in _texts(opened).items():
        write_text(folder / "template" / name, text)
    if opened.codec.prints_date:
        recipe = recipe.model_copy(update={"prompt_date": str(opened.codec.date)})
        say(f"chosen: prompt_date={recipe.prompt_date}: the chat template prints the day, which stays that of training")
    write_json(folder / "run.json", _own(recipe) | {"rows": dict(rows), "made_of": opened.tokens.made_of})
    write_text(folder / "recipe.yaml", dump(recipe))


def check_owner(opened: Opened, rows: Mapping[str, str] | None = None) -> None:
    """Raise UserError where the folder's run was made by other settings, on another base, or from other rows.

    Where `rows` are not given, they are not read as long as the model is asked as it was trained: same template and
    what it reads, same tokenizer, same settings.
    """
    recipe, file = opened.recipe, opened.recipe.folder / "run.json"
    if not file.is_file():
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    theirs, mine = read_json(file), _own(recipe)
    if "rows" not in theirs:
        _check_earlier(recipe, theirs)
        return
    if theirs["base"] and not mine["base"]:
        raise UserError(f"{recipe.model}: the base of {recipe.folder} is not there; put it back, or name it: model=...")
    if different := [*_settings(theirs["recipe"], mine["recipe"])]:
        raise _other_run(recipe, different, "give the same settings again")
    if theirs["base"] != mine["base"]:
        raise _other_run(recipe, [f"on another base: the files of {recipe.model} are others"], "put the base back")
    before = theirs["made_of"]
    if rows is None and _asked_alike(before, opened):
        return
    rows = opened.tokens.digests if rows is None else rows
    sides = ("train", "test") if recipe.trainer.get("load_best_model_at_end") else ("train",)
    if any(rows[side] != theirs["rows"][side] for side in sides):
        raise _other_run(recipe, [*_causes(before, opened)] or ["from other rows"], "put that back as it was")


def _other_run(recipe: Recipe, different: list[str], again: str) -> UserError:
    more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
    return UserError(
        f"{recipe.folder}: holds another run ({'; '.join(different[:5])}{more}); {again}, use "
        f"{recipe.folder / 'recipe.yaml'} as the recipe, name another folder with output=..., or delete this one"
    )


def _own(recipe: Recipe) -> dict[str, Any]:
    """What a run is, beside its rows: the settings of training, and the base."""
    idle = IDLE if recipe.trainer.get("packing") else IDLE | {"max_length"}
    settings = recipe.model_dump(mode="json", include=OWN, exclude={"trainer": idle})
    base = _base_folder(recipe)
    if base is None:
        settings["model"] = recipe.model
    return {"recipe": json.loads(json.dumps(settings)), "base": base and _ends(base, ("config.json", "*.safetensors*"))}


def _asked_alike(before: Mapping[str, Any], opened: Opened) -> bool:
    """Whether the model is asked in the way in which it was trained, as far as can be known without reading rows."""
    asked = opened.asked_by
    return all(before[part] == asked[part] for part in asked) and unchanged(before["called"], opened.loaded.home)


def _settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """Each setting in which two runs differ, old and new."""
    old, new = _flat(theirs), _flat(mine)
    for key in old | new:
        if old.get(key) != new.get(key):
            yield f"`{key}` was {shown(old.get(key))}, now {shown(new.get(key))}"


def _causes(before: Mapping[str, Any], opened: Opened) -> Iterator[str]:
    """What has changed of all that the rows follow from: settings, then files, each old and new."""
    now = opened.tokens.made_of
    yield from _settings(before["settings"], now["settings"])
    for side in ("train", "test"):
        old, new = before["data"].get(side, {}), now["data"].get(side, {})
        yield from (
            f"`data.{side}`: {_changed(name, old, new)}" for name in old | new if old.get(name) != new.get(name)
        )
    old, new = before["template"] | before["called"], now["template"] | now["called"]
    for name in old | new:
        if old.get(name) != new.get(name):
            yield _line(opened, name) or f"the template reads {_changed(name, old, new)}"
    if before["tokenizer"] != now["tokenizer"]:
        given = opened.recipe.tokenizer
        yield f"{given.vocab} is another vocabulary" if isinstance(given, VocabularyFile) else "another tokenizer"
    if before["prompt_date"] != now["prompt_date"]:
        yield f"`prompt_date` was {before['prompt_date']}, now {now['prompt_date']}"
    elif before["chat_template"] != now["chat_template"]:
        yield "the chat template of the tokenizer is another one"
    if before["template"] == now["template"] and before["example"] != now["example"]:
        old_text, new_text = (_example_text(made["example"]) for made in (before, now))
        yield f"the template makes of its example {shown(new_text)}, where it made {shown(old_text)}"


def _example_text(rows: Sequence[Any]) -> str:
    """Prompts and outputs of the example, as they stand in `made_of`; or why it cannot be read."""
    return "".join(row if isinstance(row, str) else row[0] + "".join(text for _, text, _ in row[1:]) for row in rows)


def _changed(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if new.get(name) is None:
        return f"{name} is not read any more"
    return f"{name} (not read before)" if old.get(name) is None else f"{name} was {old[name][:8]}, now {new[name][:8]}"


def _line(opened: Opened, name: str) -> str | None:
    """The first line of a template's text file that is not as it was kept in the run, old and new."""
    kept, now = opened.recipe.folder / "template" / name, _texts(opened).get(name)
    if now is None or not kept.is_file():
        return None
    pairs = zip_longest(kept.read_text("utf-8").splitlines(), now.splitlines())
    number, was, line = next(((i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b), (0, None, None))
    return f"{name}:{number} was {shown(was)}, now {shown(line)}" if number else None


def _texts(opened: Opened) -> dict[str, str]:
    """The small text files that lie beside a template of the user's and are read by it, itself among them."""
    if not opened.recipe.template.endswith(".py"):
        return {}
    texts = {}
    for name in {**opened.loaded.at_load, **opened.loaded.when_called()}:
        file = opened.loaded.home / name
        if not Path(name).is_absolute() and file.is_file() and file.stat().st_size <= KEPT_BYTES:
            with suppress(UnicodeDecodeError):
                texts[name] = file.read_text("utf-8")
    return texts


def _check_earlier(recipe: Recipe, theirs: Mapping[str, Any]) -> None:
    """The same for a run from before rows were kept by their hash, whose settings all count."""
    settings = recipe.model_dump(mode="json", exclude={"output", "eval", "generation", "check", "prompt_date"})
    if different := [*_settings(theirs["recipe"], json.loads(json.dumps(settings)))]:
        raise _other_run(recipe, different, "give the same settings again")
    base = _base_folder(recipe)
    if theirs["base"] != (_ends(base) if base else recipe.model if isinstance(recipe.model, str) else "from scratch"):
        raise _other_run(recipe, ["on another base"], "put the base back")
    say(f"{recipe.folder}: an earlier version trained it and did not keep the hash of its rows; they are not compared")


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


def _base_folder(recipe: Recipe) -> Path | None:
    """The folder of a base that lies on this disk; None for one on the hub, and for a new model."""
    if isinstance(recipe.model, dict):
        return None
    folder = recipe.base.trained if recipe.base else Path(recipe.model)
    return folder if folder.is_dir() else None


def _ends(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """What the files of a base are known by: their names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**16))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for item in items for key, inner in item.items()}
