"""Checkpoints: a run goes on from the newest that is whole, and from no other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft import UserError
from sft.train.checkpoints import MarkWhole, last_whole_checkpoint


def save(folder: Path, step: int, processes: int = 1, weight: float = 1.0) -> Path:
    """A checkpoint, marked as the trainer has it marked."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "rng").mkdir(parents=True)
    (checkpoint / "weights").write_text("weights")
    (checkpoint / "rng" / "state").write_text("state")
    args: Any = SimpleNamespace(output_dir=str(folder), world_size=processes)
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = weight
    MarkWhole().on_save(args, state, None, model=model)
    return checkpoint


def test_a_run_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path, 1) is None
    for step in (8, 9, 10):  # as texts, 9 comes after 10
        newest = save(tmp_path, step)
    assert last_whole_checkpoint(tmp_path, 1) == str(newest)


@pytest.mark.parametrize("file", ["weights", "rng/state"])
def test_a_checkpoint_that_lost_a_file_or_a_byte_is_passed_over(tmp_path: Path, file: str) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    (newest / file).write_text("s")
    assert last_whole_checkpoint(tmp_path, 1) == str(older)
    (older / file).unlink()
    assert last_whole_checkpoint(tmp_path, 1) is None


def test_a_checkpoint_that_was_never_marked_is_passed_over(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    (save(tmp_path, 2) / "whole.json").unlink()
    assert last_whole_checkpoint(tmp_path, 1) == str(older)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_a_run_does_not_go_on_with_more_or_fewer_processes(tmp_path: Path, before: int, now: int) -> None:
    save(tmp_path, 1, before)
    with pytest.raises(UserError, match=f"was written by {before} processes and would go on with {now}"):
        last_whole_checkpoint(tmp_path, now)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_checkpoint_with_a_weight_that_is_no_number_is_never_whole(tmp_path: Path, weight: float) -> None:
    with pytest.raises(UserError, match="`weight` is not finite after step 1"):
        save(tmp_path, 1, weight=weight)
    assert last_whole_checkpoint(tmp_path, 1) is None
