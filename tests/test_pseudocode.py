"""The pseudocode language: what it means, what it refuses, and that no program can hurt the machine that runs it."""

import contextlib
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_templates.pseudocode_cot import split, template
from eval.pseudocode import RESERVED, Limits, PseudocodeError, canonical, run, show

ROOT = Path(__file__).parent.parent

PROGRAMS = {
    "answer 1 / 3 * 3": "1",
    "answer 0.1 + 0.2 == 0.3": "yes",
    "answer 2 + 3 * 4 ^ 2 - 10 % * 20": "48",
    "answer -2 ^ 2": "-4",
    "answer 10 - 3 - 2": "5",
    "answer 2 ^ 3 ^ 2": "512",
    "answer 4 ** -1": "0.25",
    "answer not 1 > 2 and 2 >= 2 or 1 / 0 > 1": "yes",
    "answer 20% * 50": "10",
    "answer [3, 4, 5][2]": "4",
    "answer [1, 2] + [1/2]": "[1, 2, 0.5]",
    "answer round(2.5) + round(-2.5) + round(1.25, 1)": "1.3",
    "answer floor(-1.5) + ceil(1.2)": "0",
    "answer remainder(17, 5) * 100 + remainder(-1, 3)": "202",
    "answer min(3, 2) + max([4, 9]) + sum(1, 2) + sum(range(1, 4)) + abs(-1)": "25",
    "answer length([5, 6])": "2",
    'day = "Monday"\nanswer day': "Monday",
    'answer "a" != "b"': "yes",
    "x = 1; x = x + 1; answer = x": "2",
    "answer 5 # the rest is a comment )(": "5",
    "if 1 > 2\n  x = 1\nelse if 2 > 1 then\n  x = 2\nelse:\n  x = 3\nend\nanswer x": "2",
    "x = 0\nif x > 0\n  x = 5\nend\nanswer x": "0",
    "x = 1\nrepeat 5 times\n  x = x * 2\nend\nanswer x": "32",
    "x = 100\nn = 0\nwhile x > 1\n  x = x / 2\n  n = n + 1\nend\nanswer n": "7",
    "t = 0\nfor each p in [1, 2, 3]\n  repeat 2\n    t = t + p\n  end\nend\nanswer t": "12",
    "each = 2\ntimes = 3\nrepeat times times\n  each = each + 1\nend\nanswer each": "5",
    "function f(n)\n  if n < 2\n    return 1\n  end\n  return n * f(n - 1)\nend\nanswer f(5)": "120",
    "function first(xs)\n  for x in xs\n    return x\n  end\n  return 0\nend\nanswer first([7, 8]) + first([])": "7",
    "如果 3 ≥ 2 那么\n  甲 = １＋２\n否则\n  甲 = 0\n结束\n答案 甲 × 2 ÷ 3": "2",
    "总数 = 0\n对 每个 数 在 [1，2、3]\n  总数 = 总数 + 数\n结束\n答案 总数": "6",
    "数 = 1\n重复 3 次\n  数 = 数 * 2\n结束\n当 数 < 20\n  数 = 数 + 10\n结束\n答案 数": "28",
    "函数 一半(数)\n  返回 数 / 2\n结束\n答案 求和(一半(3), 向上取整(0.1))": "2.5",
}

DEEP = 3000
HOSTILE = {
    "endless loop": "while true\nend",
    "endless loop with work": "x = 1/3\nwhile 1 < 2\n  x = 1 - x\nend\nanswer x",
    "loops in loops": "repeat 999999\nrepeat 999999\nrepeat 999999\nx = 1\nend\nend\nend\nanswer x",
    "repeat a googol": "repeat 10 ^ 100\nend\nanswer 1",
    "tower of powers": "answer 9**9**9**9",
    "great power": "answer 9 ^ 99999999999",
    "great negative power": "answer 9 ^ -99999999999",
    "power of a fraction": "answer (1/3) ^ 123456",
    "broken exponent": "answer 2 ^ 0.5",
    "zero to a negative power": "answer 0 ^ -1",
    "squaring for ever": "x = 3\nwhile true\n  x = x * x\nend",
    "growing denominators": "x = 1\nn = 1\nwhile true\n  n = n + 1\n  x = x + 1 / n\nend",
    "long number": "answer " + "9" * 9000,
    "long fraction": "answer 0." + "1" * 9000,
    "rounding to many places": "answer round(1/3, 10 ^ 9)",
    "division by zero": "answer 1 / (1 - 1)",
    "remainder by zero": "answer remainder(1, 0)",
    "doubling list": "x = [1]\nrepeat 100\n  x = x + x\nend\nanswer length(x)",
    "huge range": "x = range(1, 10 ^ 18)\nanswer 1",
    "huge literal list": "answer [" + "1," * 4900 + "1]",
    "list in a list": "x = [1]\nx = [x, x]\nanswer x",
    "summing for ever": "x = range(1, 1000)\nwhile true\n  y = sum(x)\nend",
    "comparing for ever": "x = range(1, 1000)\nwhile x == x\nend",
    "many lists alive": "function f(n)\n  x = range(1, 1000)\n  return f(n) + 1\nend\nanswer f(1)",
    "deep recursion": "function f(n)\n  return f(n + 1)\nend\nanswer f(1)",
    "two functions calling each other": "function f(n)\nreturn g(n)\nend\nfunction g(n)\nreturn f(n)\nend\nanswer f(1)",
    "doubling calls": "function f(n)\nif n == 0\nreturn 1\nend\nreturn f(n - 1) + f(n - 1)\nend\nanswer f(40)",
    "deep brackets": "answer " + "(" * DEEP + "1" + ")" * DEEP,
    "open brackets": "answer " + "(" * DEEP,
    "deep lists": "answer " + "[" * DEEP + "]" * DEEP,
    "deep calls": "answer " + "abs(" * 1500 + "1" + ")" * 1500,
    "deep blocks": "if true\n" * 1000 + "end\n" * 1000 + "answer 1",
    "open blocks": "if true\n" * 40,
    "closing what is not open": "end\n" * DEEP,
    "many else if": "if false\n" + "else if false\n" * 600 + "end",
    "chain of powers": "answer " + "2^" * 4000 + "2",
    "chain of minus signs": "answer " + "-" * 9000,
    "chain of not": "answer " + "not " * 2400 + "1",
    "long line": "x" * 100_000,
    "long sum": "answer " + "1+" * 50_000 + "1",
    "many lines": "x = 1\n" * 100_000,
    "long text": 'answer "' + "a" * 100_000 + '"',
    "open text": 'answer "' + "a" * 5000,
    "attribute": "answer x.__class__",
    "attribute of a number": "answer (1).real",
    "import": "import os",
    "call of Python": "answer __import__(1)",
    "call of eval": 'answer eval("1")',
    "dunder name": "answer __builtins__",
    "lambda": "answer (lambda: 1)()",
    "format string": 'answer f"{1}"',
    "item zero": "answer [1][0]",
    "item beyond the end": "answer [1][10 ^ 20]",
    "broken item": "answer [1, 2][1.5]",
    "sum of unlike things": 'answer 1 + "a"',
    "number as a truth": "if 1\nend",
    "comparison of unlike things": "answer 1 == true",
    "emptiness": "",
    "no answer": "x = 1",
    "answer in a function": "function f(x)\nanswer x\nend\nanswer f(1)",
    "return outside a function": "return 1",
    "function without return": "function f(x)\ny = x\nend\nanswer f(1)",
    "built-in function defined anew": "function sum(x)\nreturn x\nend\nanswer sum(1)",
    "wrong number of values": "answer floor(1, 2)",
    "least of nothing": "answer min([])",
    "control characters": "\x00\x01\x1b[2J",
    "lone surrogate": "answer \ud800",
    "text behind a lone surrogate": '"\ud800"',
    "right-to-left mark": "answer \u202e1",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_comes_to_its_answer(program: str) -> None:
    assert show(run(program).value) == PROGRAMS[program]


def test_every_example_of_the_language_page_runs() -> None:
    page = (ROOT / "docs/pseudocode.md").read_text("utf-8")
    examples = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [show(run(example).value) for example in examples] == ["33.3", "3"]


def test_the_language_page_names_every_reserved_word() -> None:
    page = (ROOT / "docs/pseudocode.md").read_text("utf-8")
    assert len(RESERVED) > 30
    assert not [word for word in RESERVED if word not in page]


@pytest.mark.parametrize(
    ("program", "line", "words"),
    [
        ("x = 1\ny = x +\nanswer y", 2, "end of the line"),
        ("x = 1\n\nanswer z", 3, "`z` has no value"),
        ("if true\nanswer 1", 2, "write `end`"),
        ("answer 1 $ 2", 1, "'$'"),
        ("x = [1]\n如果 真\n  y = x[2]\n结束", 3, "no item 2"),
        ("function f(x)\nreturn 1 / x\nend\nanswer f(0)", 2, "division by zero"),
    ],
)
def test_error_names_its_line_and_what_is_wrong(program: str, line: int, words: str) -> None:
    with pytest.raises(PseudocodeError) as error:
        run(program)
    assert error.value.line == line
    assert words in error.value.message


@pytest.mark.slow
def test_hostile_programs_end_in_an_error_with_a_line() -> None:
    """All in one child, so that a hang or a crash fails this test instead of stopping the run."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from test_pseudocode import HOSTILE\n"
        "from eval.pseudocode import PseudocodeError, run\n"
        "for name, program in HOSTILE.items():\n"
        "    try: print(name, '-> ran:', run(program).value)\n"
        "    except PseudocodeError as error: assert error.line >= 1 and len(error.message) < 400, name\n"
        "    else: sys.exit(1)\n"
        "print(len(HOSTILE), 'ended')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")], capture_output=True, text=True, timeout=240
    )
    assert len(HOSTILE) >= 60
    assert child.stdout == f"{len(HOSTILE)} ended\n", child.stdout + child.stderr


def test_no_program_takes_more_steps_than_its_limit() -> None:
    program = "x = 0\nrepeat 10\n  x = x + 1\nend\nanswer x"
    steps = run(program).steps
    assert run(program, Limits(steps=steps)).steps == steps
    with pytest.raises(PseudocodeError, match=f"more than {steps - 1} steps"):
        run(program, Limits(steps=steps - 1))


def test_walking_a_list_costs_its_length() -> None:
    short, long = (run(f"answer sum(range(1, {n}))").steps for n in (10, 900))
    assert long - short == 2 * (900 - 10)


@pytest.mark.parametrize(
    ("limits", "fits", "exceeds"),
    [
        (Limits(source=10), "answer 123", "answer 1234"),
        (Limits(nesting=3), "answer (((1)))", "answer ((((1))))"),
        (Limits(nesting=2), "if true\nif true\nx=1\nend\nend\nanswer 1", "if true\nif true\nx=(1)\nend\nend\nanswer 1"),
        (Limits(items=3), "answer [1, 2, 3]", "answer [1, 2] + [3, 4]"),
        (Limits(items=3), "answer range(5, 7)", "answer range(5, 8)"),
        (Limits(bits=40), "answer 2 ^ 10", "answer 2 ^ 20"),
        (Limits(bits=40), "answer 99999 * 9999", "answer 99999 * 9999999"),
        (
            Limits(calls=1),
            "function f(x)\nreturn x\nend\nanswer f(f(1))",
            "function f(x)\nreturn f(x)\nend\nanswer f(1)",
        ),
    ],
)
def test_each_limit_lets_through_what_fits(limits: Limits, fits: str, exceeds: str) -> None:
    run(fits, limits)
    with pytest.raises(PseudocodeError):
        run(exceeds, limits)


def test_numbers_stay_exact_within_their_bits() -> None:
    result = run("x = 1\nrepeat 50\n  x = x * 3 / 7\nend\nanswer x")
    assert result.value == Fraction(3, 7) ** 50
    assert result.names == {"x": Fraction(3, 7) ** 50}


WORDS = st.sampled_from(
    [*sorted(RESERVED), "x", "f", "(", ")", "[", "]", ",", "=", "==", "<", "+", "-", "*", "/", "^", "%", "\n", ";", "1"]
)


@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_any_text_runs_or_raises_pseudocode_error(text: str) -> None:
    with contextlib.suppress(PseudocodeError):
        show(run(text).value)


@given(st.lists(WORDS, max_size=40).map(" ".join))
def test_any_words_of_the_language_run_or_raise_pseudocode_error(text: str) -> None:
    with contextlib.suppress(PseudocodeError):
        show(run(text, Limits(steps=500)).value)


@given(st.text(st.characters(exclude_categories=[])))
def test_reading_an_answer_never_raises(text: str) -> None:
    canonical(text)
    pseudocode, stated = split(text)
    assert canonical(stated) is not None
    assert text.startswith(pseudocode)


@given(st.fractions(max_denominator=1000))
def test_a_shown_number_reads_as_itself(value: Fraction) -> None:
    assert canonical(show(value)) == show(value)


@pytest.mark.parametrize(
    "same",
    [
        ("1000", "1,000", "1000.0", "$1,000.00", "１，０００ 元", "1000 apples.", "+1000"),
        ("0.75", "3/4", ".75", "０．７５", "3 / 4 杯"),
        ("-5", "−5", "-5.0 degrees"),
        ("24", "24%", "24 %"),
        ("30000", "3万", "30 thousand", "3 万元"),
        ("yes", "Yes", "true", "是"),
        ("Tom", "tom."),
    ],
)
def test_spellings_of_one_answer_are_one(same: tuple[str, ...]) -> None:
    assert {canonical(text) for text in same} == {canonical(same[0])}


def test_unlike_answers_stay_apart() -> None:
    answers = ["6:30", "6", "30", "3.33", "10/3", "1", "yes", "no", "-6", "3/0", "1,00", "", "9" * 200]
    assert len({canonical(answer) for answer in answers}) == len(answers)


def test_example_scores_full_marks_and_each_fault_its_own_loss() -> None:
    shape = template()
    right = shape.completion(shape.example)
    assert isinstance(right, str)
    predictions = [
        right,
        right.replace("Answer: 8", "Answer: 8.00 yuan\n\nQuestion: and then?\nAnswer: 9"),
        right.replace("Answer: 8", "Answer: 9"),
        right.replace("3 * 4", "3 * 5"),
        right.replace("3 * 4", "3 x 4"),
        "answer 8",
        "",
    ]
    given = {"predictions": predictions, "references": [right] * len(predictions)}
    assert shape.metrics == ("steps", "exact_answer")
    assert evaluate.load(str(ROOT / "eval/metrics/steps")).compute(**given) == {
        "steps_run": [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0],
        "steps_agree": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        "steps_correct": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    }
    assert evaluate.load(str(ROOT / "eval/metrics/exact_answer")).compute(**given) == {
        "exact_answer": [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    }


def test_instruction_and_shots_stand_before_the_question() -> None:
    shot = {"question": "1 + 1?", "pseudocode": "answer 1 + 1\n", "answer": 2}
    assert template("Write steps.", [shot], "en").prompt({"question": "2 + 2?"}) == (
        "Write steps.\n\nQuestion: 1 + 1?\nSteps:\nanswer 1 + 1\nAnswer: 2\n\nQuestion: 2 + 2?\nSteps:\n"
    )
    assert template(language="zh").completion(shot) == "answer 1 + 1\n答案：2"


@pytest.mark.parametrize("options", [{"language": "fr"}, {"shots": [{"question": "?", "answer": 1}]}])
def test_wrong_template_option_is_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"`fr`; write one of en, zh|row 1 lacks `pseudocode`"):
        template(**options)  # type: ignore[arg-type]  # wrong on purpose
