"""A recipe as its reader writes it: one YAML file is one run, typed, frozen, each key with a sentence about it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Data(Section):
    """Where the rows come from and which of them are held out."""

    train: Text
    """A file (.jsonl .json .csv .tsv .parquet .txt), a folder of such files, a `.py` file with a function
    `rows(split, **options)`, or a data set on the hub (`org/name`, `org/name@revision` or the address of its page)."""

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
    """Split that `test` means."""

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

    max_prompts_changed: float = Field(default=0.01, ge=0, le=1)
    """Rows whose prompt the tokenizer does not give back, as where it lacks the characters of a language."""

    max_duplicates: float = Field(default=0.5, ge=0, le=1)
    """Rows that are there more than once."""

    max_damaged: float = Field(default=0.01, ge=0, le=1)
    """Rows with replacement or control characters, byte order marks, or text decoded with the wrong encoding."""

    max_empty: float = Field(default=0.01, ge=0, le=1)
    """Rows with a field that holds nothing. An empty output is an error in any case."""

    max_doubled: float = Field(default=0.0, ge=0, le=1)
    """Rows whose answer brings a block, such as its thoughts, behind the one that the chat template puts there."""

    max_lost_turns: float = Field(default=0.0, ge=0, le=1)
    """Rows with a turn, such as the system's, that the chat template leaves out."""


class Recipe(Section):
    """One run, whole."""

    model: Text | dict[str, Any]
    """Base model: an id on the hub (`org/name`, `org/name@revision` or the address of its page), a local folder, or
    another recipe (`recipes/x.yaml`), which is built first.
    A mapping (`{model_type: gpt2, n_layer: 4, ...}`) is a new model, trained from scratch."""

    template: Text
    """Dataset template: the name of a file in `data_templates/`, or the path of your own `.py` file."""

    data: Data

    task: Literal["language_modelling", "classification"] = "language_modelling"
    """`classification` trains a head on the last token instead, which names the class that the template's `label`
    reads from a row."""

    tokenizer: Text | Tokenizers | None = None
    """Hub id or folder, `{vocab_size: N}` for a new one trained on the data, `{vocab: vocab.json}` for a vocabulary of
    your own, or nothing for that of the model."""

    template_options: dict[str, Any] = {}
    """Keyword arguments for the template's `template` function."""

    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """`chat` puts the prompt through the tokenizer's chat template, `plain` gives it as it is; `auto` is `chat` where
    the tokenizer has a chat template."""

    prompt_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day, YYYY-MM-DD, that a chat template prints which prints today's; the day of training where nothing is said,
    kept with the run and with what is made of it."""

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

    _base: "Recipe | None" = PrivateAttr(default=None)
    _scratch: "Recipe | None" = PrivateAttr(default=None)

    @property
    def base(self) -> "Recipe | None":
        """The recipe that `model` names, if it names one."""
        return self._base if self.names_a_recipe else None

    @property
    def scratch(self) -> "Recipe | None":
        """The recipe that `eval.scratch` names, on the data and template of this one."""
        return self._scratch if self.eval.scratch else None

    def linked(self, base: "Recipe | None", scratch: "Recipe | None") -> "Recipe":
        """This recipe with the two that it names, as its reader found them."""
        linked = self.model_copy()
        linked._base, linked._scratch = base, scratch
        return linked

    @property
    def names_a_recipe(self) -> bool:
        """Whether `model` is another recipe."""
        return isinstance(self.model, str) and self.model.endswith((".yaml", ".yml"))

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
    def has_adapter(self) -> bool:
        """Whether an adapter is trained and the base stays as it is; else all weights are trained. What kind of adapter
        is asked of `sft.model.adapter`."""
        return self.lora is not None

    @property
    def max_length(self) -> int:
        """Longest row in tokens; 1024, as in SFTConfig, where the recipe says nothing."""
        length = self.trainer.get("max_length", 1024)
        return int(length) if length else 2**31

    @property
    def trained(self) -> Path:
        """The folder that training leaves for the next stage: an adapter, or a whole model; the best one, by the loss
        on held-out rows, where the trainer keeps that."""
        best = "best_model" if self.trainer.get("load_best_model_at_end") else "model"
        return self.folder / ("adapter" if self.has_adapter else best)
