"""steps: do the written steps run, do they lead to the answer stated below them, and is that the right answer?"""

import eval.metric
from data_templates.pseudocode_cot import split
from eval.pseudocode import PseudocodeError, canonical, run, show


class Steps(eval.metric.TextMetric):
    """Whole completions -> three scores, each 1.0 or 0.0 a row.

    `steps_run`: the pseudocode runs. `steps_agree`: it comes to what the answer line states. `steps_correct`: it comes
    to the reference's answer, whatever the answer line states.
    """

    higher_is_better = True

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        rows = [_judge(*pair) for pair in zip(predictions, references, strict=True)]
        names = ("steps_run", "steps_agree", "steps_correct")
        return {name: [float(row[place]) for row in rows] for place, name in enumerate(names)}


def _judge(prediction: str, reference: str) -> tuple[bool, bool, bool]:
    pseudocode, stated = split(prediction)
    try:
        value = canonical(show(run(pseudocode).value))
    except PseudocodeError:
        return False, False, False
    return True, value == canonical(stated), value == canonical(split(reference)[1])
