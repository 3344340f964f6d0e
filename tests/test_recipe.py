"""A recipe is checked whole: each mistake is told with its line and what to write instead."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from sft import UserError
from sft.cli import main
from sft.decoding import SETTINGS
from sft.recipe import Recipe, dump, load
from sft.recipe.checks import OWNED
from sft.recipe.fields import LIBRARIES, model_config_fields
from sft.recipe.json_schema import schema
from sft.recipe.messages import ELSEWHERE

RECIPES = Path(__file__).parents[1] / "recipes"
LOADING = "trainer: {model_init_kwargs:"
NOT_THERE = "cannot be set under `trainer.model_init_kwargs`"
START = "model: m\ntemplate: story\ndata: {train: rows.jsonl}\nlora: {r: 4}\n"


@pytest.fixture
def mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`mistakes(text, *overrides)`: the lines of the message about a recipe `r.yaml` with that text."""
    monkeypatch.chdir(tmp_path)

    def messages(text: str, *overrides: str) -> list[str]:
        Path("r.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as error:
            load("r.yaml", overrides)
        return str(error.value).splitlines()

    return messages


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """`settings(text, *overrides)`: the recipe with that text, loaded."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Recipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load("r.yaml", overrides)

    return read


# ---- what may stand in a recipe


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("modle: x", "unknown key `modle`; did you mean `model`?"),
        ("Model: x", "unknown key `Model`; did you mean `model`?"),
        ("trainer: {learning-rate: 1}", "unknown key `learning-rate` under `trainer`; did you mean `learning_rate`?"),
        ("trainer: {lerning_rate: 1}", "unknown key `lerning_rate` under `trainer`; did you mean `learning_rate`?"),
        ("eval: {row: 1}", "unknown key `row` under `eval`; did you mean `rows`?"),
        ("generation: {do_smple: true}", "unknown key `do_smple` under `generation`; did you mean `do_sample`?"),
        ("trainer: {zzzzzz: 1}", "unknown key `zzzzzz` under `trainer`; known are the fields of trl.SFTConfig"),
        ("trainer: {1: 2}", "unknown key `1` under `trainer`; known are the fields of trl.SFTConfig"),
        ("learning_rate: 1.0", "unknown key `learning_rate`; it stands under `trainer`: `trainer.learning_rate`"),
        ("train: x", "unknown key `train`; it stands under `data`: `data.train`"),
        ("trainer: {quantization: 4bit}", "unknown key `quantization` under `trainer`; it stands at the top level"),
        ("trainer.max_steps: 1", "unknown key `trainer.max_steps`; in a file it is a section, `trainer: {max_steps:"),
        ("trainer: {output_dir: x}", "`output_dir` cannot be set under `trainer`: the run's folder is `output`"),
        ("generation: {max_length: 5}", "`max_length` cannot be set under `generation`: set `max_new_tokens`"),
        ("trainer: {push_to_hub: true}", "`push_to_hub` cannot be set under `trainer`: nothing is sent while training"),
        ("trainer: {accelerator_config: {split_batches: true}}", "`accelerator_config` cannot be set under `tra"),
        ("trainer: {shuffle_dataset: true}", "`shuffle_dataset` cannot be set under `trainer`: each epoch draws its"),
        ("trainer: {enable_jit_checkpoint: true}", "`enable_jit_checkpoint` cannot be set under `trainer`: a stopped"),
        (f"{LOADING} {{device_map: auto}}}}", f"`device_map` {NOT_THERE}: each process holds the whole model"),
        (f"{LOADING} {{trust_remote_code: true}}}}", f"`trust_remote_code` {NOT_THERE}: code from the hub is never"),
        (f"{LOADING} {{quantization_config: {{load_in_4bit: true}}}}}}", f"`quantization_config` {NOT_THERE}: write `"),
        (f"{LOADING} {{rope_theta: 5}}}}", f"`rope_theta` {NOT_THERE}, which has revision, dtype, attn_implementation"),
        (f"{LOADING} {{dtype: auto}}}}", "`trainer.model_init_kwargs.dtype` is 'auto'; write one of 'float32'"),
    ],
)  # fmt: skip
def test_unknown_key_says_where_it_stands_and_what_is_right(
    mistakes: Callable[..., list[str]], wrong: str, message: str
) -> None:
    (line,) = mistakes(START + wrong)
    assert line.startswith(f"r.yaml:5: {message}")


@pytest.mark.parametrize("name", ["cutoff_len", "sequence_len", "max_seq_length"])
@pytest.mark.parametrize("section", ["{}: 5", "trainer: {{{}: 5}}"])
def test_names_of_other_tools_are_known(mistakes: Callable[..., list[str]], name: str, section: str) -> None:
    (line,) = mistakes(START + section.format(name))
    assert line.startswith("r.yaml:5: ")
    assert line.endswith("here it is `trainer.max_length`")


def test_names_of_other_tools_lead_to_keys_that_exist() -> None:
    here = {*Recipe.model_fields, "data", "lora"} | {f"{s}.{k}" for s, f in LIBRARIES.items() for k in f()}
    here |= {f"data.{key}" for key in Recipe.model_fields["data"].annotation.model_fields}  # type: ignore[union-attr]
    for name, target in ELSEWHERE.items():
        for key in target.split(" (")[0].replace(" or ", " and ").split(" and "):
            assert key.split(" (")[0] in here, f"{name} -> {target}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trainer: {max_steps: ten}", "`trainer.max_steps` is 'ten'; it takes a whole number"),
        ("trainer: {max_steps: 1.5}", "`trainer.max_steps` is 1.5; it takes a whole number"),
        ("trainer: {max_steps: true}", "`trainer.max_steps` is True; it takes a whole number"),
        ("trainer: {learning_rate: '1e-3'}", "`trainer.learning_rate` is '1e-3'; it takes a number"),
        ("trainer: {learning_rate: .nan}", "`trainer.learning_rate` is nan; it takes a finite number"),
        ("trainer: {learning_rate: 0}", "`trainer.learning_rate` is 0; it takes a number above 0"),
        ("trainer: {max_steps: -2}", "`trainer.max_steps` is -2; it takes a number above 0"),
        ("trainer: {packing: yes}", "`trainer.packing` is 'yes'; it takes true or false"),
        ("trainer:", "`trainer` is empty; it takes a mapping"),
        ("trainer: [1]", "`trainer` is [1]; it takes a mapping"),
        ("quantization: 3bit", "`quantization` is '3bit'; write one of 'none', '4bit' or '8bit'"),
        ("quantization: 4", "`quantization` is 4; write one of 'none', '4bit' or '8bit'"),
        ("eval: {rows: -1}", "`eval.rows` is -1: input should be greater than or equal to 0"),
        ("tokenizer: 5", "`tokenizer` is 5; it takes text or a mapping"),
        ("tokenizer: {vocab_size: 5}", "`tokenizer.vocab_size` is 5: input should be greater than 256"),
        ("tokenizer: {}", "`tokenizer.vocab_size` is missing; write for instance `tokenizer: {vocab_size: 2048}`"),
        ("output: ''", "`output` is empty; give it a value or remove it"),
    ],
)
def test_wrong_type_says_what_the_key_takes(mistakes: Callable[..., list[str]], wrong: str, message: str) -> None:
    assert mistakes(START + wrong) == [f"r.yaml:5: {message}"]


def test_as_many_steps_as_the_epochs_have_are_asked_for_by_minus_one(settings: Callable[..., Recipe]) -> None:
    assert settings(START + "trainer: {max_steps: -1}").trainer == {"max_steps": -1}


def test_empty_model_is_one_mistake(mistakes: Callable[..., list[str]]) -> None:
    assert mistakes(START.replace("model: m", "model: ''")) == [
        "r.yaml:1: `model` is empty; give it a value or remove it"
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("peft_type: IA3", "`peft_type` cannot be set under `lora`: it is always LORA; other methods of peft are not"),
        ("peft_version: '1'", "`peft_version` cannot be set under `lora`: it is the version that is installed"),
        ("revision: v2", "`revision` cannot be set under `lora`: set that of the base, `trainer.model_init_kwargs."),
        ("auto_mapping: {a: b}", "`auto_mapping` cannot be set under `lora`: it is for model classes that"),
        ("fan_in_fan_out: true", "`fan_in_fan_out` cannot be set under `lora`: peft sets it by the kind of each layer"),
        ("eva_config: {rho: 2.0}", "`eva_config` cannot be set under `lora`: it changes the base model"),
        ("monteclora_config: {num_samples: 2}", "`monteclora_config` cannot be set under `lora`: it adds to the loss"),
    ],
)
def test_what_peft_or_the_stage_decides_is_refused_with_the_reason(
    mistakes: Callable[..., list[str]], setting: str, message: str
) -> None:
    (line,) = mistakes(START.replace("{r: 4}", f"{{r: 4, {setting}}}"))
    assert line.startswith(f"r.yaml:4: {message}")


def test_settings_of_decoding_are_those_that_can_be_asked_for_everywhere() -> None:
    from sft.cli import _parser
    from sft.serve.api import Asked, Chat, Completion

    told = {name for name, setting in SETTINGS.items() if setting.help}
    others = {"model", "row", "max_tokens", "seed", "stop", "n", "stream", "stream_options", "user", "metadata",
              "store", "safety_identifier", "prompt_cache_key", "service_tier", "frequency_penalty",
              "presence_penalty", "logit_bias", "logprobs"}  # fmt: skip
    assert set(Asked.model_fields) - others == told - {"max_new_tokens"}
    assert not (Completion.model_fields.keys() | Chat.model_fields.keys()) - Asked.model_fields.keys() & told
    options = vars(_parser().parse_args(["generate", "r.yaml"]))
    assert told <= options.keys()
    assert told == {"max_new_tokens", *SETTINGS} - {"do_sample"}


def test_a_request_is_held_to_the_bounds_of_the_settings() -> None:
    from sft.serve.api import Completion

    asked = {name: setting for name, setting in SETTINGS.items() if name in Completion.model_fields}
    assert len(asked) >= 7
    for name, setting in asked.items():
        assert setting.bounds is not None
        assert getattr(Completion.model_validate({name: setting.kind(1)}), name) == 1, name
        above = [setting.bounds.high + 1] if setting.bounds.high < 2 else []
        for wrong in (setting.kind(-1), *above, *([1.5] if setting.bounds.whole else [])):
            with pytest.raises(ValidationError):
                Completion.model_validate({name: wrong})


def test_nothing_of_the_hub_is_set_under_trainer() -> None:
    of_hub = {name for name in LIBRARIES["trainer"]() if name.startswith(("hub_", "push_"))}
    assert len(of_hub) >= 7
    assert of_hub <= OWNED["trainer"].keys()


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.bounds])
def test_settings_of_decoding_are_held_to_their_bounds(
    mistakes: Callable[..., list[str]], settings: Callable[..., Recipe], name: str
) -> None:
    setting = SETTINGS[name]
    wrong = {"max_new_tokens": 0, "temperature": 0.0, "repetition_penalty": 0.0}.get(name, setting.kind(-1))
    (line,) = mistakes(START + f"generation: {{{name}: {wrong}}}")
    assert line == f"r.yaml:5: `generation.{name}` is {wrong}; it takes {setting.bounds}"
    right = setting.kind(1)
    assert settings(START + f"generation: {{{name}: {right}}}").generation == {name: right}


def test_lora_takes_what_peft_takes(mistakes: Callable[..., list[str]]) -> None:
    text = START.replace("{r: 4}", "{r: '4', bias: some, use_dora: 3, rank: 5, target_modules: 7}")
    assert mistakes(text) == [
        "r.yaml:4: `lora.r` is '4'; it takes a whole number",
        "r.yaml:4: `lora.bias` is 'some'; write one of 'none', 'all', 'lora_only'",
        "r.yaml:4: `lora.use_dora` is 3; it takes true or false",
        "r.yaml:4: unknown key `rank` under `lora`; here it is `lora.r`",
        "r.yaml:4: `lora.target_modules` is 7; it takes a list or text or null",
    ]


def test_all_mistakes_come_at_once_in_the_order_of_their_lines(mistakes: Callable[..., list[str]]) -> None:
    text = """# a comment
model: 3
data:
  trian: rows.jsonl
  columns: {prompt: 5}

lora:
  r: 4
  alpha: 8
trainer:
  # another
  max_steps: "ten"
  max_seq_length: 5
evel: {rows: 3}
"""
    assert mistakes(text) == [
        "r.yaml:2: `model` is 3; it takes text or a mapping",
        "r.yaml:3: `data.train` is missing; write for instance `data: {train: rows.jsonl}`",
        "r.yaml:4: unknown key `trian` under `data`; did you mean `train`?",
        "r.yaml:5: `data.columns.prompt` is 5; it takes text",
        "r.yaml:9: unknown key `alpha` under `lora`; here it is `lora.lora_alpha`",
        "r.yaml:12: `trainer.max_steps` is 'ten'; it takes a whole number",
        "r.yaml:13: unknown key `max_seq_length` under `trainer`; here it is `trainer.max_length`",
        "r.yaml:14: unknown key `evel`; did you mean `eval`?",
        "r.yaml: `template` is missing; write for instance `template: story`",
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: m\ntemplate: story\ndata: {train: x}\nquantization: 4bit\n", 4, "needs a `lora:` section"),
        ("model: {n_layer: 2}\ntokenizer: {vocab_size: 300}\ntemplate: story\ndata: {train: x}\n", 1, "`model_type`"),
        ("model: {model_type: gpt2}\ntemplate: story\ndata: {train: x}\n", 1, "a new model needs a `tokenizer`"),
        ("model: m\ntokenizer: {vocab_size: 300}\ntemplate: story\ndata: {train: x}\n", 2, "needs a new model"),
        ("model: b.yaml\ntokenizer: t\ntemplate: story\ndata: {train: x}\n", 2, "where `model` is a recipe"),
        ("model: {model_type: gtp2}\ntokenizer: {vocab_size: 300}\ntemplate: story\ndata: {train: x}\n", 1, "`gtp2`"),
        ("model: {model_type: 5}\ntokenizer: {vocab_size: 300}\ntemplate: story\ndata: {train: x}\n", 1, "`5`"),
        ("tokenizer: {vocab_size: 300}\ntemplate: story\ndata: {train: x}\nmodel:\n  model_type: gpt2\n  n_layers: 2\n",
         6, "did you mean `n_layer`?"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together_name_their_line(
    mistakes: Callable[..., list[str]], text: str, line: int, words: str
) -> None:
    (message,) = mistakes(text)
    assert message.startswith(f"r.yaml:{line}: ")
    assert words in message


# ---- YAML


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "- a\n- b\n", "hello\n", "42\n", "model:m\n"])
def test_yaml_that_is_no_mapping_is_told(mistakes: Callable[..., list[str]], text: str) -> None:
    assert mistakes(text) == [
        "r.yaml: a recipe is a mapping of keys to values, at least `model`, `template` and `data`"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: m\n\ttemplate: story\n", 2),
        ("model: [a\ntemplate: story\n", 2),
        ("model: a: b\n", 1),
        ("model: m\n  template: story\n", 2),
        ("model: *nothing\n", 1),
        (START + "---\n" + START, 5),
    ],
)
def test_broken_yaml_names_its_line(mistakes: Callable[..., list[str]], text: str, line: int) -> None:
    (message,) = mistakes(text)
    assert message.startswith(f"r.yaml:{line}: not valid YAML: ")


def test_key_that_stands_twice_is_an_error(mistakes: Callable[..., list[str]]) -> None:
    assert mistakes(START + "model: n\n") == ["r.yaml:5: the key `model` stands here a second time; remove one"]
    (message,) = mistakes(START + "trainer:\n  max_steps: 1\n  max_steps: 2\n")
    assert message == "r.yaml:7: the key `max_steps` stands here a second time; remove one"


@pytest.mark.parametrize("content", ["model: m\0\n", "model: m\x07\n", "model: " + "[" * 3000])
def test_what_yaml_cannot_hold_ends_in_a_message(mistakes: Callable[..., list[str]], content: str) -> None:
    (message,) = mistakes(content)
    assert message.startswith("r.yaml: not valid YAML: ")


@pytest.mark.parametrize("content", [START.encode("utf-16"), "model: café\n".encode("latin-1")])
def test_recipe_that_is_not_utf_8_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.yaml: not UTF-8; save the recipe as UTF-8"):
        load(tmp_path / "r.yaml")


def test_numbers_need_no_dot(settings: Callable[..., Recipe]) -> None:
    recipe = settings(START + "trainer: {learning_rate: 1e-3, weight_decay: 1E-2, max_steps: 010}\n")
    assert recipe.trainer == {"learning_rate": 0.001, "weight_decay": 0.01, "max_steps": 10}
    assert all(type(value) is not str for value in recipe.trainer.values())


def test_byte_order_mark_anchors_and_dates_are_read(settings: Callable[..., Recipe]) -> None:
    recipe = settings(f"\ufeff{START}template_options: &o {{day: 2020-01-02}}\ngeneration: {{}}\noutput: 2021-03-04\n")
    assert recipe.template_options == {"day": "2020-01-02"}
    assert recipe.folder.name == "2021-03-04"


def test_mistake_behind_an_anchor_names_the_line_of_the_anchor(mistakes: Callable[..., list[str]]) -> None:
    assert mistakes(START.replace("lora: ", "lora: &a ") + "trainer: *a\n") == [
        "r.yaml:4: unknown key `r` under `trainer`; it stands under `lora`: `lora.r`"
    ]


# ---- overrides


def test_override_replaces_adds_and_removes(settings: Callable[..., Recipe]) -> None:
    recipe = settings(
        START, "trainer.max_steps=3", "data.columns.prompt=question", "lora=null", "template_options={separator: ' '}"
    )
    assert recipe.trainer == {"max_steps": 3}
    assert recipe.data.columns == {"prompt": "question"}
    assert recipe.lora is None
    assert recipe.template_options == {"separator": " "}
    text = START + "prompt_format: plain\neval: {rows: 3}\n"
    recipe = settings(text, "prompt_format=null", "eval.rows=null")
    assert (recipe.prompt_format, recipe.eval) == (settings(START).prompt_format, settings(START).eval)


@pytest.mark.parametrize("text", ["a=b", "{a", "*x", "@x", "[", "\0", "[" * 3000])
def test_override_that_is_no_yaml_is_text(settings: Callable[..., Recipe], text: str) -> None:
    assert settings(START, f"model={text}").model == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stps=3", "unknown key `max_stps` under `trainer`; did you mean `max_steps`?"),
        ("trainer.max_steps=ten", "`trainer.max_steps` is 'ten'; it takes a whole number"),
        ("trainer={max_stps: 3}", "unknown key `max_stps` under `trainer`; did you mean `max_steps`?"),
        ("trainer.report_to.first=x", "`trainer.report_to` is {'first': 'x'}; it takes null or text or a list"),
        ("cutoff_len=5", "unknown key `cutoff_len`; here it is `trainer.max_length`"),
        ("data={}", "`data.train` is missing; write for instance `data: {train: rows.jsonl}`"),
        ("lora.r=", "`lora.r` is empty; it takes a whole number"),
        ("model.n_layer=3", "`model` is 'm', not a section of keys"),
        ("data.train.x=3", "`data.train` is 'rows.jsonl', not a section of keys"),
        ("max_steps", "write overrides as key=value, for instance trainer.max_steps=10"),
        ("=5", "write overrides as key=value, for instance trainer.max_steps=10"),
        ("trainer..r=5", "write overrides as key=value, for instance trainer.max_steps=10"),
        ("trainer.=5", "write overrides as key=value, for instance trainer.max_steps=10"),
    ],
)
def test_wrong_override_is_told_by_its_own_text(
    mistakes: Callable[..., list[str]], override: str, message: str
) -> None:
    assert mistakes(START, override) == [f"{override}: {message}"]


def test_override_and_file_are_told_together(mistakes: Callable[..., list[str]]) -> None:
    assert mistakes(START + "evel: 3\n", "lora=null", "quantization=4bit", "eval.rows=-2") == [
        "r.yaml:5: unknown key `evel`; did you mean `eval`?",
        "eval.rows=-2: `eval.rows` is -2: input should be greater than or equal to 0",
    ]
    (message,) = mistakes(START, "lora=null", "quantization=4bit")
    assert message.startswith("quantization=4bit: `quantization: 4bit` needs a `lora:` section")


# ---- the recipe that a recipe starts from


def test_recipes_that_start_from_each_other_are_told(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a"), ("self", "self")):
        (tmp_path / f"{name}.yaml").write_text(f"model: {base}.yaml\ntemplate: story\ndata: {{train: x}}\n")
    with pytest.raises(UserError, match=r"b\.yaml:1: `model` leads back to .*a\.yaml; name the recipe"):
        load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"self\.yaml:1: `model` leads back to .*self\.yaml"):
        load(tmp_path / "self.yaml")


def test_mistake_in_the_base_recipe_names_both_files(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("# top\nmodel: base.yaml\ntemplate: story\ndata: {train: x}\n")
    with pytest.raises(UserError, match=r"top\.yaml:2: `model` cannot be read:\nbase\.yaml: no such recipe"):
        load(tmp_path / "top.yaml")
    (tmp_path / "base.yaml").write_text("model: m\ntemplate: story\ndata: {train: x}\nevel: 3\n")
    with pytest.raises(UserError, match=r"top\.yaml:2: .*\n.*base\.yaml:4: unknown key `evel`"):
        load(tmp_path / "top.yaml")
    (tmp_path / "base.yaml").write_text(START)
    with pytest.raises(UserError, match=r"top\.yaml:2: `model` trains an adapter"):
        load(tmp_path / "top.yaml")


def test_recipe_that_is_not_there_is_not_taken_for_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("tiny_gpt_stories").template == load("recipes/tiny_gpt_stories.yaml").template
    with pytest.raises(UserError, match=r"no such recipe; did you mean recipes/tiny_gpt_stories\.yaml\?"):
        load("mine/tiny_gpt_stories.yaml")
    with pytest.raises(UserError, match="is a folder without a run; name a recipe"):
        load(tmp_path)


def test_a_run_that_was_moved_is_read_where_it_is(tmp_path: Path, settings: Callable[..., Recipe]) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "run.json").write_text("{}")
    (tmp_path / "moved" / "recipe.yaml").write_text(dump(settings(START, "output=before")), encoding="utf-8")
    assert load(tmp_path / "moved").folder == tmp_path / "moved"
    assert load(tmp_path / "moved", ["output=after"]).folder == tmp_path / "after"


# ---- paths


def test_paths_are_found_from_the_working_directory_then_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "r.yaml").write_text(START)
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    assert load("../r.yaml").data.train == str(tmp_path / "rows.jsonl")
    Path("rows.jsonl").write_text("{}")
    assert load("../r.yaml").data.train == str(tmp_path / "here" / "rows.jsonl")
    assert load("../r.yaml").folder == tmp_path / "here" / "runs" / "r"
    assert load("../r.yaml").model == "m", "what is no path stays as it is"
    assert load("../r.yaml", ["model=" + "x" * 5000]).model == "x" * 5000


# ---- dump


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=3))
def test_dumped_recipe_loads_to_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "first.yaml").write_text(START)
    recipe = load(folder / "first.yaml").model_copy(update={"template_options": options})
    (folder / "second.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(folder / "second.yaml") == recipe


def test_every_shipped_recipe_dumps_to_itself(tmp_path: Path) -> None:
    for file in shipped():
        (tmp_path / "again.yaml").write_text(dump(load(file)), encoding="utf-8")
        assert load(tmp_path / "again.yaml") == load(file), file.name


# ---- schema


def shipped() -> list[Path]:
    files = sorted(RECIPES.glob("*.yaml"))
    assert files, "no recipe found"
    return files


def test_every_shipped_recipe_carries_the_editor_line_and_fits_the_schema() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    for file in shipped():
        text = file.read_text(encoding="utf-8")
        assert "# yaml-language-server: $schema=recipe.schema.json" in text.splitlines(), file.name
        assert [e.message for e in validator.iter_errors(YAML(typ="safe").load(text))] == [], file.name


def test_the_schema_in_the_repository_is_that_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (RECIPES / "recipe.schema.json").read_text(encoding="utf-8"), (
        "run: sft schema > recipes/recipe.schema.json"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": "x"},
        {"trainer": {"max_stps": 1}},
        {"trainer": {"max_steps": "1"}},
        {"trainer": {"output_dir": "x"}},
        {"lora": {"rank": 4}},
        {"generation": {"do_smple": True}},
        {"data": {"train": "x", "tset": "y"}},
        {"eval": {"row": 3}},
        {"tokenizer": {"vocab_size": 300, "more": 1}},
        {"quantization": "3bit"},
        {"template": 5},
    ],
)
def test_the_schema_forbids_what_the_program_refuses(tmp_path: Path, wrong: dict[str, object]) -> None:
    right = YAML(typ="safe").load(START)
    jsonschema.validate(right, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(right | wrong, schema())
    (tmp_path / "r.yaml").write_text(json.dumps(right | wrong))
    with pytest.raises(UserError):
        load(tmp_path / "r.yaml")


# ---- the libraries' own fields, read from their sources


def test_field_names_read_from_the_sources_are_those_of_the_libraries() -> None:
    from peft import LoraConfig
    from transformers import GenerationConfig
    from trl import SFTConfig

    assert set(LIBRARIES["trainer"]()) == {f.name for f in dataclasses.fields(SFTConfig) if f.init} - {"_n_gpu"}
    assert set(LIBRARIES["lora"]()) == {f.name for f in dataclasses.fields(LoraConfig) if f.init}
    own = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert set(LIBRARIES["generation"]()) == own


def test_fields_that_the_pipeline_decides_exist() -> None:
    for section, names in OWNED.items():
        known = set(LIBRARIES[section]()) | {"trust_remote_code", "dataset_kwargs"}
        assert set(names) <= known, set(names) - known


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "gpt_neox", "gemma", "falcon"])
def test_fields_of_a_new_model_are_those_of_its_config(model_type: str) -> None:
    from transformers import AutoConfig

    fields, config = model_config_fields(model_type), AutoConfig.for_model(model_type)
    assert {"model_type", "vocab_size", "hidden_size", "num_hidden_layers"} <= set(fields)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert name in fields, name
        assert isinstance(getattr(config, name), int)


def test_defaults_of_the_libraries_have_the_types_read_from_their_sources() -> None:
    from peft import LoraConfig
    from trl import SFTConfig

    for section, config in (("trainer", SFTConfig), ("lora", LoraConfig)):
        for field in dataclasses.fields(config):
            if field.default not in (dataclasses.MISSING, None) and field.name in LIBRARIES[section]():
                value = getattr(field.default, "value", field.default)
                assert LIBRARIES[section]()[field.name].problem(value) is None, field.name


# ---- what is not imported


@pytest.mark.parametrize(
    "code",
    [
        "main(['--help'])",
        "main(['train', '--help'])",
        "main(['templates'])",
        "main(['schema'])",
        "main(['bases', sys.argv[1]])",
        "main(['train', sys.argv[1], 'trainer.max_stps=3'])",
    ],
)
def test_command_line_recipes_and_templates_import_no_torch(code: str) -> None:
    script = f"""
import sys
from sft.cli import main
try:
    {code}
except SystemExit:
    pass
heavy = {{"torch", "transformers", "trl", "peft", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(shipped()[0])], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


def test_a_mistake_in_a_recipe_is_one_message_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(START + "modle: x\n")
    for command in ("train", "eval", "report", "generate", "bases"):
        assert main([command, str(tmp_path / "r.yaml")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"sft: {tmp_path}/r.yaml:5: unknown key `modle`; did you mean `model`?\n"


def test_llama_cpp_is_given_an_adapter_of_two_matrices_alone(settings: Callable[..., Recipe]) -> None:
    from sft.model.adapter import not_for_llama_cpp

    for plain in ("use_rslora: true", "rank_pattern: {c_attn: 2}"):
        assert not_for_llama_cpp(settings(START.replace("r: 4", f"r: 4, {plain}"))) is None
    for more in ("use_dora: true", "lora_bias: true", "modules_to_save: [lm_head]", "trainable_token_indices: [3]"):
        reason = not_for_llama_cpp(settings(START.replace("r: 4", f"r: 4, {more}")))
        assert reason is not None
        assert reason.startswith(f"`lora.{more.partition(':')[0]}` is set, and llama.cpp knows plain LoRA alone")
