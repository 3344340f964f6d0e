"""exact_answer: does the answer line state the reference's answer? Numbers are compared as numbers, units aside."""

import eval.metric
from data_templates.pseudocode_cot import split
from eval.pseudocode import canonical


class ExactAnswer(eval.metric.TextMetric):
    """Whole completions -> `exact_answer`, 1.0 or 0.0 a row: `Answer: 1,000 yuan` is `Answer: 1000`."""

    higher_is_better = True

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_answer": [float(_states(prediction, reference)) for prediction, reference in pairs]}


def _states(prediction: str, reference: str) -> bool:
    stated = canonical(split(prediction)[1])
    return stated != "" and stated == canonical(split(reference)[1])
