"""docs/how_to_add.md works word for word: what it says to write is written, and what it says to run is run."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from guides import Followed, follow, said

from sft.cli import main
from sft.memory import model_facts

HERE = Path(__file__).parents[1]
GUIDE = HERE / "docs" / "how_to_add.md"


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path]) -> Followed:
    """The guide followed to the letter in an empty folder. The two models are tiny ones, and facts go to `facts`."""
    done = Followed(tmp_path_factory.mktemp("how_to_add"))
    tiny_model(done.folder / "my_model", gpt2_like)
    tiny_model(done.folder / "my_llama", gpt2_like, "llama")
    (done.folder / "facts").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done.folder)
        patch.setattr(model_facts, "FOLDER", done.folder / "facts")
        return follow(GUIDE, done)


@pytest.fixture
def in_copy(guide: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is a copy of what the guide left, to be changed."""
    shutil.copytree(guide.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_the_guide_writes_every_file_and_runs_every_step(guide: Followed) -> None:
    wanted = ["notes.jsonl", "instruction.txt", "summary.py", "summary.yaml", "words_off/words_off.py", "summary.py"]
    assert guide.written == [*wanted, "summary_llama.yaml", "float16.py"]
    assert len(guide.said) == 10


def test_every_command_that_the_guide_speaks_of_is_one(guide: Followed) -> None:
    named = set(re.findall(r"`sft ([\w-]+)", GUIDE.read_text("utf-8")))
    assert named >= {"check", "train", "score", "merge", "export", "generate"}
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main(["--help"])
    assert not {name for name in named if not re.search(rf"^  {name} ", text.getvalue(), re.MULTILINE)}


# A template that reads a file beside it


def test_the_instruction_is_in_the_prompt_and_not_learned(guide: Followed) -> None:
    shown = guide.said["sft check summary.yaml --show 1"]
    prompt, learned = shown.replace("│", "").rsplit("⟦", 1)
    assert "Write the note in one short sentence." in prompt
    assert learned.startswith(" ")
    assert "Write" not in learned


def test_an_edited_instruction_is_another_run_and_its_line_is_shown(in_copy: Path) -> None:
    Path("instruction.txt").write_text("Translate the note.\n")
    status, text = said("generate", "summary.yaml", "--prompt", "The bridge is closed.")
    assert status == 2
    assert "instruction.txt:1 was" in text
    assert "Write the note in one short sentence." in text
    assert "Translate the note." in text


def test_a_comment_in_the_template_keeps_the_run(in_copy: Path) -> None:
    template = Path("summary.py")
    template.write_text(template.read_text("utf-8") + "\n# looks the same to the model\n")
    status, text = said("train", "summary.yaml")
    assert status == 0
    assert "trained already" in text


def test_the_merged_folder_has_the_instruction_and_is_asked_where_it_was_moved(in_copy: Path) -> None:
    merged = in_copy / "runs" / "summary" / "merged"
    moved = merged.rename(in_copy / "elsewhere")
    assert (moved / "instruction.txt").read_text("utf-8") == Path("instruction.txt").read_text("utf-8")
    for file in ("instruction.txt", "summary.py"):
        Path(file).unlink()
    status, text = said("generate", str(moved), "--prompt", "The bridge is closed.")
    assert status == 0, text


# A metric for which lower is better


def test_the_metric_keeps_the_run_and_a_fall_is_better(guide: Followed) -> None:
    scores = json.loads((guide.folder / "runs" / "summary" / "eval" / "scores.json").read_text("utf-8"))["metrics"]
    assert scores["words_off"]["lower_is_better"] is True
    assert scores["rougeL"]["lower_is_better"] is False
    assert "words too many or too few" in guide.said["sft report summary.yaml"]
    record = guide.folder / "runs" / "summary" / "train.json"
    assert record.stat().st_mtime < (guide.folder / "words_off" / "words_off.py").stat().st_mtime


def test_an_edited_metric_is_scored_again_without_a_model(in_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # a call of it fails
    metric = Path("words_off", "words_off.py")
    metric.write_text(metric.read_text("utf-8").replace("float(abs(", "1000 + float(abs("))
    status, text = said("score", "summary.yaml")
    assert status == 0, text
    scores = json.loads(Path("runs", "summary", "eval", "scores.json").read_text("utf-8"))["metrics"]
    assert scores["words_off"]["tuned"]["value"] >= 1000


def test_a_wrong_name_of_a_metric_is_reported_before_training(in_copy: Path) -> None:
    template = Path("summary.py")
    template.write_text(template.read_text("utf-8").replace('"words_off"', '"word_off"'))
    for command in ("check", "train"):
        status, text = said(command, "summary.yaml")
        assert status == 2, command
        assert "word_off" in text


# A base of another architecture


def test_another_architecture_is_trained_by_a_recipe_alone(guide: Followed) -> None:
    assert "24GiB: fits" in guide.said["sft fit summary_llama.yaml --gpu 24GiB"]
    settings = json.loads((guide.folder / "runs" / "summary_llama" / "adapter" / "adapter_config.json").read_text())
    assert {"q_proj", "down_proj"} <= {name.rsplit(".")[-1] for name in settings["target_modules"]}


def test_the_facts_of_a_model_are_kept_under_its_name(guide: Followed) -> None:
    fact = json.loads((guide.folder / "facts" / "me--my-llama.json").read_text("utf-8"))
    assert fact["model"] == "me/my-llama"
    assert fact["config"]["model_type"] == "llama"
    assert fact["parameters"] > 0


# An export target


def test_the_target_writes_a_folder_in_half_the_bytes_and_says_how_far_it_is(guide: Followed) -> None:
    folder = guide.folder / "runs" / "summary" / "export" / "float16"
    sizes = [(some / "model.safetensors").stat().st_size for some in (folder, guide.folder / "runs/summary/merged")]
    assert sizes[0] < 0.7 * sizes[1]
    found = json.loads((folder / "parity.json").read_text("utf-8"))
    assert found["problems"] == []
    assert 0 < found["relative_difference"] < 5e-3
    assert found["table"] in guide.said["sft export summary.yaml --to float16.py"]


def test_a_target_that_was_written_is_kept(in_copy: Path) -> None:
    status, text = said("export", "summary.yaml", "--to", "float16.py")
    assert status == 0
    assert "export/float16: up to date" in text


def test_a_target_that_was_edited_writes_again(in_copy: Path) -> None:
    target = in_copy / "float16.py"
    target.write_text(target.read_text("utf-8") + "\n# another line\n", "utf-8")
    status, text = said("export", "summary.yaml", "--to", "float16.py")
    assert status == 0
    assert "export/float16: written" in text
