"""chat: conversations, as OpenAI messages or ShareGPT turns; every answer of the assistant is learned.

An answer is one row, its prompt the turns before it. An instruct model gets them through its own chat template.
"""

from collections.abc import Iterator

from data_templates import Message, Row, Template

ROLES = {"system": "system", "user": "user", "assistant": "assistant",
         "human": "user", "gpt": "assistant", "bot": "assistant"}  # fmt: skip


def template() -> Template:
    """No options. Name the column that holds the turns with `data.columns.messages`."""
    return Template(
        fields={"messages": "the turns: [{role, content}, ...] or [{from, value}, ...]"},
        prompt=lambda row: [*map(dict, row["messages"])] if "answer" in row else turns(row),
        completion=lambda row: row["answer"],
        metrics=("rouge", "chrf"),
        samples=samples,
        example={
            "messages": [
                {"role": "user", "content": "What grows wetter the more it dries?"},
                {"role": "assistant", "content": "A towel."},
            ]
        },
    )


def samples(record: Row) -> Iterator[Row]:
    """One row for each answer, with the turns before it."""
    messages = turns(record)
    answers = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("no turn of the assistant, so there is nothing to learn")
    for place in answers:
        if not place or messages[place - 1]["role"] != "user":
            raise ValueError(f"turn {place + 1}: an answer has a turn of the user right before it")
        yield {"messages": messages[:place], "answer": messages[place]["content"]}


def turns(record: Row) -> list[Message]:
    """The turns as {role, content}; what is not text, or no turn of these roles, is refused, never turned into text."""
    if isinstance(record["messages"], str):  # a question, as `sft generate --prompt` asks it
        return [{"role": "user", "content": record["messages"]}]
    if not isinstance(record["messages"], list):
        raise ValueError("`messages` is not a list of turns")
    if record.get("tools") or record.get("functions"):
        raise ValueError("offers tools; tool calls are not supported: leave the row out")
    found: list[Message] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for place, turn in enumerate(record["messages"], 1):
        where = f"turn {place}"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} is not an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if turn.get("tool_calls") or turn.get("function_call") or role in ("tool", "function", "function_call"):
            raise ValueError(
                f"{where} calls a tool or answers for one; tool calls are not supported: leave the row out"
            )
        if role not in ROLES:
            raise ValueError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
        if isinstance(content, list):
            raise ValueError(f"{where} is a list of parts, as for pictures; only text is supported")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where} has no text")
        found.append({"role": ROLES[role], "content": content})
    return found
