"""The bootstrap: base and tuned model are compared row by row, on the same resamples."""

import json
from pathlib import Path

import numpy as np

from data_templates import Template
from eval.score import score


def test_a_small_gain_on_every_row_is_seen_among_rows_that_differ_much(tmp_path: Path) -> None:
    """Losses of rows lie between 1 and 9, the gain of each at 0.1: seen in pairs, and lost in two averages."""
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 9, 60)
    for side, losses in (("base", base), ("tuned", base - rng.uniform(0.05, 0.15, 60))):
        (tmp_path / side).mkdir()
        (tmp_path / side / "losses.json").write_text(json.dumps([[loss, 0, 1] for loss in losses]))
        (tmp_path / side / "predictions.jsonl").write_text("")
    loss = score(tmp_path, Template(fields={}, prompt=str, completion=str), seed=0)["metrics"]["loss"]
    difference = loss["difference"]
    assert -0.15 < difference["low"] < difference["value"] < difference["high"] < -0.05
    assert loss["base"]["high"] - loss["base"]["low"] > 1, "each average by itself is uncertain"
