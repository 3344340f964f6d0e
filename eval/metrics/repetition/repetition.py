"""Repetition of each prediction: the share of its runs of four words that it has written before. Lower is better."""

import datasets
import evaluate

import eval.words


class Repetition(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="texts",
                                   features=datasets.Features({"predictions": text, "references": text}))  # fmt: skip

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        runs = [eval.words.ngrams(eval.words.words(text), 4) for text in predictions]
        return {"repetition": [1 - len(set(some)) / len(some) if some else 0.0 for some in runs]}
