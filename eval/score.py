"""Predictions to scores: metrics through `evaluate`, each difference with a paired bootstrap interval. Needs no GPU."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import data_templates
from data_templates import Template
from eval.open_metric import compute, lower_is_better, open_metric, said
from eval.table import in_words
from sft import UserError, bootstrap
from sft.bootstrap import (
    Floats,
    Mean,
    by_standard_error,
    drawn,
    mean_of,
    percentiles,
    perplexity_of,
    ratio_of,
    with_intervals,
)
from sft.files import read_json, write_json
from sft.recipe.fields import shown
from sft.rows.watch import Files, Watch, content_of, unchanged
from sft.show import say
from sft.tokens.opened import Opened

LOWER_IS_BETTER = {"loss": True, "perplexity": True, "bits_per_byte": True, "token_accuracy": False, "ended": False}
"""What is measured here and not by a metric."""
OVER_ALL = {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
"""Scores over all held-out rows; the others are over those that were generated from."""
PREDICTIONS, SCORES, SCORED = "predictions.jsonl", "scores.json", "scored.json"
CORPUS_RESAMPLES = 100
"""Resamples of a score that has to be computed from all rows each time: 64 rows of 60 words take corpus_bleu 15 ms."""

CODE = {
    "eval": Path(__file__).parent,
    "data_templates": Path(data_templates.__file__).parent,
    "sft/bootstrap.py": Path(bootstrap.__file__),
}
"""The project's code that scores are made by: folders, and a file."""

Scores = dict[str, Any]


def scored(opened: Opened, folder: Path, compute_scores: Callable[[], Scores]) -> Path:
    """Write the scores of a folder of predictions, unless they are there and follow from the same predictions and from
    code that is as it was. Returns the folder.

    What is read while they are computed is noted: the template, the metrics, and the files that these read.
    """
    made_of = {
        "predictions": read_json(folder / "files.json")["sha256"],
        "metrics": list(opened.template.metrics),
        "eval": opened.recipe.eval.model_dump(),
        "template": dict(opened.loaded.at_load),
        "code": _code(),
    }
    if (changes := _changes(opened, folder, made_of)) is not None:
        watch = Watch()
        with watch.on():
            scores = in_words(compute_scores())
        files = {**watch.files(opened.loaded.home), **opened.loaded.when_called()}
        (folder / SCORED).unlink(missing_ok=True)  # never beside scores that it does not describe
        write_json(folder / SCORES, scores)
        write_json(folder / SCORED, made_of | {"files": _users(files, opened.loaded.home, folder)})
        say(f"{folder}: scored{changes}")
    else:
        say(f"{folder}: up to date")
    return folder


def score(folder: Path, template: Template, seed: int, others: Sequence[str] = ()) -> Scores:
    """Score the predictions under `folder/base` (if there is one), `folder/tuned`, and the folders of other models.

    Returns `metrics`: for each name its mean and 95 % interval for base, tuned and their difference, tuned minus base,
    and for the others; rows are resampled together for all. `rows` and `generated` are the sample sizes. Means over
    tokens are left out for a model whose tokens are others; where there is `bytes.json`, the length of each output,
    bits per byte compare them.
    """
    sides = [side for side in ("base", "tuned", *others) if (folder / side).is_dir()]
    losses = {side: _losses(folder / side) for side in sides}
    predictions = {side: read_predictions(folder / side) for side in sides if (folder / side / PREDICTIONS).is_file()}
    rows, generated = len(losses["tuned"].loss), len(predictions["tuned"])

    alike = {side: v for side, v in losses.items() if np.array_equal(v.tokens, losses["tuned"].tokens)}
    means: dict[str, dict[str, Mean]] = {
        "loss": {side: ratio_of(v.loss, v.tokens) for side, v in alike.items()},
        "perplexity": {side: ratio_of(v.loss, v.tokens, perplexity_of) for side, v in alike.items()},
        "token_accuracy": {side: ratio_of(v.correct, v.tokens) for side, v in alike.items()},
    }
    if (folder / "bytes.json").is_file():
        bits = np.array(read_json(folder / "bytes.json"), dtype=np.float64) * np.log(2)
        means["bits_per_byte"] = {side: ratio_of(v.loss, bits) for side, v in losses.items() if side in predictions}
    if generated and template.metrics:
        means["ended"] = {side: mean_of([float(p["ended"]) for p in written]) for side, written in predictions.items()}
    metrics: dict[str, Any] = {}
    for name, by_side in means.items():
        some = drawn(rows if name in OVER_ALL else generated, seed)
        metrics[name] = with_intervals(by_side, some) | {"lower_is_better": LOWER_IS_BETTER[name]}
    for name in template.metrics if generated else ():
        found = _by_metric(name, template, predictions, drawn(generated, seed))
        if taken := found.keys() & {*LOWER_IS_BETTER, *metrics}:
            ours = "is measured without a metric" if min(taken) in LOWER_IS_BETTER else "another metric gives too"
            raise UserError(f"metric `{name}`: gives `{min(taken)}`, which {ours}; give its score another name")
        metrics |= found
    return {"metrics": metrics, "rows": rows, "generated": generated, "others": [s for s in others if s in sides]}


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The predictions of one side, in the order of the held-out rows."""
    file = folder / PREDICTIONS
    try:
        return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: missing or damaged ({error}); run `sft eval` again") from error


class _Losses(NamedTuple):
    """What `sft.model.loss.RowLoss` says of each row, in columns."""

    loss: Floats
    correct: Floats
    tokens: Floats


def _losses(folder: Path) -> _Losses:
    """The losses of one side."""
    return _Losses(*np.array(read_json(folder / "losses.json"), dtype=np.float64).reshape(-1, 3).T)


def _by_metric(
    name: str, template: Template, predictions: dict[str, list[dict[str, Any]]], rows: NDArray[np.intp]
) -> dict[str, Any]:
    """The scores of one metric, in the shape of `score`."""
    metric = open_metric(name)
    whole = getattr(metric, "corpus", False)
    means: dict[str, dict[str, Mean]] = {}
    for side, written in predictions.items():
        answers, references = ([_answer(template, p[key]) for p in written] for key in ("prediction", "reference"))
        found = _of_corpus(name, metric, answers, references) if whole else by_row(name, metric, answers, references)
        _check_alike(name, means or found, found)
        for score_name, mean in found.items():
            means.setdefault(score_name, {})[side] = mean
    rows, interval = (rows[:CORPUS_RESAMPLES], by_standard_error) if whole else (rows, percentiles)
    names = getattr(metric, "shown_as", {})
    return {
        score_name: {
            **with_intervals(by_side, rows, interval),
            "lower_is_better": lower_is_better(metric, score_name),
            "shown_as": names.get(score_name),
            "resamples": len(rows),
        }
        for score_name, by_side in means.items()
    }


def _answer(template: Template, text: str) -> Any:
    """What the metrics see of a text."""
    try:
        return template.answer(text)
    except Exception as error:
        raise UserError(
            f"the template's `answer` fails on {shown(text)}: {said(error)}; it must take any text: mend it, then "
            "`sft score` scores again"
        ) from error


def _check_alike(name: str, before: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise UserError where a metric gives other scores than it gave before."""
    if different := before.keys() ^ found.keys():
        raise UserError(
            f"metric `{name}`: gives `{min(different)}` for some rows only; it must give the same scores for any rows"
        )


def by_row(name: str, metric: Any, answers: Sequence[Any], references: Sequence[Any]) -> dict[str, Mean]:
    """Each score of a metric as the mean of what it gives each row. One that gives one number is asked row by row."""
    result = compute(name, metric, answers, references)
    if all(isinstance(values, list) for values in result.values()):
        return {key: mean_of(values) for key, values in result.items() if isinstance(values, list)}
    rows = [compute(name, metric, [a], [r]) for a, r in zip(answers, references, strict=True)]
    for row in rows:
        _check_alike(name, result, row)
    return {key: mean_of([float(np.squeeze(row[key])) for row in rows]) for key in result}


def _of_corpus(name: str, metric: Any, answers: Sequence[Any], references: Sequence[Any]) -> dict[str, Mean]:
    """Each score of a metric that is computed from all rows at once: on each resample of rows, once for all scores."""
    everything = compute(name, metric, answers, references)
    if by_rows := [key for key, value in everything.items() if isinstance(value, list)]:
        raise UserError(f"metric `{name}` says corpus = True and gives `{by_rows[0]}` for each row; say one of the two")
    kept = {np.arange(len(answers)).tobytes(): everything}

    def of(index: NDArray[np.intp], key: str) -> float:
        if (rows := index.tobytes()) not in kept:
            kept[rows] = compute(name, metric, [answers[i] for i in index], [references[i] for i in index])
            _check_alike(name, everything, kept[rows])
        return float(np.squeeze(kept[rows][key]))

    def mean(key: str) -> Mean:
        return lambda indices: np.array([of(index, key) for index in indices])

    return {key: mean(key) for key in everything}


def _changes(opened: Opened, folder: Path, made_of: dict[str, Any]) -> str | None:
    """What is new since the scores in a folder were made, as the end of a sentence; None where nothing is."""
    if not (folder / SCORES).is_file() or not (folder / SCORED).is_file():
        return ""
    before = read_json(folder / SCORED)
    earlier = before.keys() != {*made_of, "files"}  # written by an earlier version
    if earlier or before["predictions"] != made_of["predictions"]:
        return ""
    home = opened.loaded.home
    files = [name for name, held in before["files"].items() if not unchanged({name: held}, home)]
    for part in ("template", "code"):
        files += [name for name, held in made_of[part].items() if before[part].get(name) != held]
    if files:
        return f" again: {', '.join(dict.fromkeys(files[:3]))} changed"
    return None if {**before, "files": 0} == {**json.loads(json.dumps(made_of)), "files": 0} else " again"


def _users(files: Files, home: Path, folder: Path) -> Files:
    """The files that were read without those that are known otherwise: the predictions, the project's code, and the
    copies that `evaluate` makes of metrics."""
    import evaluate

    known = [place.resolve() for place in (folder, *CODE.values(), Path(evaluate.config.HF_MODULES_CACHE))]
    return {
        name: held
        for name, held in files.items()
        if not any((home / name).resolve().is_relative_to(place) for place in known)
    }


def _code() -> dict[str, str | None]:
    """The code that makes scores, file by file: this folder, the project's metrics in it, the templates, intervals."""
    return {
        str(Path(name) / file.relative_to(place)): content_of(file)
        for name, place in CODE.items()
        for file in (place, *sorted(place.rglob("*")))
        if file.is_file() and "__pycache__" not in file.parts
    }
