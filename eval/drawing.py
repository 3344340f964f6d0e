"""What the report draws: curves of training, and texts that are pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_templates import Template
from eval.score import read_predictions


def pictures_of(folder: Path, template: Template) -> list[dict[str, Any]]:
    """What was written and what was held out, as pictures, where the template's texts are such."""
    if template.picture is None:
        return []
    drawn = []
    for line in read_predictions(folder / "tuned"):
        written, held_out = template.picture(line["prediction"]), template.picture(line["reference"])
        drawn.append({"written": _svg(written), "held_out": _svg(held_out)})
    return [pair for pair in drawn if pair["held_out"]]


def mistakes_of(folder: Path, template: Template) -> list[dict[str, Any]]:
    """Held-out pictures whose class the classifier gets wrong."""
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


def charts_of(log: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
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
