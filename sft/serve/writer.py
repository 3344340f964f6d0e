"""The thread that calls the model for `sft serve`: each step writes a token of every answer and calls its asker."""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from sft.show import say
from sft.write.stream import Text, TextBatch


class Full(Exception):
    """So many answers are being written that no more are taken."""


class Writer(threading.Thread):
    """Writes answers together; those that do not fit beside the others wait, in their order."""

    def __init__(self, model: Any, batch_tokens: int, places: int) -> None:
        """`batch_tokens` bounds answers x longest, prompt included; `places` those that are written or wait."""
        super().__init__(name="writer", daemon=True)
        self.model, self.batch_tokens, self.places = model, batch_tokens, places
        self._tell: dict[Text, Callable[[Text], None]] = {}  # all that are written or wait, and whom to tell of them
        self._waiting: list[Text] = []
        self._changed = threading.Condition()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._tell)

    def add(self, texts: Sequence[Text], tell: Callable[[Text], None]) -> None:
        """Write these; `tell` is called in this thread after each token. Raises Full where there are too many."""
        with self._changed:
            if self._stopping or len(self._tell) + len(texts) > self.places:
                raise Full(f"{len(self._tell)} answers are being written or wait; ask again later")
            self._tell |= dict.fromkeys(texts, tell)
            self._waiting += texts
            self._changed.notify()

    def drop(self, texts: Iterable[Text]) -> None:
        """Nobody waits for these any more: their places are free."""
        with self._changed:
            for text in texts:
                self._tell.pop(text, None)
            self._waiting = [text for text in self._waiting if text in self._tell]

    def stop(self) -> None:
        """End every answer, and take no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        batch = TextBatch(self.model)
        while self._has_work():
            if new := self._next(batch.texts):
                self._attempt(partial(batch.join, new), [new])
            writing = list(batch.texts)
            if writing and not self._attempt(partial(self._step, batch), writing):
                batch = TextBatch(self.model)  # in whatever state the step left it
        for text in list(self._tell):
            text.end = "error"
            self._report(text)

    def _has_work(self) -> bool:
        """Wait for it. False once all shall end."""
        with self._changed:
            while not self._tell and not self._stopping:
                self._changed.wait()
            return not self._stopping

    def _step(self, batch: TextBatch) -> None:
        """A token of each that somebody waits for."""
        for text in [text for text in batch.texts if text not in self._tell]:
            batch.leave(text)
        if batch.texts:
            batch.step()

    def _next(self, writing: Sequence[Text]) -> Text | None:
        """The answer that waited longest, if it fits beside those that are being written."""
        with self._changed:
            if not self._waiting:
                return None
            longest = max(len(text.prompt) + text.config.max_new_tokens for text in [self._waiting[0], *writing])
            if writing and longest * (len(writing) + 1) > self.batch_tokens:
                return None
            return self._waiting.pop(0)

    def _attempt(self, write: Callable[[], None], texts: Sequence[Text]) -> bool:
        """Write, and tell of it. What fails, for want of memory for instance, ends these answers and no others."""
        failed: Exception | None = None
        try:
            write()
        except Exception as error:
            failed = error
            say(f"{len(texts)} answers given up: {type(error).__name__}: {error}")
        for text in texts:
            text.end = "error" if failed else text.end
            self._report(text)
        return failed is None

    def _report(self, text: Text) -> None:
        """Tell whoever waits for it; an answer that ended has no place any more."""
        with self._changed:
            tell = self._tell.pop(text, None) if text.end else self._tell.get(text)
        if tell:
            tell(text)
