"""The settings by which tokens are chosen, each with its bounds, in the one place where they are listed."""

from collections.abc import Mapping
from typing import Any

DRAWN = ("temperature", "top_k", "top_p", "min_p")
"""Fields of `generation:` that say how tokens are drawn."""


def drawing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings given one by one, with what they mean: one that draws tokens turns `do_sample` on, and a
    temperature of 0 turns it off."""
    if given.get("temperature") == 0:
        return {**given, **dict.fromkeys(DRAWN), "do_sample": False}
    return {**given, "do_sample": True} if given.keys() & set(DRAWN) else dict(given)
