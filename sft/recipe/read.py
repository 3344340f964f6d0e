"""Reading recipes: the file, its overrides, the recipes it starts from, and every mistake at once with its line."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft import UserError
from sft.hub import is_more_than_an_id, place
from sft.recipe.checks import contradictions, library_problems
from sft.recipe.fields import LIBRARIES, shown
from sft.recipe.messages import invalid
from sft.recipe.schema import Recipe, VocabularyFile

SHIPPED = next(folder for parent in Path(__file__).parents[1:3] if (folder := parent / "recipes").is_dir())
"""The recipes that come with the project: inside the package when installed from a wheel, beside it in a checkout."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key=value` with dotted keys, for instance `trainer.max_steps=10`.

    Paths in it are looked for from the working directory, then from the recipe's own folder, and become absolute.
    Raises UserError with every mistake of the file at once.
    """
    return _load(Path(path).expanduser(), overrides, ())


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load` reads back to the same recipe."""
    text = json.dumps(recipe.model_dump(exclude_defaults=True), ensure_ascii=False, indent=2)
    unlike_json = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"  # these YAML takes as escapes alone
    text = re.sub(unlike_json, lambda found: f"\\u{ord(found[0]):04x}", text)
    return "# The recipe as it was resolved. JSON is YAML: this file runs again as it is.\n" + text + "\n"


def shipped() -> list[Path]:
    """The recipes that come with the project."""
    return sorted(SHIPPED.glob("*.yaml"))


def _load(path: Path, overrides: Sequence[str], above: tuple[Path, ...]) -> Recipe:
    """Read a recipe and, to check them too, the recipes it starts from; `above` are those that led here."""
    named, path = path, _find_recipe(path)
    document, origins = _read(path), dict[str, str]()
    if path.parent == named:
        document["output"] = str(named)  # a run that was moved is read, and written to, where it is now
    for override in overrides:
        origins[_override(document, override)] = override
    values = _plain(document)
    problems: list[tuple[tuple[str, ...], str]] = [*library_problems(values)]
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
        problems += contradictions(recipe)
    except ValidationError as error:
        problems += invalid(error)
    if problems or recipe is None:
        lines = {_where(path, document, origins, loc) + ": " + text: None for loc, text in problems}
        raise UserError("\n".join(sorted(lines, key=_by_line)))
    recipe = _pinned(_with_paths(recipe, path), _where(path, document, origins, ("model",)))
    if file := next((p for p in (recipe.folder, *recipe.folder.parents) if os.path.isfile(p)), None):
        where = _where(path, document, origins, ("output",))
        raise UserError(f"{where}: `output` is {recipe.folder}, but {file} is a file; name a folder")
    base = _base(recipe, _where(path, document, origins, ("model",)), (*above, path.resolve()))
    return recipe.linked(base, _scratch(recipe, _where(path, document, origins, ("eval", "scratch"))))


def _pinned(recipe: Recipe, where: str) -> Recipe:
    """The recipe with the base's id in `model` alone: a revision, or the address of its page, stands there as well.

    Raises UserError for an address of something else, and for two revisions. `where` is the place of the key.
    """
    named = recipe.model
    if not isinstance(named, str) or os.path.exists(named) or not is_more_than_an_id(named):
        return recipe
    try:
        name, revision = place(named)
    except UserError as error:
        raise UserError(f"{where}: `model`: {error}") from None
    loading = recipe.trainer.get("model_init_kwargs") or {}
    if revision and loading.get("revision", revision) != revision:
        raise UserError(
            f"{where}: `model` names the revision {revision}, and `trainer.model_init_kwargs.revision` is "
            f"{loading['revision']}; write one of them"
        )
    settings = {"model_init_kwargs": loading | {"revision": revision}} if revision else {}
    return recipe.model_copy(update={"model": name, "trainer": recipe.trainer | settings})


def _base(recipe: Recipe, where: str, above: tuple[Path, ...]) -> Recipe | None:
    """The recipe that `model` names, if it names one. `where` is the place of that key."""
    if not recipe.names_a_recipe:
        return None
    if Path(str(recipe.model)).resolve() in above:
        raise UserError(f"{where}: `model` leads back to {recipe.model}; name the recipe that this one starts from")
    try:
        base = _load(Path(str(recipe.model)), (), above)
    except UserError as error:
        raise UserError(f"{where}: `model` cannot be read:\n{error}") from error
    if base.has_adapter:
        raise UserError(f"{where}: `model` trains an adapter; a recipe to start from trains a whole model")
    return base


def _scratch(recipe: Recipe, where: str) -> Recipe | None:
    """The recipe that `eval.scratch` names, if it names one, on the rows of this one."""
    if recipe.eval.scratch is None:
        return None
    try:
        scratch = load(recipe.eval.scratch, recipe.on_same_data())
    except UserError as error:
        raise UserError(f"{where}: `eval.scratch` cannot be read:\n{error}") from error
    if not isinstance(scratch.model, dict):
        raise UserError(f"{where}: `eval.scratch` starts from a trained model; name a recipe whose `model` is new")
    return scratch


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "run.json").is_file() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"  # a run's folder stands for its recipe
    if path.parent in (Path(), Path("recipes")) and (SHIPPED / path.name).with_suffix(".yaml").is_file():
        return (SHIPPED / path.name).with_suffix(".yaml")
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder without a run; name a recipe, which is a YAML file, or the folder of a run"
        )
    names = [p.stem for p in shipped()]
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    raise UserError(
        f"{path}: no such recipe; "
        + (f"did you mean recipes/{near[0]}.yaml?" if near else "`sft recipes` lists those that are shipped")
    )


def _read(path: Path) -> Any:
    try:
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the recipe as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except YAMLError as error:
        raise UserError(f"{path}{_mended(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}; put what is text between quotes") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, at least `model`, `template` and `data`")
    return document


def _mended(error: YAMLError) -> str:
    """Line and cause of broken YAML, and what to do about it."""
    if not isinstance(error, MarkedYAMLError):
        return f": not valid YAML: {str(error).splitlines()[0]}; save it as plain text"
    mark = error.problem_mark or error.context_mark
    at = f":{mark.line + 1}" if mark else ""
    problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
    if isinstance(error, DuplicateKeyError) and (twice := re.search(r'found duplicate key "(.*?)"', problem)):
        return f"{at}: the key `{twice[1]}` stands here a second time; remove one"
    return f"{at}: not valid YAML: {problem}; check indentation, colons and quotes"


def _plain(node: Any) -> Any:
    """The document without the YAML reader's own types, which remember lines and notation. A date is its text."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    plain = next((kind for kind in (bool, int, float, str) if isinstance(node, kind)), None)
    return plain(node) if plain else node if node is None else str(node)


def _override(document: Any, override: str) -> str:
    """Set one `a.b=value` in the document and return its dotted key. `data.test=null` takes the recipe's own away."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override}: write overrides as key=value, for instance trainer.max_steps=10")
    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, RecursionError, ValueError):  # the last for a day that no month has
        value = text
    *parents, last = key.split(".")
    node = document
    for i, parent in enumerate(parents):
        if not isinstance(node.get(parent), dict):
            if node.get(parent) is not None:
                section = ".".join(parents[: i + 1])
                raise UserError(f"{override}: `{section}` is {shown(node[parent])}, not a section of keys")
            node[parent] = {}
        node = node[parent]
    if value is None and (key == "lora" or key.split(".")[0] not in LIBRARIES):
        node.pop(last, None)
    else:
        node[last] = value
    return key


def _where(path: Path, document: Any, origins: Mapping[str, str], loc: tuple[Any, ...]) -> str:
    """`file:line` of a key, or the override that set it."""
    keys = [str(part) for part in loc]
    for end in range(len(keys), 0, -1):
        if (dotted := ".".join(keys[:end])) in origins:
            return origins[dotted]
    line, node = None, document
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            break
        if hasattr(node, "lc") and key in (node.lc.data or {}):
            line = node.lc.key(key)[0] + 1
        elif inside := [override for dotted, override in origins.items() if dotted.startswith(".".join((*keys, "")))]:
            return inside[0]
        node = node[key]
    return f"{path}:{line}" if line else str(path)


def _by_line(message: str) -> tuple[bool, int]:
    line = re.search(r":(\d+): ", message)
    return line is None, int(line[1]) if line else 0


def _with_paths(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with every path that exists made absolute, and its output named."""

    def absolute(name: str) -> str:
        name = os.path.expanduser(name)
        for folder in (Path.cwd(), path.parent):
            if os.path.exists(folder / name):  # unlike Path.exists, it takes names too long for a file as well
                return os.path.abspath(folder / name)
        return name

    data = recipe.data.model_copy(
        update={"train": absolute(recipe.data.train), "test": recipe.data.test and absolute(recipe.data.test)}
    )
    output = recipe.output or os.path.join("runs", path.stem)
    update: dict[str, Any] = {"data": data, "output": os.path.abspath(os.path.expanduser(output))}
    if isinstance(recipe.model, str):
        update["model"] = absolute(recipe.model)
    if isinstance(recipe.tokenizer, str):
        update["tokenizer"] = absolute(recipe.tokenizer)
    if isinstance(recipe.tokenizer, VocabularyFile):
        update["tokenizer"] = recipe.tokenizer.model_copy(update={"vocab": absolute(recipe.tokenizer.vocab)})
    if recipe.eval.scratch is not None:
        update["eval"] = recipe.eval.model_copy(update={"scratch": absolute(recipe.eval.scratch)})
    if recipe.template.endswith(".py"):
        update["template"] = absolute(recipe.template)
    return recipe.model_copy(update=update)
