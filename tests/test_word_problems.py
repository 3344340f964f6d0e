"""Word problems and GSM8K as pseudocode: every row runs to its answer, and test rows are strangers to training rows."""

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.pseudocode import run, show

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data"
PROBLEMS = runpy.run_path(str(DATA / "word_problems.py"))
GSM8K = runpy.run_path(str(DATA / "gsm8k_to_pseudocode.py"))
CASES = list(itertools.product(("en", "zh"), ("train", "test"), (1, 2, 3)))


def made(language: str, split: str, level: int | None = None, count: int = 300) -> list[dict[str, str]]:
    return list(PROBLEMS["rows"](language, split, level, count))


def numbers(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\d+", row["question"])))


def run_main(script: dict[str, Any], name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DATA / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(("language", "split", "level"), CASES)
def test_every_row_runs_to_its_answer(language: str, split: str, level: int) -> None:
    rows = made(language, split, level)
    assert [show(run(row["pseudocode"]).value) for row in rows] == [row["answer"] for row in rows]
    assert {row["level"] for row in rows} == {str(level)}


@pytest.mark.parametrize(("language", "split", "level"), CASES)
def test_every_family_appears_and_no_question_twice(language: str, split: str, level: int) -> None:
    rows = made(language, split, level)
    assert len({row["question"] for row in rows}) == len(rows) == 300
    assert {row["family"] for row in rows} == set(PROBLEMS["FAMILIES"])
    assert len(PROBLEMS["FAMILIES"]) >= 8


@pytest.mark.parametrize(("language", "split", "level"), CASES)
def test_questions_and_steps_are_whole_and_in_their_language(language: str, split: str, level: int) -> None:
    for row in made(language, split, level):
        assert not re.search(r"[{}]|(?<!/)\b1 \w+s\b", row["question"]), row
        assert row["question"].endswith(("?", ".") if language == "en" else ("？", "。", "）")), row
        assert bool(re.search(r"[\u4e00-\u9fff]", row["question"] + row["pseudocode"])) == (language == "zh"), row
        if language == "zh":
            assert not re.search(r"[A-Za-z]", row["question"] + row["pseudocode"]), row


def test_harder_levels_take_longer_steps() -> None:
    for family in PROBLEMS["FAMILIES"]:
        steps = [PROBLEMS["texts"]("en")[family, level].steps for level in (1, 2, 3)]
        work = [len(re.findall(r"[-+*/%<>,(]|\n", text)) for text in steps]
        assert work == sorted(set(work)), family


def test_same_call_gives_the_same_rows_and_another_seed_others() -> None:
    assert made("en", "train") == made("en", "train")
    assert made("en", "train")[:50] == made("en", "train", count=50)
    assert list(PROBLEMS["rows"]("en", "train", None, 300, seed=1)) != made("en", "train")


def test_train_and_test_share_no_set_of_numbers() -> None:
    sides = {
        split: {numbers(row) for language in ("en", "zh") for row in made(language, split, count=2000)}
        for split in ("train", "test")
    }
    assert min(map(len, sides.values())) > 500
    assert not sides["train"] & sides["test"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_train_and_test_share_no_wording_name_or_thing(language: str) -> None:
    texts = PROBLEMS["texts"](language).values()
    assert len(texts) == 3 * len(PROBLEMS["FAMILIES"])
    assert all(len(text.questions["train"]) >= 2 and text.questions["test"] for text in texts)
    pieces = {
        split: {
            clause.strip()
            for text in texts
            for question in text.questions[split]
            for clause in re.split(r"[.?,;。？，；]", question)
            if re.sub(r"\{\w+\}", "", clause).strip()
        }
        for split in ("train", "test")
    }
    assert not pieces["train"] & pieces["test"]
    for words in (PROBLEMS["NAMES"], PROBLEMS["THINGS"]):
        assert not set(words[language, "train"]) & set(words[language, "test"])


def test_too_many_rows_are_refused_instead_of_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PROBLEMS["rows"]
    monkeypatch.setitem(rows.__globals__, "FAMILIES", {"garden": PROBLEMS["FAMILIES"]["garden"]})
    with pytest.raises(ValueError, match=r"only \d+ different rows were found, not 1000"):
        list(rows("en", "test", 1, 1000))


def test_word_problems_are_written_as_rows_of_the_template(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run_main(PROBLEMS, "word_problems.py", "zh", "test", "40", str(out))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == made("zh", "test", count=40)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


ROW = {
    "question": "Ann sold clips to 48 friends in April, and half as many in May. What is a third of all, times 7?",
    "answer": "Ann sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = $<<48+24=72>>72 altogether.\n"
    "A third is 72 clips / 3 = 24.0\nA seventh is 72/7 = <<72/7=10.29>>10.29 clips.\nSo 72 * 7 = $504\n#### 504",
}


def test_gsm8k_row_becomes_named_steps() -> None:
    assert GSM8K["convert"](ROW["question"], ROW["answer"]) == {
        "question": ROW["question"],
        "pseudocode": "clips_in_may = 48 / 2\naltogether = 48 + clips_in_may\nclips = round(altogether / 7, 2)\n"
        "result = altogether * 7\nanswer result",
        "answer": "504",
    }


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        ("2+2 = <<2+2=5>>5\n#### 5", "does not come to"),
        ("2+2 = <<2+2=4>>4\n#### 5", "no step comes to the answer"),
        ("x is <<9=9>>9\n#### 9", "stated, not worked out"),
        ("1/0 = <<1/0=9>>9\n#### 9", "not arithmetic"),
        ("no arithmetic at all\n#### 9", "no step"),
        ("no answer either", "no step"),
    ],
)
def test_gsm8k_row_that_does_not_add_up_is_left_out_with_a_reason(solution: str, why: str) -> None:
    with pytest.raises(GSM8K["Unusable"], match=why):
        GSM8K["convert"]("How many?", solution)


def test_a_number_that_may_mean_something_else_stays_a_number() -> None:
    solution = "3*4 = <<3*4=12>>12 a month\n5+1 = <<5+1=6>>6 a day\n6*12 = <<6*12=72>>72 a year\n#### 72"
    assert "= a_month" not in (program := GSM8K["convert"]("How many?", solution)["pseudocode"])
    assert program.endswith("* 12\nanswer year")


def test_gsm8k_file_is_converted_and_its_share_printed(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + json.dumps({"question": "?", "answer": "#### 3"}) + "\n", "utf-8")
    done = run_main(GSM8K, "gsm8k_to_pseudocode.py", str(source), str(out))
    assert "1 of 2 rows, 50.0%" in done.stdout, done.stderr
    assert "1 left out: no step" in done.stdout
    assert json.loads(out.read_text("utf-8"))["answer"] == "504"


@pytest.mark.parametrize("line", ["{", "[]", '{"question": "?"}', "3"])
def test_a_line_that_is_no_row_is_named_and_nothing_is_written(tmp_path: Path, line: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{json.dumps(ROW)}\n{line}\n", "utf-8")
    done = run_main(GSM8K, "gsm8k_to_pseudocode.py", str(source), str(out))
    assert done.returncode == 2
    assert "in.jsonl:2: not a row of GSM8K" in done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name a folder that holds datasets/gsm8k")
@pytest.mark.parametrize("split", ["train", "test"])
def test_more_than_nine_in_ten_rows_of_gsm8k_convert(split: str) -> None:
    source = Path(os.environ["REAL_DATA"]) / "datasets" / "gsm8k" / f"{split}.jsonl"
    given = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    rows = []
    for row in given:
        try:
            rows.append(GSM8K["convert"](row["question"], row["answer"]))
        except GSM8K["Unusable"]:
            continue
    assert len(rows) > 0.9 * len(given) > 0
    assert [show(run(row["pseudocode"]).value) for row in rows] == [row["answer"] for row in rows]
