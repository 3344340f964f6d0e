"""What a person sees of a training that runs: loss, speed, the share of tokens that is learned, time left."""

import math
import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import (
    TrainerCallback,
)

from sft import UserError
from sft.show import say
from sft.train.checkpoints import DIVERGED


class Progress(TrainerCallback):
    """A bar with loss, speed, supervised share and time left; a line at each log where there is no terminal."""

    def __init__(self, trainer: Any) -> None:
        """`trainer` counts in `tokens_seen` and `tokens_learned`."""
        self.trainer, self.bar, self.loss = trainer, None, math.nan
        self.started, self.first_step, self.shown = time.monotonic(), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self._state(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.loss = logs["loss"]
            if not math.isfinite(self.loss):
                raise UserError(f"the loss is {self.loss} at step {state.global_step}; {DIVERGED}")
        if not state.is_world_process_zero:
            return
        line = f"held-out loss {logs['eval_loss']:.4f}" if "eval_loss" in logs else self._state()
        if self.bar is not None and "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: {line}", file=sys.stderr)
        elif self.bar is None and ("loss" in logs or "eval_loss" in logs):
            steps = state.global_step - self.first_step
            left = (time.monotonic() - self.started) / max(steps, 1) * (state.max_steps - state.global_step)
            say(f"step {state.global_step}/{state.max_steps}: {line}, {left:.0f} s left")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _state(self) -> str:
        seen, learned = self.trainer.tokens_seen, self.trainer.tokens_learned
        speed = seen * self.trainer.args.world_size / (time.monotonic() - self.started)
        return f"loss {self.loss:.4f}, {speed:,.0f} tok/s, {learned / max(seen, 1):.0%} learned"
