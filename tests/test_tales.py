"""The tales are the same every time, hold out what they say they hold out, and go on as they began."""

import hashlib
import importlib.util
import json
import re
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "recipes" / "data" / "tales.py"


@pytest.fixture(scope="module")
def tales() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tales", SOURCE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "split", "fingerprint"),
    [
        ("mixed", "train", "5da7bc1001be"),
        ("mixed", "test", "c73ce8c136b5"),
        ("riddle", "train", "7b7487d93e2b"),
        ("riddle", "test", "7bd98fd89bb6"),
    ],
)
def test_the_generator_gives_the_same_rows_every_time(
    tales: ModuleType, kind: str, split: str, fingerprint: str
) -> None:
    first = list(islice(tales.rows(split, kind), 100))
    assert first == list(islice(tales.rows(split, kind), 100))
    assert hashlib.sha256(json.dumps(first).encode()).hexdigest()[:12] == fingerprint


def test_each_row_has_the_columns_of_its_kind(tales: ModuleType) -> None:
    for kind, split in tales.SIZES:
        columns = {"text"} if kind == "mixed" else {"prompt", "output"}
        found = list(tales.rows(split, kind))
        assert len(found) == tales.SIZES[kind, split]
        assert all(row.keys() == columns and all(row.values()) for row in found)


def test_no_row_comes_twice(tales: ModuleType) -> None:
    for kind, split in tales.SIZES:
        found = [tuple(row.values()) for row in tales.rows(split, kind)]
        assert len(set(found)) == len(found)


def test_no_test_opening_is_in_training(tales: ModuleType) -> None:
    tuned_on = {row["prompt"] for row in tales.rows("train", "riddle")}
    read = "\n".join(row["text"] for row in tales.rows("train", "mixed"))
    for row in tales.rows("test", "riddle"):
        assert row["prompt"] not in tuned_on
        assert row["prompt"] not in read


def test_no_hero_of_a_test_riddle_goes_to_that_place_in_training(tales: ModuleType) -> None:
    def heroes(split: str) -> set[tuple[str, str]]:
        return {hero_and_place(tales, row["prompt"]) for row in tales.rows(split, "riddle")}

    assert heroes("test")
    assert heroes("train").isdisjoint(heroes("test"))


def test_no_text_is_in_both_splits_of_the_mixed_tales(tales: ModuleType) -> None:
    train, test = ({row["text"] for row in tales.rows(split, "mixed")} for split in ("train", "test"))
    assert train.isdisjoint(test)


def test_the_special_kind_is_hardly_in_the_mixed_text(tales: ModuleType) -> None:
    marks = ("Answer me, or leave me the", "Guess my riddle, or the", "Nobody passes without an answer")
    assert all(any(mark in row["prompt"] for mark in marks) for row in tales.rows("test", "riddle"))
    texts = [row["text"] for row in tales.rows("train", "mixed")]
    share = sum(any(mark in text for mark in marks) for text in texts) / len(texts)
    assert 0 < share < 0.015


def test_names_of_the_opening_return_in_the_continuation(tales: ModuleType) -> None:
    for row in tales.rows("test", "riddle"):
        hero, place = hero_and_place(tales, row["prompt"])
        (friend,) = set(words(row["prompt"])) & set(tales.NAMES) - {hero}
        assert {hero, friend, place} <= set(words(row["output"]))


def test_the_continuation_names_nobody_that_the_opening_did_not(tales: ModuleType) -> None:
    names = {*tales.NAMES, *tales.PLACES}
    for row in tales.rows("test", "riddle"):
        assert names & set(words(row["output"])) <= set(words(row["prompt"]))


def test_the_riddle_is_answered_and_the_temper_decides_who_answers_it(tales: ModuleType) -> None:
    for row in tales.rows("test", "riddle"):
        ((answer, guess),) = [rest for question, *rest in tales.RIDDLES if question in row["prompt"]]
        patient = bool(set(words(row["prompt"])) & set(tales.PATIENT))
        hasty = bool(set(words(row["prompt"])) & set(tales.HASTY))
        assert patient != hasty
        assert answer in row["output"]
        assert (f"is {guess}!" in row["output"]) == hasty


def test_every_wording_is_used_and_every_field_is_filled(tales: ModuleType) -> None:
    told = "\n".join(" ".join(row.values()) for kind, split in tales.SIZES for row in tales.rows(split, kind))
    assert not re.search(r"[{}]|  ", told)
    for plot in (*tales.PLOTS, tales.RIDDLE_OPENING, tales.RIDDLE_WON, tales.RIDDLE_LOST):
        for wording in (wording for sentence in plot for wording in sentence):
            longest = max(re.split(r"\{\w+\}", wording), key=len)
            assert longest in told, wording


def hero_and_place(tales: ModuleType, opening: str) -> tuple[str, str]:
    """The hero is named first; there is but one place."""
    (place,) = set(words(opening)) & set(tales.PLACES)
    return next(word for word in words(opening) if word in tales.NAMES), place


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z-]+", text)
