"""Metrics by name or path: found, opened by `evaluate` without the hub, and asked what is better."""

import contextlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from data_templates import Template
from sft import UserError

METRICS = Path(__file__).parent / "metrics"
DIRECTIONS = {"lower_is_better": True, "higher_is_better": False}
"""The attributes by which a metric says what is better -> whether less is, where it says True."""


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
    if isinstance(template.metrics, str):
        raise UserError(f"the template's `metrics` is the text {template.metrics!r}; write ({template.metrics!r},)")
    for name in template.metrics:
        if metric_folder(name).parent != METRICS:
            open_metric(name)


def open_metric(name: str) -> Any:
    """A metric, opened, its files read as they are now. Raises UserError where it cannot be, or where what it says of
    itself cannot be understood."""
    import evaluate

    folder = metric_folder(name)
    for module in [module for module in sys.modules if module.startswith("evaluate_modules.")]:
        del sys.modules[module]  # else a file that is read while the module loads would be read once a process
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            metric = evaluate.load(str(folder), keep_in_memory=True)
    except (Exception, SystemExit) as error:  # whatever the code in it raises
        raise UserError(f"{folder}: cannot be opened as a metric: {said(error)}") from error
    _check_attributes(folder, metric)
    return metric


def _check_attributes(folder: Path, metric: Any) -> None:
    """Raise UserError where a metric says what is better in two ways or in no way, or misnames its scores."""
    directions = [attribute for attribute in DIRECTIONS if hasattr(metric, attribute)]
    if len(directions) > 1:
        raise UserError(f"{folder}: sets both {' and '.join(directions)}; keep the one that is meant")
    for attribute in directions:
        value = getattr(metric, attribute)
        if not isinstance(value, bool) and not _maps_to(value, bool):
            raise UserError(
                f"{folder}: `{attribute}` is {value!r}; write True, or a mapping of scores to True or False"
            )
    if not isinstance(corpus := getattr(metric, "corpus", False), bool):
        raise UserError(f"{folder}: `corpus` is {corpus!r}; write True or False")
    if not _maps_to(shown_as := getattr(metric, "shown_as", {}), str):
        raise UserError(f"{folder}: `shown_as` is {shown_as!r}; write a mapping of scores to their names in a report")


def _maps_to(value: Any, kind: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(entry, kind) for entry in value.values())


def compute(
    name: str, metric: Any, answers: Sequence[Any], references: Sequence[Any]
) -> dict[str, float | list[float]]:
    """What a metric makes of answers. Raises UserError where it fails, or gives something else than numbers: one for
    each row, or one for all."""
    try:
        result = metric.compute(predictions=list(answers), references=list(references))
    except (Exception, SystemExit) as error:
        raise UserError(f"metric `{name}` failed: {said(error)}; mend it, then `sft score` scores again") from error
    if not isinstance(result, Mapping) or not result:
        raise UserError(f"metric `{name}` gives {result!r}; it gives a mapping, score -> numbers")
    return {
        str(score): _numbers(f"metric `{name}`: `{score}`", values, len(answers)) for score, values in result.items()
    }


def _numbers(whose: str, values: Any, rows: int) -> float | list[float]:
    """One score as Python's numbers, whichever library's they are."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    listed = list(values) if isinstance(values, list | tuple) else [values]
    if isinstance(values, list | tuple) and len(listed) != rows:
        raise UserError(f"{whose} has {len(listed)} numbers for {rows} rows")
    if wrong := [value for value in listed if not isinstance(value, Real | np.bool_) or not math.isfinite(value)]:
        raise UserError(f"{whose} holds {wrong[0]!r}, which is not a finite number")
    return [float(value) for value in listed] if isinstance(values, list | tuple) else float(values)


def lower_is_better(metric: Any, score: str) -> bool | None:
    """Whether less of a score is better; None where the metric does not say."""
    for attribute, when in DIRECTIONS.items():
        value = getattr(metric, attribute, None)
        if (value := value.get(score) if isinstance(value, Mapping) else value) is not None:
            return bool(value) is when
    return None


def said(error: BaseException) -> str:
    """An exception of a user's code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
