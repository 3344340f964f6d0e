"""chrF of each prediction, 0 to 1, by sacrebleu: character n-grams. Popović, 2015, https://aclanthology.org/W15-3049."""

import datasets
import evaluate
import sacrebleu


class Chrf(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="texts",
                                   features=datasets.Features({"predictions": text, "references": text}))  # fmt: skip

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = sacrebleu.CHRF()
        return {"chrf": [scorer.sentence_score(text, [reference]).score / 100
                         for text, reference in zip(predictions, references, strict=True)]}  # fmt: skip
