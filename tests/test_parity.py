"""Two models compared on the same tokens: what is measured is what it says, and no number passes that is none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sft.model.parity import TOLERANCE, Logits, as_table, differences, past_tolerance, recorded
from sft.tokens.prepare import MASKED

ROWS = [
    {"input_ids": [1, 2, 3, 4, 0], "labels": [MASKED, MASKED, 3, 4, 0]},
    {"input_ids": [4, 3, 2], "labels": [MASKED, 3, 2]},
]


def logits_of(seed: int, noise: float = 0.0) -> Logits:
    """Random logits over five tokens, the same for the same ids, with some noise of their own on top."""

    def logits(ids: list[int]) -> NDArray[np.float32]:
        table = np.random.default_rng(0).normal(size=(5, 5))
        more = np.random.default_rng(seed).normal(size=(len(ids), 5))
        return (table[ids] + noise * more).astype(np.float32)

    return logits


def test_a_model_is_equal_to_itself() -> None:
    parity = differences(ROWS, logits_of(1), logits_of(1))
    assert parity["positions"] == 8
    assert [parity[k] for k in ("largest_logit_difference", "largest_kl", "disagreement", "loss_difference")] == [0] * 4
    assert past_tolerance(parity, TOLERANCE["float32"]) == []


def test_the_figures_are_those_of_pytorch() -> None:
    reference, candidate = logits_of(1), logits_of(2, 1.0)
    parity = differences(ROWS, reference, candidate)
    r, c = (torch.cat([torch.tensor(f(row["input_ids"])) for row in ROWS]).double() for f in (reference, candidate))
    kl = torch.nn.functional.kl_div(c.log_softmax(-1), r.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert parity["mean_kl"] == pytest.approx(kl.mean().item())
    assert parity["largest_kl"] == pytest.approx(kl.max().item())
    assert parity["mean_logit_difference"] == pytest.approx((r - c).abs().mean().item())
    assert parity["largest_logit_difference"] == pytest.approx((r - c).abs().max().item())
    assert parity["disagreement"] == pytest.approx((r.argmax(-1) != c.argmax(-1)).double().mean().item())
    spread = r.var(-1, correction=0).mean().sqrt()
    assert parity["relative_difference"] == pytest.approx(((r - c).square().mean().sqrt() / spread).item())
    targets = torch.tensor([*ROWS[0]["labels"][1:], MASKED, *ROWS[1]["labels"][1:], MASKED])
    assert parity["candidate_loss"] == pytest.approx(torch.nn.functional.cross_entropy(c, targets).item())
    assert len(past_tolerance(parity, TOLERANCE["bfloat16"])) == 2
    assert "largest KL divergence" in as_table(parity, TOLERANCE["bfloat16"])


def test_logits_that_are_no_numbers_are_past_every_tolerance() -> None:
    def broken(ids: list[int]) -> NDArray[np.float32]:
        return np.full((len(ids), 5), np.nan, dtype=np.float32)

    with np.errstate(invalid="ignore"):
        assert len(past_tolerance(differences(ROWS, logits_of(1), broken), TOLERANCE["bfloat16"])) == 2


def test_a_model_of_another_vocabulary_is_an_error() -> None:
    def wider(ids: list[int]) -> NDArray[np.float32]:
        return np.zeros((len(ids), 6), dtype=np.float32)

    with pytest.raises(ValueError, match=r"another shape: \(5, 5\) and \(5, 6\)"):
        differences(ROWS, logits_of(1), wider)


def test_rows_that_are_compared_hold_the_end_of_their_prompt_and_the_beginning_of_their_output() -> None:
    from datasets import Dataset

    from sft.model.parity import rows_to_compare

    rows = [
        {"input_ids": list(range(900)), "labels": [MASKED] * prompt + list(range(prompt, 900)), "prompt_tokens": prompt}
        for prompt in (3, 500, 890)
    ]
    tokens: Any = SimpleNamespace(test=Dataset.from_list(rows))
    for row, part in zip(rows, rows_to_compare(tokens, 3, 100), strict=True):
        seam = row["prompt_tokens"]
        assert len(part["input_ids"]) == len(part["labels"]) == 100
        assert {seam - 1, seam} <= set(part["input_ids"])
        assert [label for label in part["labels"] if label != MASKED] == [i for i in part["input_ids"] if i >= seam]
    assert len(rows_to_compare(tokens, 2, 100)) == 2


def test_recorded_logits_are_those_of_the_model_which_is_not_asked_again(tmp_path: Path) -> None:
    asked: list[Any] = []

    def counted(ids: list[int]) -> NDArray[np.float32]:
        asked.append(ids)
        return logits_of(1)(ids)

    again = recorded(ROWS, counted, tmp_path / "logits")
    assert differences(ROWS, logits_of(1), again)["largest_logit_difference"] == 0
    assert len(asked) == 2
