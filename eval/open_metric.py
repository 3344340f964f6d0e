"""Metrics by name or path: found, opened by `evaluate` without the hub, and asked what is better."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_templates import Template
from sft import UserError

METRICS = Path(__file__).parent / "metrics"


def metric_names() -> list[str]:
    """The metrics that come with the project."""
    return sorted(folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file())


def metric_folder(name: str) -> Path:
    """The folder of a metric. Raises UserError where there is none, or it holds no file of its own name."""
    folder = METRICS / name if name in metric_names() else Path(name)
    if not folder.is_dir():
        near = get_close_matches(name, metric_names(), n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(metric_names())};"
        raise UserError(
            f"no metric `{name}`; {hint} your own is a folder with a .py file of the same name, given by its path"
        )
    if not (folder / f"{folder.resolve().name}.py").is_file():
        raise UserError(f"{folder}: a metric's folder holds a file of its name, {folder.resolve().name}.py")
    return folder


def check_metrics(template: Template) -> None:
    """Raise UserError for a metric of the template that cannot be opened. Those of the project are not opened for it,
    which takes seconds."""
    for name in template.metrics:
        if metric_folder(name).parent != METRICS:
            open_metric(name)


def open_metric(name: str) -> Any:
    """A metric, opened. Raises UserError where it cannot be, or says two things about what is better."""
    import evaluate

    folder = metric_folder(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            metric = evaluate.load(str(folder), keep_in_memory=True)
    except (Exception, SystemExit) as error:  # whatever the code in it raises
        raise UserError(f"{folder}: cannot be opened as a metric: {_said(error)}") from error
    for attribute in ("higher_is_better", "lower_is_better"):
        said = getattr(metric, attribute, True)
        if not isinstance(said, bool) and not (
            isinstance(said, Mapping) and all(isinstance(value, bool) for value in said.values())
        ):
            raise UserError(f"{folder}: `{attribute}` is {said!r}; write True, or a mapping of scores to True or False")
    return metric


def compute(name: str, metric: Any, answers: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
    """What a metric makes of answers. Raises UserError where it fails, or gives something else than numbers: one for
    each row, or one for all."""
    try:
        result = metric.compute(predictions=list(answers), references=list(references))
    except (Exception, SystemExit) as error:
        raise UserError(f"metric `{name}` failed: {_said(error)}; mend it, then `sft score` scores again") from error
    if not isinstance(result, Mapping):
        raise UserError(f"metric `{name}` gives {result!r}; it gives a mapping, score -> numbers")
    found = {str(score): values.tolist() if hasattr(values, "tolist") else values for score, values in result.items()}
    for score, values in found.items():
        listed = values if isinstance(values, list) else [values]
        if isinstance(values, list) and len(values) != len(answers):
            raise UserError(f"metric `{name}`: `{score}` has {len(values)} numbers for {len(answers)} rows")
        if wrong := [v for v in listed if not isinstance(v, int | float) or not math.isfinite(v)]:
            raise UserError(f"metric `{name}`: `{score}` holds {wrong[0]!r}, which is not a finite number")
    return found


def lower_is_better(name: str, metric: Any, score: str) -> bool | None:
    """Whether less of a score is better; None where the metric does not say. Raises UserError where it says both."""
    said = {attribute: getattr(metric, attribute, None) for attribute in ("higher_is_better", "lower_is_better")}
    higher, lower = (value.get(score) if isinstance(value, Mapping) else value for value in said.values())
    if higher is not None and higher is lower:
        raise UserError(f"metric `{name}`: says higher_is_better and lower_is_better {higher} of `{score}`; say one")
    return lower if lower is not None else None if higher is None else not higher


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
