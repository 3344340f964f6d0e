"""Sequences of a vocabulary of one's own: read, counted where they are wrong, learned, drawn, and told apart."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel

from eval.evaluate import evaluate_run
from eval.ngrams import ngram_losses
from eval.report import report
from sft import UserError
from sft.cli import main
from sft.recipe import Recipe
from sft.recipe.read import SHIPPED, load
from sft.rows.read import load_python
from sft.tokens.opened import Opened
from sft.tokens.vocabulary import read_vocabulary
from sft.write.ask import open_run
from sft.write.next import explore

TONES = ["C4", "D4", "E4", "F4", "G4", "A4", "B4", "C5"]
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *TONES]
NOBODY: dict[str, str | None] = {}


def scale(first: int, step: int, length: int) -> list[int]:
    """A run of tones, as ids."""
    return [4 + (first + step * i) % len(TONES) for i in range(length)]


ROWS = [
    {"sequence": scale(first, step, length), "label": step}
    for first in range(len(TONES)) for step in (1, 3) for length in (5, 8)
]  # fmt: skip
"""32 runs by one tone or by three, and which of the two as the label."""

GPT: dict[str, Any] = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}
TRAINER = {"max_length": 64, "max_steps": -1, "num_train_epochs": 12, "learning_rate": 1e-2, "logging_steps": 2,
           "per_device_train_batch_size": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "bf16": False,
           "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
           "greater_is_better": False, "train_sampling_strategy": "random"}  # fmt: skip


def write_vocabulary(folder: Path, tokens: list[str] = TOKENS) -> Path:
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder / "vocab.json"


@pytest.fixture(scope="session")
def sequences(write_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """`sequences(folder, rows=ROWS, **changes)`: a recipe for the sequence template, its vocabulary beside it."""

    def write(folder: Path, rows: list[Any] = ROWS, **changes: Any) -> Path:
        if not (folder / "vocab.json").is_file():
            write_vocabulary(folder)
        own: dict[str, Any] = {"model": GPT, "tokenizer": {"vocab": str(folder / "vocab.json")}, "lora": None}
        own |= {"template": "sequence", "trainer": TRAINER}
        own |= {"generation": {"max_new_tokens": 8}, "eval": {"training_rows": 6}}
        own["eval"] |= {} if changes.get("task") == "classification" else {"ngrams": [1, 3]}
        return write_recipe(folder, rows=rows, **(own | changes))

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sequences: Callable[..., Path]) -> Recipe:
    from sft.train.stage import train

    recipe = load(sequences(tmp_path_factory.mktemp("trained")))
    train(recipe)
    evaluate_run(recipe)
    report(recipe)
    return recipe


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory, trained: Recipe, sequences: Callable[..., Path]) -> Recipe:
    """A classifier that goes on from the language model of the same rows."""
    from eval.classification import evaluate_run as evaluate_classes
    from sft.train.stage import train

    folder = tmp_path_factory.mktemp("classified")
    rows = [json.loads(line) for line in Path(trained.data.train).read_text().splitlines()]
    path = sequences(folder, rows, task="classification", model=str(trained.trained))
    settings = ["data.train=" + trained.data.train, f"tokenizer.vocab={vocabulary_file(trained)}"]
    recipe = load(path, [*settings, "trainer.learning_rate=3e-3"])
    train(recipe)
    evaluate_classes(recipe)
    report(recipe)
    return recipe


def vocabulary_file(recipe: Recipe) -> str:
    return str(recipe.model_dump()["tokenizer"]["vocab"])


# ---- the vocabulary


def test_special_tokens_are_known_by_their_usual_names_or_named(tmp_path: Path) -> None:
    found = read_vocabulary(write_vocabulary(tmp_path), NOBODY)
    assert dict(found.special) == {"pad": "<pad>", "start": "<s>", "end": "</s>", "unknown": "<unk>"}
    found = read_vocabulary(write_vocabulary(tmp_path, ["[CLS]", "<|endoftext|>", "a", "end"]), NOBODY)
    assert dict(found.special) == {"start": "[CLS]", "end": "<|endoftext|>", "pad": "<|endoftext|>",
                                   "unknown": "<|endoftext|>"}  # fmt: skip
    found = read_vocabulary(write_vocabulary(tmp_path, ["a", "b", "stop"]), {"end": "stop", "pad": "a"})
    assert (found.special["start"], found.special["pad"]) == ("stop", "a")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a vocabulary"),
        ("[]", "a vocabulary is a JSON object"),
        ("{}", "a vocabulary is a JSON object"),
        ('{"a": "0"}', "a vocabulary is a JSON object"),
        ('{"a": true}', "a vocabulary is a JSON object"),
        ('{"</s>": 0, "a": 2}', "the id 2 leaves a gap; ids of 2 tokens run from 0 to 1"),
        ('{"</s>": 0, "a": 0}', "the id 0 stands for two tokens"),
        ('{"</s>": 0, "a": 1, "a": 2}', "the token 'a' stands there twice"),
        ('{"</s>": 0, "a b": 1}', "1 tokens are empty or hold white space, the first is 'a b'"),
        ('{"</s>": 0, "": 1}', "empty or hold white space"),
        ('{"</s>": 0, "\\ud800": 1}', "a token holds half a character"),
        ('{"a": 0, "end": 1}', "none of its tokens is known as an end token; name one: tokenizer.end"),
        ('{"</s>": 0, "<eos>": 1}', "may both be the end token; name it: tokenizer.end='</s>'"),
    ],
)
def test_a_vocabulary_that_is_none_is_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match=r"vocab\.json: ") as error:
        read_vocabulary(tmp_path / "vocab.json", NOBODY)
    assert said in str(error.value)


def test_a_token_that_holds_the_name_of_a_special_one_is_told(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    write_vocabulary(tmp_path, [*TOKENS, "x</s>"])
    with pytest.raises(UserError, match=r"the token 'x</s>' does not come back"):
        _ = Opened(load(sequences(tmp_path))).tokenizer


def test_ids_names_and_text_are_the_same_rows_and_own_special_tokens_go(
    tmp_path: Path, sequences: Callable[..., Path]
) -> None:
    names = [TOKENS[i] for i in ROWS[0]["sequence"]]
    padded = [1, *ROWS[0]["sequence"], 2, 0, 0]
    template = Opened(load(sequences(tmp_path))).template
    for sequence in (ROWS[0]["sequence"], names, " ".join(names), padded, [TOKENS[i] for i in padded]):
        assert not list(template.problems({"sequence": sequence}))
        assert template.completion({"sequence": sequence}) == " ".join(names)


def test_training_ids_are_those_of_the_file_between_start_and_end(
    tmp_path: Path, sequences: Callable[..., Path]
) -> None:
    recipe = load(sequences(tmp_path))
    tokens = Opened(recipe).tokens
    rows = [*tokens.train, *tokens.test]
    assert sorted(row["input_ids"] for row in rows) == sorted([1, *row["sequence"], 2] for row in ROWS)
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in rows)
    assert not tokens.counts["train"].changed


def test_all_rows_that_cannot_be_used_are_told_at_once_by_kind(
    tmp_path: Path, sequences: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[Any] = [{"sequence": [4, 12]}, {"sequence": []}, {"sequence": [4, 2, 5]}, {"sequence": [1, 2]}]
    path = sequences(tmp_path, [*ROWS, *wrong, *[{"sequence": [99]}] * 11, {"sequence": ["C4", "H4"]}])
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"sft: {tmp_path}/rows.jsonl: 16 of 48 rows cannot be used; mend them or take them out"
    assert lines[1].startswith(f"  13 with tokens outside the vocabulary of 12: {tmp_path}/rows.jsonl:33 (12), ")
    assert lines[1].endswith(" and 3 more")
    assert lines[2] == f"  2 with an empty sequence: {tmp_path}/rows.jsonl:34, {tmp_path}/rows.jsonl:36"
    assert lines[3] == f"  1 with the end token inside the sequence: {tmp_path}/rows.jsonl:35"
    assert len(lines) == 4
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.columns.label=sequence", "template_options.width=wide"], "`width` is 'wide'; it takes a whole number"),
        (["tokenizer=vocab.json"], "a vocabulary of your own is named tokenizer={vocab: ...}"),
        (["data.test=rows.jsonl"], "no row is left to train on; 32 stand in `data.test` too"),
        (["data.limit=1"], "its one record cannot be held out"),
        (["eval.ngrams=[1, 1]"], "name each order once"),
        (["data.seed=-1"], "`data.seed` is -1"),
        (["trainer.seed=-1"], "`trainer.seed` is -1; it takes a whole number from 0"),
    ],
)
def test_settings_that_make_no_sense_end_in_one_message(
    tmp_path: Path, sequences: Callable[..., Path], capsys: pytest.CaptureFixture[str], settings: list[str], said: str
) -> None:
    path = sequences(tmp_path)
    assert main(["check", str(path), *settings]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_a_sequence_under_another_name_is_told_with_the_names_that_are_there(
    tmp_path: Path, sequences: Callable[..., Path]
) -> None:
    recipe = load(sequences(tmp_path, [{"notes": row["sequence"]} for row in ROWS]))
    with pytest.raises(UserError, match=r"32 with no column `sequence`: name yours with data\.columns") as error:
        _ = Opened(recipe).tokens
    assert "(it has notes)" in str(error.value)


# ---- the digits


def test_a_digit_comes_back_from_its_tokens_and_the_shipped_vocabulary_is_theirs() -> None:
    digits = load_python(SHIPPED / "data" / "digits.py")
    vocabulary = json.loads((SHIPPED / "data" / "digits.vocab.json").read_text())
    assert vocabulary == digits.vocabulary()
    assert len(vocabulary) == 516
    recipe = load("recipes/tiny_gpt_digits.yaml")
    template, rows = Opened(recipe).template, list(digits.rows("train"))
    assert len(rows) == 1797
    assert template.picture is not None
    for row in rows[::100]:
        picture = digits.picture(row["sequence"])
        assert digits.ids(picture) == row["sequence"]
        drawn = template.picture(template.completion(row))
        assert np.array_equal(np.array(drawn), picture)
    assert template.picture("C4 E4") is None
    assert {row["label"] for row in rows} == set(range(10))


# ---- the language model


def measured(model: Any, recipe: Recipe) -> float:
    from sft.model.loss import output_losses

    losses = np.array(output_losses(model, Opened(recipe).tokens.test, 4096, 0))
    return float(losses[:, 0].sum() / losses[:, 2].sum())


def test_the_best_model_is_that_of_the_lowest_held_out_loss_and_the_final_one_the_last(trained: Recipe) -> None:
    log = json.loads((trained.folder / "train.json").read_text())["log"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.6 * losses[0]
    best, final = (GPT2LMHeadModel.from_pretrained(trained.folder / name) for name in ("best_model", "final_model"))
    assert trained.trained.name == "best_model"
    assert measured(best, trained) == pytest.approx(min(losses), rel=1e-4)
    assert measured(final, trained) == pytest.approx(losses[-1], rel=1e-4)


def test_the_best_is_kept_where_it_is_not_the_last(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    from sft.train.stage import train

    recipe = load(sequences(tmp_path), ["trainer.greater_is_better=true", "trainer.num_train_epochs=3"])
    train(recipe)
    record = json.loads((recipe.folder / "train.json").read_text())
    losses = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    assert max(losses) == losses[0], "the wrong way round, so that the first is called the best"
    assert record["best_step"] < record["steps"]
    best, final = (GPT2LMHeadModel.from_pretrained(recipe.folder / name) for name in ("best_model", "final_model"))
    assert measured(best, recipe) == pytest.approx(max(losses), rel=1e-4)
    assert measured(final, recipe) == pytest.approx(losses[-1], rel=1e-4)


def test_the_saved_tokenizer_gives_back_the_whole_vocabulary(trained: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.trained)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.decode(list(range(len(TOKENS)))) == " ".join(TOKENS)
    assert tokenizer("C4 D4")["input_ids"] == [1, 4, 5]
    model = GPT2LMHeadModel.from_pretrained(trained.trained)
    assert model.config.vocab_size == len(TOKENS)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)


def test_padding_changes_no_loss(trained: Recipe) -> None:
    from sft.model.loss import output_losses

    model = GPT2LMHeadModel.from_pretrained(trained.trained)
    rows = Opened(trained).tokens.test
    assert len({len(ids) for ids in rows["input_ids"]}) > 1
    alone, together = (output_losses(model, rows, size, 0) for size in (1, 10**6))
    assert [a for a, _, _ in alone] == pytest.approx([b for b, _, _ in together], rel=1e-4)


def test_training_and_held_out_rows_are_measured_each_epoch_and_plotted(trained: Recipe) -> None:
    log = json.loads((trained.folder / "train.json").read_text())["log"]
    both = [entry for entry in log if "eval_perplexity" in entry]
    assert len(both) == 12
    for entry in both:
        assert entry["seen_perplexity"] == pytest.approx(math.exp(entry["seen_loss"]))
        assert 0 <= entry["seen_token_accuracy"] <= 1
    page = (trained.folder / "report.html").read_text("utf-8")
    for chart in ("loss, by step", "perplexity, by epoch", "token accuracy, by epoch"):
        assert chart in page
    assert "chosen by the held-out rows" in page


def test_training_goes_on_from_a_saved_model_and_asks_for_its_vocabulary(
    tmp_path: Path, trained: Recipe, sequences: Callable[..., Path]
) -> None:
    from sft.train.stage import train

    path = sequences(tmp_path, ROWS[::2], model=str(trained.trained))
    recipe = load(path, ["trainer.num_train_epochs=1"])
    train(recipe)
    log = json.loads((recipe.folder / "train.json").read_text())["log"]
    assert next(entry["loss"] for entry in log if "loss" in entry) < 1.8, "random weights have ln 12"
    write_vocabulary(tmp_path, [*TOKENS[:4], *reversed(TONES)])
    with pytest.raises(UserError, match=r"is not the vocabulary that .*best_model was trained with"):
        _ = Opened(recipe).tokenizer


def test_a_vocabulary_that_changed_under_a_run_is_noticed(
    tmp_path: Path, trained: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    (tmp_path / "vocab.json").write_text(Path(vocabulary_file(trained)).read_text())
    settings = [f"output={folder}", f"tokenizer.vocab={tmp_path / 'vocab.json'}"]
    command = ["generate", str(trained.folder), "--prompt", "C4 D4", *settings]
    assert main(command) == 0
    assert capsys.readouterr().out.strip()
    write_vocabulary(tmp_path, [*TOKENS[:4], *reversed(TONES)])
    assert main(command) == 2
    assert "vocab.json is another vocabulary" in capsys.readouterr().err


def test_a_prompt_of_tokens_is_gone_on_with_and_one_of_others_is_refused(
    trained: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained.folder), "--prompt", "C4 D4  E4"]) == 0
    assert set(capsys.readouterr().out.split()) <= set(TOKENS)
    assert main(["generate", str(trained.folder), "--prompt", "C4 H4"]) == 2
    assert "'H4': not in the vocabulary" in capsys.readouterr().err
    assert main(["generate", str(trained.folder), "--row", "{}"]) == 2
    assert "no prompt that a row could fill" in capsys.readouterr().err
    assert main(["generate", str(trained.folder), "--prompt", "C4", "--base"]) == 2
    assert "trained from nothing" in capsys.readouterr().err


def test_a_person_who_types_a_word_that_there_is_not_may_try_again(
    trained: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sft.write.next.typed", lambda sign: iter(["H4", "E4"]))
    explore(open_run(trained), ["C4 D4"], 3, by_hand=True)
    shown = capsys.readouterr()
    assert "'H4': not in the vocabulary" in shown.err
    assert "E4" in shown.out.splitlines(), "what was written after the second try"


# ---- n-grams beside it


def test_ngram_probabilities_by_hand() -> None:
    """Two rows `1 1 2` after a start token 0; four tokens in all; Witten and Bell's formula, worked out on paper."""
    rows = [{"input_ids": [0, 1, 1, 2], "labels": [-100, 1, 1, 2]}] * 2
    ((loss, correct, count),) = ngram_losses(rows, rows[:1], 1, 4)
    one, two = (4 + 2 / 4) / 8, (2 + 2 / 4) / 8  # 6 tokens seen, 2 kinds of them
    assert loss == pytest.approx(-math.log(one * one * two))
    assert (correct, count) == (2, 3)
    ((loss, correct, count),) = ngram_losses(rows, rows[:1], 2, 4)
    behind_start, again, then = (2 + one) / 3, (2 + 2 * one) / 6, (2 + 2 * two) / 6
    assert loss == pytest.approx(-math.log(behind_start * again * then))


def test_ngram_distributions_sum_to_one_also_in_contexts_never_seen() -> None:
    rows = [{"input_ids": scale(i, 1, 6), "labels": scale(i, 1, 6)} for i in range(4)]
    for context in ([4, 5], [4, 4], [11, 9]):
        asked = [{"input_ids": [*context, token], "labels": [-100, -100, token]} for token in range(12)]
        assert sum(math.exp(-loss) for loss, _, _ in ngram_losses(rows, asked, 3, 12)) == pytest.approx(1.0)


def test_ngram_models_stand_beside_the_network_on_the_same_tokens(
    trained: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((trained.folder / "eval" / "scores.json").read_text())
    assert scores["others"] == ["unigram", "trigram"]
    perplexity = scores["metrics"]["perplexity"]
    assert 1 < perplexity["trigram"]["value"] < perplexity["unigram"]["value"] < len(TOKENS)
    report(trained)
    shown = capsys.readouterr().out
    assert "trigram" in shown.splitlines()[0]
    assert "a trigram model has" in shown


def test_generated_sequences_are_drawn_in_the_report(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    from sft.train.stage import train

    patches = [f"{n:09b}" for n in (0, 16, 511)]
    write_vocabulary(tmp_path, ["<pad>", "<s>", "</s>", *patches])
    rows = [{"sequence": [3 + (i + j * k) % 3 for j in range(4)]} for i in range(3) for k in range(3)]
    path = sequences(tmp_path, rows, template_options={"width": 2}, generation={"max_new_tokens": 4})
    recipe = load(path, ["trainer.num_train_epochs=1", "eval.rows=2"])
    train(recipe)
    evaluate_run(recipe)
    page = report(recipe).read_text("utf-8")
    held_out = page.split("Held-out rows, for comparison.")[1]
    assert held_out.count('viewBox="0 0 2 2"') == len(Opened(recipe).tokens.test)
    assert "no picture" in page or page.split("Held-out rows")[0].count('class="picture"') >= 1


# ---- classification


def test_the_classifier_holds_out_the_rows_that_its_language_model_held_out(
    trained: Recipe, classified: Recipe
) -> None:
    from sft.train.classification import labelled

    rows = labelled(Opened(classified))
    theirs = Opened(trained).tokens
    assert sorted(rows.test["input_ids"]) == sorted(theirs.test["input_ids"])
    assert sorted(rows.train["input_ids"]) == sorted(theirs.train["input_ids"])
    assert rows.classes == ["1", "3"]
    for row in rows.test:
        gap = (row["input_ids"][2] - row["input_ids"][1]) % len(TONES)
        assert row["name"] == str(gap)


def test_the_class_is_told_at_the_last_real_token(classified: Recipe) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(classified.trained).eval()
    assert model.config.id2label == {0: "1", 1: "3"}
    row = torch.tensor([[1, 4, 5, 6, 7, 2]])
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        alone = model(row).logits
        among = model(padded, attention_mask=(padded != 0).long()).logits
        hidden = model.score(model.transformer(row).last_hidden_state[:, -1])
    torch.testing.assert_close(alone, among)
    torch.testing.assert_close(alone, hidden)


def test_scores_of_classes_are_those_of_the_metrics_with_the_baseline_beside(
    classified: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from eval.classification import _f1
    from eval.open_metric import open_metric
    from eval.score import read_predictions

    scores = json.loads((classified.folder / "eval" / "scores.json").read_text())
    lines = read_predictions(classified.folder / "eval" / "tuned")
    right = sum(line["prediction"] == line["reference"] for line in lines) / len(lines)
    assert scores["metrics"]["accuracy"]["tuned"]["value"] == pytest.approx(right)
    log = json.loads((classified.folder / "train.json").read_text())["log"]
    assert max(entry["seen_accuracy"] for entry in log if "seen_accuracy" in entry) > 0.8
    rng = np.random.default_rng(0)
    answers, truth = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
    by_metric = open_metric("f1").compute(predictions=answers.tolist(), references=truth.tolist())["f1"]
    assert _f1(answers, truth)(np.arange(50)[None])[0] == pytest.approx(by_metric)
    report(classified)
    shown = capsys.readouterr().out
    assert "logistic regression" in shown
    assert "held-out rows are too few to tell two models apart" in shown
    assert "accuracy, by epoch" in (classified.folder / "report.html").read_text("utf-8")


def test_predicted_classes_are_kept_where_a_metric_fails_and_scored_without_the_network(
    tmp_path: Path, classified: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.classification import evaluate_run, score_run

    shutil.copytree(classified.folder, tmp_path / "run")
    recipe = load(tmp_path / "run")
    scores = tmp_path / "run" / "eval" / "scores.json"
    before = scores.read_text()
    shutil.rmtree(tmp_path / "run" / "eval")
    with monkeypatch.context() as patch:
        patch.setattr("eval.open_metric.METRICS", tmp_path)  # where no metric is
        with pytest.raises(UserError, match="no metric `accuracy`"):
            evaluate_run(recipe)
    monkeypatch.setattr("eval.classification._network", lambda *_: pytest.fail("the network is asked again"))
    score_run(recipe)
    assert scores.read_text() == before
    scores.unlink()
    evaluate_run(recipe)
    assert scores.read_text() == before


def test_missing_labels_are_counted(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    from sft.train.stage import train

    rows: list[Any] = [
        *ROWS,
        {"sequence": [4, 5]},
        {"sequence": [5, 4], "label": None},
        {"sequence": [6], "label": 0.5},
    ]
    assert main(["check", str(sequences(tmp_path, rows))]) == 0  # nobody asks for labels
    recipe = load(sequences(tmp_path, rows, task="classification"))
    with pytest.raises(UserError) as error:
        train(recipe)
    assert "3 of 35 rows cannot be used" in str(error.value)
    assert f"2 with a missing label: {tmp_path}/rows.jsonl:33, {tmp_path}/rows.jsonl:34" in str(error.value)
    assert "rows.jsonl:35 (0.5)" in str(error.value)


def test_a_classifier_of_weights_in_16_bits_is_trained_in_32(
    tmp_path: Path, trained: Recipe, sequences: Callable[..., Path]
) -> None:
    from sft.model.load import load_classifier

    half = GPT2LMHeadModel.from_pretrained(trained.trained, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    Opened(trained).tokenizer.save_pretrained(tmp_path / "half")
    recipe = load(sequences(tmp_path, task="classification", model=str(tmp_path / "half")))
    assert load_classifier(recipe, Opened(recipe).tokenizer, ["1", "3"]).dtype == torch.float32


def test_odd_labels_and_functions_are_messages_about_their_rows(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    from sft.train.classification import labelled

    rows = [row | {"label": label} for row, label in zip(ROWS, ["--3", "²", "9" * 5000, "-1"] * 8, strict=True)]
    recipe = load(sequences(tmp_path, rows, task="classification"))
    assert labelled(Opened(recipe)).classes == ["-1", "--3", "9" * 5000, "²"]
    (tmp_path / "some.py").write_text(
        "from data_templates import Template\n\n\n"
        "def template():\n"
        "    return Template({'sequence': ''}, lambda r: '', lambda r: ' '.join(r['sequence']),\n"
        "                    label=lambda r: r['kind'])\n"
    )
    recipe = load(sequences(tmp_path, task="classification", template=str(tmp_path / "some.py")))
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*`kind`"):
        labelled(Opened(recipe))


def test_check_tells_of_classes_what_training_would(
    tmp_path: Path, sequences: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sequences(tmp_path, [row | {"label": "one"} for row in ROWS])
    assert main(["check", str(path)]) == 0
    path = sequences(tmp_path, [row | {"label": "one"} for row in ROWS], task="classification")
    assert main(["check", str(path)]) == 2
    assert "all rows to train on are of one class, 'one'; add rows of others" in capsys.readouterr().err
    assert main(["check", str(path), "data.test=rows.jsonl"]) == 2
    assert "no row is left to train on, all stand in `data.test` too" in capsys.readouterr().err


def test_a_class_that_training_never_sees_is_refused(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    from sft.train.classification import labelled

    path = sequences(tmp_path, [row | {"label": f"by {row['label']}"} for row in ROWS], task="classification")
    held_out = [{"sequence": scale(first, 2, 6), "label": "by 2"} for first in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    with pytest.raises(UserError, match=r"test\.jsonl:1: no row to train on has its label, 'by 2'; add some"):
        labelled(Opened(load(path, [f"data.test={tmp_path / 'test.jsonl'}"])))


def test_a_classifier_is_made_from_nothing_too_and_writes_nothing(
    tmp_path: Path, sequences: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sequences(tmp_path, task="classification")
    assert main(["train", str(path), "trainer.num_train_epochs=1"]) == 0
    assert main(["train", str(path), "trainer.num_train_epochs=1"]) == 0
    assert "trained already" in capsys.readouterr().err
    for command in (["generate", "--prompt", "C4"], ["merge"]):
        assert main([command[0], str(path), "trainer.num_train_epochs=1", *command[1:]]) == 2
        assert "is a classifier, which writes nothing" in capsys.readouterr().err


def test_what_does_not_go_with_classification_is_told(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    path = sequences(tmp_path, task="classification")
    for setting, said in (("lora.r=4", "trains all weights"), ("trainer.packing=true", "goes with language modelling"),
                          ("eval.scratch=x.yaml", "goes with language modelling"),
                          ("eval.ngrams=[1]", "goes with language modelling")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load(path, [setting])
    from sft.train.stage import train

    with pytest.raises(UserError, match="template `running_text` has no `label`"):
        train(load(path, ["template=running_text", "data.columns.text=sequence"]))


# ---- the third column


def test_a_model_from_nothing_on_the_same_rows_is_the_third_column(
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "scratch.yaml").write_text(
        "model: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 256}\n"
        "tokenizer: {vocab_size: 300}\ntemplate: running_text\ndata: {train: elsewhere.txt}\n"
        "trainer: {max_length: 256, max_steps: 3, use_cpu: true}\n"
    )
    tiny_model(tmp_path / "model", gpt2_like)
    scratch = str(tmp_path / "scratch.yaml")
    path = write_recipe(tmp_path, eval={"rows": 3, "scratch": scratch}, generation={"max_new_tokens": 4})
    assert main(["bases", str(path)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert last == str(path)
    command, *settings = first.split("\t")
    assert command == scratch
    assert main(["train", str(path)]) == 0
    assert main(["eval", str(path)]) == 2
    assert "`eval.scratch` is not trained yet; ./launch.sh trains it first" in capsys.readouterr().err
    assert main(["train", command, *settings]) == 0
    assert main(["eval", str(path)]) == 0
    assert main(["report", str(path)]) == 0

    recipe = load(path)
    assert recipe.scratch is not None
    tokens = Opened(recipe.scratch).tokens
    own = Opened(recipe).tokens
    assert sorted(tokens.test["reference"]) == sorted(own.test["reference"])
    scores = json.loads((recipe.folder / "eval" / "scores.json").read_text())
    assert scores["others"] == ["scratch"]
    assert "scratch" not in scores["metrics"]["loss"], "tokens of another tokenizer"
    assert "scratch" in scores["metrics"]["rougeL"]
    losses = json.loads((recipe.folder / "eval" / "scratch" / "losses.json").read_text())
    size = sum(len(text.encode()) for text in own.test["reference"])
    by_hand = sum(loss for loss, _, _ in losses) / math.log(2) / size
    assert scores["metrics"]["bits_per_byte"]["scratch"]["value"] == pytest.approx(by_hand)
    assert "<th>scratch</th>" in (recipe.folder / "report.html").read_text("utf-8")
    assert "scratch" in capsys.readouterr().out


def test_a_third_column_that_starts_from_a_trained_model_is_told(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"`eval\.scratch` starts from a trained model"):
        load(path, [f"eval.scratch={path}"])
    with pytest.raises(UserError, match=r"`eval.scratch` cannot be read:\n.*no such recipe"):
        load(path, ["eval.scratch=nothing.yaml"])


def test_sequences_never_go_through_a_chat_template(tmp_path: Path, sequences: Callable[..., Path]) -> None:
    recipe = load(sequences(tmp_path))
    assert not Opened(recipe).codec.chat
