"""Predictions to scores: metrics through `evaluate`, each difference with a paired bootstrap interval. Needs no GPU."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_templates import Template
from sft import UserError

METRICS = Path(__file__).parent / "metrics"
LOWER_IS_BETTER = {"loss", "perplexity", "repetition", "bits_per_byte"}
OVER_ALL = {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
"""Metrics over all held-out rows; the others are over those that were generated from."""
PREDICTIONS = "predictions.jsonl"
RESAMPLES = 2000

Floats = NDArray[np.float64]
Mean = Callable[[NDArray[np.intp]], Floats]
"""Row numbers [resamples, rows] -> the mean of each resample."""


def score(folder: Path, template: Template, seed: int, others: Sequence[str] = ()) -> dict[str, Any]:
    """Score the predictions under `folder/base` (if there is one), `folder/tuned`, and the folders of other models.

    Returns `metrics`: for each name its mean and 95 % interval for base, tuned and their difference, tuned minus base,
    and for the others; rows are resampled together for all, with replacement (Efron, 1979). `rows` and `generated` are
    the sample sizes. Means over tokens are left out for a model whose tokens are others; where there is `bytes.json`,
    the length of each output, bits per byte compare them.
    """
    sides = [side for side in ("base", "tuned", *others) if (folder / side).is_dir()]
    losses = {
        side: np.array(json.loads((folder / side / "losses.json").read_text()), dtype=np.float64) for side in sides
    }
    predictions = {side: read_predictions(folder / side) for side in sides if (folder / side / PREDICTIONS).is_file()}
    rows, generated = len(losses["tuned"]), len(predictions["tuned"])

    alike = {side: v for side, v in losses.items() if np.array_equal(v[:, 2], losses["tuned"][:, 2])}
    means: dict[str, dict[str, Mean]] = {
        "loss": {side: _ratio(v[:, 0], v[:, 2]) for side, v in alike.items()},
        "perplexity": {side: _ratio(v[:, 0], v[:, 2], _exp) for side, v in alike.items()},
        "token_accuracy": {side: _ratio(v[:, 1], v[:, 2]) for side, v in alike.items()},
    }
    if (folder / "bytes.json").is_file():
        lengths = np.array(json.loads((folder / "bytes.json").read_text()), dtype=np.float64) * np.log(2)
        means["bits_per_byte"] = {side: _ratio(v[:, 0], lengths) for side, v in losses.items() if side in predictions}
    if generated and template.metrics:
        means["ended"] = {side: mean_of([float(p["ended"]) for p in written]) for side, written in predictions.items()}
        per_row = {side: row_scores(template, written) for side, written in predictions.items()}
        for name in per_row["tuned"]:
            means[name] = {side: mean_of(values[name]) for side, values in per_row.items()}
    resampler = np.random.default_rng(seed)
    drawn = {size: resampler.integers(0, size, (RESAMPLES, size)) for size in {rows, generated} if size}
    metrics = {}
    for name, by_side in means.items():
        size = rows if name in OVER_ALL else generated
        metrics[name] = with_intervals(by_side, drawn[size]) | {"lower_is_better": name in LOWER_IS_BETTER}
    return {"metrics": metrics, "rows": rows, "generated": generated, "others": [s for s in others if s in sides]}


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The predictions of one side, in the order of the held-out rows."""
    file = folder / PREDICTIONS
    try:
        return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: missing or damaged ({error}); run `sft eval` again") from error


def row_scores(template: Template, predictions: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric of the template, per row. A metric that gives one number is computed row by row."""
    answers = [template.answer(p["prediction"]) for p in predictions]
    references = [template.answer(p["reference"]) for p in predictions]
    scores: dict[str, list[float]] = {}
    for name in template.metrics:
        metric = load_metric(name)
        result = metric.compute(predictions=answers, references=references)
        if not all(isinstance(values, list) and len(values) == len(answers) for values in result.values()):
            rows = [metric.compute(predictions=[a], references=[r]) for a, r in zip(answers, references, strict=True)]
            result = {key: [float(row[key]) for row in rows] for key in result}
        scores |= result
    return scores


def load_metric(name: str) -> Any:
    """A metric folder, opened by `evaluate.load` without the hub. Raises UserError where there is none."""
    import evaluate

    folder = Path(name) if Path(name).is_dir() else METRICS / name
    if not folder.is_dir():
        raise UserError(
            f"no metric `{name}`; there are {', '.join(sorted(p.name for p in METRICS.iterdir()))}; "
            "your own is a folder with a .py file of the same name, given by its path"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate.load(str(folder), keep_in_memory=True)


def _exp(loss: Floats) -> Floats:
    """Perplexity, bounded where a model is so wrong that it would leave the range of numbers."""
    return np.exp(np.minimum(loss, 700.0))


def mean_of(values: list[float]) -> Mean:
    array = np.array(values, dtype=np.float64)
    return lambda index: array[index].mean(-1)


def _ratio(numerator: Floats, denominator: Floats, then: Callable[[Floats], Floats] = lambda x: x) -> Mean:
    """A mean over tokens, of which rows have different numbers."""
    return lambda index: then(numerator[index].sum(-1) / denominator[index].sum(-1))


def with_intervals(by_side: dict[str, Mean], drawn: NDArray[np.intp]) -> dict[str, Any]:
    everything = np.arange(drawn.shape[1])[None]
    values = {side: (float(mean(everything)[0]), mean(drawn)) for side, mean in by_side.items()}
    if "base" in values:
        (base, bases), (tuned, tuneds) = values["base"], values["tuned"]
        values["difference"] = (tuned - base, tuneds - bases)
    result = {}
    for side, (value, resampled) in values.items():
        low, high = (float(x) for x in np.quantile(resampled, [0.025, 0.975]))
        result[side] = {"value": value, "low": low, "high": high}
    return result
