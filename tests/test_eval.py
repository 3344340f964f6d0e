"""Generation, scores and report: the same prompts for both models, metrics offline, intervals, one HTML file."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.evaluate import evaluate_run
from eval.report import report
from eval.score import METRICS, load_metric, row_scores, score
from eval.table import verdict
from sft import UserError
from sft.cli import main
from sft.model.load import decoding
from sft.recipe import Recipe, load
from sft.rows.template import template_names
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.write.ask import ask, open_run
from sft.write.generate import write

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
    assert [row[0] for row in written] == pytest.approx([row[0] for row in expected], rel=1e-4)


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
    with pytest.raises(UserError, match="`generation:` is not accepted"):
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
        scores = row_scores(template, [{"prediction": text, "reference": text}] * 2)
        assert bool(scores) == bool(template.metrics)
        for metric, values in scores.items():
            assert values == pytest.approx([0.0, 0.0] if metric == "repetition" else [1.0, 1.0], abs=0.15), metric
            if metric not in ("repetition", "distinct2"):
                assert values == pytest.approx([1.0, 1.0]), metric


def test_each_metric_folder_tells_right_from_wrong() -> None:
    folders = [p.name for p in METRICS.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(folders) >= 5
    for name in {"rouge", "bleu", "chrf", "exact_answer"} & set(folders):
        right, wrong = ("answer: 42", "answer: 7") if name == "exact_answer" else (CHINESE, "hello there")
        for result in load_metric(name).compute(predictions=[right, wrong], references=[right, right]).values():
            assert result[0] == pytest.approx(1.0)
            assert result[1] < 0.5


def test_repetition_and_distinct_by_hand() -> None:
    texts = ["a b c d a b c d", "a b c d e", CHINESE]
    assert load_metric("repetition").compute(predictions=texts, references=texts)["repetition"] == pytest.approx(
        [0.2, 0.0, 0.0]
    )
    distinct = load_metric("distinct").compute(predictions=texts, references=texts)["distinct2"]
    assert distinct == pytest.approx([4 / 7, 1.0, 8 / 9])


def test_short_perfect_answers_score_one_in_bleu() -> None:
    assert (
        load_metric("bleu").compute(predictions=["yes", "好"], references=["yes", "好"])["bleu"]
        == [pytest.approx(1.0)] * 2
    )


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(UserError, match="no metric `rogue`; there are"):
        load_metric("rogue")


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
