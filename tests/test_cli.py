"""Bad input ends in one message and exit status 2, with no traceback and nothing half-written."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sft.cli import main
from sft.recipe import load

GOOD = {"prompt": "Mira went to the well.", "output": "She found a key."}


def train(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`sft train recipe.yaml ...` in the folder, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "sft", "train", "recipe.yaml", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(folder: Path) -> dict[str, int]:
    """Every file below a folder and when it was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@dataclass(frozen=True)
class Mistake:
    """A recipe of the fixture `write_recipe` with something wrong in it, and what is said about it."""

    said: str
    """A part of the message. DIR is the folder of the recipe."""
    arguments: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes | str] = field(default_factory=dict)


def rows(*wrong: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in [GOOD, *wrong])


CASES = {
    "unknown key": Mistake(
        "recipe.yaml:14: unknown key `modle`; did you mean `model`?", changes={"modle": "x"}
    ),
    "wrong type": Mistake("trainer.max_steps=ten: `trainer.max_steps` is 'ten'; it takes", ("trainer.max_steps=ten",)),
    "key of another tool": Mistake("cutoff_len=5: unknown key `cutoff_len`; here it is", ("cutoff_len=5",)),
    "unknown quantization": Mistake("`quantization` is '3bit'; write one of 'none', '4bit'", ("quantization=3bit",)),
    "missing recipe base": Mistake("`model` cannot be read:\ngone.yaml: no such recipe", ("model=gone.yaml",)),
    "value that trl refuses": Mistake(
        "`trainer.lr_scheduler_type` is not accepted by trl.", ("trainer.lr_scheduler_type=cosin",)
    ),
    "missing file": Mistake("gone.jsonl: no such file, from DIR; name an existing file", ("data.train=gone.jsonl",)),
    "missing column": Mistake(
        "DIR/rows.jsonl:1: no column `question`, which `data.columns.prompt` names; there are `prompt`, `output`",
        ("data.columns.prompt=question",),
    ),
    "column that the template needs": Mistake(
        "DIR/rows.jsonl:2: no column `output`; there are `prompt`, `answer`: name the right one in the recipe",
        files={"rows.jsonl": rows({"prompt": "a", "answer": "b"})},
    ),
    "empty output": Mistake(
        "DIR/rows.jsonl:2: the output is empty, there is nothing to learn; fill it in or remove the row",
        files={"rows.jsonl": rows({"prompt": "a", "output": " "})},
    ),
    "half a character": Mistake(
        "DIR/rows.jsonl:2: holds half a character", files={"rows.jsonl": rows({"prompt": "a\ud800", "output": "b"})}
    ),
    "not utf-8": Mistake(
        "DIR/rows.jsonl:2: not utf-8; it looks like gb18030: set `data.encoding: gb18030`",
        files={"rows.jsonl": rows().encode() + '{"prompt": "从前有座山", "output": "山上有座庙"}\n'.encode("gb18030")},
    ),
    "broken JSON line": Mistake(
        "DIR/rows.jsonl:2: broken JSON at column 12: ", files={"rows.jsonl": rows() + '{"prompt": "a\n'}
    ),
    "empty data": Mistake("DIR/rows.jsonl: no records in it", files={"rows.jsonl": ""}),
    "one row": Mistake("DIR/rows.jsonl: ", files={"rows.jsonl": rows()}),
    "every row too long": Mistake("`trainer.max_length` (4 tokens): raise it", ("trainer.max_length=4",)),
    "row too long": Mistake("DIR/rows.jsonl:", ("trainer.max_length=30", "data.overflow=error")),
    "unknown template": Mistake("unknown template `stroy`; did you mean `story`?", ("template=stroy",)),
    "template that raises": Mistake(
        "DIR/rows.jsonl:1: the template cannot read this row: ZeroDivisionError",
        ("template=my.py",),
        files={
            "my.py": "from data_templates import Template\ndef template():\n"
            "    return Template(fields={}, prompt=lambda row: 1 / 0, completion=str)\n"
        },
    ),
    "unknown model folder": Mistake("./gone: no such folder; `model` is a local folder", ("model=./gone",)),
    "model folder without a model": Mistake("DIR/empty: cannot load the tokenizer of this folder", ("model=empty",)),
    "model that cannot be reached": Mistake("put the model into a folder and name that: model=", ("model=some/one",)),
    "output that is a file": Mistake("output=rows.jsonl: `output` is ", ("output=rows.jsonl",)),
    "output below a file": Mistake("DIR/rows.jsonl is a file; name a folder", ("output=rows.jsonl/run",)),
    "output that holds something else": Mistake("is not empty and holds no run; name another", ("output=empty/..",)),
    "layer that the model does not have": Mistake(
        "`lora.target_modules` names `q_proj`, which this model does not have; there are ",
        ("lora.target_modules=[q_proj]",),
    ),
    "max_length past the positions": Mistake("has 256 positions; write trainer.max_", ("trainer.max_length=512",)),
}  # fmt: skip


RUNNER = """
import json, os, sys, traceback
import peft, sft.train  # once, for the seconds that it takes; each case is then a process of its own
from sft.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

for folder, arguments in json.load(sys.stdin):
    if not (case := os.fork()):
        os.chdir(folder)
        os.dup2(os.open(f"{folder}.stderr", os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            status = main(["train", "recipe.yaml", *arguments])
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)  # taking the interpreter down would be most of the time
    print(os.waitstatus_to_exitcode(os.waitpid(case, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """What became of a case."""

    status: int
    stderr: str
    folder: Path
    before: dict[str, int]
    """What was in the folder, as `contents` gives it."""


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> dict[str, Ended]:
    """All cases, each run in its own folder by its own process."""
    model, folders = tiny_model(tmp_path_factory.mktemp("model"), gpt2_like), dict[str, Path]()
    for name, case in CASES.items():
        folder = folders[name] = tmp_path_factory.mktemp("case").resolve()
        write_recipe(folder, **({"model": str(model)} | case.changes))
        (folder / "empty").mkdir()
        for file, content in case.files.items():
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {name: contents(folder) for name, folder in folders.items()}
    jobs = json.dumps([(str(folders[name]), case.arguments) for name, case in CASES.items()])
    runner = subprocess.run(
        [sys.executable, "-c", RUNNER], input=jobs, stdout=subprocess.PIPE, text=True, check=True, timeout=500
    )
    return {
        name: Ended(int(status), Path(f"{folders[name]}.stderr").read_text("utf-8"), folders[name], before[name])
        for name, status in zip(CASES, runner.stdout.split(), strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_message_and_exit_status_2(ended: dict[str, Ended], name: str) -> None:
    case = ended[name]
    assert case.status == 2, case.stderr
    assert "Traceback" not in case.stderr
    assert case.stderr.count("sft: ") == 1
    message = case.stderr[case.stderr.index("sft: ") :]
    assert CASES[name].said.replace("DIR", str(case.folder)) in message
    assert len(message.splitlines()) == (2 if name == "missing recipe base" else 1), message


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_input_leaves_nothing_half_written(ended: dict[str, Ended], name: str) -> None:
    before, after = ended[name].before, contents(ended[name].folder)
    files = [file for file in before if (ended[name].folder / file).is_file()]
    assert len(files) >= 2
    assert all(before[file] == after[file] for file in files), "what was there is as it was"
    new = set(after) - set(before)
    assert not [file for file in new if ".part" in file], new
    for tokens in ended[name].folder.glob("runs/.tokens/*"):
        assert {"train.arrow", "test.arrow", "counts.json"} <= {file.name for file in tokens.iterdir()}, "whole"
    # what a model refuses is found once the run has its folder, which the mended recipe takes over
    claimed = {"runs/run/recipe.yaml", "runs/run/run.json"}
    late = name in ("layer that the model does not have", "max_length past the positions")
    assert {file for file in new if file.startswith("runs/run/")} <= (claimed if late else set()), new


@pytest.mark.slow
def test_recipe_is_mended_after_a_mistake_and_runs(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> None:
    write_recipe(tmp_path, model=str(tiny_model(tmp_path / "model", gpt2_like)))
    assert train(tmp_path, "trainer.max_length=512").returncode == 2
    assert train(tmp_path, "trainer.max_length=256").returncode == 0
    assert (tmp_path / "runs" / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_output_that_holds_another_run_is_left_as_it_is(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> None:
    model = tiny_model(tmp_path / "model", gpt2_like)
    write_recipe(tmp_path, model=str(model))
    first = train(tmp_path, "trainer.max_steps=1")
    assert first.returncode == 0, first.stderr
    before = contents(tmp_path / "runs" / "run")
    assert any("adapter_model.safetensors" in file for file in before)
    other = train(tmp_path, "trainer.max_steps=2")
    assert other.returncode == 2
    assert "Traceback" not in other.stderr
    message = other.stderr[other.stderr.index("sft: ") :]
    assert "runs/run: holds another run (" in message
    assert "`trainer.max_steps` was 1, now 2" in message
    assert "name another folder with output=..., or delete this one" in message
    assert contents(tmp_path / "runs" / "run") == before
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text("utf-8").replace("kept", "hid"), "utf-8")
    edited = train(tmp_path, "trainer.max_steps=1")
    assert edited.returncode == 2
    assert "holds another run (`data.train`: rows.jsonl was " in edited.stderr
    assert contents(tmp_path / "runs" / "run") == before


def test_unreadable_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], write_recipe: Any) -> None:
    recipe = write_recipe(tmp_path)
    recipe.chmod(0)
    if os.access(recipe, os.R_OK):
        pytest.skip("the superuser reads every file")
    assert main(["bases", str(recipe)]) == 2
    assert capsys.readouterr().err == f"sft: {recipe}: cannot be read: Permission denied\n"


def test_name_too_long_for_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", str(tmp_path / ("x" * 300))]) == 2
    assert capsys.readouterr().err.endswith("File name too long\n")


def test_command_line_without_or_with_a_wrong_command_says_how_it_goes() -> None:
    for arguments in ([], ["trian", "x.yaml"], ["train"], ["train", "x.yaml", "--fast"]):
        process = subprocess.run([sys.executable, "-m", "sft", *arguments], capture_output=True, text=True)
        assert process.returncode == 2
        assert process.stderr.startswith("usage: sft")
        assert "Traceback" not in process.stderr


def test_output_into_a_closed_pipe_ends_in_silence() -> None:
    process = subprocess.Popen([sys.executable, "-m", "sft", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_module_and_console_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("sft")
    if not script.is_file():
        pytest.skip("the package is not installed")
    helps = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "sft"])
    ]
    assert helps[0] == helps[1]
    for command in ("train", "eval", "report", "generate", "serve", "schema", "templates"):
        assert f" {command} " in helps[0]


def test_templates_are_listed_with_their_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["templates"]) == 0
    out = capsys.readouterr().out
    assert "story: " in out
    assert '{"prompt": "Mira the miller' in out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    stated = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert capsys.readouterr().out in (f"sft {stated}\n", "sft, of a checkout that is not installed\n")


def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Any, tuned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_recipe(tmp_path, output="~/out", model="~/model", template="~/own.py", data={"train": "~/rows.jsonl"})
    (tmp_path / "model").mkdir()
    (tmp_path / "own.py").write_text("")
    recipe = load("~/recipe.yaml", ["tokenizer=~/model", "data.test=~/gone.jsonl"])
    assert (recipe.model, recipe.tokenizer) == (f"{tmp_path}/model", f"{tmp_path}/model")
    assert (recipe.data.train, recipe.data.test) == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/gone.jsonl")
    assert (recipe.output, recipe.template) == (f"{tmp_path}/out", f"{tmp_path}/own.py")
    assert load(tmp_path / "recipe.yaml", ["output=~/other"]).output == f"{tmp_path}/other"

    (tmp_path / "asked.txt").write_text("Mira went home.\n")
    (tmp_path / "run").symlink_to(tuned.folder)
    assert main(["generate", "~/run", "--file", "~/asked.txt"]) == 0
    assert main(["merge", "~/run", "--output", "~/merged"]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert main(["generate", "~/merged", "--file=~/asked.txt"]) == 0
    assert main(["export", "~/run", "--to", "~/gone.py"]) == 2
    assert f"--to {tmp_path}/gone.py: no such file" in capsys.readouterr().err


def test_a_missing_data_file_is_reported_before_the_tokenizer_is_fetched(
    tmp_path: Path, write_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, model="some/one"))
    for command, setting in (("check", "data.train=gone.jsonl"), ("train", "data.test=gone.csv")):
        assert main([command, recipe, setting]) == 2
        assert f"{setting.partition('=')[2]}: no such file, from " in capsys.readouterr().err
