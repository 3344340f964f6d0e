"""pseudocode_cot: a question, the reasoning as runnable pseudocode, then a line with the answer; English, Chinese."""

import re
from collections.abc import Sequence

from data_templates import Row, Template

WORDS = {"en": ("Question: ", "Steps:", "Answer: "), "zh": ("问题：", "步骤：", "答案：")}
FIELDS = {"question": "the problem", "pseudocode": "its steps, see docs/pseudocode.md", "answer": "what they come to"}


def template(instruction: str = "", shots: Sequence[Row] = (), language: str = "en") -> Template:
    """`instruction` and `shots` (solved rows) stand before each question; `language` is `en` or `zh`."""
    if language not in WORDS:
        raise ValueError(f"unknown language `{language}`; write one of {', '.join(WORDS)}")
    for place, shot in enumerate(shots, 1):
        if missing := FIELDS.keys() - shot.keys():
            raise ValueError(f"`shots`: row {place} lacks `{min(missing)}`")
    asks, steps, answers = WORDS[language]

    def ask(row: Row) -> str:
        return asks + row["question"] + f"\n{steps}\n"

    def solve(row: Row) -> str:
        return f"{row['pseudocode'].rstrip()}\n{answers}{row['answer']}"

    before = [*filter(None, [instruction]), *(ask(shot) + solve(shot) for shot in shots)]
    return Template(
        fields=FIELDS,
        prompt=lambda row: "\n\n".join([*before, ask(row)]),
        completion=solve,
        metrics=("steps", "exact_answer"),  # both read the whole completion, so `answer` leaves it whole
        example={
            "question": "Mira buys 3 pens at 4 yuan each and pays with a 20-yuan note. How much change does she get?",
            "pseudocode": "cost = 3 * 4\nchange = 20 - cost\nanswer change",
            "answer": "8",
        },
    )


def split(text: str) -> tuple[str, str]:
    """Completion -> its pseudocode, and what its first answer line states, "" where it has none. It never raises."""
    line = re.search(r"^[ \t]*(?:answer|答案)[ \t]*[:：](.*)$", text, re.IGNORECASE | re.MULTILINE)
    return (text[: line.start()], line[1].strip()) if line else (text, "")
