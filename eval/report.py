"""The report: one self-contained report.html of a run, and the same table in the terminal."""

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.drawing import charts_of, mistakes_of, pictures_of
from eval.score import read_predictions
from eval.table import number, score_lines, side_names, table_rows, verdict
from sft import UserError
from sft.files import read_json, write_text
from sft.model.parity import as_lines
from sft.recipe import Recipe, dump
from sft.show import say, table
from sft.tokens.opened import Opened
from sft.train.summary import summary

SAMPLES = 8


def report(recipe: Recipe) -> Path:
    """Write `report.html` from what training and evaluation left in the run folder; print its table and its path."""
    trained = read_json(recipe.folder / "train.json")
    folder = recipe.folder / "eval"
    if not (folder / "scores.json").is_file():
        raise UserError(f"{recipe.folder}: not scored yet; run `sft eval` first")
    scores = read_json(folder / "scores.json")
    names = side_names(scores)
    template, classes = Opened(recipe).template, recipe.task == "classification"
    pictures = [] if classes else pictures_of(folder, template)
    mistakes = mistakes_of(folder, template) if classes else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html.j2").render(
        name=recipe.folder.name,
        train=trained,
        scores=scores,
        verdict=verdict(scores),
        rows=table_rows(scores),
        columns=names | {name: name for name in scores["others"]},
        charts=charts_of(trained["log"]),
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


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Held-out prompts with what base and tuned wrote."""
    tuned = read_predictions(folder / "tuned")
    base = read_predictions(folder / "base") if (folder / "base").is_dir() else [None] * len(tuned)
    return [
        t | {"tuned": t["prediction"], "base": b and b["prediction"], "base_ended": b and b["ended"]}
        for t, b in list(zip(tuned, base, strict=True))[:SAMPLES]
    ]


def _parity(recipe: Recipe) -> dict[str, Any] | None:
    """How far the merged model is from the one that was trained, where there is one."""
    file = recipe.folder / "merged" / "parity.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = read_json(file)
    if "table" not in found:  # of an earlier version
        positions = f"{found['positions']:,} positions of {found['rows']} held-out rows"
        found["table"] = [positions, "merged against trained", "tolerated"], as_lines(found, found["tolerance"])
    return found
