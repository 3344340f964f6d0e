"""A folder outside its run: prompted as it was trained, by sft and by whoever knows the tokenizer alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import data_templates
from data_templates import Template
from sft import UserError
from sft.files import seal, sealed
from sft.model.artifact import chat_template, furnish, load_artifact, open_artifact
from sft.recipe import load
from sft.rows.template import read_sample, samples, template_names
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened

TEXTS = ["Mira found a key.", "  two  spaces, \n\n{{ braces }} {% raw %} \\n 'quotes' \"more\"", "从前有座山", "🦊"]


def applied(tokenizer: Any, content: str, **options: Any) -> list[int]:
    turns = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **options))


@pytest.mark.parametrize("separator", ["\n", " ", "\n\nThen:\n"])
def test_the_chat_template_of_a_plain_model_gives_the_ids_of_training(any_tokenizer: Path, separator: str) -> None:
    from data_templates.story import template

    tokenizer = AutoTokenizer.from_pretrained(any_tokenizer)
    codec = Codec(tokenizer, "plain")
    story = template(separator)
    tokenizer.chat_template = chat_template(story, codec)
    for text in TEXTS:
        assert applied(tokenizer, text) == codec.prompts([str(story.prompt({"prompt": text}))])[0]


@pytest.mark.parametrize("name", template_names())
def test_every_template_has_a_chat_template_for_a_plain_model(gpt2_like: Path, name: str) -> None:
    import importlib

    template: Template = importlib.import_module(f"data_templates.{name}").template()
    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    codec = Codec(tokenizer, "plain")
    tokenizer.chat_template = chat_template(template, codec)
    row = next(iter(samples(template, template.example, "")))
    prompt, _ = read_sample(template, row, "")
    if name in ("running_text", "sequence"):  # a text to be gone on with
        assert applied(tokenizer, "Once") == codec.prompts([""])[0] + codec.outputs(["Once"])[0]
    elif name == "algorithm_evolution":  # of two fields: the content is the prompt
        assert applied(tokenizer, str(prompt)) == codec.prompts([prompt])[0]
    elif name == "chat":
        turns = [dict(turn) for turn in prompt]  # type: ignore[arg-type]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(ids) == codec.prompts([prompt])[0]
    else:
        first = template.example[next(iter(template.fields))]
        expected = template.prompt({next(iter(template.fields)): first})
        assert applied(tokenizer, first) == codec.prompts([expected])[0]


def test_the_few_shot_head_stands_before_the_question(gpt2_like: Path) -> None:
    from data_templates.pseudocode_cot import template

    shot = {"question": "1 + 1?", "pseudocode": "answer 1 + 1", "answer": "2"}
    solved = template(instruction='Say "why".', shots=[shot])
    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    tokenizer.chat_template = chat_template(solved, Codec(tokenizer, "plain"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}], tokenize=False)
    assert text == solved.prompt({"question": "2 + 2?"})
    assert text.startswith('Say "why".\n\nQuestion: 1 + 1?')


def test_turns_follow_each_other_as_prompts_and_ended_outputs_and_a_system_turn_is_refused(gpt2_like: Path) -> None:
    from data_templates.story import template

    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    tokenizer.chat_template = chat_template(template(), Codec(tokenizer, "plain"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "a\nb<|endoftext|>c\n"
    with pytest.raises(Exception, match="without a system turn"):
        tokenizer.apply_chat_template([{"role": "system", "content": "s"}, *turns], tokenize=False)


def test_a_chat_model_keeps_its_own_template(chat_like: Path) -> None:
    from data_templates.story import template

    tokenizer = AutoTokenizer.from_pretrained(chat_like)
    codec = Codec(tokenizer)
    assert chat_template(template(), codec) == tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}<|im_end|>",
        "{% if message['role'] == 'assistant' %}<think></think>\n{% endif %}{{ message['content'] }}<|im_end|>",
    )
    codec = Codec(tokenizer)
    assert codec.opening == "<think></think>\n"
    tokenizer.chat_template = chat_template(template(), codec)
    assert applied(tokenizer, "q") == Codec(AutoTokenizer.from_pretrained(chat_like)).prompts(["q"])[0] + list(
        tokenizer("<think></think>\n", add_special_tokens=False)["input_ids"]
    )


@pytest.fixture
def furnished(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> Path:
    """An untrained model furnished with a template of the user's own."""
    tiny_model(tmp_path / "model", gpt2_like)
    shutil.copyfile(Path(data_templates.__file__).with_name("story.py"), tmp_path / "mine.py")
    options = {"template": str(tmp_path / "mine.py"), "template_options": {"separator": "\n--\n"}}
    recipe = load(write_recipe(tmp_path, generation={"max_new_tokens": 7}, **options))
    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "model", folder)
    furnish(Opened(recipe), folder)
    seal(folder, {"run": 1})
    (tmp_path / "mine.py").unlink()
    (tmp_path / "rows.jsonl").unlink()
    return folder


def test_a_furnished_folder_opens_anywhere_with_its_own_template(
    furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = furnished.rename(tmp_path / "moved")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "template.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path / "cwd")
    found = open_artifact(elsewhere, ["generation.max_new_tokens=9"])
    assert found.template.prompt({"prompt": "a"}) == "a\n--\n"
    assert found.recipe.prompt_format == "plain"
    assert found.recipe.generation["max_new_tokens"] == 9
    model = load_artifact(found)
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.eos_token_id == found.tokenizer.eos_token_id
    assert found.codec.prompts(["a\n--\n"])[0] == applied(found.tokenizer, "a")
    assert str(tmp_path) not in (elsewhere / "recipe.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", ["recipe.yaml", "config.json", "files.json"])
def test_a_folder_that_lacks_a_part_is_refused(furnished: Path, name: str) -> None:
    (furnished / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        open_artifact(furnished)


def test_a_truncated_and_an_altered_file_are_told(furnished: Path) -> None:
    weights = furnished / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors: missing or not as it was written"):
            open_artifact(furnished)


def test_a_sealed_folder_knows_what_it_was_made_of(furnished: Path, tmp_path: Path) -> None:
    assert sealed(furnished, {"run": 1})
    assert not sealed(furnished, {"run": 2})
    assert json.loads((furnished / "files.json").read_text())["files"].keys() == {
        path.name for path in furnished.iterdir() if path.name != "files.json"
    }
    (furnished / "template.py").write_text("")
    assert not sealed(furnished, {"run": 1})
    assert not sealed(tmp_path / "nowhere", {"run": 1})
    with pytest.raises(UserError, match="was not written by sft"):
        sealed(tmp_path / "model", {"run": 1})
    (tmp_path / "model" / "files.json").write_text('{"of": "another program"}')
    with pytest.raises(UserError, match="sft did not write"):
        sealed(tmp_path / "model", {"run": 1})
