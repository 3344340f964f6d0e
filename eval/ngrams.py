"""Unigram and trigram models of the training rows: what counting tokens reaches, beside what a network does.

Probabilities are interpolated by Witten and Bell (1991): in a context seen C times, before T different tokens, a token
seen c times has (c + T q) / (C + T), where q is its probability in the context one token shorter, in the end uniform.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.model.loss import RowLoss
from sft.tokens.prepare import MASKED

ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}

Context = tuple[int, ...]


def order_name(order: int) -> str:
    """What a model of this order is called."""
    return ORDERS.get(order, f"{order}-gram")


def ngram_losses(
    train: Iterable[dict[str, Any]], test: Sequence[dict[str, Any]], order: int, vocabulary: int
) -> list[RowLoss]:
    """The loss of each held-out row, as `output_losses` gives it for a network. A token is predicted from at most
    `order` - 1 before it."""
    counts: dict[Context, Counter[int]] = defaultdict(Counter)
    for row in train:
        for context, token in _learned(row, order):
            for start in range(len(context) + 1):
                counts[context[start:]][token] += 1

    asked: dict[Context, list[tuple[int, int]]] = defaultdict(list)  # so that each distribution is made once
    for i, row in enumerate(test):
        for context, token in _learned(row, order):
            asked[context].append((i, token))
    losses, correct, tokens = np.zeros(len(test)), np.zeros(len(test), int), np.zeros(len(test), int)
    for context, places in asked.items():
        distribution = _distribution(counts, context, vocabulary)
        first = int(distribution.argmax())
        for i, token in places:
            losses[i] -= np.log(distribution[token])
            correct[i] += token == first
            tokens[i] += 1
    return [*map(RowLoss, losses.tolist(), correct.tolist(), tokens.tolist())]


def _learned(row: dict[str, Any], order: int) -> Iterable[tuple[Context, int]]:
    """Each token with a label, and the tokens before it."""
    ids, labels = row["input_ids"], row["labels"]
    for i in range(1, len(ids)):
        if labels[i] != MASKED:
            yield tuple(ids[max(0, i - order + 1) : i]), ids[i]


def _distribution(counts: dict[Context, "Counter[int]"], context: Context, vocabulary: int) -> NDArray[np.float64]:
    """Probability of each token behind a context."""
    shorter = np.full(vocabulary, 1 / vocabulary)
    for start in range(len(context), -1, -1):
        if seen := counts.get(context[start:]):
            shorter *= len(seen)
            shorter[list(seen)] += list(seen.values())
            shorter /= seen.total() + len(seen)
    return shorter
