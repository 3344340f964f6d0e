"""The pseudocode of `docs/pseudocode.md`: source text to its answer, in a sandbox whose every resource is bounded.

    >>> show(run("price = 3/4\\nanswer 6 * price").value)
    '4.5'

The source is parsed (LALR, no backtracking) straight into a flat list of instructions for a small stack machine.
Neither parsing nor running recurses, nothing of Python's own is within a program's reach, and no text is given to
Python's `eval` or `exec`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, NoReturn

import lark

Scalar = Fraction | bool | str
Value = Scalar | tuple[Scalar, ...]
"""What a name can stand for: an exact number, a truth, a text, or a list of these (lists do not nest)."""

Instruction = tuple[Callable[["_Machine", Any], None], Any]
Code = list[Instruction]


@dataclass(frozen=True)
class Limits:
    """What a program may use. Every step makes at most one value, so `steps` bounds the memory too."""

    source: int = 10_000
    """Characters of source, texts in it included; there is no way to make a longer text."""
    nesting: int = 50
    """Brackets and blocks inside one another."""
    steps: int = 20_000
    """Instructions; whatever walks a list pays for each item."""
    calls: int = 50
    """Calls of the program's own functions inside one another."""
    items: int = 1_000
    """Items in a list."""
    bits: int = 2_000
    """Bits of a number, above and below the fraction bar together; checked before the number is computed."""


@dataclass(frozen=True)
class Result:
    """What a program came to."""

    value: Value
    """What `answer` was given."""
    names: Mapping[str, Value]
    """Each name of the main program, as it stood at the end."""
    steps: int
    """Instructions it took."""


class PseudocodeError(ValueError):
    """The only thing that `run` raises: the program is wrong, or it wants more than its limits."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}")
        self.line, self.message = line, message


def run(source: str, limits: Limits = Limits()) -> Result:
    """Source -> its answer. Any text may be given; `PseudocodeError` says what is wrong with it, and in which line."""
    if len(source) > limits.source:
        raise PseudocodeError(1, f"the source has {len(source)} characters; at most {limits.source} are allowed")
    return _Machine(_parse(source.translate(_ASCII) + "\n", limits), limits).run()


def show(value: Value) -> str:
    """Value -> text: `24`, `0.75`, `1/3` where six decimal places do not hold it, `yes`, `[1, 2]`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    millionths = abs(value) * 10**6
    if millionths.denominator != 1:
        return str(value)
    whole, part = divmod(millionths.numerator, 10**6)
    return "-" * (value < 0) + f"{whole}.{part:06}".rstrip("0").rstrip(".")


_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    {"\u3000": " ", "、": ",", "“": '"', "”": '"', "×": "*", "÷": "/", "−": "-", "≤": "<=", "≥": ">=", "≠": "!="}
)
_SCALES = {"万": 10**4, "亿": 10**8, "thousand": 10**3, "million": 10**6}
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.])(-?)[$¥€£]?"
    r"(?:([0-9]{1,3}(?:,[0-9]{3}){1,30}|[0-9]{1,100})(\.[0-9]{1,100})?|(\.[0-9]{1,100}))(?![0-9])"
    r"(?:\s*/\s*([0-9]{1,100}))?\s*(万|亿|thousand|million)?"
)
_TRUTHS = {"true": "yes", "真": "yes", "是": "yes", "对": "yes", "false": "no", "假": "no", "否": "no", "不": "no"}


def canonical(text: str) -> str:
    """An answer in one spelling, so that equal answers are equal texts. It accepts any text and never raises.

    A text with exactly one number in it is that number, its unit dropped: `$1,000.00`, `1000 元` and `1000` are one
    answer, and so are `3/4` and `0.75`. A percent sign is a unit. Any other text stands for itself, whatever its case.
    """
    text = text.translate(_ASCII).strip().rstrip(".。!").casefold()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1 or int(numbers[0][5] or 1) == 0 or re.search(r"[0-9]{100}", text):
        return _TRUTHS.get(text, text)
    sign, whole, places, bare, below, scale = numbers[0].groups()
    value = Fraction(sign + (whole or "0").replace(",", "") + (bare or places or "")) / int(below or 1)
    return show(value * _SCALES.get(scale, 1))


_WORDS = {
    "answer": "ANSWER", "答案": "ANSWER", "if": "IF", "如果": "IF", "then": "_THEN", "那么": "_THEN",
    "elif": "ELIF", "否则如果": "ELIF", "else": "_ELSE", "否则": "_ELSE", "end": "_END", "结束": "_END",
    "repeat": "REPEAT", "重复": "REPEAT", "times": "TIMES", "次": "TIMES", "while": "WHILE", "当": "WHILE",
    "for": "FOR", "对": "FOR", "each": "EACH", "每个": "EACH", "in": "_IN", "在": "_IN",
    "function": "_FUNCTION", "函数": "_FUNCTION", "return": "RETURN", "返回": "RETURN",
    "and": "_AND", "且": "_AND", "or": "_OR", "或": "_OR", "not": "_NOT", "非": "_NOT",
    "true": "TRUE", "真": "TRUE", "false": "FALSE", "假": "FALSE",
}  # fmt: skip
RESERVED = frozenset(_WORDS) - {"times", "次", "each", "每个"}
"""Words that cannot be names."""

_GRAMMAR = r"""
start: block
block: (statement? _NEWLINE)*
?statement: _name "=" expression                                        -> assign
    | ANSWER "="? expression                                            -> answer
    | RETURN expression                                                 -> give_back
    | branch again* otherwise? _END                                     -> choose
    | WHILE expression _begin block _END                                -> loop
    | REPEAT expression TIMES? _begin block _END                        -> repeat
    | FOR EACH? _name _IN expression _begin block _END                  -> for_each
    | _FUNCTION NAME "(" names ")" _begin block _END                    -> define
branch: IF expression _begin block
again: ELIF expression _begin block                                     -> branch
    | _ELSE IF expression _begin block                                  -> branch
otherwise: _ELSE _begin block
_begin: _THEN? ":"? _NEWLINE
names: (_name ("," _name)*)?
_name: NAME | EACH | TIMES

?expression: both (_OR both)*
?both: truth (_AND truth)*
?truth: comparison | _NOT truth                                         -> opposite
?comparison: sum (COMPARE sum)?
?sum: product (SIGN product)*
?product: factor (SCALE factor)*
?factor: power | SIGN factor                                            -> signed
?power: operand (POWER factor)?
?operand: "(" expression ")"
    | operand "%"                                                       -> percent
    | operand "[" expression "]"                                        -> item
    | NAME "(" _values? ")"                                             -> call
    | "[" _values? "]"                                                  -> items
    | _name                                                             -> name
    | NUMBER                                                            -> number
    | TEXT                                                              -> text
    | TRUE                                                              -> true
    | FALSE                                                             -> false
_values: expression ("," expression)*

NAME: /[^\W\d]\w*/
NUMBER: /[0-9]+(\.[0-9]+)?|\.[0-9]+/
TEXT: /"[^"\n]*"/
COMPARE: /[<>]=?|[=!]=/
SIGN: /[+-]/
SCALE: /[*\/]/
POWER: /\^|\*\*/
_NEWLINE: /[\n;]/
%ignore /[ \t\r\f]+|#[^\n]*/
%declare ANSWER IF _THEN ELIF _ELSE _END REPEAT TIMES WHILE FOR EACH _IN _FUNCTION RETURN _AND _OR _NOT TRUE FALSE
"""
_OPENING = {"LPAR", "LSQB", "IF", "WHILE", "REPEAT", "FOR", "_FUNCTION"}
_CLOSING = {"RPAR", "RSQB", "_END"}


def _parse(source: str, limits: Limits) -> Code:
    parsing, depth, before = _parser().parse_interactive(source), 0, ""
    try:
        for token in parsing.iter_parse():
            depth += (token.type in _OPENING and before != "_ELSE") - (token.type in _CLOSING)
            before = token.type
            if depth > limits.nesting:
                raise PseudocodeError(token.line or 1, f"brackets or blocks more than {limits.nesting} deep")
        code: Code = parsing.feed_token(lark.Token.new_borrow_pos("$END", "", token))
    except lark.UnexpectedCharacters as wrong:
        raise PseudocodeError(wrong.line, f"{wrong.char!r} is not part of the language") from None
    except lark.UnexpectedToken as wrong:
        if wrong.token.type == "$END":
            raise PseudocodeError(wrong.line, "a block is still open at the end; write `end`") from None
        word = "the end of the line" if wrong.token.type == "_NEWLINE" else f"{wrong.token[:30]!r}"
        raise PseudocodeError(wrong.line, f"{word} does not fit here") from None
    return code


@cache
def _parser() -> lark.Lark:
    def word(token: lark.Token) -> lark.Token:
        return lark.Token.new_borrow_pos(_WORDS.get(token, "NAME"), token, token)

    return lark.Lark(_GRAMMAR, parser="lalr", lexer="basic", transformer=_Compiler(), lexer_callbacks={"NAME": word})


class _Compiler(lark.Transformer[lark.Token, Any]):
    """Called by the parser at each rule, innermost first: the instructions of the parts -> those of the whole.

    Jumps are relative. A statement leaves the stack as it found it; an expression leaves one value more.
    """

    def start(self, parts: list[Code]) -> Code:
        return [*parts[0], (_Machine.fail, "the program ends without `answer`")]

    def block(self, parts: list[Code]) -> Code:
        return [instruction for statement in parts for instruction in statement]

    def assign(self, parts: list[Any]) -> Code:
        name, value = parts
        return [_at(name), *value, (_Machine.store, str(name))]

    def answer(self, parts: list[Any]) -> Code:
        word, value = parts
        return [_at(word), *value, (_Machine.answer, None)]

    def give_back(self, parts: list[Any]) -> Code:
        word, value = parts
        return [_at(word), *value, (_Machine.give_back, None)]

    def branch(self, parts: list[Any]) -> tuple[Code, Code]:
        word, condition, block = parts
        return [_at(word), *condition], block

    def otherwise(self, parts: list[Code]) -> tuple[Code, Code]:
        return [], parts[0]

    def choose(self, parts: list[tuple[Code, Code]]) -> Code:
        code: Code = []
        for condition, block in reversed(parts):
            test = [*condition, (_Machine.unless, len(block) + 1)] if condition else []
            code = [*test, *block, (_Machine.jump, len(code)), *code]
        return code

    def loop(self, parts: list[Any]) -> Code:
        word, condition, block = parts
        code = [_at(word), *condition, (_Machine.unless, len(block) + 1), *block]
        return [*code, (_Machine.jump, -len(code) - 1)]

    def repeat(self, parts: list[Any]) -> Code:
        word, count, *_, block = parts
        return self._walk(word, [*count, (_Machine.turns, None)], None, block)

    def for_each(self, parts: list[Any]) -> Code:
        word, *_, name, items, block = parts
        return self._walk(word, [*items, (_Machine.walk, None)], str(name), block)

    def _walk(self, word: lark.Token, items: Code, name: str | None, block: Code) -> Code:
        code = [(_Machine.advance, (name, len(block) + 1)), *block]
        return [_at(word), *items, *code, (_Machine.jump, -len(code) - 1)]

    def define(self, parts: list[Any]) -> Code:
        name, names, block = parts
        code = [*block, (_Machine.fail, f"function `{name}` ends without `return`")]
        return [_at(name), (_Machine.define, (str(name), names, code))]

    def names(self, parts: list[lark.Token]) -> list[str]:
        return [str(name) for name in parts]

    def expression(self, parts: list[Code]) -> Code:
        return self._decided(parts, True)

    def both(self, parts: list[Code]) -> Code:
        return self._decided(parts, False)

    def _decided(self, parts: list[Code], early: bool) -> Code:
        """The first part that is `early` decides; those after it are not looked at."""
        code: Code = [(_Machine.push, not early), (_Machine.jump, 1), (_Machine.push, early)]
        for part in reversed(parts):
            flip: Code = [(_Machine.opposite, None)] if early else []
            code = [*part, *flip, (_Machine.unless, len(code) - 1), *code]
        return code

    def opposite(self, parts: list[Code]) -> Code:
        return [*parts[0], (_Machine.opposite, None)]

    def comparison(self, parts: list[Any]) -> Code:
        left, sign, right = parts
        return [*left, *right, (_Machine.compare, str(sign))]

    def sum(self, parts: list[Any]) -> Code:
        code: Code = list(parts[0])
        for sign, part in zip(parts[1::2], parts[2::2], strict=True):
            code += [*part, (_Machine.arithmetic, str(sign))]
        return code

    product = power = sum

    def signed(self, parts: list[Any]) -> Code:
        sign, value = parts
        return [(_Machine.push, Fraction(0)), *value, (_Machine.arithmetic, str(sign))]

    def percent(self, parts: list[Code]) -> Code:
        return [*parts[0], (_Machine.push, Fraction(100)), (_Machine.arithmetic, "/")]

    def item(self, parts: list[Code]) -> Code:
        return [*parts[0], *parts[1], (_Machine.item, None)]

    def call(self, parts: list[Any]) -> Code:
        name, *arguments = parts
        return [*self.block(arguments), (_Machine.call, (str(name), len(arguments)))]

    def items(self, parts: list[Code]) -> Code:
        return [*self.block(parts), (_Machine.items, len(parts))]

    def name(self, parts: list[lark.Token]) -> Code:
        return [(_Machine.load, str(parts[0]))]

    def number(self, parts: list[lark.Token]) -> Code:
        return [(_Machine.number, str(parts[0]))]

    def text(self, parts: list[lark.Token]) -> Code:
        return [(_Machine.push, str(parts[0][1:-1]))]

    def true(self, parts: list[lark.Token]) -> Code:
        return [(_Machine.push, True)]

    def false(self, parts: list[lark.Token]) -> Code:
        return [(_Machine.push, False)]


def _at(token: lark.Token) -> Instruction:
    return (_Machine.at_line, token.line)


class _Machine:
    """Instructions and a stack of values. Each method named in an instruction takes its values from the stack's end."""

    def __init__(self, code: Code, limits: Limits) -> None:
        self.code, self.at, self.limits = code, 0, limits
        self.line, self.steps = 1, 0
        self.stack: list[Any] = []
        self.names: dict[str, Value] = {}
        self.functions: dict[str, tuple[list[str], Code]] = {}
        self.callers: list[tuple[Code, int, dict[str, Value], int, int]] = []
        self.result: Result | None = None

    def run(self) -> Result:
        while self.result is None:
            operation, argument = self.code[self.at]
            self.at += 1
            self.spend(1)
            operation(self, argument)
        return self.result

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.limits.steps:
            self.fail(f"more than {self.limits.steps} steps; does a loop never end?")

    def fail(self, message: str) -> NoReturn:
        raise PseudocodeError(self.line, message)

    # Names and where the program goes next

    def at_line(self, line: int) -> None:
        self.line = line

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def load(self, name: str) -> None:
        if name not in self.names:
            self.fail(f"`{name[:30]}` has no value here")
        self.push(self.names[name])

    def store(self, name: str) -> None:
        self.names[name] = self.stack.pop()

    def jump(self, offset: int) -> None:
        self.at += offset

    def unless(self, offset: int) -> None:
        if not self.truth():
            self.at += offset

    def turns(self, _: None) -> None:
        count = self.whole(self.stack.pop(), "the number of turns")
        self.stack.append(iter(range(count)))

    def walk(self, _: None) -> None:
        self.stack.append(iter(self.list_of(self.stack.pop())))

    def advance(self, argument: tuple[str | None, int]) -> None:
        name, exit_offset = argument
        value = next(self.stack[-1], None)
        if value is None:
            self.stack.pop()
            self.at += exit_offset
        elif name is not None:
            self.names[name] = value

    def answer(self, _: None) -> None:
        if self.callers:
            self.fail("`answer` stands inside a function; write `return`")
        self.result = Result(self.stack.pop(), self.names, self.steps)

    # The program's own functions

    def define(self, function: tuple[str, list[str], Code]) -> None:
        name, names, code = function
        if name in _BUILT_IN:
            self.fail(f"function `{name}` is built in; choose another name")
        self.functions[name] = (names, code)

    def call(self, argument: tuple[str, int]) -> None:
        name, count = argument
        values = self.take(count)
        if name in _BUILT_IN:
            least, most, built_in = _BUILT_IN[name]
            if not least <= count <= most:
                self.fail(f"`{name}` takes {least if count < least else most} values here, not {count}")
            self.push(built_in(self, *values))
            return
        names, code = self.functions.get(name) or self.fail(f"there is no function `{name[:30]}` here")
        if len(names) != count:
            self.fail(f"`{name[:30]}` takes {len(names)} values, not {count}")
        if len(self.callers) == self.limits.calls:
            self.fail(f"calls more than {self.limits.calls} deep; does a function call itself for ever?")
        self.callers.append((self.code, self.at, self.names, self.line, len(self.stack)))
        self.code, self.at, self.names = code, 0, dict(zip(names, values, strict=True))

    def give_back(self, _: None) -> None:
        if not self.callers:
            self.fail("`return` stands outside a function; write `answer`")
        value = self.stack.pop()
        self.code, self.at, self.names, self.line, height = self.callers.pop()
        self.stack[height:] = [value]

    # Truths, numbers and lists

    def truth(self) -> bool:
        value = self.stack.pop()
        return value if isinstance(value, bool) else self.fail(f"{_kind(value)} stands where true or false is needed")

    def opposite(self, _: None) -> None:
        self.push(not self.truth())

    def compare(self, sign: str) -> None:
        left, right = self.take(2)
        if sign in ("==", "!="):
            if type(left) is not type(right):
                self.fail(f"{_kind(left)} and {_kind(right)} cannot be compared")
            self.spend(len(left) if isinstance(left, tuple) else 0)
            self.push((left == right) == (sign == "=="))
        else:
            a, b = self.fraction(left), self.fraction(right)
            self.push(a < b if sign == "<" else a <= b if sign == "<=" else a > b if sign == ">" else a >= b)

    def number(self, digits: str) -> None:
        self.fits(len(digits) * 3)
        self.fits(_bits(value := Fraction(digits)))
        self.push(value)

    def arithmetic(self, sign: str) -> None:
        left, right = self.take(2)
        if sign == "+" and isinstance(left, tuple) and isinstance(right, tuple):
            self.push(self.listed([*left, *right]))
        elif sign in ("^", "**"):
            self.push(self.power(self.fraction(left), self.fraction(right)))
        else:
            self.push(self.combined(self.fraction(left), sign, self.fraction(right)))

    def combined(self, a: Fraction, sign: str, b: Fraction) -> Fraction:
        self.fits(_bits(a) + _bits(b))
        if sign == "/":
            return a / b if b else self.fail("division by zero")
        return a + b if sign == "+" else a - b if sign == "-" else a * b

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            self.fail("an exponent is a whole number")
        if base == 0 and exponent < 0:
            self.fail("division by zero")
        self.fits(_bits(base) * abs(exponent.numerator))
        return base**exponent.numerator

    def fits(self, bits: int) -> None:
        if bits > self.limits.bits:
            self.fail(f"a number would need more than {self.limits.bits} bits")

    def items(self, count: int) -> None:
        self.push(self.listed(self.take(count)))

    def item(self, _: None) -> None:
        items, place = self.take(2)
        items, place = self.list_of(items), self.whole(place, "the place in a list")
        if not 1 <= place <= len(items):
            self.fail(f"the list has {len(items)} items and no item {place}; the first is item 1")
        self.push(items[place - 1])

    def listed(self, values: list[Any]) -> tuple[Scalar, ...]:
        if len(values) > self.limits.items:
            self.fail(f"a list would have more than {self.limits.items} items")
        if any(isinstance(value, tuple) for value in values):
            self.fail("a list cannot hold a list")
        self.spend(len(values))
        return tuple(values)

    def take(self, count: int) -> list[Any]:
        """The last `count` values, in the order in which they were made."""
        first = len(self.stack) - count
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def fraction(self, value: Value) -> Fraction:
        return value if isinstance(value, Fraction) else self.fail(f"{_kind(value)} stands where a number is needed")

    def list_of(self, value: Value) -> tuple[Scalar, ...]:
        return value if isinstance(value, tuple) else self.fail(f"{_kind(value)} stands where a list is needed")

    def whole(self, value: Value, what: str) -> int:
        number = self.fraction(value)
        return number.numerator if number.denominator == 1 else self.fail(f"{what} is a whole number, not {number}")

    # The functions that the language brings along

    def floor(self, value: Value) -> Fraction:
        return Fraction(math.floor(self.fraction(value)))

    def ceil(self, value: Value) -> Fraction:
        return Fraction(math.ceil(self.fraction(value)))

    def round(self, value: Value, places: Value = Fraction(0)) -> Fraction:
        scale = self.power(Fraction(10), self.fraction(places))
        scaled = self.combined(abs(self.fraction(value)), "*", scale)
        size = math.floor(scaled + Fraction(1, 2)) / scale
        return -size if self.fraction(value) < 0 else size

    def absolute(self, value: Value) -> Fraction:
        return abs(self.fraction(value))

    def remainder(self, value: Value, divisor: Value) -> Fraction:
        a, b = self.fraction(value), self.fraction(divisor)
        return self.combined(a, "-", b * math.floor(self.combined(a, "/", b)))

    def minimum(self, *values: Value) -> Fraction:
        return min(self.fractions(values))

    def maximum(self, *values: Value) -> Fraction:
        return max(self.fractions(values))

    def total(self, *values: Value) -> Fraction:
        total = Fraction(0)
        for value in self.fractions(values):
            total = self.combined(total, "+", value)
        return total

    def fractions(self, values: tuple[Value, ...]) -> list[Fraction]:
        """The numbers of one list, or the numbers given one by one."""
        numbers = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
        self.spend(len(numbers))
        return [self.fraction(number) for number in numbers] or self.fail("the list is empty")

    def length(self, value: Value) -> Fraction:
        return Fraction(len(self.list_of(value)))

    def range(self, first: Value, last: Value) -> tuple[Scalar, ...]:
        low, high = self.whole(first, "the start of a range"), self.whole(last, "the end of a range")
        if high - low >= self.limits.items:
            self.fail(f"a list would have more than {self.limits.items} items")
        return self.listed([Fraction(number) for number in range(low, high + 1)])


_MANY = 1_000
_ENGLISH: dict[str, tuple[int, int, Callable[..., Value]]] = {
    "floor": (1, 1, _Machine.floor),
    "ceil": (1, 1, _Machine.ceil),
    "round": (1, 2, _Machine.round),
    "abs": (1, 1, _Machine.absolute),
    "remainder": (2, 2, _Machine.remainder),
    "min": (1, _MANY, _Machine.minimum),
    "max": (1, _MANY, _Machine.maximum),
    "sum": (1, _MANY, _Machine.total),
    "length": (1, 1, _Machine.length),
    "range": (2, 2, _Machine.range),
}
_CHINESE = ("向下取整", "向上取整", "四舍五入", "绝对值", "余数", "最小", "最大", "求和", "长度", "范围")
_BUILT_IN = _ENGLISH | dict(zip(_CHINESE, _ENGLISH.values(), strict=True))
"""Name -> least and most values it takes, and what computes it."""


def _kind(value: Any) -> str:
    kinds = {Fraction: "a number", bool: "true or false", str: "a text", tuple: "a list"}
    return kinds[type(value)]


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()
