"""Rows of conversations against what the chat template makes of the whole: each kind of difference, counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft import UserError
from sft.recipe import load
from sft.tokens.account import counts_line, counts_table
from sft.tokens.check import Refused, refuse
from sft.tokens.conversation import DOUBLED, LOST, OTHER_TURNS, REWRITTEN, THOUGHTS, TRIMMED
from sft.tokens.counts import Counts
from sft.tokens.opened import Opened

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = CHATML.replace("m.content", "m.content | trim")
PHI_3 = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set told = m.content.split('</think>')[-1].lstrip() %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}\n</think>\n\n"
    "{{ told }}{% elif m.role == 'assistant' %}{{ told }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # puts what the system says into the last turn, where that is the user's
    "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last and told is defined %}{{ told }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
LOUD = CHATML.replace("m.content", "(m.content | upper if m.content == 'whisper' else m.content)")


def turns(*texts: str) -> dict[str, Any]:
    """A record of a conversation: `system: Be brief.`, or the texts of user and assistant in turn."""
    roles = ("user", "assistant") if not texts[0].startswith("system: ") else ("assistant", "user")
    return {
        "messages": [
            {"role": "system", "content": text.removeprefix("system: ")}
            if text.startswith("system: ")
            else {"role": roles[i % 2], "content": text}
            for i, text in enumerate(texts)
        ]
    }


@pytest.fixture
def opened(tmp_path: Path, chat_like: Path, write_recipe: Callable[..., Path]) -> Callable[..., Opened]:
    """A recipe whose tokenizer has that chat template, on ten plain conversations and then those given."""

    def make(template: str, *records: dict[str, Any]) -> Opened:
        tokenizer = AutoTokenizer.from_pretrained(chat_like)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        rows = [turns(f"What is {i} and {i}?", f"It is {i + i}.") for i in range(10)]
        return Opened(load(write_recipe(tmp_path, [*rows, *records], template="chat")))

    return make


def found(counts: dict[str, Counts]) -> dict[str, int]:
    kinds = [kind for side in counts.values() for kind in side.differences]
    return {kind: sum(side.differences.get(kind, 0) for side in counts.values()) for kind in kinds}


ASKED = "Which way?"
DIFFERENT = {
    "an answer is trimmed": (LLAMA_3, turns(ASKED, " Left.\n"), TRIMMED, "' Left.\\n'"),
    "thoughts behind an empty block": (
        QWEN_3, turns(ASKED, "<think>\nHm.\n</think>\n\nLeft."), DOUBLED,
        "'<think>\\n\\n</think>\\n\\n' + '<think>\\nHm.\\n</think>\\n\\nLeft.'",
    ),
    "an empty block behind an empty one": (
        QWEN_3, turns(ASKED, "<think></think>Left."), DOUBLED,
        "'<think>\\n\\n</think>\\n\\n' + '<think></think>Left.'",
    ),
    "a system turn is left out": (PHI_3, turns("system: Be brief.", ASKED, "Left."), LOST, "system: 'Be brief.'"),
    "a system turn that the user repeats is left out": (
        PHI_3, turns("system: Be brief.", "Be brief. Which way?", "Left."), LOST, "system: 'Be brief.'",
    ),
    "an answer is written otherwise": (LOUD, turns(ASKED, "whisper"), REWRITTEN, "'whisper', by the chat template 'WH"),
    "a prompt changes once it is answered": (MISTRAL, turns("system: Be brief.", ASKED, "Left."), OTHER_TURNS, "'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_row_that_its_chat_template_would_write_otherwise_is_counted_with_its_place(
    name: str, opened: Callable[..., Opened]
) -> None:
    template, record, kind, shown = DIFFERENT[name]
    counts = opened(template, record, record | {"id": 2}).tokens.counts
    assert found(counts) == {kind: 2}
    (side,) = (side for side, some in counts.items() if kind in some.examples)
    assert f"rows.jsonl:11: {shown}" in counts[side].examples[kind]
    assert kind in counts_table(counts)
    assert f"2 {kind}" in counts_line(side, counts[side]), "training says it too"


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, QWEN_3, PHI_3, MISTRAL])
def test_rows_that_the_chat_template_writes_as_they_are_trained_differ_in_nothing(
    template: str, opened: Callable[..., Opened]
) -> None:
    assert found(opened(template, turns("a", "b", "a", "b")).tokens.counts) == {}


def test_what_the_system_says_may_stand_in_another_turn(opened: Callable[..., Opened]) -> None:
    counts = opened(MISTRAL, turns("system: Be brief.", "One?", "1", "Two?", "2")).tokens.counts
    assert LOST not in found(counts)


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_means_it(opened: Callable[..., Opened]) -> None:
    some = opened(QWEN_3, turns("One?", "<think>\nHm.\n</think>\n\nIt is 1.", "Two?", "2"))
    assert found(some.tokens.counts) == {DOUBLED: 1, THOUGHTS: 1}


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("thoughts behind an empty block", "max_doubled", "1 of 11 answers have a block of their own"),
        ("a system turn is left out", "max_lost_turns", "1 of 11 rows have a turn that the chat template leaves out"),
    ],
)
def test_two_blocks_and_a_lost_turn_are_refused_unless_allowed(
    name: str, key: str, said: str, opened: Callable[..., Opened]
) -> None:
    template, record, _, _ = DIFFERENT[name]
    some = opened(template, record)
    with pytest.raises(Refused, match=rf"{said}.*the first: \S+rows\.jsonl:11: .*check\.{key}=0\.091"):
        refuse(some.recipe, some.tokens)
    refuse(load(some.recipe.folder.parents[1] / "recipe.yaml", [f"check.{key}=0.091"]), some.tokens)


def test_a_template_that_refuses_the_answer_alone_is_a_message_about_the_row(opened: Callable[..., Opened]) -> None:
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('no such answer') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"rows\.jsonl:11: the chat template .* refuses it \(no such answer\)"):
        opened(refusing, turns(ASKED, "no")).tokens  # noqa: B018
