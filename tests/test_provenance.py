"""What a run was made of is known by what was read while it was made, and by the tokens that came out."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.evaluate import evaluate_run
from sft import UserError
from sft.cli import main
from sft.merge import merge
from sft.recipe import Recipe, load
from sft.rows.watch import Watch, unchanged
from sft.run import check_owner
from sft.tokens.opened import Opened
from sft.train.stage import train

ROWS = [{"src": f"the {i}th line of text", "tgt": f"line {i} was read"} for i in range(10)]
READING = {
    "at load": 'TEXT = Path(__file__).with_name("instruction.txt").read_text()',
    "when it is called": (
        'TEXT = None\ndef _text():\n    return Path(__file__).with_name("instruction.txt").read_text()'
    ),
    "by a module beside it": "from helper import TEXT",
    "by a package beside it": "from parts.text import TEXT",
    "from JSON": 'TEXT = json.load(open(Path(__file__).with_name("shots.json")))["instruction"]',
    "from a folder that is listed": 'TEXT = " ".join(sorted(os.listdir(Path(__file__).with_name("shots"))))',
    "through a library in C++": (
        'TEXT = pq.read_table(Path(__file__).with_name("shots.parquet")).to_pydict()["text"][0]'
    ),
    "from the environment": 'TEXT = os.environ["INSTRUCTION"]',
}
"""Ways in which a template comes by its instruction -> the line that does it."""
TEMPLATE = """import json, os
from pathlib import Path
import pyarrow.parquet as pq
from data_templates import Template

{reading}

def template():
    return Template(
        fields={{"src": "a line", "tgt": "what is made of it"}},
        prompt=lambda row: f"{{TEXT or _text()}} {{row['src']}}\\n",
        completion=lambda row: row["tgt"],
        metrics={metrics},
        answer=lambda text: text{answer},
        example={{"src": "a", "tgt": "b"}},
    )
"""


def instruct(folder: Path, text: str) -> None:
    """Write an instruction in every form that a template of this file may read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "instruction.txt").write_text(text)
    (folder / "helper.py").write_text(f"TEXT = {text!r}\n")
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "text.py").write_text(f"TEXT = {text!r}\n")
    (folder / "shots.json").write_text(json.dumps({"instruction": text}))
    shutil.rmtree(folder / "shots", ignore_errors=True)
    (folder / "shots").mkdir()
    (folder / "shots" / text.split()[0]).touch()
    pq.write_table(pa.table({"text": [text]}), folder / "shots.parquet")
    os.environ["INSTRUCTION"] = text


def write_template(folder: Path, reading: str, metrics: str = "()", answer: str = ".strip()") -> Path:
    file = folder / "mine.py"
    text = TEMPLATE.format(reading=READING[reading], metrics=metrics, answer=answer)
    file.write_text(text if "def _text" in READING[reading] else text.replace("TEXT or _text()", "TEXT"))
    return file


@pytest.fixture(scope="module")
def projects(
    tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> Callable[[str], Path]:
    """`projects(reading)` -> the recipe of a run that was trained with a template that reads in this way."""
    made: dict[str, Path] = {}

    def project(reading: str) -> Path:
        if reading not in made:
            folder = tmp_path_factory.mktemp("project")
            tiny_model(folder / "model", gpt2_like)
            instruct(folder, "Summarise this:")
            recipe = write_recipe(
                folder, ROWS, template=str(write_template(folder, reading)), trainer={"max_length": 64}
            )
            train(load(recipe))
            made[reading] = recipe
        return made[reading]

    return project


@pytest.fixture
def project(projects: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`project(reading)` -> the same in a folder of its own, moved there with all that belongs to it."""

    def moved(reading: str) -> Path:
        monkeypatch.setenv("INSTRUCTION", "Summarise this:")
        old = projects(reading).parent
        shutil.copytree(old, tmp_path / "moved")
        recipe = tmp_path / "moved" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(old), str(recipe.parent)))
        return recipe

    return moved


def prompts(recipe: Recipe, text: str) -> str:
    opened = Opened(recipe)
    return opened.codec.text([opened.codec.prompts([opened.template.prompt({"src": text})])[0]])[0]


@pytest.mark.parametrize("reading", READING)
def test_a_moved_project_is_the_run_that_it_was(project: Callable[..., Path], reading: str, capsys: Any) -> None:
    recipe = project(reading)
    assert main(["train", str(recipe)]) == 0
    assert "trained already" in capsys.readouterr().err
    assert main(["generate", str(recipe), "--prompt", "a line", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("reading", READING)
def test_an_edited_instruction_is_another_run_in_every_stage_and_the_mask_shows_it(
    project: Callable[..., Path], reading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project(reading)
    instruct(recipe.parent, "Translate this:")
    assert main(["check", str(recipe), "--show", "1"]) == 0
    shown = capsys.readouterr().out.replace("│", "")
    assert "Translate" in shown
    assert "Summarise" not in shown
    for stage in (["train"], ["eval"], ["merge"], ["generate", "--prompt", "a line"], ["export", "--to", "adapter"]):
        assert main([stage[0], str(recipe), *stage[1:]]) == 2, stage
        said = capsys.readouterr().err
        assert "holds another run (" in said, stage
    expected = {
        "at load": "instruction.txt:1 was 'Summarise this:', now 'Translate this:'",
        "when it is called": "instruction.txt:1 was 'Summarise this:', now 'Translate this:'",
        "by a module beside it": "helper.py:1 was \"TEXT = 'Summarise this:'\", now \"TEXT = 'Translate this:'\"",
        "by a package beside it": "text.py:1 was \"TEXT = 'Summarise this:'\"",
        "from JSON": "shots.json:1 was",
        "from a folder that is listed": "the template reads shots was ",
    }
    assert expected.get(reading, "the template makes of its example 'Translate this: a") in said


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file.write_text("# a comment\n" + file.read_text()),
        lambda file: write_template(file.parent, "at load", metrics='("rouge", "chrf")'),
        lambda file: write_template(file.parent, "at load", answer=".strip().lower()"),
        lambda file: file.write_text(file.read_text().replace("example={", "problems=lambda row: (), example={")),
        lambda file: file.write_text(file.read_text().replace("example={", "picture=lambda text: None, example={")),
        lambda file: (file.parent / "instruction.txt").touch(),
    ],
    ids=["comment", "metrics", "answer", "problems", "picture", "touched"],
)
def test_an_edit_that_changes_no_token_keeps_the_run(
    project: Callable[..., Path], edit: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project("at load")
    edit(recipe.parent / "mine.py")
    assert main(["train", str(recipe)]) == 0
    assert "trained already" in capsys.readouterr().err
    for stage in (["eval"], ["merge"], ["generate", "--prompt", "a line", "--max-new-tokens", "2"]):
        assert main([stage[0], str(recipe), *stage[1:]]) == 0, capsys.readouterr().err


def test_renamed_data_is_the_same_run_and_edited_data_is_named(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project("at load")
    rows = recipe.parent / "rows.jsonl"
    renamed = rows.rename(rows.with_name("renamed.jsonl"))
    assert main(["train", str(recipe), f"data.train={renamed}"]) == 0
    assert "trained already" in capsys.readouterr().err
    renamed.write_text(renamed.read_text().replace("line 3", "line three"))
    assert main(["eval", str(recipe), f"data.train={renamed}"]) == 2
    assert re.search(r"`data.train`: renamed.jsonl", capsys.readouterr().err)


def test_a_setting_is_named_with_both_values(project: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = project("at load")
    assert main(["eval", str(recipe), "trainer.max_length=28"]) == 2
    assert "`trainer.max_length` was 64, now 28" in capsys.readouterr().err
    assert main(["eval", str(recipe), "lora.r=8"]) == 2
    assert "`lora.r` was 4, now 8" in capsys.readouterr().err
    for idle in ("trainer.logging_steps=7", "trainer.max_length=128"):
        assert main(["train", str(recipe), idle]) == 0, "it changes neither the rows nor what is learned from them"


def test_generation_needs_no_rows_while_it_asks_as_in_training(project: Callable[..., Path]) -> None:
    recipe = project("when it is called")
    (recipe.parent / "rows.jsonl").unlink()
    assert main(["generate", str(recipe), "--prompt", "a line", "--max-new-tokens", "2"]) == 0


def test_a_base_that_is_gone_is_named_and_found_again_in_another_place(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project("at load")
    moved = (recipe.parent / "model").rename(recipe.parent / "elsewhere")
    opened = Opened(load(recipe, [f"tokenizer={moved}"]))
    with pytest.raises(UserError, match=r"model: the base of .*run is not there; put it back, or name it: model="):
        check_owner(opened)
    assert main(["generate", str(recipe), f"model={moved}", "--prompt", "a", "--max-new-tokens", "2"]) == 0


def test_a_merged_folder_takes_along_what_its_template_reads(project: Callable[..., Path], tmp_path: Path) -> None:
    from sft.model.artifact import open_artifact

    for reading in ("when it is called", "by a module beside it", "by a package beside it", "from JSON"):
        recipe = project(reading)
        whole = prompts(load(recipe), "a line")
        moved = merge(load(recipe)).rename(tmp_path / "elsewhere")
        shutil.rmtree(recipe.parent)
        opened = open_artifact(moved)
        ids = opened.codec.prompts([opened.template.prompt({"src": "a line"})])[0]
        assert opened.codec.text([ids])[0] == whole == "Summarise this: a line\n", reading
        shutil.rmtree(moved)


def test_a_template_that_draws_at_random_is_refused(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    file = write_template(tmp_path, "at load")
    file.write_text(file.read_text().replace("{TEXT}", "{__import__('random').random()}"))
    instruct(tmp_path, "x")
    recipe = load(write_recipe(tmp_path, ROWS, template=str(file), model=str(gpt2_like)))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the template reads this record in another way each time"):
        _ = Opened(recipe).tokens


def test_a_template_of_the_project_may_be_edited_by_an_upgrade(
    tuned: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_templates

    shutil.copytree(Path(data_templates.__file__).parent, tmp_path / "data_templates")
    file = tmp_path / "data_templates" / "story.py"
    file.write_text(file.read_text() + "\n# as of the next version\n")
    monkeypatch.setattr(data_templates, "__file__", str(tmp_path / "data_templates" / "__init__.py"))
    evaluate_run(tuned)


# ---- dates

DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "Today is {{ date_string }}, or {{ strftime_now('%Y-%m-%d') }}.\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that prints the day as those of Llama 3.2 and of Mistral Small do."""


@pytest.fixture(scope="module")
def dated(
    tmp_path_factory: pytest.TempPathFactory, chat_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> Path:
    """The recipe of a run that was trained long ago with such a chat template, and does not name the day itself."""
    folder = tmp_path_factory.mktemp("dated")
    shutil.copytree(chat_like, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(DATED)
    tiny_model(folder / "model", folder / "tokenizer", "llama")
    recipe: Path = write_recipe(folder)
    train(load(recipe, ["prompt_date=2020-02-29"]))
    return recipe


def test_the_day_of_training_stays_with_the_run_and_with_what_is_made_of_it(dated: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sft.model.artifact import open_artifact

    recipe = load(dated)
    assert recipe.prompt_date is None
    opened = Opened(recipe)
    said = "Today is 29 Feb 2020, or 2020-02-29.\n"
    asked = opened.codec.prompts(["A question."])[0]
    assert opened.codec.tokenizer.decode(asked).startswith(said)
    first = opened.tokens.train[0]
    assert opened.codec.tokenizer.decode(first["input_ids"]).startswith(said)
    evaluate_run(recipe)
    folder = merge(recipe).rename(tmp_path / "merged")
    for tokenizer in (AutoTokenizer.from_pretrained(folder), open_artifact(folder).codec.tokenizer):
        turns = [{"role": "user", "content": "A question."}]
        assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == asked
    assert open_artifact(folder).codec.prompts(["A question."])[0] == asked


def test_another_day_is_another_run(dated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(dated), "prompt_date=2021-03-01"]) == 2
    assert "`prompt_date` was 2020-02-29, now 2021-03-01" in capsys.readouterr().err


@pytest.mark.parametrize("day", ["2021-02-30", "yesterday", "2021"])
def test_what_is_no_day_is_refused(dated: Path, day: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(dated), f"prompt_date={day}"]) == 2
    assert "prompt_date" in capsys.readouterr().err


# ---- settings that would be recorded and not done


@pytest.mark.parametrize("key", ["peft_type", "peft_version", "revision", "auto_mapping"])
def test_a_setting_of_peft_that_the_stage_decides_is_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], key: str
) -> None:
    with pytest.raises(UserError, match=f"`{key}` cannot be set under `lora`"):
        load(write_recipe(tmp_path, lora={key: "IA3"}))


# ---- runs of earlier versions


def test_a_run_of_an_earlier_version_keeps_working_and_says_what_is_not_compared(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project("at load")
    folder, loaded = load(recipe).folder, load(recipe)
    settings = loaded.model_dump(mode="json", exclude={"output", "eval", "generation", "check", "prompt_date"})
    base = __import__("sft.run", fromlist=["_ends"])._ends(Path(str(loaded.model)))
    (folder / "run.json").write_text(json.dumps({"recipe": settings, "tokens": "0123456789abcdef", "base": base}))
    for stage in (["train"], ["eval"], ["merge"], ["generate", "--prompt", "a line", "--max-new-tokens", "2"]):
        assert main([stage[0], str(recipe), *stage[1:]]) == 0, capsys.readouterr().err
        assert "did not keep the hash of its rows" in capsys.readouterr().err
    assert main(["eval", str(recipe), "lora.r=8"]) == 2
    assert "`lora.r` was 4, now 8" in capsys.readouterr().err


# ---- the watch itself


def test_a_watch_sees_what_is_read_and_not_what_is_written_or_a_library_reads(tmp_path: Path) -> None:
    watch = Watch()
    (tmp_path / "read.txt").write_text("a")
    with watch.on():
        import email.mime.audio  # noqa: F401  of the standard library

        (tmp_path / "read.txt").read_text()
        (tmp_path / "written.txt").write_text("b")
        with pytest.raises(FileNotFoundError):
            (tmp_path / "missing.txt").read_text()
        os.listdir(tmp_path)
    (tmp_path / "after.txt").write_text("c")
    (tmp_path / "after.txt").read_text()
    files = watch.files(tmp_path)
    assert files.keys() == {"read.txt", "missing.txt", "."}
    assert files["missing.txt"] is None
    assert unchanged(files, tmp_path)
    (tmp_path / "missing.txt").write_text("now it is there")
    assert not unchanged(files, tmp_path)
