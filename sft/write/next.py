"""`sft generate --next`: the probabilities of the tokens that may come next, as a table; and a text grown by hand."""

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from unicodedata import east_asian_width

from data_templates import Row
from sft import UserError
from sft.model.adapter import as_base
from sft.model.load import decoding
from sft.show import say
from sft.tokens.codec import Codec
from sft.write.ask import Answerer, fitting, prompt_ids, row_of, typed
from sft.write.generate import read
from sft.write.stream import Text, TextBatch

BAR_WIDTH = 24
"""Columns of the longest bar, which stands for 100 %."""


def explore(answerer: Answerer, questions: Iterable[str | Row], count: int, by_hand: bool) -> None:
    """Print the `count` likeliest next tokens after each question. `by_hand`: then ask what to go on with, a token by
    its place in the table (`#3`) or a text, and so on until Ctrl-D or the end token."""
    opened = answerer.opened
    codec, batch = opened.codec, TextBatch(answerer.model)
    config = decoding(opened.recipe, codec)
    with as_base(answerer.model) if answerer.base else nullcontext():
        for question in questions:
            row = question if isinstance(question, Mapping) else row_of(opened.template, question)
            prompt = fitting(opened.recipe, codec, config, prompt_ids(codec, opened.template, row, str(question)))
            text = Text(codec, prompt, config, opened.recipe.eval.seed)
            table, likeliest = _table(batch, text, count)
            print(table)
            for line in typed("#3 for the third, or text to go on with> ") if by_hand else ():
                place = int(line[1:]) if line[:1] == "#" and line[1:].isdecimal() else 0 if line else 1
                try:
                    text.written += [likeliest[place - 1]] if 1 <= place <= len(likeliest) else codec.added(line)
                except UserError as error:  # a person can try again
                    say(str(error))
                    continue
                if text.written[-1:] == codec.end[-1:]:
                    print(read(codec, text.written)[0])
                    break
                if len(text.written) >= config.max_new_tokens:
                    say(f"{config.max_new_tokens} tokens are the limit; --max-new-tokens gives more")
                    break
                print(read(codec, text.written)[0])
                table, likeliest = _table(batch, text, count)
                print(table)


def _table(batch: TextBatch, text: Text, count: int) -> tuple[str, list[int]]:
    """The table, and the ids of its tokens."""
    logits = batch.next(text.prompt + text.written)
    shares, ids = text.scores(logits).softmax(-1).topk(min(count, len(logits)))
    names = [readable(text.codec, int(token)) for token in ids]
    width = max(map(_width, names))
    lines = [
        f"{place:>3}  {name}{' ' * (width - _width(name))}  {int(token):>7}  {share:>6.1%}  {_bar(share)}"
        for place, (name, token, share) in enumerate(zip(names, ids, shares.tolist(), strict=True), 1)
    ]
    return "\n".join(line.rstrip() for line in lines), [int(token) for token in ids]


def _bar(share: float) -> str:
    return "█" * round(BAR_WIDTH * share)


def readable(codec: Codec, token: int) -> str:
    """A token as it can be read: its text in quotes, or its name where it has no text of its own."""
    text = codec.text([[token]])[0]
    name = str(codec.tokenizer.convert_ids_to_tokens(token))
    if token == codec.end[-1]:
        return f"{name} (end)"
    return name if "\ufffd" in text or not text else json.dumps(text, ensure_ascii=False)


def _width(text: str) -> int:
    """Columns in a terminal: two for each Chinese character."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
