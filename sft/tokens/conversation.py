"""What a chat template makes of a whole conversation, compared with the text of the row that is trained."""

from collections.abc import Sequence
from typing import NamedTuple

from data_templates import Message

TRIMMED = "answers whose outer white space the chat template would trim"
DOUBLED = "answers with a block of their own behind that of the chat template"
REWRITTEN = "answers that the chat template would write otherwise"
OTHER_TURNS = "prompts that the chat template writes otherwise once they are answered"
THOUGHTS = "earlier answers whose thoughts the chat template leaves out"
LOST = "prompts with a turn that the chat template leaves out"


class Difference(NamedTuple):
    """One way in which a row is other than what its chat template makes of the whole conversation."""

    kind: str
    shown: str
    """The text that it is about, shortened."""


class Ours(NamedTuple):
    """The texts that a row is put together of, with its answer behind `lead`."""

    prompt: str
    """As the model reads it, `opening` at its end."""
    opening: str
    lead: str
    closing: str


def differences(turns: Sequence[Message], answer: str, whole: str, ours: Ours) -> list[Difference]:
    """Compare a row with `whole`, which the chat template makes of its turns and its answer."""
    found = _left_out(turns, ours.prompt)
    before = ours.prompt + ours.lead
    if whole.startswith(before + answer + ours.closing):
        return found
    asked, shown = ours.prompt.removesuffix(ours.opening), repr(answer[:80])
    block = ours.opening.split()[:1]
    if not whole.startswith(asked):
        found.append(Difference(OTHER_TURNS, repr(_parting(asked, whole))))
    elif block and (not whole.startswith(ours.prompt) or answer.lstrip().startswith(block[0])):
        found.append(Difference(DOUBLED, f"{ours.opening!r} + {shown}"))
    elif whole.startswith(before + answer.strip() + ours.closing):
        found.append(Difference(TRIMMED, shown))
    else:
        found.append(Difference(REWRITTEN, f"{shown}, by the chat template {whole[len(before) :][:80]!r}"))
    return found


def _left_out(turns: Sequence[Message], prompt: str) -> list[Difference]:
    """Turns whose text is not in the prompt. Templates trim what stands around a text."""
    texts, place = [turn["content"].strip() for turn in turns], 0
    for text in texts:
        place = prompt.find(text, place)
        if place < 0:
            break
        place += len(text)
    else:
        return []  # all are there, in their order
    found = []
    for turn, text in zip(turns, texts, strict=True):
        if prompt.count(text) < sum(other.count(text) for other in texts):
            answer = text.rpartition("</think>")[2].strip() if turn["role"] == "assistant" else ""
            kind = THOUGHTS if answer and answer != text and answer in prompt else LOST
            found.append(Difference(kind, f"{turn['role']}: {text[:80]!r}"))
    return found


def _parting(one: str, other: str) -> str:
    """The text from where another begins to differ."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[max(0, place - 20) : place + 60]
