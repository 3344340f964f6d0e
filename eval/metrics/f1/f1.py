"""F1, the harmonic mean of precision and recall, of each class, and their mean over the classes that occur."""

import datasets
import evaluate
import sklearn.metrics


class F1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="numbers of classes", features=features
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": float(sklearn.metrics.f1_score(references, predictions, average="macro"))}
