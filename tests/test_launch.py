"""launch.sh as a user starts it, in the environment that it made, and the wheel as it is shipped."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import popen

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    if not (ROOT / ".venv" / "set-up").exists():
        pytest.skip("launch.sh has not made its environment; run ./launch.sh test")

    def start(*arguments: str, **env: str) -> "subprocess.Popen[str]":
        command = [str(ROOT / "launch.sh"), *arguments]
        return popen(command, cwd=tmp_path, env=os.environ | env)

    return start


def test_a_recipe_goes_all_the_way_from_any_folder(
    launch: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
) -> None:
    tiny_model(tmp_path / "model", gpt2_like, "llama")
    recipe = write_recipe(tmp_path, eval={"rows": 2}, output=None)
    process = launch(str(recipe), "generation.max_new_tokens=4", "output=runs/my run")
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "95 % interval" in shown
    assert (tmp_path / "runs" / "my run" / "report.html").is_file()
    process = launch(str(recipe), "generation.max_new_tokens=4", "output=runs/my run")
    _, errors = process.communicate(timeout=300)
    assert "setting up" not in errors
    assert "trained already" in errors
    assert "up to date" in errors


def test_two_processes_really_run_and_a_mistake_is_told_once(
    launch: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
) -> None:
    tiny_model(tmp_path / "model", gpt2_like, "llama")
    recipe = write_recipe(tmp_path, eval={"rows": 2}, generation={"max_new_tokens": 4})
    process = launch(str(recipe), PROCESSES="2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert '"processes": 2' in (tmp_path / "runs" / "run" / "train.json").read_text()
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    process = launch(str(recipe), "output=runs/other", PROCESSES="2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.count("broken JSON") == 1


def test_the_status_is_that_of_the_stage_that_failed(launch: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = launch("recipes/quickstrat.yaml")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "did you mean recipes/quickstart.yaml?" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_and_leaves_nothing_running(
    launch: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
    number: int,
) -> None:
    tiny_model(tmp_path / "model", gpt2_like)
    recipe = write_recipe(tmp_path, trainer={"max_steps": 100000, "logging_steps": 1})
    process = launch(str(recipe))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(number)]
    for _ in range(100):
        if not running(str(recipe)):
            break
        time.sleep(0.1)
    assert not running(str(recipe))


def running(what: str) -> bool:
    found = subprocess.run(["ps", "-ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return any(what in line and "sft" in line for line in found.splitlines())


def test_the_wheel_holds_the_packages_the_recipes_and_nothing_else(tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    build = [sys.executable, "-m", "pip", "wheel", "-q", *options, str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sft", "data_templates", "eval"}
    expected = ["sft/recipes/quickstart.yaml", "sft/recipes/data/tales.py", "sft/recipes/recipe.schema.json"]
    expected += ["eval/report.html.j2", "eval/metrics/rouge/rouge.py", "data_templates/story.py"]
    for name in expected:
        assert name in names
    assert not [name for name in names if "__pycache__" in name]
