"""Sentence BLEU of each prediction, 0 to 1, by sacrebleu. Papineni et al., 2002, https://aclanthology.org/P02-1040."""

import datasets
import evaluate
import sacrebleu

import eval.words


class Bleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="texts",
                                   features=datasets.Features({"predictions": text, "references": text}))  # fmt: skip

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        # effective order: without it a perfect answer of fewer than four words scores 0
        scorer = sacrebleu.BLEU(effective_order=True, tokenize="none")
        spaced = [[" ".join(eval.words.words(text)) for text in texts] for texts in (predictions, references)]
        return {"bleu": [scorer.sentence_score(text, [reference]).score / 100
                         for text, reference in zip(*spaced, strict=True)]}  # fmt: skip
