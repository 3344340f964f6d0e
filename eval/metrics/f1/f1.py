"""F1, the harmonic mean of precision and recall, of each class, and their mean over the classes that occur."""

import sklearn.metrics

import eval.metric


class F1(eval.metric.ClassMetric):
    higher_is_better = True
    corpus = True
    shown_as = {"f1": "F1, mean of the classes"}

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": float(sklearn.metrics.f1_score(references, predictions, average="macro"))}
