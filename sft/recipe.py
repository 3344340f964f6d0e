"""Recipes: one YAML file is one run, typed, frozen and checked whole before anything heavy is imported.

The keys of `trainer:`, `lora:`, `generation:` and of a model made from scratch belong to the libraries that own them.
They are read from those libraries' sources (`sft.fields`), so that a recipe is checked in milliseconds, without torch.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft import UserError
from sft.fields import GENERATION, LORA, TRAINER, WORDS, LibraryFields, model_config_fields, shown

SHIPPED = next(p for p in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes") if p.is_dir())
"""The recipes that come with the project: inside the package when installed from a wheel, beside it in a checkout."""

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Data(Section):
    """Where the rows come from and which of them are held out."""

    train: Text
    """A file (.jsonl .json .csv .tsv .parquet .txt), a folder of such files, a `.py` file with a function
    `rows(split, **options)`, or a data set on the hub."""

    test: Text | None = None
    """Held-out rows, named like `train`. Without it, `test_fraction` of `train` is held out."""

    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows that is held out when `test` is not set."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides which rows are held out. Apart from `trainer.seed`, so that repeated runs share one test set."""

    columns: dict[str, str] = {}
    """Template field -> column of the file, where the two names differ: `{prompt: question, output: answer}`."""

    record: Literal["line", "paragraph", "file"] = "line"
    """What one record of a plain text file is."""

    encoding: str = "utf-8"
    """Encoding of text files, by its Python name. A byte order mark is read as what it is."""

    options: dict[str, Any] = {}
    """Keyword arguments for the `rows` function of a `.py` file."""

    subset: str | None = None
    """Configuration of a data set on the hub."""

    train_split: str = "train"
    """Split of a data set on the hub (or in a folder written by `save_to_disk`) that `train` means."""

    test_split: str = "test"
    """Split that `test` means, likewise."""

    limit: int | None = Field(default=None, gt=0)
    """Use only the first so many records of `train`, and of `test`."""

    overflow: Literal["trim_prompt", "drop", "error"] = "trim_prompt"
    """What happens to a row longer than `trainer.max_length`: its prompt loses its oldest tokens, the row is left out,
    or the run stops. The output and its end token are never cut; each such row is counted."""


class NewTokenizer(Section):
    """A byte-level BPE tokenizer, trained on the training rows."""

    vocab_size: int = Field(gt=256)
    """Number of tokens, the 256 bytes and the end token among them."""


class VocabularyFile(Section):
    """A vocabulary of your own, for rows that are sequences of its tokens. What is not named is known by its usual
    name: `<pad>`, `<s>`, `[CLS]`, `</s>`, `<|endoftext|>`, `<unk>`."""

    vocab: Text
    """A JSON file, `{token: id, ...}`, with ids from 0 without gaps."""

    pad: Text | None = None
    """The token that fills up rows; without one, the end token."""

    start: Text | None = None
    """The token before every sequence; without one, the end token."""

    end: Text | None = None
    """The token behind every sequence."""

    unknown: Text | None = None
    """The token for what is not in the vocabulary; without one, the pad token. No row may hold such a thing."""


def _kind_of_tokenizer(value: Any) -> str:
    own = isinstance(value, VocabularyFile) or (isinstance(value, dict) and "vocab" in value)
    return "VocabularyFile" if own else "NewTokenizer"


Tokenizers = Annotated[
    Annotated[NewTokenizer, Tag("NewTokenizer")] | Annotated[VocabularyFile, Tag("VocabularyFile")],
    Discriminator(_kind_of_tokenizer),
]


class Eval(Section):
    """How base and tuned model are compared. The decoding itself stands under `generation:`."""

    rows: int = Field(default=64, ge=0)
    """Number of held-out prompts to generate from. The loss is measured on all held-out rows."""

    batch_tokens: int = Field(default=8192, gt=0)
    """Bound on rows x length of one batch: what bounds the memory of scoring and generating."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """For the choice of prompts, for sampling, and for the bootstrap."""

    training_rows: int = Field(default=0, ge=0)
    """Rows of the training side on which loss and accuracy are measured too, each time that training looks at the
    held-out rows: the report plots both."""

    scratch: Text | None = None
    """A recipe that makes a new model: it is trained on the data and template of this recipe, and its scores stand
    beside base and tuned as a third column."""

    ngrams: list[Annotated[int, Field(gt=0)]] = []
    """Orders of n-gram models, counted on the training rows, whose scores stand there too: `[1, 3]`."""


class Check(Section):
    """How much may be lost before a run is refused, as shares of the rows of either side."""

    max_dropped: float = Field(default=0.01, ge=0, le=1)
    """Rows left out because they are longer than `trainer.max_length`."""

    max_trimmed: float = Field(default=1.0, ge=0, le=1)
    """Rows whose prompt lost its beginning to fit."""

    max_changed: float = Field(default=0.01, ge=0, le=1)
    """Rows whose output the tokenizer does not give back exactly."""

    max_duplicates: float = Field(default=0.5, ge=0, le=1)
    """Rows that are there more than once."""

    max_damaged: float = Field(default=0.01, ge=0, le=1)
    """Rows with replacement or control characters, byte order marks, or UTF-8 that was read as Latin-1."""

    max_empty: float = Field(default=0.01, ge=0, le=1)
    """Rows with a field that holds nothing. An empty output is an error in any case."""


class Recipe(Section):
    """One run, whole."""

    model: Text | dict[str, Any]
    """Base model: an id on the hub, a local folder, or another recipe (`recipes/x.yaml`), which is built first.
    A mapping (`{model_type: gpt2, n_layer: 4, ...}`) is a new model, trained from scratch."""

    template: Text
    """Dataset template: the name of a file in `data_templates/`, or the path of your own `.py` file."""

    data: Data

    task: Literal["language_modelling", "classification"] = "language_modelling"
    """`classification` trains a head on the last token instead, which tells the class that the template's `label`
    reads from a row."""

    tokenizer: Text | Tokenizers | None = None
    """Hub id or folder, `{vocab_size: N}` for a new one trained on the data, `{vocab: vocab.json}` for a vocabulary of
    your own, or nothing for that of the model."""

    template_options: dict[str, Any] = {}
    """Keyword arguments for the template's `template` function."""

    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """`chat` puts the prompt through the tokenizer's chat template, `plain` gives it as it is; `auto` is `chat` where
    the tokenizer has a chat template."""

    quantization: Literal["none", "4bit", "8bit"] = "none"
    """4bit is nf4 with double quantisation (QLoRA), 8bit is LLM.int8(); both through bitsandbytes and with `lora:`."""

    lora: dict[str, Any] | None = None
    """`peft.LoraConfig`, by its own names. Without it all weights are trained."""

    trainer: dict[str, Any] = {}
    """`trl.SFTConfig`, by its own names."""

    generation: dict[str, Any] = {}
    """`transformers.GenerationConfig`, by its own names: how predictions are decoded, for base and tuned alike."""

    check: Check = Check()

    eval: Eval = Eval()

    output: Text | None = None
    """Folder of the run; `runs/NAME` where nothing is said."""

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        assert self.output is not None, "a recipe from `load` has its output set"
        return Path(self.output)

    @cached_property
    def base(self) -> "Recipe | None":
        """The recipe that `model` names, if it names one."""
        return load(self.model) if isinstance(self.model, str) and self.model.endswith((".yaml", ".yml")) else None

    @cached_property
    def scratch(self) -> "Recipe | None":
        """The recipe that `eval.scratch` names, on the data and template of this one."""
        return load(str(self.eval.scratch), self.on_same_data()) if self.eval.scratch else None

    def on_same_data(self) -> list[str]:
        """The settings that put another recipe on the data and template of this one."""
        settings = {
            "data": self.data.model_dump(exclude_defaults=True),
            "template": self.template,
            "template_options": self.template_options,
            "output": f"{self.folder}.scratch",
            "eval": None,
        }
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

    @property
    def trained(self) -> Path:
        """The folder that training leaves for the next stage: an adapter, or a whole model; the best one, by the loss
        on held-out rows, where the trainer keeps that."""
        best = "best_model" if self.trainer.get("load_best_model_at_end") else "model"
        return self.folder / ("adapter" if self.lora is not None else best)


LIBRARIES: Mapping[str, LibraryFields] = {"trainer": TRAINER, "lora": LORA, "generation": GENERATION}

OWNED = {
    "trainer": {
        "output_dir": "the run's folder is `output` at the top level",
        "auto_find_batch_size": "it changes the effective batch size unseen; set `per_device_train_batch_size`",
        "resume_from_checkpoint": "the same command goes on from the last whole checkpoint by itself",
        "completion_only_loss": "the loss falls on what the template's `completion` returns, always",
        "assistant_only_loss": "the loss falls on what the template's `completion` returns, always",
        "truncation_mode": "outputs are never cut; `data.overflow` says what happens to long rows",
        "dataset_text_field": "the template reads the row; map columns with `data.columns`",
        "dataset_kwargs": "rows reach the trainer with ids and labels; there is nothing left to prepare",
        "chat_template_path": "the tokenizer's own chat template is used; see `prompt_format`",
        "trust_remote_code": "code from the hub is never run",
        "activation_offloading": "it is not supported here; use `activation_checkpointing`",
        "padding_free": "`packing` does it, and is proven not to leak before it is used",
        "fsdp": "each process holds the whole model here", "fsdp_config": "each process holds the whole model here",
        "deepspeed": "each process holds the whole model here",
        "parallelism_config": "each process holds the whole model here",
    },
    "lora": {"task_type": "it is always CAUSAL_LM", "base_model_name_or_path": "it is `model` at the top level",
             "inference_mode": "it is set by the stage"},
    "generation": {"max_length": "set `max_new_tokens`", "eos_token_id": "the end token is that of training",
                   "pad_token_id": "it is that of the tokenizer", "bos_token_id": "it is that of the tokenizer",
                   "num_return_sequences": "write `sft generate --samples N`",
                   "return_dict_in_generate": "the text alone is kept", "output_scores": "the text alone is kept",
                   "output_logits": "the text alone is kept", "output_attentions": "the text alone is kept",
                   "output_hidden_states": "the text alone is kept"},
}  # fmt: skip
"""Fields of the libraries that the pipeline itself decides. Setting one would be ignored or would break a promise."""

POSITIVE = {"max_length", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "r",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_alpha", "max_new_tokens",
            "temperature", "repetition_penalty"}  # fmt: skip
"""Fields of the libraries that make no sense at 0 or below, which the libraries tell late or never."""
NO_LIMIT = ("max_steps", -1)
SHARES, COUNTS = {"top_p", "min_p", "typical_p"}, {"top_k", "no_repeat_ngram_size"}
"""Fields of `generation:` that run from 0 to 1, and those that run from 0 up."""
SEEDS = {"seed", "data_seed"}
"""Fields of `trainer:` that numpy takes too, which has 32 bits for them."""
AUTO = (("trainer", "per_device_train_batch_size"), "auto")
"""The one setting that a library does not know: the largest micro-batch that fits the card, by `sft.fit`."""

DRAWN = ("temperature", "top_k", "top_p", "min_p")
"""Fields of `generation:` that say how tokens are drawn."""

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


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key=value` with dotted keys, for instance `trainer.max_steps=10`.

    Paths in it are looked for from the working directory, then from the recipe's own folder, and become absolute.
    Raises UserError with every mistake of the file at once.
    """
    return _load(Path(path), overrides, ())


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load` reads back to the same recipe."""
    text = json.dumps(recipe.model_dump(exclude_defaults=True), ensure_ascii=False, indent=2)
    unlike_json = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"  # these YAML takes as escapes alone
    text = re.sub(unlike_json, lambda found: f"\\u{ord(found[0]):04x}", text)
    return "# The recipe as it was resolved. JSON is YAML: this file runs again as it is.\n" + text + "\n"


def drawing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings given one by one, with what they mean: one that draws tokens turns `do_sample` on, and a
    temperature of 0 turns it off."""
    if given.get("temperature") == 0:
        return {**given, **dict.fromkeys(DRAWN), "do_sample": False}
    return {**given, "do_sample": True} if given.keys() & set(DRAWN) else dict(given)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the libraries' own fields, for editors."""
    schema = Recipe.model_json_schema()
    for section, fields in LIBRARIES.items():
        node = {"type": "object", "additionalProperties": False, "description": f"{fields.owner}, by its own names."}
        known = {name: kind.schema() for name, kind in fields().items() if name not in OWNED[section]}
        if section == AUTO[0][0]:
            known[AUTO[0][1]] = {"anyOf": [known[AUTO[0][1]], {"const": AUTO[1]}]}
        node["properties"] = known
        schema["properties"][section] = {"anyOf": [node, {"type": "null"}]} if section == "lora" else node
    return schema


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
    problems: list[tuple[tuple[str, ...], str]] = [*_library_problems(values)]
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
        problems += _contradictions(recipe)
    except ValidationError as error:
        problems += _invalid(error)
    if problems or recipe is None:
        lines = {_where(path, document, origins, loc) + ": " + text: None for loc, text in problems}
        raise UserError("\n".join(sorted(lines, key=_by_line)))
    recipe = _with_paths(recipe, path)
    if file := next((p for p in (recipe.folder, *recipe.folder.parents) if os.path.isfile(p)), None):
        where = _where(path, document, origins, ("output",))
        raise UserError(f"{where}: `output` is {recipe.folder}, but {file} is a file; name a folder")
    if isinstance(recipe.model, str) and recipe.model.endswith((".yaml", ".yml")):
        where, above = _where(path, document, origins, ("model",)), (*above, path.resolve())
        if Path(recipe.model).resolve() in above:
            raise UserError(f"{where}: `model` leads back to {recipe.model}; name the recipe that this one starts from")
        try:
            base = _load(Path(recipe.model), (), above)
        except UserError as error:
            raise UserError(f"{where}: `model` cannot be read:\n{error}") from error
        if base.lora is not None:
            raise UserError(f"{where}: `model` trains an adapter; a recipe to start from trains a whole model")
    if recipe.eval.scratch is not None:
        where = _where(path, document, origins, ("eval", "scratch"))
        try:
            new = isinstance(recipe.scratch and recipe.scratch.model, dict)
        except UserError as error:
            raise UserError(f"{where}: `eval.scratch` cannot be read:\n{error}") from error
        if not new:
            raise UserError(f"{where}: `eval.scratch` starts from a trained model; name a recipe whose `model` is new")
    return recipe


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
    except (YAMLError, RecursionError):
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
    if value is None and key.split(".")[0] not in LIBRARIES:
        node.pop(last, None)
    else:
        node[last] = value
    return key


def _library_problems(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and values of the sections that belong to a library, and of the model that is made from scratch."""
    sections = {name: fields() for name, fields in LIBRARIES.items()}
    model = document.get("model")
    if isinstance(model, dict) and "model_type" in model:
        known = model_config_fields(str(model["model_type"]))
        if not known:
            yield ("model", "model_type"), f"transformers has no model type `{model['model_type']}`"
        else:
            sections["model"] = known
    for section, known in sections.items():
        values = document.get(section)
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            loc = (section, str(key))
            if reason := OWNED.get(section, {}).get(key):
                yield loc, f"`{key}` cannot be set under `{section}`: {reason}"
            elif key not in known:
                yield loc, _unknown(loc, known)
            elif ((section, key), value) == AUTO:
                continue
            elif problem := known[key].problem(value):
                yield loc, f"`{section}.{key}` {problem}"
            elif key in POSITIVE and isinstance(value, int | float) and value <= 0 and (key, value) != NO_LIMIT:
                yield loc, f"`{section}.{key}` is {value}; it takes a number above 0"
            elif key in SHARES and isinstance(value, int | float) and not 0 <= value <= 1:
                yield loc, f"`{section}.{key}` is {value}; it takes a number from 0 to 1"
            elif key in COUNTS and isinstance(value, int) and value < 0:
                yield loc, f"`{section}.{key}` is {value}; it takes a whole number from 0 up"
            elif key in SEEDS and isinstance(value, int) and not 0 <= value < 2**32:
                yield loc, f"`{section}.{key}` is {value}; it takes a whole number from 0 to {2**32 - 1}"


def _unknown(loc: tuple[str, ...], known: Mapping[str, Any]) -> str:
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


def _contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are right alone and wrong together."""
    if recipe.quantization != "none" and recipe.lora is None:
        yield (
            ("quantization",),
            (
                f"`quantization: {recipe.quantization}` needs a `lora:` section; whole 4-bit or 8-bit weights "
                "cannot be trained"
            ),
        )
    if recipe.trainer.get(AUTO[0][1]) == AUTO[1] and "gradient_accumulation_steps" not in recipe.trainer:
        yield AUTO[0], "`auto` needs `trainer.gradient_accumulation_steps`: the rows of a step, which it divides"
    if isinstance(recipe.model, dict):
        if "model_type" not in recipe.model:
            yield ("model",), "a new model needs `model_type`, for instance `model_type: gpt2`"
        if recipe.tokenizer is None:
            yield ("model",), "a new model needs a `tokenizer`: `{vocab_size: 2048}` trains one on the data"
        if recipe.lora is not None:
            yield ("lora",), "a new model is trained whole: remove `lora:` and `quantization:`"
    elif isinstance(recipe.tokenizer, NewTokenizer):
        yield ("tokenizer",), "a new tokenizer needs a new model: remove `tokenizer:`, or make `model:` a mapping"
    if recipe.task == "classification":
        if recipe.lora is not None:
            yield ("lora",), "`task: classification` trains all weights: remove `lora:` and `quantization:`"
        if recipe.eval.scratch is not None:
            yield ("eval", "scratch"), "`eval.scratch` goes with language modelling: remove it"
        if recipe.eval.ngrams:
            yield ("eval", "ngrams"), "`eval.ngrams` goes with language modelling: remove it"
        if recipe.trainer.get("packing"):
            yield ("trainer", "packing"), "`trainer.packing` goes with language modelling: remove it"
    if len(set(recipe.eval.ngrams)) < len(recipe.eval.ngrams):
        yield ("eval", "ngrams"), f"`eval.ngrams` is {recipe.eval.ngrams}; name each order once"
    if recipe.trainer.get("load_best_model_at_end") and recipe.lora is None:
        for key, wrong, right in (
            ("save_strategy", "best", "`epoch` or `steps`"),
            ("save_total_limit", 1, "2 or more"),
        ):
            if recipe.trainer.get(key) == wrong:
                message = (
                    f"`trainer.{key}: {wrong}` leaves no last checkpoint, of which final_model is made; write {right}"
                )
                yield ("trainer", key), message
    if (recipe.trainer.get("model_init_kwargs") or {}).get("trust_remote_code"):
        yield ("trainer", "model_init_kwargs"), "`trust_remote_code` cannot be set: code from the hub is never run"
    if (bias := (recipe.lora or {}).get("bias", "none")) in ("all", "lora_only"):
        yield ("lora", "bias"), f"`lora.bias: {bias}` trains the base's own weights, to which the result is compared"
    if (start := (recipe.lora or {}).get("init_lora_weights", True)) not in (True, False, "gaussian"):
        message = (
            f"`lora.init_lora_weights: {start}` changes the base model, to which the result is compared; leave it out"
        )
        yield ("lora", "init_lora_weights"), message
    given = isinstance(recipe.tokenizer, str | VocabularyFile)
    if given and isinstance(recipe.model, str) and recipe.model.endswith((".yaml", ".yml")):
        yield ("tokenizer",), "`tokenizer` cannot be set where `model` is a recipe; that recipe decides it"


MISSING = {"model": "model: gpt2", "template": "template: story", "data": "data: {train: rows.jsonl}",
           "data.train": "data: {train: rows.jsonl}",
           "tokenizer.vocab_size": "tokenizer: {vocab_size: 2048}"}  # fmt: skip
"""Key that cannot be left out -> an example of it."""

TAKES = {"string_type": str, "int_type": int, "int_from_float": int, "float_type": float, "dict_type": dict,
         "model_type": dict, "model_attributes_type": dict}  # fmt: skip
"""Pydantic's names of a wrong type -> the right one."""


def _invalid(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pydantic's errors in the words of a recipe, what a value of several types may be in one sentence."""
    told, taken = set[tuple[str, ...]](), dict[tuple[str, ...], tuple[Any, list[str]]]()
    for e in error.errors():
        branch = {"str", "constrained-str", "NewTokenizer", "VocabularyFile"}
        keys = tuple(str(k) for k in e["loc"] if k not in branch and not str(k).startswith(("dict[", "tagged-union[")))
        if e["type"] not in TAKES:
            told.add(keys)
            yield keys, _sentence(keys, e)
        elif not (keys == ("tokenizer",) and isinstance(e["input"], dict)):  # its keys have errors of their own
            taken.setdefault(keys, (e["input"], []))[1].append(WORDS[TAKES[e["type"]]])
    for keys, (value, words) in taken.items():
        if keys not in told:
            yield keys, f"`{'.'.join(keys)}` is {shown(value)}; it takes {' or '.join(words)}"


def _sentence(keys: tuple[str, ...], error: Any) -> str:
    """One pydantic error."""
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"data": Data, "eval": Eval, "check": Check, "tokenizer": NewTokenizer}
        if "VocabularyFile" in error["loc"]:
            sections["tokenizer"] = VocabularyFile
        return _unknown(keys, (sections[keys[0]] if len(keys) > 1 else Recipe).model_fields)
    if error["type"] == "missing":
        return f"`{name}` is missing; write for instance `{MISSING[name]}`"
    if error["type"] == "literal_error":
        return f"`{name}` is {shown(error['input'])}; write one of {error['ctx']['expected']}"
    if error["type"] == "string_too_short":
        return f"`{name}` is empty; give it a value or remove it"
    return f"`{name}` is {shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


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
        for folder in (Path.cwd(), path.parent):
            if os.path.exists(folder / name):  # unlike Path.exists, it takes names too long for a file as well
                return os.path.abspath(folder / name)
        return name

    data = recipe.data.model_copy(
        update={"train": absolute(recipe.data.train), "test": recipe.data.test and absolute(recipe.data.test)}
    )
    update: dict[str, Any] = {"data": data, "output": os.path.abspath(recipe.output or Path("runs") / path.stem)}
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
