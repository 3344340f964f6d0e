"""`sft check`: its numbers on rows made by hand, its refusals, and what it shows."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.cli import main
from sft.tokens.prepare import MASKED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def by_hand(tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path]) -> Path:
    """20 training rows of which each odd thing is known, and 3 held-out rows."""
    fine = [{"prompt": f"opening {i}", "output": f"end {i}"} for i in range(10)]
    odd = [
        {"prompt": "opening 0", "output": "end 0"},  # a duplicate within training
        {"prompt": "held 0", "output": "out 0"},  # a duplicate across the split
        {"prompt": "word " * 300, "output": "short"},  # trimmed
        {"prompt": "x", "output": "word " * 300},  # dropped
        {"prompt": "bad \ufffd", "output": "ok 1"},  # suspicious: a byte that was lost
        {"prompt": "bad \x00", "output": "ok 2"},  # suspicious: a control character
        {"prompt": "bad Ã¤", "output": "ok 3"},  # suspicious: UTF-8 read as Latin-1
        {"prompt": "bad \ufeffmark", "output": "ok 4"},  # suspicious: a byte order mark
        {"prompt": "Mira went to the ", "output": "well"},  # a seam, as "the well" without the separator
        {"prompt": "12", "output": "34"},
    ]
    held = [{"prompt": f"held {i}", "output": f"out {i}"} for i in range(3)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return write_recipe(
        tmp_path,
        rows=fine + odd,
        model=str(gpt2_like),
        data={"test": str(tmp_path / "held.jsonl"), "test_fraction": 0.5},
        check={"max_dropped": 0.1, "max_damaged": 1.0},
    )


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["check", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, found


def test_every_number_on_rows_made_by_hand(by_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = as_json(capsys, str(by_hand), "template_options.separator=")
    assert status == 0
    train, test = found["train"], found["test"]
    assert {name: train[name] for name in ("records", "rows", "trimmed", "dropped", "repeated", "duplicates")} == {
        "records": 19,  # 20 without the one that is held out too
        "rows": 18,  # without the dropped one
        "trimmed": 1,
        "dropped": 1,
        "repeated": 1,
        "duplicates": 1,
    }
    assert (test["rows"], test["supervised"]) == (3, 3 * test["supervised"] // 3)
    assert sorted(train["suspicious"].values()) == [1, 1, 1, 1]
    assert train["damaged"] == 4
    assert train["ended"] == train["rows"]
    assert train["changed"] == 0
    assert train["longest"] == 256
    assert sum(train["lengths"].values()) == train["rows"]
    assert train["lengths"]["256"] == 1
    assert train["examples"]["dropped"].startswith(str(by_hand.with_name("rows.jsonl")) + ":14: ")
    assert found["prompt_format"] == "plain"


def test_tokens_are_counted_to_the_last_one(
    tmp_path: Path, gpt2_like: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    rows = [{"prompt": f"p {i}", "output": f"out {i}"} for i in range(12)]
    _, found = as_json(capsys, str(write_recipe(tmp_path, rows=rows, model=str(gpt2_like))), "--show", "100")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_like)
    sizes = [(len(tokenizer(f"p {i}\n")["input_ids"]), len(tokenizer(f"out {i}")["input_ids"]) + 1) for i in range(12)]
    sides = found["train"], found["test"]
    assert sum(side["tokens"] for side in sides) == sum(map(sum, sizes))
    assert sum(side["supervised"] for side in sides) == sum(output for _, output in sizes)
    for row in found["rows"]:
        learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != MASKED]
        assert tokenizer.decode(learned).startswith("out ")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "check.max_dropped=0",
            "1 of 22 rows do not fit into trainer.max_length (4.55%, allowed are 0.00%",
        ),
        ("check.max_trimmed=0.01", "1 of 22 prompts lost their beginning"),
        ("check.max_damaged=0.1", "4 of 22 rows hold text that looks damaged"),
        ("check.max_duplicates=0.01", "1 of 22 rows are there more than once"),
    ],
)
def test_a_broken_threshold_ends_with_status_one_and_what_to_write(
    by_hand: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert main(["check", str(by_hand), override]) == 1
    shown = "".join(capsys.readouterr())
    assert said in shown
    key = override.split("=")[0]
    assert f"or allow it: {key}=" in shown
    allowed = shown.split(f"{key}=")[1].split()[0]
    assert main(["check", str(by_hand), f"{key}={allowed}"]) == 0


def test_training_refuses_what_check_refuses(by_hand: Path, tmp_path: Path, tiny_model: Any, gpt2_like: Path) -> None:
    tiny_model(tmp_path / "model", gpt2_like)
    assert main(["train", str(by_hand), f"model={tmp_path / 'model'}", "check.max_dropped=0"]) == 1
    assert not (tmp_path / "runs" / "run").exists()


def test_the_table_tells_it_to_a_person(by_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(by_hand), "--show", "1"]) == 0
    shown = "".join(capsys.readouterr())
    for text in (
        "rows kept",
        "share learned",
        "prompts trimmed to fit",
        "trainer.max_length is 256",
        "█",
        "│⟦e│nd│",
    ):
        assert text in shown, text
    assert "the prompt goes in as plain text" in shown


def test_a_chat_template_is_said_to_be_used(
    tmp_path: Path, chat_like: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p {i}", "output": "out"} for i in range(20)]
    rows[0]["prompt"] = "an <|im_end|> of a user's"
    file = write_recipe(tmp_path, rows=rows, model=str(chat_like), check={"max_damaged": 1.0})
    assert main(["check", str(file), "--show", "1"]) == 0
    shown = "".join(capsys.readouterr())
    assert "the prompt goes through the chat template" in shown
    assert "the name of a special token, which becomes that token in a chat template" in shown


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "data" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["tokenizers/gpt2", "tokenizers/gpt-neox-20b", "tokenizers/mistral-v1"])
def test_all_of_the_real_data_is_accounted_for(
    tmp_path: Path,
    real_data: Path,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tokenizer: str,
) -> None:
    made = tmp_path / "gsm8k.jsonl", tmp_path / "eoh.jsonl"
    sources = real_data / "datasets" / "gsm8k" / "test.jsonl", real_data / "datasets" / "eoh_chains" / "chains.jsonl"
    for script, source, target in zip(("gsm8k_to_pseudocode", "eoh_chains"), sources, made, strict=True):
        command = [sys.executable, str(ROOT / "recipes" / "data" / f"{script}.py"), str(source), str(target)]
        subprocess.run(command, check=True, capture_output=True)
    for template, file in (
        ("story", real_data / "datasets" / "fairytale_continuation" / "train.jsonl"),
        ("story", real_data / "datasets" / "zh_xiehouyu" / "pairs.jsonl"),
        ("pseudocode_cot", made[0]),
        ("algorithm_evolution", made[1]),
    ):
        recipe = write_recipe(tmp_path, model=str(real_data / tokenizer), template=template, data={"train": str(file)},
                              trainer={"max_length": 8192}, check={"max_dropped": 0.2})  # fmt: skip
        status, found = as_json(capsys, str(recipe))
        assert status == 0, found["problems"]
        for side in (found["train"], found["test"]):
            assert side["rows"] == side["ended"] > 0
            assert side["changed"] == 0
            assert 0 < side["supervised"] < side["tokens"]
