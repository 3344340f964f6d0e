"""accuracy: is the class the right one? 1.0 or 0.0 a row."""

import eval.metric


class Accuracy(eval.metric.ClassMetric):
    higher_is_better = True

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, list[float]]:
        return {"accuracy": [float(ours == right) for ours, right in zip(predictions, references, strict=True)]}
