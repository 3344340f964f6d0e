"""Repetition of each prediction: the share of its runs of four words that it has written before."""

import eval.metric
import eval.words


class Repetition(eval.metric.TextMetric):
    lower_is_better = True

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        runs = [eval.words.ngrams(eval.words.words(text), 4) for text in predictions]
        return {"repetition": [1 - len(set(some)) / len(some) if some else 0.0 for some in runs]}
