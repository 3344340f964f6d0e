"""A model folder outside its run, which everybody prompts as it was trained: recipe, template and tokenizer go along.

What a consumer that knows nothing of recipes reads, the tokenizer's chat template and the generation config, says the
same in its own words.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_templates import Template
from sft import UserError
from sft.files import altered, read_json, write_text
from sft.model.load import decoding, device, without_bars
from sft.recipe import Recipe, dump, load
from sft.rows.template import has_prompt, read_prompt, template_file
from sft.show import say
from sft.tokens.codec import ANSWER, Codec
from sft.tokens.opened import Opened
from sft.tokens.tokenizer import unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROBES = ("Once upon a time", ' Two  spaces,\na line; "quotes" {{ and }} \\n', "从前有座山，", f"{ANSWER}\n\n", "é🦊")
"""Texts by which it is found out where a template puts its first field, and whether a chat template gives its ids."""

RECORDS = ("README.md", "recipe.yaml", "parity.json", "files.json")
"""Names in a furnished folder that are written after the template's files."""

Ids = Callable[[str], list[int]]


def furnish(opened: Opened, folder: Path) -> None:
    """Write beside a model's weights what is needed to prompt it as it was trained: `recipe.yaml` (and, where the
    template is the user's own, `template.py` with what it reads), the tokenizer with a chat template, and
    `generation_config.json`."""
    recipe, codec = opened.recipe, opened.codec
    tokenizer = copy.deepcopy(codec.tokenizer)
    tokenizer.chat_template = chat_template(opened.template, codec)
    if tokenizer.chat_template is None:
        say(f"{folder.name}: no chat template gives the ids of training with this tokenizer, so there is none; use sft")
    tokenizer.save_pretrained(folder)
    decoding(recipe, codec).save_pretrained(folder)
    if recipe.template.endswith(".py"):
        _take_template(opened, folder)
    write_text(folder / "recipe.yaml", dump(_portable(recipe, codec)))


def _take_template(opened: Opened, folder: Path) -> None:
    """Copy a user's template, and what it reads that lies beside it, to the same places below a folder."""
    own = template_file(opened.recipe)
    shutil.copyfile(own, folder / "template.py")
    for name in {**opened.loaded.at_load, **opened.called}:
        source, place = opened.loaded.home / name, folder / name
        if name == own.name or not source.is_file():
            continue
        if Path(name).is_absolute():
            say(f"{folder.name}: the template reads {name}, which is not copied; put it beside the template")
        elif place.exists() or name in RECORDS:
            raise UserError(f"{source}: the template reads it, and {name} is also a file of the model; rename yours")
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)


def open_artifact(folder: Path, overrides: Sequence[str] = ()) -> Opened:
    """A furnished folder as its recipe, opened: `model` is the folder, and no adapter and no quantisation is left.
    `overrides` are those of its recipe.

    Raises UserError for another folder, and for one whose files are not as they were written. A `template.py` in it is
    Python that is run.
    """
    for name in ("recipe.yaml", "config.json", "files.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; name a folder that `sft merge` wrote, or a run")
    if broken := altered(folder, read_json(folder / "files.json")["sha256"]):
        raise UserError(f"{folder / broken}: missing or not as it was written; write the folder again")
    recipe = load(folder / "recipe.yaml", overrides)
    template = str(folder / "template.py") if recipe.template.endswith(".py") else recipe.template
    trainer = {key: value for key, value in recipe.trainer.items() if key != "model_init_kwargs"}
    update = {"model": str(folder), "tokenizer": None, "template": template, "trainer": trainer, "output": str(folder)}
    return Opened(recipe.model_copy(update=update | {"lora": None, "quantization": "none"}))


def load_artifact(opened: Opened, dtype: str = "auto") -> "PreTrainedModel":
    """The model of a furnished folder, on the device at hand. Raises UserError where its weights cannot be read.

    `dtype` is that of its weights unless given: what is converted later keeps buffers that were rounded by loading.
    """
    from transformers import AutoModelForCausalLM

    without_bars()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(opened.recipe.model), use_safetensors=True, dtype=dtype)
    except Exception as error:
        raise UserError(unreachable(str(opened.recipe.model), "model", error)) from error
    return model.to(device(opened.recipe)).eval()


def chat_template(template: Template, codec: Codec) -> str | None:
    """A Jinja chat template with which `tokenizer.apply_chat_template` gives the ids of `codec.prompts`; None where no
    such template was found.

    That of the tokenizer itself where the model was trained through it. Else the content of a user's turn is the first
    field of the data template, or the whole prompt where the data template reads several fields. The names of special
    tokens in a content become such tokens, which `codec.prompts` prevents and a chat template cannot.
    """
    if codec.chat:
        opening = "{% if add_generation_prompt %}" + _printed(codec.opening) + "{% endif %}" if codec.opening else ""
        return codec.template + opening
    turns, ids = _turns(template, codec)
    trial = copy.deepcopy(codec.tokenizer)
    for candidate in _opened(turns, codec, ids("")):
        trial.chat_template = candidate
        if all(_applied(trial, probe) == ids(probe) for probe in PROBES):
            return candidate
    return None


def _turns(template: Template, codec: Codec) -> tuple[str, Ids]:
    """Jinja for the turns of a conversation in front of a plain model, and what ids a content means."""
    if not has_prompt(template):
        head = codec.prompts([""])[0]
        return _turn(codec, "", ""), lambda text: head + codec.outputs([text])[0]
    try:
        prompts = [read_prompt(template, {next(iter(template.fields)): probe}, "") for probe in PROBES]
    except UserError:  # it needs more fields than the first
        return _turn(codec, "", ""), lambda text: codec.prompts([text])[0]
    if not isinstance(prompts[0], str):  # data_templates.as_text, in Jinja
        each = "{{ m['role'] | capitalize + ': ' + m['content'] + '\\n\\n' }}"
        turns = (
            "{% for m in messages %}"
            + each
            + "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
        )
        return turns, lambda text: codec.prompts([[{"role": "user", "content": text}]])[0]
    before, _, after = prompts[0].partition(PROBES[0])
    if any(prompt != before + probe + after for prompt, probe in zip(prompts, PROBES, strict=True)):
        return _turn(codec, "", ""), lambda text: codec.prompts([text])[0]
    return _turn(codec, before, after), lambda text: codec.prompts([before + text + after])[0]


def _turn(codec: Codec, before: str, after: str) -> str:
    """Jinja for turns of which each question is a prompt and each answer an output with its end token."""
    end = "".join(codec.tokenizer.convert_ids_to_tokens(codec.end))
    question = _printed(before) + "{{ m['content'] }}" + _printed(after)
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}" + question + "{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] }}" + _printed(end) + "{% else %}{{ raise_exception('this model was trained on prompts alone: "
        "write user turns, without a ' + m['role'] + ' turn') }}{% endif %}{% endfor %}"
    )


def _opened(turns: str, codec: Codec, empty: list[int]) -> Iterator[str]:
    """Ways to put what stands before every text, such as BOS: as it is, or with the space that some tokenizers put
    before a text themselves, but not after BOS."""
    start = "".join(codec.tokenizer.convert_ids_to_tokens(codec.start or empty))
    if not codec.start:
        yield turns
    yield _printed(start) + turns
    spaced = "{{ ('' if text.startswith(' ') else ' ') + text }}"
    yield "{% set text %}" + turns + "{% endset %}" + _printed(start) + spaced


def _applied(tokenizer: "PreTrainedTokenizerFast", content: str) -> list[int]:
    turns = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def _printed(text: str) -> str:
    """Jinja that prints a text: a JSON string is one of Jinja as well."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _portable(recipe: Recipe, codec: Codec) -> Recipe:
    """The recipe as it travels: its prompt format settled, and the places of this machine by their last name."""
    data = {key: _name(value) for key in ("train", "test") if (value := getattr(recipe.data, key))}
    update: dict[str, Any] = {"data": recipe.data.model_copy(update=data), "output": None}
    update["prompt_format"] = "chat" if codec.chat else "plain"
    update["prompt_date"] = str(codec.date) if codec.prints_date else None
    if isinstance(recipe.model, str):
        update["model"] = _name(str(recipe.base.folder) if recipe.base else recipe.model)
    if isinstance(recipe.tokenizer, str):
        update["tokenizer"] = _name(recipe.tokenizer)
    if recipe.template.endswith(".py"):
        update["template"] = "template.py"
    return recipe.model_copy(update=update)


def _name(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place
