"""The report: one self-contained report.html of a run, and the same table in the terminal."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_templates import Template
from eval.score import read_predictions
from sft import UserError
from sft.files import read_json, write_text
from sft.parity import as_lines
from sft.recipe import Recipe, dump
from sft.show import say, table
from sft.template import load_template

SAMPLES = 8
FEW = 10
"""Held-out rows below which a bootstrap says little."""
PROMPTS = {"chat": "through the chat template", "plain": "as plain text"}
PLAIN = {
    "loss": "loss on outputs",
    "token_accuracy": "token accuracy",
    "ended": "ended by itself",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "distinct2": "distinct-2",
    "bits_per_byte": "bits per byte",
    "f1": "F1, mean of the classes",
}


def report(recipe: Recipe) -> Path:
    """Write `report.html` from what training and evaluation left in the run folder; print its table and its path."""
    trained = read_json(recipe.folder / "train.json")
    folder = recipe.folder / "eval"
    if not (folder / "scores.json").is_file():
        raise UserError(f"{recipe.folder}: not scored yet; run `sft eval` first")
    scores = read_json(folder / "scores.json")
    names = _names(scores)
    template, classes = load_template(recipe), recipe.task == "classification"
    pictures = [] if classes else _pictures(folder, template)
    mistakes = _mistakes(folder, template) if classes else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    page = environment.get_template("report.html.j2").render(
        name=recipe.folder.name,
        train=trained,
        scores=scores,
        verdict=verdict(scores),
        rows=_rows(scores),
        columns=names | {name: name for name in scores["others"]},
        charts=_charts(trained["log"]),
        pictures=pictures,
        mistakes=mistakes,
        samples=[] if pictures or mistakes else _samples(folder),
        facts=summary(recipe, trained, scores),
        parity=_parity(recipe),
        recipe_text=dump(recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    path = recipe.folder / "report.html"
    write_text(path, page)
    print(table(*score_lines(scores)))
    print(verdict(scores))
    say(f"report: {path}")
    return path


def verdict(scores: dict[str, Any]) -> str:
    """One sentence on whether tuning helped, which says so only where the interval of the difference is clear of 0."""
    loss = scores["metrics"]["loss"]
    if "accuracy" in scores["metrics"]:
        return _verdict_on_classes(scores)
    if "base" not in loss:
        perplexity = scores["metrics"]["perplexity"]
        beside = [
            f"{'the model of eval.scratch' if name == 'scratch' else f'a {name} model'} has "
            f"{_number(perplexity[name]['value'])}"
            for name in scores["others"]
            if name in perplexity
        ]
        return (
            f"Trained from scratch: loss {loss['tuned']['value']:.3f} on the outputs of {scores['rows']} held-out rows"
            + (f"; perplexity {_number(perplexity['tuned']['value'])}, {', '.join(beside)}." if beside else ".")
        )
    if scores["rows"] < FEW:
        return f"{scores['rows']} held-out rows are too few to tell base and tuned model apart; hold out {FEW} or more."
    difference = loss["difference"]
    change = (
        f"loss on {scores['rows']} held-out rows {loss['base']['value']:.3f} → {loss['tuned']['value']:.3f} "
        f"(difference {_interval(difference)})"
    )
    if difference["high"] < 0:
        return f"The tuned model is better than its base: {change}."
    if difference["low"] > 0:
        return f"The tuned model is worse than its base: {change}."
    return f"No difference between tuned model and base could be shown: {change}."


def _verdict_on_classes(scores: dict[str, Any]) -> str:
    """The same for a classifier and the baseline beside it."""
    accuracy, names = scores["metrics"]["accuracy"], scores["names"]
    difference = accuracy["difference"]
    better = "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else ""
    if scores["rows"] < FEW:
        return f"{scores['rows']} held-out rows are too few to tell two models apart; hold out {FEW} or more."
    told = f"The {names['tuned']} is {better} than" if better else "No difference could be shown to"
    return (
        f"{told} a {names['base']}: accuracy on {scores['rows']} held-out rows {accuracy['tuned']['value']:.3f} and "
        f"{accuracy['base']['value']:.3f} (difference {_interval(difference)})."
    )


def _interval(value: dict[str, float]) -> str:
    return f"{_number(value['value'])}, 95 % interval {_number(value['low'])} to {_number(value['high'])}"


def _number(value: float, sign: str = "") -> str:
    """Some three digits behind the point, or a power of ten for what no table holds; `sign` "+" shows it always."""
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:{sign}.2e}" if abs(value) >= 1e6 else f"{value:{sign}.{digits}f}".replace("-", "−")


def _rows(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    few = scores["rows"] < FEW
    return [_row(name, metric, scores["others"], few) for name, metric in scores["metrics"].items()]


def _row(name: str, metric: dict[str, Any], others: Sequence[str], few: bool) -> dict[str, Any]:
    """One line of the table: values, and whether the difference is clear of 0 in the right direction."""
    row = {side: metric.get(side) for side in ("base", "tuned", "difference")}
    row["others"] = [metric.get(side) for side in others]
    row |= {"name": PLAIN.get(name, name.replace("_", " ")), "verdict": ""}
    row["better"] = "lower" if metric["lower_is_better"] else "higher"
    if row["difference"]:
        ends = [row["difference"]["low"], row["difference"]["high"]]
        worse, better = (min(ends) > 0, max(ends) < 0) if metric["lower_is_better"] else (max(ends) < 0, min(ends) > 0)
        row["verdict"] = "" if few else "good" if better else "bad" if worse else ""
    return row


def score_lines(scores: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table of scores, as text."""
    names = _names(scores)
    if "base" not in scores["metrics"]["loss"]:
        header = ["", names["tuned"], "95 % interval", *scores["others"]]
    else:
        header = ["", names["base"], names["tuned"], *scores["others"], "difference", "95 % interval", ""]
    marks = {"good": "better", "bad": "worse", "": "not clear"}
    lines = []
    for row in _rows(scores):
        others = ["" if other is None else _number(other["value"]) for other in row["others"]]
        if row["base"] is None:
            tuned = row["tuned"]
            between = f"{_number(tuned['low'])} to {_number(tuned['high'])}"
            lines.append([row["name"], _number(tuned["value"]), between, *others])
            continue
        d = row["difference"]
        lines.append(
            [
                row["name"],
                _number(row["base"]["value"]),
                _number(row["tuned"]["value"]),
                *others,
                _number(d["value"]),
                f"{_number(d['low'])} to {_number(d['high'])}",
                marks[row["verdict"]],
            ]
        )
    return header, lines


def _names(scores: dict[str, Any]) -> dict[str, str]:
    """What the two sides that are compared are called."""
    trained = "tuned" if "base" in scores["metrics"]["loss"] else "trained"
    return {"base": "base", "tuned": trained} | scores.get("names", {})


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Held-out prompts with what base and tuned wrote."""
    tuned = read_predictions(folder / "tuned")
    base = read_predictions(folder / "base") if (folder / "base").is_dir() else [None] * len(tuned)
    return [
        t | {"tuned": t["prediction"], "base": b and b["prediction"], "base_ended": b and b["ended"]}
        for t, b in list(zip(tuned, base, strict=True))[:SAMPLES]
    ]


def summary(recipe: Recipe, trained: dict[str, Any], scores: dict[str, Any]) -> list[tuple[str, str]]:
    """What was trained on what, in lines of name and value."""
    method = {"none": "LoRA", "4bit": "QLoRA, 4 bit", "8bit": "LoRA on 8 bit"}[recipe.quantization]
    if recipe.lora is None:
        method = "from scratch" if isinstance(recipe.model, dict) else "all weights"
    else:
        kinds = [kind for kind, key in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if recipe.lora.get(key)]
        method = method.replace("LoRA", kinds[0], 1) if kinds and "QLoRA" not in method else method
        method += f", r = {recipe.lora.get('r', 8)}"
    train, test = trained["counts"]["train"], trained["counts"]["test"]
    return [
        ("Model", _short(recipe.model) if isinstance(recipe.model, str) else f"a new {recipe.model['model_type']}"),
        ("Method", f"{method}; {trained['trainable_parameters']:,} of {trained['parameters']:,} parameters trained"),
        (
            "Template",
            f"{_short(recipe.template)}; prompt {PROMPTS[trained['prompt_format']]}",
        ),
        (
            "Training data",
            f"{_short(recipe.data.train)}: {train['rows']:,} rows, {train['tokens']:,} tokens, "
            f"{train['supervised'] / max(train['tokens'], 1):.0%} of them learned",
        ),
        (
            "Held out",
            f"{test['rows']:,} rows, {test['tokens']:,} tokens; predictions for {scores['generated']:,} of them",
        ),
        (
            "Left out",
            f"training: {train['trimmed']:,} prompts trimmed, {train['dropped']:,} rows too long, "
            f"{train['repeated']:,} held out already; held out: {test['trimmed']:,} prompts trimmed, "
            f"{test['dropped']:,} rows too long",
        ),
        (
            "Training",
            (f"from step {trained['since']:,}, where it was interrupted, to " if trained["since"] else "")
            + f"{trained['steps']:,} steps, {trained['epochs']:.2f} epochs, {_duration(trained['seconds'])} on "
            f"{trained['device']}, {trained['processes']} process{'es' if trained['processes'] > 1 else ''}, "
            f"{trained['tokens_seen'] / max(trained['seconds'], 1e-9):,.0f} tokens a second",
        ),
        (
            "Kept",
            "the weights of the last step"
            if trained["best_step"] is None
            else f"the weights of step {trained['best_step']:,}, chosen by the held-out rows, whose scores are thus a "
            "little better than those of rows that nothing was chosen by"
            + ("; final_model/ has those of the last step" if recipe.lora is None else ""),
        ),
        *_beside(recipe, scores.get("others", ())),
        (
            "Peak memory",
            f"{trained['peak_memory_bytes'] / 2**30:.2f} GiB"
            + (f", predicted {predicted / 2**30:.2f} GiB" if (predicted := trained["predicted_memory_bytes"]) else ""),
        ),
        ("Versions", ", ".join(f"{name} {number}" for name, number in trained["versions"].items())),
    ]


def _beside(recipe: Recipe, others: Sequence[str]) -> list[tuple[str, str]]:
    """What the further columns are."""
    counted = [name for name in others if name != "scratch"]
    found = [f"{' and '.join(counted)}: counts of the training rows' tokens"] if counted else []
    if "scratch" in others:
        found.insert(0, f"scratch: {_short(str(recipe.eval.scratch))}, trained from nothing on the same rows")
    return [("Other columns", "; ".join(found))] if found else []


def _parity(recipe: Recipe) -> dict[str, Any] | None:
    """How far the merged model is from the one that was trained, where there is one."""
    file = recipe.folder / "merged" / "parity.json"
    if not file.is_file():
        return None
    found = read_json(file)
    return found | {"lines": as_lines(found, found["tolerance"])}


def _short(name: str) -> str:
    """A path as seen from here, or by its last two parts where it lies elsewhere; a hub id as it is."""
    path = Path(name)
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(Path(*path.parts[-2:]))


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _pictures(folder: Path, template: Template) -> list[dict[str, Any]]:
    """What was written and what was held out, as pictures, where the template's texts are such."""
    if template.picture is None:
        return []
    drawn = []
    for line in read_predictions(folder / "tuned"):
        written, held_out = template.picture(line["prediction"]), template.picture(line["reference"])
        drawn.append({"written": _svg(written), "held_out": _svg(held_out)})
    return [pair for pair in drawn if pair["held_out"]]


def _mistakes(folder: Path, template: Template) -> list[dict[str, Any]]:
    """Held-out pictures that the classifier tells wrongly."""
    if template.picture is None:
        return []
    wrong = [line for line in read_predictions(folder / "tuned") if line["prediction"] != line["reference"]]
    drawn = [line | {"picture": _svg(template.picture(line["prompt"]))} for line in wrong]
    return [line for line in drawn if line["picture"]]


def _svg(picture: Sequence[Sequence[float]] | None) -> dict[str, Any] | None:
    """Width, height and inked cells of a picture: column, line and how dark it is."""
    if not picture:
        return None
    cells = [(x, y, value) for y, line in enumerate(picture) for x, value in enumerate(line) if value > 0]
    return {"width": max(map(len, picture)), "height": len(picture), "cells": cells}


CHARTS = {"loss": "loss", "perplexity": "perplexity", "token_accuracy": "token accuracy", "accuracy": "accuracy"}
"""What training logs of the held-out rows -> its name in the report."""


def _charts(log: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """The loss over steps, and over epochs whatever else was measured at least twice on held-out rows."""
    charts = []
    for name, words in CHARTS.items():
        time, training = ("step", "loss") if name == "loss" else ("epoch", f"seen_{name}")
        lines = {"training": [(e[time], e[training]) for e in log if training in e]}
        lines["held out"] = [(e[time], e[f"eval_{name}"]) for e in log if f"eval_{name}" in e]
        if len(lines["training" if name == "loss" else "held out"]) > 1:
            charts.append(_chart(f"{words}, by {time}", lines))
    return charts


def _chart(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Points of an SVG of 640 x 220, with a few round ticks."""
    points = [point for line in lines.values() for point in line]
    last = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = (high - low or 1.0) * 0.06
    low, high = max(low - margin, 0.0), high + margin  # nothing that is drawn is below 0
    digits = max(2, math.ceil(-math.log10((high - low) / 4)))  # as many as tell two ticks apart

    def place(x: float, y: float) -> tuple[float, float]:
        return round(48 + 580 * x / last, 1), round(10 + 180 * (high - y) / (high - low), 1)

    return {
        "name": name,
        "lines": {side: [place(x, y) for x, y in line] for side, line in lines.items() if line},
        "y": [(place(0, y)[1], f"{y:.{digits}f}") for y in (low + (high - low) * i / 4 for i in range(5))],
        "x": [(place(x, low)[0], f"{x:,}") for x in sorted({round(last * i / 4) for i in range(5)})],
    }  # fmt: skip
