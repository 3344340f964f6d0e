"""distinct-2 of each prediction: different word pairs over all word pairs. Li et al., 2016, arXiv:1510.03055."""

import datasets
import evaluate

import eval.words


class Distinct(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="texts",
                                   features=datasets.Features({"predictions": text, "references": text}))  # fmt: skip

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        pairs = [eval.words.ngrams(eval.words.words(text), 2) for text in predictions]
        return {"distinct2": [len(set(some)) / len(some) if some else 0.0 for some in pairs]}
