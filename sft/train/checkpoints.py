"""Checkpoints: named whole once all of one is written, and found again by a run that goes on."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    TrainerCallback,
)

from sft import UserError
from sft.files import damage, read_json, sizes, write_json
from sft.show import say

DIVERGED = (
    "lower `trainer.learning_rate`, or set `trainer.max_grad_norm: 1.0` and `trainer.bf16: false`, and name another "
    "folder with output=..."
)


def check_finite(model: Any, step: int) -> None:
    """Raise UserError where a trained weight is not a number: the logged losses between two logs would not show it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"`{name}` is not finite after step {step}; {DIVERGED}")


class MarkWhole(TrainerCallback):
    """Names a checkpoint whole once every process has written its part: a run killed while writing leaves none."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            check_finite(kwargs["model"], state.global_step)
            write_json(folder / "whole.json", {"processes": args.world_size, "files": sizes(folder)})


def last_whole_checkpoint(folder: Path, processes: int) -> str | None:
    """The newest checkpoint whose files are all there with the sizes they were written with."""
    whole = {}
    for marker in folder.glob("checkpoint-*/whole.json"):
        written = read_json(marker)
        if damage(marker.parent, written["files"]) is None:
            whole[int(marker.parent.name.rsplit("-", 1)[1])] = marker.parent, written["processes"]
    if not whole:
        return None
    newest, before = whole[max(whole)]
    if before != processes:
        raise UserError(
            f"{newest}: was written by {before} processes and would go on with {processes}, which is another batch "
            f"size; set PROCESSES={before}, or delete {folder} to start from the beginning"
        )
    say(f"going on from {newest}")
    return str(newest)
