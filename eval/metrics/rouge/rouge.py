"""ROUGE-1 and ROUGE-L F1 of each prediction, with words of any script. Lin, 2004, https://aclanthology.org/W04-1013."""

import rouge_score.rouge_scorer

import eval.metric
import eval.words


class _Words:
    """rouge_score's own tokenizer keeps Latin letters alone: identical Chinese texts would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return eval.words.words(text)


class Rouge(eval.metric.TextMetric):
    higher_is_better = True
    shown_as = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = rouge_score.rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=_Words())
        scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        return {name: [float(score[name].fmeasure) for score in scores] for name in self.shown_as}
