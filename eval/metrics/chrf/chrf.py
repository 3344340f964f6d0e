"""chrF of each prediction, 0 to 1, by sacrebleu: character n-grams. Popović, 2015, https://aclanthology.org/W15-3049."""

import sacrebleu

import eval.metric


class Chrf(eval.metric.TextMetric):
    higher_is_better = True
    shown_as = {"chrf": "chrF"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = sacrebleu.CHRF()
        return {"chrf": [scorer.sentence_score(text, [reference]).score / 100
                         for text, reference in zip(predictions, references, strict=True)]}  # fmt: skip
