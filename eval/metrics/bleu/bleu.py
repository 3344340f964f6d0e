"""Sentence BLEU of each prediction, 0 to 1, by sacrebleu. Papineni et al., 2002, https://aclanthology.org/P02-1040."""

import sacrebleu

import eval.metric
import eval.words


class Bleu(eval.metric.TextMetric):
    higher_is_better = True
    shown_as = {"bleu": "BLEU"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        # effective order: without it a perfect answer of fewer than four words scores 0
        scorer = sacrebleu.BLEU(effective_order=True, tokenize="none")
        spaced = [[" ".join(eval.words.words(text)) for text in texts] for texts in (predictions, references)]
        return {"bleu": [scorer.sentence_score(text, [reference]).score / 100
                         for text, reference in zip(*spaced, strict=True)]}  # fmt: skip
