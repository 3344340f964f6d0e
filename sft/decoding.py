"""The settings by which tokens are chosen, with all that is known of each, in the one place where they are listed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Bounds(NamedTuple):
    """The numbers that a setting takes."""

    low: float
    high: float = math.inf
    whole: bool = False
    """Whether it counts something."""
    low_itself: bool = True
    """Whether `low` is one of them."""

    def hold(self, number: float) -> bool:
        return self.low < number <= self.high or (self.low_itself and number == self.low)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if not self.low_itself:
            return f"{kind} above {self.low}"
        return f"{kind} from {self.low} up" if math.isinf(self.high) else f"{kind} from {self.low} to {self.high}"


ABOVE_0 = Bounds(0, low_itself=False)
SHARE = Bounds(0, 1)
COUNT = Bounds(0, whole=True)


class Setting(NamedTuple):
    """A field of `generation:` that looks at a token and those before it alone, so that a text can be written with it
    token by token, and a batch in pieces."""

    kind: type
    bounds: Bounds | None
    draws: bool
    """Whether it says how tokens are drawn."""
    help: str = ""
    """What it does, where it can be asked for outside a recipe: an option of `sft generate`."""


SETTINGS: Mapping[str, Setting] = {
    "do_sample": Setting(bool, None, draws=False),
    "temperature": Setting(float, ABOVE_0, True, "draw tokens, the less likely ones more often above 1; 0 is --greedy"),
    "top_k": Setting(int, COUNT, True, "draw from the N likeliest tokens"),
    "top_p": Setting(float, SHARE, True, "draw from the likeliest tokens that hold this share together"),
    "min_p": Setting(float, SHARE, True, "draw from tokens this share as likely as the likeliest"),
    "typical_p": Setting(float, SHARE, True, "draw from tokens about as likely as is expected, this share together"),
    "repetition_penalty": Setting(float, ABOVE_0, False, "above 1, what was written becomes less likely"),
    "no_repeat_ngram_size": Setting(int, COUNT, False, "never write the same N tokens twice"),
    "max_new_tokens": Setting(int, ABOVE_0, False, "longest answer"),
}
"""In the order of help. A temperature of 0 draws nothing, so a recipe writes `do_sample: false` in its place."""

DRAWN = tuple(name for name, setting in SETTINGS.items() if setting.draws)

BESIDE = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
"""What a `GenerationConfig` of ours holds beside its settings."""


def drawing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings given one by one, with what they mean: one that draws tokens turns `do_sample` on, and a
    temperature of 0 turns it off."""
    if given.get("temperature") == 0:
        return {**given, **dict.fromkeys(DRAWN), "do_sample": False}
    return {**given, "do_sample": True} if given.keys() & set(DRAWN) else dict(given)


def of_whole_texts(names: Iterable[str]) -> list[str]:
    """Those of a GenerationConfig's fields that only a text written as a whole can follow, such as beams."""
    return sorted(set(names) - SETTINGS.keys() - BESIDE)
