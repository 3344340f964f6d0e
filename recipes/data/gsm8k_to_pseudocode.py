"""GSM8K's rows -> question, pseudocode, answer; every step and every answer is executed and compared with the original.

    python recipes/data/gsm8k_to_pseudocode.py gsm8k/train.jsonl gsm8k_pseudocode.train.jsonl

A mark such as `<<48/2=24>>24 clips in May` becomes `clips_in_may = 48 / 2`, and a later 24 becomes `clips_in_may` where
it can mean nothing else. Rows that do not come to their own answer are left out and counted.
"""

import argparse
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from eval.pseudocode import RESERVED, PseudocodeError, canonical, run

MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_PART = r"[$(]*[\d.,]*\d[%)]*(?: ?[a-z]{2,}(?:/[a-z]+)?)?"
_SUM = rf"(?<![\w.)/])({_PART}(?:\s*[-+*/x×÷−–]\s*{_PART})+)\s*=\s*\$?"
BARE = re.compile(rf"{_SUM}(-?[\d.,]*\d)(?![\d/%])")
"""Arithmetic that the author left unmarked, such as `20 apples / 4 = 5`; what does not add up is passed over."""
BEFORE = re.compile(rf"{_SUM}$")
"""The same, in front of a mark that only states a number, such as `20 / 4 = <<5=5>>5`."""
NUMBER = re.compile(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?!%)")

COMMON = {Fraction(number) for number in (2, 3, 4, 5, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000)}
"""Factors that may stand for something else than an earlier result: days of a week, minutes of an hour."""
SPELLED = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "twice": 2, "double": 2, "triple": 3, "dozen": 12, "fifteen": 15, "twenty": 20,
    "thirty": 30, "fifty": 50,
}  # fmt: skip
"""Numbers that questions write as words."""
CUTS = {
    "because", "so", "and", "if", "since", "which", "that", "when", "while", "after", "but", "or", "then", "than",
    "before", "thus", "therefore", "as", "who",
}  # fmt: skip
"""A name ends before these words."""
FILLERS = {
    "a", "an", "the", "of", "for", "in", "on", "to", "at", "by", "from", "with", "is", "are", "was", "were", "be",
    "will", "would", "has", "have", "had", "he", "she", "it", "they", "i", "we", "you", "his", "her", "its", "their",
    "him", "them", "this", "those", "these", "there", "each", "every", "s", "t", "x", "let", "first", "find", "total",
    "number", "amount", "means",
}  # fmt: skip
"""A name neither begins nor ends with these words."""


class Unusable(ValueError):
    """A row that does not become a program; the message says why."""


@dataclass(frozen=True)
class Step:
    """One piece of arithmetic in a solution."""

    expression: str
    """As it stands in the solution, without signs of currency."""
    result: str
    """What the author says it comes to."""
    name: str
    """Words around it, joined; "" where there are none."""
    marked: bool
    """Whether it stands in `<<...>>`, and so must add up."""


def convert(question: str, solution: str) -> dict[str, str]:
    """One row of GSM8K -> a row for `pseudocode_cot`; `Unusable` where no checked program comes out of it."""
    reasoning, _, final = solution.partition("####")
    answer, given = canonical(final), _numbers(question)
    lines: list[str] = []
    values: dict[str, Fraction] = {}
    for step in _steps(reasoning):
        if not re.search(r"\d.*[-+*/]", step.expression):
            if not _numbers(step.result) <= given:
                raise Unusable("a step is stated, not worked out")
            continue
        try:
            expression, value = _checked(step)
        except Unusable:
            if step.marked:
                raise
            continue
        if value in values.values() and not step.marked:
            continue
        name = _free(step.name or "result", values)
        lines.append(f"{name} = {_named(expression, values, given)}")
        values[name] = value
    program = "\n".join([*lines, f"answer {_last(values, answer, solution)}"])
    result = run(program)
    if result.names != values:
        raise Unusable("a step comes to something else once its numbers have names")
    return {"question": question, "pseudocode": program, "answer": answer}


def _steps(reasoning: str) -> Iterator[Step]:
    for line in reasoning.splitlines():
        rest = 0
        for mark in MARK.finditer(line):
            before = line[rest : mark.start()]
            bare = None if re.search(r"[-+*/]", mark[1]) else BEFORE.search(before)
            yield Step(_plain(bare[1]) if bare else mark[1], mark[2], _name(before, mark[2], line[mark.end() :]), True)
            rest = mark.end()
        for bare in BARE.finditer(line, rest):
            name = _name(line[rest : bare.end(1)], bare[2], line[bare.end() :])
            yield Step(_plain(bare[1]), bare[2].replace(",", ""), name, False)


def _plain(bare: str) -> str:
    return re.sub(r"[$,]| ?[a-z]{2,}(/[a-z]+)?", "", bare).translate(str.maketrans("x×÷−–", "**/--"))


def _checked(step: Step) -> tuple[str, Fraction]:
    """The expression, rounded where the author rounded, and its value."""
    expression = re.sub(r"\s*([-+*/])\s*", r" \1 ", step.expression.lstrip("+ ")).strip()
    try:
        value, stated = run(f"answer {expression}").value, Fraction(step.result.replace(",", ""))
        if value != stated:
            expression = f"round({expression}, {len(step.result.partition('.')[2])})"
            value = run(f"answer {expression}").value
    except (PseudocodeError, ValueError) as error:
        raise Unusable("a step is not arithmetic") from error
    if value != stated:
        raise Unusable("a step does not come to what its author says")
    return expression, stated


def _named(expression: str, values: dict[str, Fraction], given: set[Fraction]) -> str:
    """The expression with earlier results by name, where a number is one of them and nothing else."""

    def name(number: re.Match[str]) -> str:
        value, (before, after) = Fraction(number[0]), (expression[: number.start()], expression[number.end() :])
        names = [name for name in values if values[name] == value]
        scales = value in COMMON and re.search(r"[*/] *$|^ *[*/]", f"{before}\n{after}", re.MULTILINE)
        follows_on = not before and names == list(values)[-1:]
        unclear = len(names) != 1 or value in given | {1} or (scales and not follows_on) or before.count(",")
        return canonical(number[0]) if unclear else names[0]

    return NUMBER.sub(name, expression)


def _last(values: dict[str, Fraction], answer: str, solution: str) -> str:
    """What comes to the answer: the latest step that does, or the last one in cents or percent."""
    for name in reversed(values):
        if canonical(str(values[name])) == answer:
            return name
    if values and re.search(r"cent|%", solution):
        name = list(values)[-1]
        if canonical(str(values[name] * 100)) == answer:
            return f"{name} * 100"
    raise Unusable("no step comes to the answer")


def _name(before: str, result: str, after: str) -> str:
    """Words for a result: those behind it, else behind its first mention, else in front of its arithmetic."""
    behind = re.sub(r"^[\s$]*[\d.,]*\d(?:st|nd|rd|th)?\b", "", after)
    mention = re.search(rf"(?<![\d.]){re.escape(result)}(?![\d.])(.*)", before)
    for text in (behind, mention[1] if mention else ""):
        if words := _trimmed(_words(text)[:4]):
            return "_".join(words)
    front = re.split(r"\bbecause\b|[.,:;]\s", re.sub(r"[^A-Za-z]*$", "", before))
    words = [word for word in re.findall(r"[a-z]+", front[-1].lower()) if word not in FILLERS | CUTS | {"per"}]
    return "_".join([word for word, after in itertools.pairwise([*words, ""]) if word[:4] != after[:4]][-3:])


def _words(text: str) -> list[str]:
    """The words that a text begins with, up to a sign, a digit or a cut."""
    start = re.match(r"[A-Za-z'’ ]*", text.lstrip("% "))
    words = re.findall(r"[a-z]+", re.sub("['’]s?", "", start[0].lower())) if start else []
    return list(itertools.takewhile(lambda word: word not in CUTS, words))


def _trimmed(words: list[str]) -> list[str]:
    while words and words[0] in FILLERS:
        words = words[1:]
    while words and (words[-1] in FILLERS or words[-1] == "per"):
        words = words[:-1]
    return words


def _free(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is reserved or taken."""
    if name not in taken and name not in RESERVED:
        return name
    return next(other for place in itertools.count(2) if (other := f"{name}_{place}") not in taken)


def _numbers(question: str) -> set[Fraction]:
    digits = re.findall(r"\d+(?:\.\d+)?", question.replace(",", ""))
    words = {SPELLED[word] for word in re.findall(r"[a-z]+", question.lower()) if word in SPELLED}
    return {Fraction(number) for number in [*digits, *words]}


def main() -> None:
    """Converts a file; what is written is written whole or not at all."""
    arguments = argparse.ArgumentParser(description="GSM8K's JSONL to rows with runnable, checked pseudocode.")
    arguments.add_argument("source", type=Path, help="rows with question and answer")
    arguments.add_argument("out", type=Path, help="rows with question, pseudocode and answer")
    chosen = arguments.parse_args()
    rows, left_out = [], Counter[str]()
    for place, line in enumerate(chosen.source.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, solution = str(row["question"]), str(row["answer"])
        except (json.JSONDecodeError, KeyError, TypeError):
            arguments.error(
                f"{chosen.source}:{place}: not a row of GSM8K; write a JSON object with question and answer"
            )
        try:
            rows.append(convert(question, solution))
        except Unusable as why:
            left_out[str(why)] += 1
    part = chosen.out.with_name(f"{chosen.out.name}.part")
    part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    os.replace(part, chosen.out)
    total = len(rows) + left_out.total()
    print(f"{chosen.out}: {len(rows)} of {total} rows, {len(rows) / max(total, 1):.1%}")
    for reason, count in left_out.most_common():
        print(f"  {count:5} left out: {reason}")


if __name__ == "__main__":
    main()
