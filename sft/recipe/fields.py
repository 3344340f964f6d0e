"""The fields of other libraries' configs, read from their source text: importing them would take seconds."""

import ast
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sft.decoding import SETTINGS

SCALAR_TYPES = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "dict": (dict,), "list": (list,),
           "tuple": (list,), "None": (type(None),)}  # fmt: skip
SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array",
          type(None): "null"}  # fmt: skip
TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping",
         list: "a list", type(None): "null"}  # fmt: skip


def shown(value: Any) -> str:
    """A wrong value as it stands in a message."""
    text = repr(value)
    return "empty" if value is None else text if len(text) < 60 else text[:56] + " ..."


@dataclass(frozen=True)
class Kind:
    """What values a field takes, as far as its annotation says."""

    types: tuple[type, ...] = ()
    """Empty where the annotation names a class of the library: any value may be right."""
    choices: tuple[Any, ...] = ()

    def problem(self, value: Any) -> str | None:
        """What is wrong with the value, or None."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"is {value}; it takes a finite number"
        if self.choices and not any(value == choice and type(value) is type(choice) for choice in self.choices):
            if not (isinstance(value, self.types) and self.types):
                return f"is {shown(value)}; write one of {', '.join(map(repr, self.choices))}"
        elif self.types and not self.choices:
            number_for_bool = isinstance(value, bool) and bool not in self.types
            if number_for_bool or not isinstance(value, self.types):
                words = [
                    TYPE_WORDS[kind] for kind in dict.fromkeys(self.types) if not (kind is int and float in self.types)
                ]
                return f"is {shown(value)}; it takes {' or '.join(words)}"
        return None

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of such a value."""
        if self.choices:
            either: list[dict[str, Any]] = [{"enum": list(self.choices)}]
            return {"anyOf": either + [{"type": SCHEMA_TYPES[kind]} for kind in self.types]}
        return {"type": sorted({SCHEMA_TYPES[kind] for kind in self.types})} if self.types else {}


@dataclass(frozen=True)
class LibraryFields:
    """A config class of a library, by its name and the function that reads its fields."""

    owner: str
    read: Callable[[], dict[str, Kind]]

    def __call__(self) -> dict[str, Kind]:
        return self.read()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed; run ./launch.sh once")
    return Path(spec.submodule_search_locations[0])


def _source(package: str, path: str) -> ast.Module | None:
    file = _package(package) / path
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _dataclass_fields(*places: tuple[str, str, str]) -> dict[str, Kind]:
    """Annotated fields of classes given as (package, file, class), the most derived first."""
    fields: dict[str, Kind] = {}
    for package, path, name in reversed(places):
        tree = _source(package, path)
        if tree is None or name not in _classes(tree):
            raise ModuleNotFoundError(f"{package}: no class {name} in {path}; install the versions in constraints.txt")
        fields |= dict(_annotated(_classes(tree)[name]))
    return fields


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, Kind]]:
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if not name.startswith("_"):
                if "ClassVar" not in ast.unparse(annotation):
                    yield name, _kind(annotation)


def _kind(annotation: ast.expr) -> Kind:
    """`int | None`, `Optional[Union[list[str], str]]`, `Literal["a", "b"]`: the outermost types and literal values."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _either([left, right])
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _either([inner, ast.Constant(None)])
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=elements)):
            return _either(elements)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=elements)):
            return Kind(choices=tuple(e.value for e in elements if isinstance(e, ast.Constant)))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant(value=value)):
            return Kind(choices=(value,))
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name) if name in SCALAR_TYPES:
            return Kind(SCALAR_TYPES[name])
        case ast.Constant(value=None):
            return Kind(SCALAR_TYPES["None"])
    return Kind()


def _either(annotations: list[ast.expr]) -> Kind:
    kinds = [_kind(annotation) for annotation in annotations]
    if not all(kind.types or kind.choices for kind in kinds):
        return Kind()
    return Kind(tuple(dict.fromkeys(t for kind in kinds for t in kind.types)), sum((k.choices for k in kinds), ()))


@cache
def _trainer() -> dict[str, Kind]:
    fields = _dataclass_fields(
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    )
    mappings = {name: Kind((dict, type(None))) for name in fields if name.endswith("_kwargs")}
    levels = Kind(choices=("passive", "debug", "info", "warning", "error", "critical"))
    said = dict.fromkeys(("log_level", "log_level_replica"), levels)
    said["include_num_input_tokens_seen"] = Kind(choices=(True, False, "all", "non_padding", "no"))
    said["train_sampling_strategy"] = Kind(choices=("random", "sequential", "group_by_length"))
    said["loss_type"] = Kind(choices=("nll", "dft", "chunked_nll"))
    said["debug"] = Kind(choices=("", "underflow_overflow"))
    return fields | mappings | said  # what the annotations leave open, and the libraries find wrong in a traceback


@cache
def _lora() -> dict[str, Kind]:
    return _dataclass_fields(
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    )


@cache
def lora_parts(field: str) -> dict[str, Kind]:
    """Fields of a section within `lora:`, whose unknown keys peft leaves out without a word; empty for other fields."""
    name = {"velora_config": "VeloraConfig", "use_bdlora": "BdLoraConfig"}.get(field)
    return _dataclass_fields(("peft", "tuners/lora/config.py", name)) if name else {}


def _of_setting(kind: type) -> Kind:
    """The values of a generation setting, which `GenerationConfig` finds wrong late, in a traceback."""
    return Kind(SCALAR_TYPES[kind.__name__] if kind is bool else (*SCALAR_TYPES[kind.__name__], type(None)))


OTHER_GENERATION_KINDS: Mapping[str, str] = {
    "min_length": "int", "min_new_tokens": "int", "max_time": "float", "stop_strings": "str | list", "num_beams": "int",
    "early_stopping": "bool | str", "length_penalty": "float", "top_h": "float", "epsilon_cutoff": "float",
    "eta_cutoff": "float", "bad_words_ids": "list", "renormalize_logits": "bool", "forced_eos_token_id": "int | list",
    "remove_invalid_values": "bool", "exponential_decay_length_penalty": "list", "suppress_tokens": "list",
    "begin_suppress_tokens": "list", "sequence_bias": "list", "guidance_scale": "float", "watermarking_config": "dict",
}  # fmt: skip
"""The types of `GenerationConfig`'s other fields, as its documentation has them: its code names none."""


@cache
def _generation() -> dict[str, Kind]:
    """`GenerationConfig` is not a dataclass: its fields are those its `__init__` takes out of its keyword arguments."""
    tree = _source("transformers", "generation/configuration_utils.py")
    assert tree is not None
    init = next(n for n in _classes(tree)["GenerationConfig"].body if getattr(n, "name", "") == "__init__")
    names = {
        str(call.args[0].value): Kind()
        for call in ast.walk(init)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "pop"
        and isinstance(call.args[0], ast.Constant) and not str(call.args[0].value).startswith("_")
    }  # fmt: skip
    kinds = {
        name: _kind(ast.parse(f"{text} | None", mode="eval").body) for name, text in OTHER_GENERATION_KINDS.items()
    }
    kinds |= {name: _of_setting(setting.kind) for name, setting in SETTINGS.items()}
    return names | {name: kind for name, kind in kinds.items() if name in names}


@cache
def model_config_fields(model_type: str) -> dict[str, Kind]:
    """Fields of the config class of a transformers model type; empty where there is no such type."""
    for tree in _config_sources(model_type):
        classes = _classes(tree)
        for node in classes.values():
            assigned = {i.targets[0].id: i.value for i in node.body
                        if isinstance(i, ast.Assign) and isinstance(i.targets[0], ast.Name)}  # fmt: skip
            declared = assigned.get("model_type")
            if isinstance(declared, ast.Constant) and declared.value == model_type:
                fields = _dataclass_fields(("transformers", "configuration_utils.py", "PreTrainedConfig"))
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in classes:
                        fields |= dict(_annotated(classes[base.id]))
                aliases = getattr(assigned.get("attribute_map"), "keys", ())
                named = {str(key.value): Kind() for key in aliases if isinstance(key, ast.Constant)}
                return fields | dict(_annotated(node)) | named | {"model_type": Kind((str,))}
    return {}


def _config_sources(model_type: str) -> Iterator[ast.Module]:
    """The configuration file of a model type: most have a folder of their name, some live with a relative."""
    name = model_type.replace("-", "_")
    if name.isidentifier() and (tree := _source("transformers", f"models/{name}/configuration_{name}.py")):
        yield tree
    for file in sorted(_package("transformers").glob("models/*/configuration_*.py")):
        text = file.read_text(encoding="utf-8")
        if f'model_type = "{model_type}"' in text:
            yield ast.parse(text)


LIBRARIES: Mapping[str, LibraryFields] = {
    "trainer": LibraryFields("trl.SFTConfig", _trainer),
    "lora": LibraryFields("peft.LoraConfig", _lora),
    "generation": LibraryFields("transformers.GenerationConfig", _generation),
}
"""Section of a recipe -> the config class that owns its keys."""
