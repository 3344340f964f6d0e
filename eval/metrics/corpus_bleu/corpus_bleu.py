"""BLEU of all predictions at once, 0 to 1, by sacrebleu. Papineni et al., 2002, https://aclanthology.org/P02-1040."""

import sacrebleu

import eval.metric
import eval.words


class CorpusBleu(eval.metric.TextMetric):
    higher_is_better = True
    corpus = True
    shown_as = {"corpus_bleu": "BLEU of the corpus"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        spaced = [[" ".join(eval.words.words(text)) for text in texts] for texts in (predictions, references)]
        return {"corpus_bleu": sacrebleu.BLEU(tokenize="none").corpus_score(spaced[0], [spaced[1]]).score / 100}
