"""Word problems with runnable solutions: nine families, three levels, English and Chinese, the same rows every time.

    python recipes/data/word_problems.py zh train 2000 word_problems.zh.train.jsonl

Train and test share no wording, no name, no thing, and no set of numbers (whatever the family or the language).
"""

import argparse
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from math import ceil, floor
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Level:
    """One level of a family; how it reads stands in `word_problems.{en,zh}.txt`."""

    numbers: Callable[[Random], dict[str, int]]
    """Draws the numbers."""
    answer: Callable[..., int | Fraction]
    """The numbers, by name -> the answer, worked out apart from the written steps."""


@dataclass(frozen=True)
class Text:
    """One level of a family in one language; `{braces}` are filled with numbers, a name and a thing."""

    questions: Mapping[str, list[str]]
    """Split -> wordings of the question."""
    steps: str
    """The solution, in the language of docs/pseudocode.md."""


NAMES = {
    ("en", "train"): ("Mira", "Tom", "Aisha", "Daniel", "Grace", "Omar", "Lucy", "Ben"),
    ("en", "test"): ("Nina", "Victor", "Chloe", "Samir", "Ruth", "Leo"),
    ("zh", "train"): ("小明", "小红", "李雷", "王芳", "陈晨", "刘洋", "小刚", "杨帆"),
    ("zh", "test"): ("小林", "孙悦", "吴桐", "赵宁", "小雪", "何平"),
}
THINGS = {
    ("en", "train"): ("pencils", "apples", "stickers", "notebooks", "candles", "muffins", "balloons", "buttons"),
    ("en", "test"): ("marbles", "oranges", "postcards", "erasers", "ribbons", "cookies"),
    ("zh", "train"): ("支铅笔", "个苹果", "张贴纸", "本练习册", "根蜡烛", "块饼干", "只气球", "颗纽扣"),
    ("zh", "test"): ("粒弹珠", "个橙子", "张明信片", "块橡皮", "条丝带", "枚徽章"),
}
"""A Chinese thing stands behind its measure word, which is its first character."""


def rows(
    language: str, split: str, level: int | None = None, count: int = 1000, seed: int = 0
) -> Iterator[dict[str, str]]:
    """`count` different rows with question, pseudocode, answer, family and level, families and levels taking turns.

    `language` is en or zh, `split` train or test, `level` 1, 2, 3 or None for all of them.
    """
    random = Random(f"{seed} {language} {split}")
    levels = (level,) if level else (1, 2, 3)
    turns = itertools.cycle(itertools.product(levels, FAMILIES))
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        row = _row(random, language, split, *next(turns))
        if row["question"] not in seen and _side(row["question"]) == split:
            seen.add(row["question"])
            misses = 0
            yield row
        elif (misses := misses + 1) > 10_000:
            raise ValueError(f"only {len(seen)} different rows were found, not {count}; ask for fewer")


def _row(random: Random, language: str, split: str, level: int, family: str) -> dict[str, str]:
    drawn, text = FAMILIES[family][level - 1], texts(language)[family, level]
    numbers = drawn.numbers(random)
    thing = random.choice(THINGS[language, split])
    words = {"name": random.choice(NAMES[language, split]), "things": thing, "unit": thing[0], "thing": thing[1:]}
    return {
        "question": random.choice(text.questions[split]).format(**numbers, **words),
        "pseudocode": text.steps.format(**numbers),
        "answer": _shown(Fraction(drawn.answer(**numbers))),
        "family": family,
        "level": str(level),
    }


@cache
def texts(language: str) -> dict[tuple[str, int], Text]:
    """Language -> (family, level) -> how it reads."""
    written = Path(__file__).with_suffix(f".{language}.txt").read_text(encoding="utf-8")
    sections = re.split(r"^\[(\w+) (\d)\]\n", written, flags=re.MULTILINE)[1:]
    found = {}
    for family, level, section in zip(sections[::3], sections[1::3], sections[2::3], strict=True):
        questions = {split: re.findall(rf"^{split}: (.+)$", section, re.MULTILINE) for split in ("train", "test")}
        steps = re.sub(r"^(train|test): .+\n", "", section, flags=re.MULTILINE).strip()
        found[family, int(level)] = Text(questions, steps)
    return found


def _side(question: str) -> str:
    """The numbers of a question, in whatever order, decide on which side of the split it may stand."""
    numbers = sorted(re.findall(r"\d+", question))
    return "train" if zlib.crc32(" ".join(numbers).encode()) % 5 else "test"


def _shown(answer: Fraction) -> str:
    return str(Decimal(answer.numerator) / answer.denominator) if 10**6 % answer.denominator == 0 else str(answer)


def _shopping_1(random: Random) -> dict[str, int]:
    return {"n": random.randint(3, 40), "price": random.randint(2, 30)}


def _shopping_2(random: Random) -> dict[str, int]:
    n, price = random.randint(3, 20), random.randint(2, 25)
    return {"n": n, "price": price, "paid": (n * price // 50 + random.randint(1, 2)) * 50}


def _shopping_3(random: Random) -> dict[str, int]:
    numbers = _shopping_1(random) | {"bags": random.randint(2, 9), "bag": random.randint(2, 6)}
    return numbers | {"off": random.choice((5, 10, 15, 20, 25)), "limit": random.randint(4, 40) * 10}


def _bill(n: int, price: int, bags: int, bag: int, off: int, limit: int) -> Fraction:
    total = n * price + bags * bag
    return Fraction(total * (100 - off), 100) if total > limit else Fraction(total)


def _sharing_1(random: Random) -> dict[str, int]:
    kids = random.randint(3, 12)
    return {"kids": kids, "total": kids * random.randint(2, 30)}


def _sharing_2(random: Random) -> dict[str, int]:
    size = random.randint(4, 15)
    return {"size": size, "total": size * random.randint(3, 30) + random.randint(1, size - 1)}


def _sharing_3(random: Random) -> dict[str, int]:
    boxes, size, kids = random.randint(2, 6), random.randint(4, 12), random.randint(8, 30)
    return {
        "boxes": boxes,
        "size": size,
        "kids": kids,
        "each": boxes * size // kids + random.randint(2, 5),
        "pack": random.randint(5, 20),
    }


def _travel_2(random: Random) -> dict[str, int]:
    return {
        "first": random.randint(2, 6),
        "slow": random.randint(30, 60),
        "second": random.randint(2, 6),
        "fast": random.randint(65, 120),
    }


def _travel_3(random: Random) -> dict[str, int]:
    first, second = random.randint(2, 4), random.randint(2, 4)
    hours = first + second
    slow = hours * random.randint(ceil(30 / hours), floor(60 / hours))
    return {"first": first, "slow": slow, "second": second, "fast": slow + hours * random.randint(1, 8)}


def _saving_2(random: Random) -> dict[str, int]:
    spend = random.randint(2, 20)
    return {
        "start": random.randint(10, 200),
        "save": spend + random.randint(3, 30),
        "spend": spend,
        "weeks": random.randint(4, 30),
    }


def _saving_3(random: Random) -> dict[str, int]:
    start, save = random.randint(10, 150), random.randint(8, 40)
    return {"start": start, "save": save, "goal": start + save * random.randint(3, 20) + random.randint(1, save)}


def _garden(random: Random, *more: tuple[str, int, int]) -> dict[str, int]:
    wide = random.randint(4, 30)
    return {"long": wide + random.randint(2, 30), "wide": wide} | {name: random.randint(*span) for name, *span in more}


def _school_1(random: Random) -> dict[str, int]:
    return {"pupils": 20 * random.randint(4, 60), "walk": 5 * random.randint(2, 17)}


def _school_2(random: Random) -> dict[str, int]:
    return {"pupils": 400 * random.randint(1, 6), "walk": 5 * random.randint(2, 15), "bus": 5 * random.randint(2, 18)}


def _school_3(random: Random) -> dict[str, int]:
    return {"price": 20 * random.randint(4, 60), "up": 5 * random.randint(1, 10), "down": 5 * random.randint(1, 10)}


def _scores_1(random: Random) -> dict[str, int]:
    a, b = random.randint(60, 98), random.randint(60, 98)
    return {"a": a, "b": b, "c": random.randint(20, 31) * 3 + -(a + b) % 3}


def _scores_2(random: Random) -> dict[str, int]:
    a, b, c = (random.randint(60, 98) for _ in range(3))
    return {"a": a, "b": b, "c": c, "mean": (a + b + c + random.randint(15, 24) * 4 + -(a + b + c) % 4) // 4}


def _scores_3(random: Random) -> dict[str, int]:
    scores = {name: random.randint(55, 99) for name in "abcde"}
    prize = random.randint(3, 9)
    return scores | {"limit": random.randint(70, 90), "prize": prize, "small": random.randint(1, prize - 1)}


def _baking(random: Random) -> dict[str, int]:
    top, below = random.choice(((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (2, 5), (3, 5), (4, 5)))
    return {"top": top, "below": below, "n": random.randint(3, 40)}


def _baking_2(random: Random) -> dict[str, int]:
    numbers = _baking(random)
    needed = ceil(Fraction(numbers["n"] * numbers["top"], numbers["below"]))
    return numbers | {"have": needed + random.randint(1, 12)}


def _baking_3(random: Random) -> dict[str, int]:
    numbers = _baking(random) | {"each": random.randint(2, 5)}
    needed = ceil(Fraction(numbers["n"] * numbers["top"], numbers["below"]))
    eggs = numbers["n"] * numbers["each"]
    return {name: numbers[name] for name in ("top", "below", "each")} | {
        "cups": max(2, needed + random.randint(-2, 4)),
        "eggs": eggs + random.randint(-2, 12),
    }


def _taxi(random: Random, *more: tuple[str, int, int]) -> dict[str, int]:
    numbers = {"base": random.randint(5, 14), "rate": random.randint(2, 4)}
    return numbers | {name: random.randint(*span) for name, *span in more}


def _taxi_3(random: Random) -> dict[str, int]:
    numbers = _taxi(random, ("free", 2, 4), ("far", 8, 15))
    return numbers | {
        "more": numbers["rate"] + random.randint(1, 3),
        "km": random.randint(numbers["free"] + 1, numbers["far"] + 15),
    }


def _taxi_fare(base: int, rate: int, free: int, far: int, more: int, km: int) -> int:
    return base + rate * (min(km, far) - free) + more * max(km - far, 0)


FAMILIES: dict[str, tuple[Level, Level, Level]] = {
    "shopping": (
        Level(_shopping_1, lambda n, price: n * price),
        Level(_shopping_2, lambda n, price, paid: paid - n * price),
        Level(_shopping_3, _bill),
    ),
    "sharing": (
        Level(_sharing_1, lambda kids, total: total // kids),
        Level(_sharing_2, lambda size, total: total % size),
        Level(_sharing_3, lambda boxes, size, kids, each, pack: ceil(Fraction(kids * each - boxes * size, pack))),
    ),
    "travel": (
        Level(
            lambda random: {"speed": random.randint(30, 120), "hours": random.randint(2, 12)},
            lambda speed, hours: speed * hours,
        ),
        Level(_travel_2, lambda first, slow, second, fast: first * slow + second * fast),
        Level(_travel_3, lambda first, slow, second, fast: Fraction(first * slow + second * fast, first + second)),
    ),
    "saving": (
        Level(
            lambda random: {
                "start": random.randint(10, 200),
                "save": random.randint(3, 40),
                "weeks": random.randint(3, 30),
            },
            lambda start, save, weeks: start + save * weeks,
        ),
        Level(_saving_2, lambda start, save, spend, weeks: start + (save - spend) * weeks),
        Level(_saving_3, lambda start, save, goal: ceil(Fraction(goal - start, save))),
    ),
    "garden": (
        Level(_garden, lambda long, wide: long * wide),
        Level(lambda random: _garden(random, ("gate", 1, 3)), lambda long, wide, gate: 2 * (long + wide) - gate),
        Level(
            lambda random: _garden(random, ("path", 1, 3), ("cost", 4, 30)),
            lambda long, wide, path, cost: ((long + 2 * path) * (wide + 2 * path) - long * wide) * cost,
        ),
    ),
    "percent": (
        Level(_school_1, lambda pupils, walk: pupils * walk // 100),
        Level(_school_2, lambda pupils, walk, bus: pupils * (100 - walk) * bus // 10000),
        Level(_school_3, lambda price, up, down: abs(Fraction(price * (100 + up) * (100 - down), 10000) - price)),
    ),
    "scores": (
        Level(_scores_1, lambda a, b, c: Fraction(a + b + c, 3)),
        Level(_scores_2, lambda a, b, c, mean: 4 * mean - a - b - c),
        Level(
            _scores_3,
            lambda limit, prize, small, **scores: sum(prize if s >= limit else small for s in scores.values()),
        ),
    ),
    "baking": (
        Level(_baking, lambda top, below, n: Fraction(n * top, below)),
        Level(_baking_2, lambda top, below, n, have: have - Fraction(n * top, below)),
        Level(_baking_3, lambda top, below, each, cups, eggs: min(cups * below // top, eggs // each)),
    ),
    "taxi": (
        Level(lambda random: _taxi(random, ("km", 3, 60)), lambda base, rate, km: base + rate * km),
        Level(
            lambda random: _taxi(random, ("free", 2, 6), ("km", 2, 40)),
            lambda base, rate, free, km: base + rate * max(km - free, 0),
        ),
        Level(_taxi_3, _taxi_fare),
    ),
}


def main() -> None:
    """Writes a file of rows, one JSON object a line, whole or not at all."""
    arguments = argparse.ArgumentParser(description="Write word problems with runnable solutions as JSONL.")
    arguments.add_argument("language", choices=("en", "zh"))
    arguments.add_argument("split", choices=("train", "test"))
    arguments.add_argument("count", type=int)
    arguments.add_argument("out", type=Path)
    chosen = arguments.parse_args()
    made = [json.dumps(row, ensure_ascii=False) for row in rows(chosen.language, chosen.split, count=chosen.count)]
    part = chosen.out.with_name(f"{chosen.out.name}.part")
    part.write_text("".join(f"{line}\n" for line in made), encoding="utf-8")
    os.replace(part, chosen.out)
    print(f"{chosen.out}: {len(made)} rows")


if __name__ == "__main__":
    main()
