"""distinct-2 of each prediction: different word pairs over all word pairs. Li et al., 2016, arXiv:1510.03055."""

import eval.metric
import eval.words


class Distinct(eval.metric.TextMetric):
    higher_is_better = True
    shown_as = {"distinct2": "distinct-2"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        pairs = [eval.words.ngrams(eval.words.words(text), 2) for text in predictions]
        return {"distinct2": [len(set(some)) / len(some) if some else 0.0 for some in pairs]}
