"""Generation, scores and report: the same prompts for both models, metrics offline, intervals, one HTML file."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_templates import Template
from eval.evaluate import evaluate_run, score_run
from eval.open_metric import METRICS, check_metrics, compute, open_metric
from eval.report import report
from eval.score import score
from eval.table import score_lines, verdict
from sft import UserError
from sft.cli import STAGES, main
from sft.model.load import decoding
from sft.recipe import Recipe, load
from sft.rows.template import template_names
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.write.ask import ask, open_run
from sft.write.generate import write

STORY = Path(__file__).parents[1] / "data_templates" / "story.py"
CHINESE = "从前有座山，山上有座庙。"


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
) -> Recipe:
    from sft.train.stage import train

    folder = tmp_path_factory.mktemp("scored")
    tiny_model(folder / "model", gpt2_like, "llama")
    trainer = {"max_steps": 30, "learning_rate": 1e-2, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 10}
    recipe = load(
        write_recipe(
            folder, trainer=trainer, data={"test_fraction": 0.5}, eval={"rows": 4}, generation={"max_new_tokens": 12}
        )
    )
    train(recipe)
    evaluate_run(recipe)
    report(recipe)
    return recipe


def scores_of(recipe: Recipe) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((recipe.folder / "eval" / "scores.json").read_text())
    return scores


def test_both_sides_answer_the_same_prompts(scored: Recipe) -> None:
    lines = {
        side: [json.loads(line) for line in (scored.folder / "eval" / side / "predictions.jsonl").open("rb")]
        for side in ("base", "tuned")
    }
    assert len(lines["base"]) == 4
    for base, tuned in zip(lines["base"], lines["tuned"], strict=True):
        assert [base[k] for k in ("where", "prompt", "reference")] == [
            tuned[k] for k in ("where", "prompt", "reference")
        ]


def test_thirty_steps_beat_the_base_with_the_interval_clear_of_zero(scored: Recipe) -> None:
    scores = scores_of(scored)
    loss = scores["metrics"]["loss"]
    assert loss["difference"]["value"] == pytest.approx(loss["tuned"]["value"] - loss["base"]["value"])
    assert loss["difference"]["low"] <= loss["difference"]["value"] <= loss["difference"]["high"] < 0
    assert verdict(scores).startswith("The tuned model is better than its base")


def test_the_base_side_is_the_untouched_base(scored: Recipe) -> None:
    from sft.model.loss import output_losses

    model = AutoModelForCausalLM.from_pretrained(scored.model)
    expected = output_losses(model, Opened(scored).tokens.test, 4096, 0)
    written = json.loads((scored.folder / "eval" / "base" / "losses.json").read_text())
    assert [row[0] for row in written] == pytest.approx([row.loss for row in expected], rel=1e-4)


def test_a_second_evaluation_keeps_what_fits_and_redoes_what_does_not(scored: Recipe) -> None:
    file = scored.folder / "eval" / "scores.json"
    before = file.stat().st_mtime_ns
    evaluate_run(scored)
    assert file.stat().st_mtime_ns == before
    evaluate_run(load(scored.folder / "recipe.yaml", ["eval.rows=3"]))
    assert scores_of(scored)["generated"] == 3
    evaluate_run(scored)


def test_a_damaged_evaluation_is_done_again(scored: Recipe) -> None:
    file = scored.folder / "eval" / "tuned" / "predictions.jsonl"
    whole = file.read_text("utf-8")
    file.write_text(whole[:-20], encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions.jsonl: missing or damaged .*run `sft eval` again"):
        report(scored)
    evaluate_run(scored)
    assert file.read_text("utf-8") == whole


def test_few_rows_prove_nothing(scored: Recipe) -> None:
    scores = scores_of(scored) | {"rows": 2}
    assert verdict(scores) == "2 held-out rows are too few to tell base and tuned model apart; hold out 10 or more."


def test_the_report_is_one_file_that_says_what_happened(scored: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    page = report(scored).read_text("utf-8")
    assert not re.search(r'(src|href)="|@import|url\(', page), "nothing is loaded from elsewhere"
    for text in ("loss on outputs", "ROUGE-L", "<polyline", "<mark>", "Peak memory", "transformers 5", "reference"):
        assert text in page, text
    shown = "".join(capsys.readouterr())
    assert "95 % interval" in shown
    assert "report.html" in shown


def test_text_of_the_rows_cannot_break_out_of_the_report(scored: Recipe) -> None:
    file = scored.folder / "eval" / "tuned" / "predictions.jsonl"
    kept = file.read_text("utf-8")
    rows = [json.loads(line) for line in kept.splitlines()]
    rows[0]["prediction"] = "<script>alert(1)</script>"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<script>" not in report(scored).read_text("utf-8")
    file.write_text(kept, encoding="utf-8")


def test_generation_is_the_same_one_by_one_and_in_batches(scored: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scored.model)
    codec, model = Codec(tokenizer), AutoModelForCausalLM.from_pretrained(scored.model)
    prompts = codec.prompts(["Mira", "Tom went to the well and found a map.", "小明", "Ada " * 60])
    config = decoding(scored, codec)
    one, many = (write(model, codec, prompts, config, size) for size in (1, 10**6))
    assert one == many


def test_a_prompt_near_the_last_position_gets_the_room_that_is_left(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], scored: Recipe
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m", gpt2_like))
    codec = Codec(AutoTokenizer.from_pretrained(gpt2_like))
    prompts = [[9] * 250, [9] * 10, [9] * 255]
    written = write(model, codec, prompts, decoding(scored, codec), 10**6)
    assert written == [write(model, codec, [ids], decoding(scored, codec), 1)[0] for ids in prompts]


def test_an_end_token_ends_the_text_and_is_not_part_of_it(gpt2_like: Path, scored: Recipe) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(gpt2_like))
    body = codec.outputs([" and so it was."])[0]

    class Writes(torch.nn.Module):
        """Stands in for a model: generate() appends known ids."""

        device, config = torch.device("cpu"), AutoModelForCausalLM.from_pretrained(scored.model).config

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            rows = torch.tensor([body + codec.end + body, (body * 3)[: 2 * len(body) + 1]])
            return torch.cat([input_ids, rows], 1)

    written = write(Writes(), codec, [[5, 6], [5, 6]], decoding(scored, codec), 10**6)
    assert written[0] == (" and so it was.", True)
    assert written[1][1] is False


def test_a_wrong_generation_setting_is_an_error(scored: Recipe) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(scored.model))
    with pytest.raises(UserError, match=r"`generation\.early_stopping` is not accepted"):
        decoding(load(scored.folder / "recipe.yaml", ["generation.early_stopping=maybe"]), codec)


def test_generate_takes_a_prompt_a_row_or_lines(
    scored: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(scored.folder / "recipe.yaml")
    assert main(["generate", recipe, "--prompt", "Mira went home."]) == 0
    by_prompt = capsys.readouterr().out
    assert main(["generate", recipe, "--row", '{"prompt": "Mira went home."}']) == 0
    assert capsys.readouterr().out == by_prompt
    monkeypatch.setattr("sys.stdin", io.StringIO('Mira went home.\n{"prompt": "Mira went home."}\n'))
    assert main(["generate", recipe]) == 0
    assert capsys.readouterr().out == by_prompt * 2
    assert main(["generate", recipe, "--prompt", "Mira went home.", "--base"]) == 0
    assert capsys.readouterr().out != by_prompt


def test_generate_writes_several_different_samples(scored: Recipe) -> None:
    recipe = load(scored.folder / "recipe.yaml", ["generation.do_sample=true", "generation.temperature=1.5"])
    found = [*ask(open_run(recipe), ["Mira"], samples=3)]
    assert [(piece.step, piece.sample) for piece in found] == [(1, 1), (1, 2), (1, 3)]
    assert len({piece.text for piece in found}) > 1
    assert found == [*ask(open_run(recipe), ["Mira"], samples=3)], "the seed of the recipe decides"
    with pytest.raises(UserError, match="greedy decoding writes the same"):
        next(ask(open_run(scored), ["Mira"], samples=2))


def test_generate_rolls_a_chain_forward(
    tmp_path: Path, scored: Recipe, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    """The model is the real one; what it writes is replaced, since two steps of training write no algorithms."""
    written = iter(["no algorithm", *(f"## Algorithm\nStep {c}\n## Pseudocode\nreturn {c}" for c in "DEF")])
    prompts: list[str] = []

    def fake(model: Any, codec: Codec, ids: list[list[int]], *_: Any) -> list[tuple[str, bool]]:
        prompts.append(codec.tokenizer.decode(ids[0]))
        return [(next(written), True) for _ in ids]

    monkeypatch.setattr("sft.write.ask.write", fake)
    monkeypatch.setattr("sft.write.ask.check_owner", lambda *_: None)
    monkeypatch.setattr("sft.write.ask.load_trained", lambda *_: AutoModelForCausalLM.from_pretrained(scored.model))
    recipe = load(write_recipe(tmp_path, model=scored.model, template="algorithm_evolution",
                               trainer={"max_length": 1024},
                               generation={"do_sample": True}))  # fmt: skip
    chain = Opened(recipe).template.example
    found = [*ask(open_run(recipe), [chain], samples=2, steps=2)]
    assert [(piece.step, piece.sample) for piece in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert "Step D" in prompts[1], "the second step follows from the first readable sample"
    with pytest.raises(UserError, match="has no `next_row`"):
        next(ask(open_run(scored), ["Mira"], steps=2))


@pytest.mark.parametrize("name", template_names())
def test_the_reference_scores_one_and_metrics_open_offline(name: str, write_recipe: Any, tmp_path: Path) -> None:
    template = Opened(load(write_recipe(tmp_path, template=name))).template
    from sft.rows.template import read_sample, samples

    for row in samples(template, template.example, "example"):
        _, segments = read_sample(template, row, "example")
        text = "".join(segment.text for segment in segments)
        answers = [template.answer(text)] * 2
        scores = [compute(name, open_metric(name), answers, answers) for name in template.metrics]
        for metric, values in (pair for found in scores for pair in found.items()):
            assert values == pytest.approx([0.0, 0.0] if metric == "repetition" else [1.0, 1.0], abs=0.15), metric
            if metric not in ("repetition", "distinct2"):
                assert values == pytest.approx([1.0, 1.0]), metric


def test_each_metric_folder_tells_right_from_wrong() -> None:
    folders = [p.name for p in METRICS.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(folders) >= 5
    for name in {"rouge", "bleu", "chrf", "exact_answer"} & set(folders):
        right, wrong = ("answer: 42", "answer: 7") if name == "exact_answer" else (CHINESE, "hello there")
        for result in open_metric(name).compute(predictions=[right, wrong], references=[right, right]).values():
            assert result[0] == pytest.approx(1.0)
            assert result[1] < 0.5


def test_repetition_and_distinct_by_hand() -> None:
    texts = ["a b c d a b c d", "a b c d e", CHINESE]
    assert open_metric("repetition").compute(predictions=texts, references=texts)["repetition"] == pytest.approx(
        [0.2, 0.0, 0.0]
    )
    distinct = open_metric("distinct").compute(predictions=texts, references=texts)["distinct2"]
    assert distinct == pytest.approx([4 / 7, 1.0, 8 / 9])


def test_short_perfect_answers_score_one_in_bleu() -> None:
    assert (
        open_metric("bleu").compute(predictions=["yes", "好"], references=["yes", "好"])["bleu"]
        == [pytest.approx(1.0)] * 2
    )


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(UserError, match="no metric `rogue`; did you mean `rouge`"):
        open_metric("rogue")


def test_intervals_cover_the_truth_about_as_often_as_they_say(tmp_path: Path) -> None:
    """Simulated rows whose losses differ by 0.1 on average between base and tuned."""
    from data_templates import Template

    template = Template(fields={}, prompt=str, completion=str)
    rng, inside = np.random.default_rng(0), 0
    for trial in range(100):
        for side, shift in (("base", 0.1), ("tuned", 0.0)):
            folder = tmp_path / str(trial) / side
            folder.mkdir(parents=True)
            losses = rng.normal(2 + shift, 0.5, 80)
            (folder / "losses.json").write_text(json.dumps([[loss, 0, 1] for loss in losses]))
            (folder / "predictions.jsonl").write_text("")
        difference = score(tmp_path / str(trial), template, seed=trial)["metrics"]["loss"]["difference"]
        inside += difference["low"] <= -0.1 <= difference["high"]
    assert 86 <= inside <= 100


# ---- metrics of the user's own

DISTANCE = """import datasets
import evaluate
{top}

TABLE = {table}

class Distance(evaluate.Metric):
    {says}

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({{"predictions": text, "references": text}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        {body}
"""
APART = """return {"distance": [float(sum(a != b for a, b in zip(p.ljust(20), r.ljust(20))))
                             for p, r in zip(predictions, references)]}"""


def write_metric(folder: Path, says: str = "pass", body: str = APART, table: str = "None", top: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{folder.name}.py").write_text(DISTANCE.format(says=says, body=body, table=table, top=top))
    return folder


@pytest.fixture
def own(tmp_path: Path, scored: Recipe) -> Callable[..., tuple[Recipe, Path]]:
    """`own(says, body)` -> the scored run in a folder of its own, its template with a metric of the user's, and that
    metric's folder."""

    def make(says: str = "pass", body: str = APART) -> tuple[Recipe, Path]:
        metric = write_metric(tmp_path / "distance", says, body)
        shutil.copytree(scored.folder, tmp_path / "run", dirs_exist_ok=True)
        template = tmp_path / "mine.py"
        story = STORY.read_text("utf-8")
        template.write_text(re.sub(r"metrics=\(.*?\)", f"metrics=({str(metric)!r},)", story), "utf-8")
        return load(tmp_path / "run", [f"template={template}"]), metric

    return make


def written(folder: Path) -> int:
    return (folder / "tuned" / "predictions.jsonl").stat().st_mtime_ns


def test_a_metric_that_fails_costs_no_prediction_and_is_scored_again_without_a_model(
    own: Callable[..., tuple[Recipe, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, metric = own(body="raise RuntimeError('not today')")
    with pytest.raises(
        UserError, match=r"metric `.*distance` failed: RuntimeError: not today.*`sft score` scores again"
    ):
        evaluate_run(recipe)
    before = written(recipe.folder / "eval")
    write_metric(metric)
    for name in ("load_base", "load_trained"):
        monkeypatch.setattr(f"eval.evaluate.{name}", lambda *_: pytest.fail("a model is loaded"))
    folder = score_run(recipe)
    assert "distance" in json.loads((folder / "scores.json").read_text())["metrics"]
    assert written(folder) == before


def test_an_edited_metric_or_answer_is_scored_again_from_the_same_predictions(
    own: Callable[..., tuple[Recipe, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, metric = own()

    def value() -> float:
        scores = json.loads((evaluate_run(recipe) / "scores.json").read_text())
        return float(scores["metrics"]["distance"]["tuned"]["value"])

    first, before = value(), written(recipe.folder / "eval")
    assert first > 0
    capsys.readouterr()
    assert value() == first
    assert "up to date" in capsys.readouterr().err
    write_metric(metric, body="return {'distance': [7.0 for _ in predictions]}")
    assert value() == 7
    assert "scored again: distance/distance.py changed" in capsys.readouterr().err
    (metric / "numbers.json").write_text("[3]")
    read = f"import json; return {{'distance': json.load(open({str(metric / 'numbers.json')!r})) * len(predictions)}}"
    write_metric(metric, body=read)
    assert value() == 3
    (metric / "numbers.json").write_text("[4]")
    assert value() == 4, "a file that the metric reads"
    table = "json.load(open({!r}))[0]".format(str(metric / "numbers.json"))
    write_metric(
        metric, body="return {'distance': [TABLE for _ in predictions]}", table=f"__import__('json').{table[5:]}"
    )
    assert value() == 4
    (metric / "numbers.json").write_text("[5]")
    assert value() == 5, "a file that is read while the metric loads"
    assert value() == 5
    (metric / "helper.py").write_text("FAR = 8.0\n")
    write_metric(metric, body="return {'distance': [FAR for _ in predictions]}", top="from .helper import FAR")
    assert value() == 8
    (metric / "helper.py").write_text("FAR = 9.0\n")
    assert value() == 9, "a module that the metric imports"
    write_metric(metric)
    assert value() == first
    template = Path(recipe.template)
    template.write_text(template.read_text().replace("metrics=", "answer=lambda text: '', metrics="), "utf-8")
    assert value() == 0, "empty answers are no distance apart"
    assert "scored again: mine.py changed" in capsys.readouterr().err
    assert written(recipe.folder / "eval") == before


@pytest.mark.parametrize(
    ("says", "verdict"),
    [
        ("lower_is_better = True", "better"),
        ("higher_is_better = False", "better"),
        ("higher_is_better = True", "worse"),
        ("lower_is_better = {'distance': True}", "better"),
        ("pass", "changed"),
        ("lower_is_better = {'another': True}", "changed"),
    ],
)
def test_a_distance_that_falls_is_what_its_metric_says_of_it(tmp_path: Path, says: str, verdict: str) -> None:
    metric = write_metric(tmp_path / "distance", says)
    template = Template(fields={}, prompt=str, completion=str, metrics=(str(metric),))
    for side, text in (("base", "a quite other text"), ("tuned", "the reference")):
        lines = [{"prediction": text, "reference": "the reference", "ended": True}] * 20
        (tmp_path / side).mkdir()
        (tmp_path / side / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / side / "losses.json").write_text(json.dumps([[1.0, 0, 1]] * 20))
    _, lines = score_lines(score(tmp_path, template, 0))
    (distance,) = [line for line in lines if line[0] == "distance"]
    assert distance[-1] == verdict
    assert float(distance[1]) > float(distance[2]) == 0


@pytest.mark.parametrize(
    ("says", "body", "message"),
    [
        ("higher_is_better = lower_is_better = True", APART, "sets both lower_is_better and higher_is_better"),
        ("higher_is_better, lower_is_better = True, False", APART, "sets both lower_is_better and higher_is_better"),
        ("shown_as = 'Distance'", APART, "`shown_as` is 'Distance'; write a mapping"),
        ("corpus = 'no'", APART, "`corpus` is 'no'; write True or False"),
        ("pass", "return {}", "gives {}; it gives a mapping"),
        ("pass", "return {'loss': [1.0 for _ in predictions]}", "gives `loss`, which is measured without a metric"),
        ("pass", "return {'d' + str(len(predictions)): 1.0}", "gives `d1` for some rows only"),
        ("corpus = True", "return {'d' + predictions[-1]: 1.0}", "for some rows only; it must give the same scores"),
        ("lower_is_better = 'yes'", APART, "`lower_is_better` is 'yes'; write True, or a mapping"),
        ("pass", "return {'distance': [1.0]}", "`distance` has 1 numbers for"),
        ("pass", "return {'distance': [float('nan') for _ in predictions]}", "holds nan, which is not a finite number"),
        ("pass", "return {'distance': ['far' for _ in predictions]}", "holds 'far', which is not a finite number"),
        ("pass", "return 3", "it gives a mapping"),
        ("pass", "raise SystemExit(0)", "failed: SystemExit"),
        ("corpus = True", APART, "says corpus = True and gives `distance` for each row"),
    ],
)
def test_what_a_metric_cannot_say_or_give_is_one_message(tmp_path: Path, says: str, body: str, message: str) -> None:
    metric = write_metric(tmp_path / "distance", says, body)
    template = Template(fields={}, prompt=str, completion=str, metrics=(str(metric),))
    (tmp_path / "tuned").mkdir()
    lines = [json.dumps({"prediction": text, "reference": "b", "ended": True}) for text in "abc"]
    (tmp_path / "tuned" / "predictions.jsonl").write_text("\n".join(lines))
    (tmp_path / "tuned" / "losses.json").write_text(json.dumps([[1.0, 0, 1]] * 3))
    with pytest.raises(UserError) as error:
        score(tmp_path, template, 0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rogue", "no metric `rogue`; did you mean `rouge`?"),
        ("broken", "cannot be opened as a metric: SyntaxError"),
        ("empty", "a metric's folder holds a file of its name, empty.py"),
        ("none", "cannot be opened as a metric"),
    ],
)
def test_a_metric_that_cannot_be_opened_is_reported_by_check_and_before_training(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], metric: str, message: str,
) -> None:  # fmt: skip
    for name, text in (("broken", "def :"), ("none", "x = 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(text)
    (tmp_path / "empty").mkdir()
    place = metric if metric == "rogue" else str(tmp_path / metric)
    template = tmp_path / "mine.py"
    template.write_text(re.sub(r"metrics=\(.*?\)", f"metrics=({place!r},)", STORY.read_text("utf-8")), "utf-8")
    tiny_model(tmp_path / "model", gpt2_like)
    recipe = write_recipe(tmp_path, template=str(template))
    for command in ("check", "train"):
        assert main([command, str(recipe)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run" / "adapter").exists()


def test_scores_without_predictions_are_one_message(
    tmp_path: Path, scored: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scored.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "eval")
    assert main(["score", str(tmp_path / "run")]) == 2
    assert "holds no predictions to score; run `sft eval` first" in capsys.readouterr().err


def test_bleu_of_the_corpus_is_sacrebleus_and_has_an_interval(tmp_path: Path) -> None:
    import sacrebleu

    references = [
        f"the {word} went to the old mill by the river" for word in ["fox", "hen", "bear", "wolf", "crow"]
    ] * 8
    sides = {"base": [text.replace("mill", "well") for text in references], "tuned": references}
    template = Template(fields={}, prompt=str, completion=str, metrics=("corpus_bleu", "bleu"))
    for side, texts in sides.items():
        (tmp_path / side).mkdir()
        lines = [
            json.dumps({"prediction": a, "reference": b, "ended": True}) for a, b in zip(texts, references, strict=True)
        ]
        (tmp_path / side / "predictions.jsonl").write_text("\n".join(lines))
        (tmp_path / side / "losses.json").write_text(json.dumps([[1.0, 0, 1]] * len(texts)))
    found = score(tmp_path, template, 0)["metrics"]["corpus_bleu"]
    expected = sacrebleu.BLEU(tokenize="none").corpus_score(sides["base"], [references]).score / 100
    assert found["base"]["value"] == pytest.approx(expected)
    assert found["base"]["low"] <= expected <= found["base"]["high"]
    assert found["tuned"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert found["shown_as"] == "BLEU of the corpus"


def test_equal_models_are_said_to_be_equal_and_the_verdict_goes_by_the_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    template = Template(fields={}, prompt=str, completion=str)
    base = rng.normal(2, 0.5, 40)
    for side, losses in (("base", base), ("tuned", base + rng.normal(-0.01, 0.3, 40))):
        (tmp_path / side).mkdir()
        (tmp_path / side / "losses.json").write_text(json.dumps([[loss, 0, 1] for loss in losses]))
        (tmp_path / side / "predictions.jsonl").write_text("")
    scores = score(tmp_path, template, 0)
    difference = scores["metrics"]["loss"]["difference"]
    assert difference["low"] < 0 < difference["high"]
    assert difference["value"] != 0
    assert verdict(scores).startswith(
        "No difference between tuned model and base could be shown: loss on 40 held-out rows"
    )
    _, lines = score_lines(scores)
    assert {line[-1] for line in lines} == {"not clear"}


def predictions_by_hand(folder: Path, sides: dict[str, list[str]], reference: str = "b") -> None:
    """Predictions of two models, as evaluation writes them."""
    for side, texts in sides.items():
        (folder / side).mkdir()
        lines = [json.dumps({"prediction": text, "reference": reference, "ended": True}) for text in texts]
        (folder / side / "predictions.jsonl").write_text("\n".join(lines))
        (folder / side / "losses.json").write_text(json.dumps([[1.0, 0, 1]] * len(texts)))


@pytest.mark.parametrize("number", ["np.float32(2)", "np.int64(2)", "2", "2.0"])
@pytest.mark.parametrize("shape", ["[{} for _ in predictions]", "tuple({} for _ in predictions)", "{}",
                                   "np.array([{} for _ in predictions])"])  # fmt: skip
def test_a_metric_may_give_the_numbers_of_any_library(tmp_path: Path, number: str, shape: str) -> None:
    metric = write_metric(tmp_path / "distance", body=f"return {{'distance': {shape.format(number)}}}",
                          top="import numpy as np")  # fmt: skip
    found = compute("distance", open_metric(str(metric)), ["a", "b"], ["a", "b"])["distance"]
    assert found in (2.0, [2.0, 2.0])
    assert json.dumps(found)


def test_a_metric_that_calls_its_score_accuracy_makes_no_classifier_of_a_language_model(tmp_path: Path) -> None:
    metric = write_metric(tmp_path / "distance", body="return {'accuracy': [1.0 for _ in predictions]}")
    predictions_by_hand(tmp_path, {"base": ["a"] * 12, "tuned": ["b"] * 12})
    template = Template(fields={}, prompt=str, completion=str, metrics=(str(metric),))
    assert "loss on 12 held-out rows" in verdict(score(tmp_path, template, 0))


def test_an_answer_that_cannot_take_a_text_is_one_message_with_the_text(tmp_path: Path) -> None:
    predictions_by_hand(tmp_path, {"base": ["a b"] * 12, "tuned": ["oh"] * 12}, "c d")
    template = Template(
        fields={}, prompt=str, completion=str, metrics=("rouge",), answer=lambda text: text.split(" ")[1]
    )
    with pytest.raises(UserError, match="the template's `answer` fails on 'oh': IndexError"):
        score(tmp_path, template, 0)


def test_a_score_of_the_corpus_has_about_the_interval_of_the_same_score_by_row(tmp_path: Path) -> None:
    """The mean share of words that are right, by row and of the corpus: the sides differ by 0.1 in each row, which
    only resamples that are paired can tell."""
    by_row = "[float(p.count('b')) / 20 for p in predictions]"
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 18, 64)
    sides = {
        "base": ["b " * int(n) + "-" for n in counts],
        "tuned": ["b " * int(n + rng.integers(1, 4)) + "-" for n in counts],
    }
    predictions_by_hand(tmp_path, sides)
    write_metric(tmp_path / "row", "higher_is_better = True", f"return {{'share': {by_row}}}")
    whole = f"values = {by_row}; return {{'share_of_all': sum(values) / len(values)}}"
    write_metric(tmp_path / "corpus", "higher_is_better = corpus = True", whole)
    metrics = (str(tmp_path / "row"), str(tmp_path / "corpus"))
    scores = score(tmp_path, Template(fields={}, prompt=str, completion=str, metrics=metrics), 0)
    row, corpus = (scores["metrics"][name] for name in ("share", "share_of_all"))
    for side in ("base", "tuned", "difference"):
        assert corpus[side]["value"] == pytest.approx(row[side]["value"])
        widths = [found[side]["high"] - found[side]["low"] for found in (corpus, row)]
        assert widths[0] == pytest.approx(widths[1], rel=0.25), side
        low, value, high = (corpus[side][name] for name in ("low", "value", "high"))
        assert high - value == pytest.approx(value - low), "standard errors, where there are few resamples"
    base, difference = (corpus[side]["high"] - corpus[side]["low"] for side in ("base", "difference"))
    assert difference < base / 3, "both sides are resampled alike"
    assert (row["resamples"], corpus["resamples"]) == (2000, 100)


def test_bleu_of_a_chinese_corpus_counts_characters(tmp_path: Path) -> None:
    whole = open_metric("corpus_bleu")
    assert whole.compute(predictions=[CHINESE] * 2, references=[CHINESE] * 2)["corpus_bleu"] == pytest.approx(1.0)
    half = whole.compute(predictions=[CHINESE, CHINESE[:7]], references=[CHINESE] * 2)["corpus_bleu"]
    assert 0.4 < half < 1, "one number of both, with the penalty for what is too short"


def test_a_folder_of_an_earlier_version_is_reported_and_evaluated_again(
    tmp_path: Path, scored: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(scored.folder, tmp_path / "run")
    folder = run / "eval"
    scores = json.loads((folder / "scores.json").read_text())
    for metric in scores["metrics"].values():
        metric["lower_is_better"] = bool(metric["lower_is_better"])
        metric.pop("shown_as", None)
        metric.pop("resamples", None)
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "files.json").rename(folder / "made_of.json")
    (folder / "scored.json").unlink()
    assert main(["report", str(run)]) == 0
    assert main(["score", str(run)]) == 2
    assert "an earlier version wrote it; run `sft eval`" in capsys.readouterr().err
    assert main(["eval", str(run)]) == 0
    assert main(["score", str(run)]) == 0
    assert "up to date" in capsys.readouterr().err
    (folder / "scored.json").write_text(json.dumps({"predictions": {}, "code": "one hash of all", "files": {}}))
    assert main(["score", str(run)]) == 0
    assert "scored" in capsys.readouterr().err


def test_a_score_without_a_direction_is_changed_in_the_report_and_on_the_terminal(
    tmp_path: Path, scored: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(scored.folder, tmp_path / "run")
    scores = json.loads((run / "eval" / "scores.json").read_text()) | {"rows": 40}
    scores["metrics"]["rouge1"] |= {"difference": {"value": 0.2, "low": 0.1, "high": 0.3}, "lower_is_better": None}
    (run / "eval" / "scores.json").write_text(json.dumps(scores))
    page = report(load(run)).read_text("utf-8")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "ROUGE-1" in line]
    assert line.rstrip(" │|").endswith("changed")
    row = page[page.index("ROUGE-1") :].split("</tr>")[0]
    assert "changed" in row
    assert not re.search("better|worse|↑|↓", row)


def test_other_settings_of_scoring_are_scored_again_and_a_seed_redraws_the_intervals(
    tmp_path: Path, scored: Recipe
) -> None:
    run = shutil.copytree(scored.folder, tmp_path / "run")
    loss = [
        json.loads((score_run(load(run, overrides)) / "scores.json").read_text())["metrics"]["loss"]["tuned"]
        for overrides in (["eval.seed=1"], ["eval.seed=2"])
    ]
    assert loss[0]["value"] == loss[1]["value"]
    assert loss[0]["low"] != loss[1]["low"]


@pytest.mark.slow
def test_an_edit_of_a_metric_is_scored_again_in_a_new_process(
    tmp_path: Path, own: Callable[..., tuple[Recipe, Path]]
) -> None:
    """Of the user's, and of the project's, for which the project is copied."""
    recipe, distance = own()
    home, template = tmp_path / "project", Path(recipe.template)
    template.write_text(template.read_text("utf-8").replace("metrics=(", "metrics=('repetition', "), "utf-8")
    (home / "recipes").mkdir(parents=True)
    for name in ("sft", "eval", "data_templates"):
        shutil.copytree(STORY.parents[1] / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))

    def score_anew() -> tuple[dict[str, float], str]:
        done = subprocess.run(
            [sys.executable, "-m", "sft", "score", str(tmp_path / "run"), f"template={template}"],
            cwd=home, env=os.environ | {"PYTHONPATH": str(home)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "run" / "eval" / "scores.json").read_text())["metrics"]
        return {name: metrics[name]["tuned"]["value"] for name in ("repetition", "distance")}, done.stderr

    before, _ = score_anew()
    assert "up to date" in score_anew()[1]
    write_metric(distance, body="return {'distance': [7.0 for _ in predictions]}")
    found, said = score_anew()
    assert found == before | {"distance": 7.0}
    assert "scored again: distance/distance.py changed" in said
    repetition = home / "eval" / "metrics" / "repetition" / "repetition.py"
    repetition.write_text(repetition.read_text("utf-8").replace("[1 - len", "[3 - len"), "utf-8")
    found, said = score_anew()
    assert found == pytest.approx({"repetition": before["repetition"] + 2, "distance": 7.0})
    assert "scored again: eval/metrics/repetition/repetition.py changed" in said
    bootstrap = home / "sft" / "bootstrap.py"
    bootstrap.write_text(bootstrap.read_text("utf-8").replace("RESAMPLES = 2000", "RESAMPLES = 1000"), "utf-8")
    assert "scored again: sft/bootstrap.py changed" in score_anew()[1], "it makes intervals, and no metric reads it"


def test_scores_stand_where_a_run_is_moved(
    tmp_path: Path, own: Callable[..., tuple[Recipe, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = own()
    score_run(recipe)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    capsys.readouterr()
    score_run(load(tmp_path / "moved", [f"template={recipe.template}"]))
    assert "up to date" in capsys.readouterr().err


def test_only_the_first_of_several_processes_opens_metrics_before_training(
    tmp_path: Path, scored: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("sft.cli._opened_with_metrics", lambda recipe: opened.append(recipe.template))
    monkeypatch.setitem(STAGES, "train", "builtins:id")
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        main(["train", str(scored.folder)])
        assert len(opened) == count


def test_metrics_given_as_one_text_are_one_message() -> None:
    with pytest.raises(UserError, match=re.escape("`metrics` is the text 'rouge'; write ('rouge',)")):
        check_metrics(Template(fields={}, prompt=str, completion=str, metrics="rouge"))  # type: ignore[arg-type]
