"""Mistakes of a recipe in words: the nearest right key, the name that another tool has for it, what a value may be."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from sft.recipe.fields import LIBRARIES, TYPE_WORDS, shown
from sft.recipe.schema import Check, Data, Eval, NewTokenizer, Recipe, Section, VocabularyFile

ELSEWHERE = {
    "base_model": "model", "model_name_or_path": "model", "pretrained_model": "model", "checkpoint": "model",
    "cutoff_len": "trainer.max_length", "sequence_len": "trainer.max_length", "max_seq_length": "trainer.max_length",
    "max_seq_len": "trainer.max_length", "block_size": "trainer.max_length", "model_max_length": "trainer.max_length",
    "sample_packing": "trainer.packing", "micro_batch_size": "trainer.per_device_train_batch_size",
    "batch_size": "trainer.per_device_train_batch_size", "train_batch_size": "trainer.per_device_train_batch_size",
    "num_epochs": "trainer.num_train_epochs", "epochs": "trainer.num_train_epochs", "lr": "trainer.learning_rate",
    "lr_scheduler": "trainer.lr_scheduler_type", "optimizer": "trainer.optim",
    "warmup_ratio": "trainer.warmup_steps (a number below 1 is a ratio)",
    "group_by_length": "trainer.train_sampling_strategy (`group_by_length`)",
    "evaluation_strategy": "trainer.eval_strategy", "grad_accum": "trainer.gradient_accumulation_steps",
    "lora_r": "lora.r", "lora_rank": "lora.r", "rank": "lora.r", "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout", "lora_target": "lora.target_modules", "lora_modules": "lora.target_modules",
    "lora_target_modules": "lora.target_modules", "lora_target_linear": "lora.target_modules (`all-linear`)",
    "load_in_4bit": "quantization (`4bit`)", "load_in_8bit": "quantization (`8bit`)",
    "quantization_bit": "quantization (`4bit`, `8bit`)", "adapter": "quantization and lora",
    "dataset": "data.train", "datasets": "data.train", "dataset_path": "data.train", "dataset_name": "data.train",
    "train_file": "data.train", "validation_file": "data.test", "test_file": "data.test", "eval_dataset": "data.test",
    "val_set_size": "data.test_fraction", "val_size": "data.test_fraction", "output_dir": "output",
    "max_new_tokens": "generation.max_new_tokens", "seed": "trainer.seed (training) or data.seed (the split)",
    "chat_template": "prompt_format", "max_samples": "data.limit",
}  # fmt: skip
"""Names that other tools use, or that stand elsewhere -> the name here."""


def unknown_key(loc: tuple[str, ...], known: Mapping[str, Any]) -> str:
    """The sentence about an unknown key: another tool's name, another place, or the nearest right name."""
    *section, key = loc
    message = f"unknown key `{key}`" + (f" under `{'.'.join(section)}`" if section else "")
    spelled = key.strip().lower().replace("-", "_")
    if spelled in ELSEWHERE:
        return f"{message}; here it is `{ELSEWHERE[spelled]}`"
    if "." in key and key.split(".")[0] in Recipe.model_fields:
        return f"{message}; in a file it is a section, `{key.replace('.', ': {')}: ...{'}' * key.count('.')}`"
    places = {name: [*fields()] for name, fields in LIBRARIES.items()}
    places |= {"data": [*Data.model_fields], "eval": [*Eval.model_fields], "check": [*Check.model_fields]}
    for place, names in places.items():
        if key in names and place not in section:
            return f"{message}; it stands under `{place}`: `{place}.{key}`"
    if section and key in Recipe.model_fields:
        return f"{message}; it stands at the top level"
    if near := difflib.get_close_matches(spelled, list(known), n=1, cutoff=0.5):
        return f"{message}; did you mean `{near[0]}`?"
    if section and section[0] in LIBRARIES:
        return f"{message}; known are the fields of {LIBRARIES[section[0]].owner}"
    return f"{message}; known are {', '.join(sorted(known))}"


def blamed(settings: Mapping[str, Any], make: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Those of the settings without any one of which `make` takes the others; all of them where there is none such."""
    found = {}
    for key, value in settings.items():
        try:
            make({name: other for name, other in settings.items() if name != key})
        except Exception:  # as wrong without this one
            continue
        found[key] = value
    return found or dict(settings)


def not_accepted(section: str, settings: Mapping[str, Any], library: str, error: BaseException | None) -> str:
    """The sentence about settings that a library does not accept, with the key that its own words name."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    named = [key for key in settings if re.search(rf"\b{re.escape(key)}\b", reason) and len(key) > 1]
    if len(settings) == 1:
        named = [*settings]
    where = " and ".join(f"`{section}.{key}`" for key in named) or f"`{section}:`"
    return f"{where} {'are' if len(named) > 1 else 'is'} not accepted by {library}: {reason}"


MISSING = {"model": "model: gpt2", "template": "template: story", "data": "data: {train: rows.jsonl}",
           "data.train": "data: {train: rows.jsonl}",
           "tokenizer.vocab_size": "tokenizer: {vocab_size: 2048}"}  # fmt: skip
"""Key that cannot be left out -> an example of it."""

TAKES = {"string_type": str, "int_type": int, "int_from_float": int, "float_type": float, "dict_type": dict,
         "model_type": dict, "model_attributes_type": dict}  # fmt: skip
"""Pydantic's names of a wrong type -> the right one."""


def invalid(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pydantic's errors in the words of a recipe, what a value of several types may be in one sentence."""
    said, taken = set[tuple[str, ...]](), dict[tuple[str, ...], tuple[Any, list[str]]]()
    for e in error.errors():
        branch = {"str", "constrained-str", "NewTokenizer", "VocabularyFile"}
        keys = tuple(str(k) for k in e["loc"] if k not in branch and not str(k).startswith(("dict[", "tagged-union[")))
        if e["type"] not in TAKES:
            said.add(keys)
            yield keys, _sentence(keys, e)
        elif not (keys == ("tokenizer",) and isinstance(e["input"], dict)):  # its keys have errors of their own
            taken.setdefault(keys, (e["input"], []))[1].append(TYPE_WORDS[TAKES[e["type"]]])
    for keys, (value, words) in taken.items():
        if keys not in said:
            yield keys, f"`{'.'.join(keys)}` is {shown(value)}; it takes {' or '.join(words)}"


def _sentence(keys: tuple[str, ...], error: Any) -> str:
    """One pydantic error."""
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"data": Data, "eval": Eval, "check": Check, "tokenizer": NewTokenizer}
        if "VocabularyFile" in error["loc"]:
            sections["tokenizer"] = VocabularyFile
        return unknown_key(keys, (sections[keys[0]] if len(keys) > 1 else Recipe).model_fields)
    if error["type"] == "missing":
        return f"`{name}` is missing; write for instance `{MISSING[name]}`"
    if error["type"] == "literal_error":
        return f"`{name}` is {shown(error['input'])}; write one of {error['ctx']['expected']}"
    if error["type"] == "string_too_short":
        return f"`{name}` is empty; give it a value or remove it"
    return f"`{name}` is {shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"
