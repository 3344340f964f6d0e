"""`sft check`: what became of every row, before any training, and a refusal where too much was lost."""

import json
from dataclasses import asdict
from typing import Any

from sft import UserError
from sft.recipe import Recipe
from sft.tokens.account import counts_table, histogram, notes_lines
from sft.tokens.codec import Codec
from sft.tokens.conversation import DOUBLED, LOST
from sft.tokens.counts import RETURNS
from sft.tokens.example import example_by_token
from sft.tokens.opened import Opened
from sft.tokens.prepare import Tokens


class Refused(UserError):
    """The data break a threshold of the recipe's `check:` section."""

    status = 1


def check(opened: Opened, show: int = 0, as_json: bool = False) -> None:
    """Read all rows through template and tokenizer and print what was found; `show` prints so many rows token by token.

    Raises Refused, for exit status 1, where a threshold of `check:` is broken.
    """
    recipe, tokens, codec = opened.recipe, opened.tokens, opened.codec
    broken = problems(recipe, tokens)
    rows = [tokens.train[i] for i in range(min(show, len(tokens.train)))]
    if as_json:
        print(json.dumps(as_data(tokens, codec, broken) | {"rows": rows}, ensure_ascii=False))
    else:
        print(counts_table(tokens.counts))
        if tokens.notes:
            print("\nread as it is, or not at all\n" + notes_lines(tokens.notes))
        print(f"\nlengths in tokens; trainer.max_length is {recipe.max_length}")
        print(histogram(tokens.counts["train"]))
        day = f", which prints the day: {codec.date} (`prompt_date`)" if codec.prints_date else ""
        print(f"\nthe prompt goes {'through the chat template' if codec.chat else 'in as plain text'}{day}")
        for row in rows:
            print("\n" + example_by_token(codec, row["input_ids"], row["labels"], row.get("weights")))
    if broken:
        raise Refused("\n".join(broken))


def refuse(recipe: Recipe, tokens: Tokens) -> None:
    """Raise Refused where the tokens break a threshold: training begins with this."""
    if broken := problems(recipe, tokens):
        raise Refused("\n".join(broken))


def problems(recipe: Recipe, tokens: Tokens) -> list[str]:
    """One sentence for each threshold that is broken, with the first row that counts and the setting to write."""
    sides = list(tokens.counts.values())
    seen = sum(counts.rows + counts.dropped for counts in sides)
    damaged = [what for counts in sides for what in counts.suspicious if what != RETURNS]
    found = []
    for name, examples, what, remedy in (
        ("dropped", ["dropped"], "rows do not fit into trainer.max_length", "raise it, or shorten the outputs"),
        ("trimmed", ["trimmed"], "prompts lost their beginning", "raise trainer.max_length"),
        ("changed", ["changed"], "outputs are not given back by the tokenizer", "clean the texts"),
        ("prompts_changed", ["prompts_changed"], "prompts are not given back by the tokenizer",
         "clean the texts, or use a tokenizer that knows their characters"),
        ("duplicates", [], "rows are there more than once", "remove them"),
        ("damaged", damaged, "rows hold text that looks damaged", "mend the file"),
        ("doubled", [DOUBLED], "answers have a block of their own behind that of the chat template",
         "take it out of the answers, or out of the tokenizer's chat template"),
        ("lost_turns", [LOST], "rows have a turn that the chat template leaves out",
         "put its text into a turn of the user, or mend the tokenizer's chat template"),
        ("empty", ["empty"], "rows have an empty field", "fill it in, or remove them"),
    ):  # fmt: skip
        count = sum(getattr(counts, name) for counts in sides)
        limit = getattr(recipe.check, f"max_{name}")
        if count > limit * seen:
            first = [f"; the first: {c.examples[e]}" for c in sides for e in examples if e in c.examples][:1]
            enough = min(1.0, -(-count * 1000 // seen) / 1000)
            found.append(
                f"{count:,} of {seen:,} {what} ({count / seen:.2%}, allowed are {limit:.2%}{''.join(first)}); "
                f"{remedy}, or allow it: check.max_{name}={enough}"
            )
    return found


def as_data(tokens: Tokens, codec: Codec, broken: list[str]) -> dict[str, Any]:
    """The same for machines."""
    sides: dict[str, Any] = {side: asdict(counts) for side, counts in tokens.counts.items()}
    return sides | {
        "prompt_format": "chat" if codec.chat else "plain",
        "problems": broken,
        "notes": [note._asdict() for note in tokens.notes],
        "rows": dict(tokens.digests),
    }
