"""Scores in words: a sentence on whether tuning helped, and the lines of the table."""

from collections.abc import Sequence
from typing import Any

FEWEST_ROWS = 10
"""Held-out rows below which a bootstrap says little."""

SHOWN_AS = {"loss": "loss on outputs", "ended": "ended by itself"}
"""Names in a report of what is measured here and not by a metric."""


def verdict(scores: dict[str, Any]) -> str:
    """One sentence on whether tuning helped, which says so only where the interval of the difference is clear of 0."""
    loss = scores["metrics"]["loss"]
    if "names" in scores:
        return _verdict_on_classes(scores)
    if "base" not in loss:
        perplexity = scores["metrics"]["perplexity"]
        beside = [
            f"{'the model of eval.scratch' if name == 'scratch' else f'a {name} model'} has "
            f"{number(perplexity[name]['value'])}"
            for name in scores["others"]
            if name in perplexity
        ]
        return (
            f"Trained from scratch: loss {loss['tuned']['value']:.3f} on the outputs of {scores['rows']} held-out rows"
            + (f"; perplexity {number(perplexity['tuned']['value'])}, {', '.join(beside)}." if beside else ".")
        )
    if scores["rows"] < FEWEST_ROWS:
        few = f"{scores['rows']} held-out rows are too few to tell base and tuned model apart"
        return f"{few}; hold out {FEWEST_ROWS} or more."
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


def in_words(scores: dict[str, Any]) -> dict[str, Any]:
    """The same scores with their sentence and their table beside them, for whoever shows them."""
    return scores | {"sentence": verdict(scores), "table": score_lines(scores)}


def _verdict_on_classes(scores: dict[str, Any]) -> str:
    """The same for a classifier and the baseline beside it."""
    accuracy, names = scores["metrics"]["accuracy"], scores["names"]
    difference = accuracy["difference"]
    better = "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else ""
    if scores["rows"] < FEWEST_ROWS:
        return f"{scores['rows']} held-out rows are too few to tell two models apart; hold out {FEWEST_ROWS} or more."
    begins = f"The {names['tuned']} is {better} than" if better else "No difference could be shown to"
    return (
        f"{begins} a {names['base']}: accuracy on {scores['rows']} held-out rows {accuracy['tuned']['value']:.3f} and "
        f"{accuracy['base']['value']:.3f} (difference {_interval(difference)})."
    )


def _interval(value: dict[str, float]) -> str:
    return f"{number(value['value'])}, 95 % interval {number(value['low'])} to {number(value['high'])}"


def number(value: float, sign: str = "") -> str:
    """Some three digits behind the point, or a power of ten for what no table holds; `sign` "+" shows it always."""
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:{sign}.2e}" if abs(value) >= 1e6 else f"{value:{sign}.{digits}f}".replace("-", "−")


def table_rows(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    few = scores["rows"] < FEWEST_ROWS
    return [_row(name, metric, scores["others"], few) for name, metric in scores["metrics"].items()]


def _row(name: str, metric: dict[str, Any], others: Sequence[str], few: bool) -> dict[str, Any]:
    """One line of the table: values, and whether the difference is clear of 0 in the right direction."""
    row = {side: metric.get(side) for side in ("base", "tuned", "difference")}
    row["others"] = [metric.get(side) for side in others]
    row["name"] = metric.get("shown_as") or SHOWN_AS.get(name, name.replace("_", " "))
    row["arrow"] = {True: "↓", False: "↑", None: ""}[metric["lower_is_better"]]
    row["verdict"] = "" if few or not row["difference"] else _direction(metric)
    return row


def _direction(metric: dict[str, Any]) -> str:
    """Whether the difference of a metric is `better` or `worse`, by the whole of its interval; `changed` where the
    metric does not say which; empty where the interval holds 0."""
    low, high = metric["difference"]["low"], metric["difference"]["high"]
    if low <= 0 <= high:
        return ""
    if metric["lower_is_better"] is None:
        return "changed"
    return "better" if (high < 0) == metric["lower_is_better"] else "worse"


def score_lines(scores: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table of scores, as text."""
    names = side_names(scores)
    if "base" not in scores["metrics"]["loss"]:
        header = ["", names["tuned"], "95 % interval", *scores["others"]]
    else:
        header = ["", names["base"], names["tuned"], *scores["others"], "difference", "95 % interval", ""]
    lines = []
    for row in table_rows(scores):
        others = ["" if other is None else number(other["value"]) for other in row["others"]]
        if row["base"] is None:
            tuned = row["tuned"]
            between = f"{number(tuned['low'])} to {number(tuned['high'])}"
            lines.append([row["name"], number(tuned["value"]), between, *others])
            continue
        d = row["difference"]
        lines.append(
            [
                row["name"],
                number(row["base"]["value"]),
                number(row["tuned"]["value"]),
                *others,
                number(d["value"]),
                f"{number(d['low'])} to {number(d['high'])}",
                row["verdict"] or "not clear",
            ]
        )
    return header, lines


def side_names(scores: dict[str, Any]) -> dict[str, str]:
    """What the two sides that are compared are called."""
    trained = "tuned" if "base" in scores["metrics"]["loss"] else "trained"
    return {"base": "base", "tuned": trained} | scores.get("names", {})
