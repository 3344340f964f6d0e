"""A row as the model sees it, its mask in colour or between brackets."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from sft.tokens.codec import Codec
from sft.tokens.prepare import MASKED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
from sft.show import GREEN, GREY, OFF, coloured


def pieces(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """Stretches of a row's text, each with whether it is learned. They join to the row's whole text."""
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or (labels[i] == MASKED) != (labels[i - 1] == MASKED)]
    return [(text, labels[end - 1] != MASKED) for end, text in zip(ends, _grown(tokenizer, ids, ends), strict=True)]


def masked_example(codec: Codec, ids: Sequence[int], labels: Sequence[int]) -> str:
    """One row as the model sees it: learned text green, or between ⟦ and ⟧ where there is no colour."""
    on, off = (GREEN, OFF) if coloured() else ("⟦", "⟧")
    text = "".join(f"{on}{part}{off}" if learned else part for part, learned in pieces(codec.tokenizer, ids, labels))
    return f"{_head(codec, labels)}\n{text}"


def example_by_token(
    codec: Codec, ids: Sequence[int], labels: Sequence[int], weights: Sequence[float] | None = None
) -> str:
    """The same, with a bar between tokens, and behind each stretch its loss weight where there are weights."""
    parts = _grown(codec.tokenizer, ids, range(1, len(ids) + 1))
    kinds = [weights[i] if weights else float(labels[i] != MASKED) for i in range(len(ids))]
    on, off, bar = (GREEN, OFF, f"{GREY}│{OFF}") if coloured() else ("⟦", "⟧", "│")
    stretches = []
    for kind, some in groupby(zip(parts, kinds, strict=True), lambda part: part[1]):
        tokens = [part for part, _ in some]
        text = bar.join(f"{on}{token}{off}" for token in tokens) if coloured() else f"{on}{bar.join(tokens)}{off}"
        stretches.append((text if kind else bar.join(tokens)) + (f"×{kind:.2f}" if weights and kind else ""))
    return f"{_head(codec, labels)}\n{bar.join(stretches)}"


def _head(codec: Codec, labels: Sequence[int]) -> str:
    learned = sum(label != MASKED for label in labels)
    how = "put through the chat template" if codec.chat else "plain text"
    return (
        f"one row as it is trained ({len(labels)} tokens, {learned} learned, shown "
        f"{'green' if coloured() else '⟦so⟧'}; the prompt is {how}):"
    )


def _grown(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """What the text grows by at each end. A character split over tokens appears with the last of them."""
    texts, shown = [], 0
    for end in ends:
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = whole if end == len(ids) else whole.rstrip("\ufffd")
        texts.append(whole[shown:])
        shown = max(shown, len(whole))
    return texts
