"""Requests to ids: the template is applied here, so that no client writes a prompt by hand."""

from dataclasses import dataclass

from data_templates import Message, Prompt, Template, as_text
from sft.decoding import SETTINGS, drawing
from sft.model.load import decoding
from sft.rows.template import read_prompt
from sft.serve.api import Chat, Completion, RequestRefused
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.write.ask import prompt_ids, row_of, takes_turns
from sft.write.stream import Text


@dataclass(frozen=True)
class ServerLimits:
    max_tokens: int
    """Longest answer."""
    max_requests: int
    """Answers written or waiting at once."""


def texts_of(opened: Opened, limits: ServerLimits, asked: Completion | Chat) -> list[Text]:
    """The answers to be written. Raises UserError or RequestRefused for what cannot be asked."""
    recipe, codec = opened.recipe, opened.codec
    ids = chat_ids(opened, asked) if isinstance(asked, Chat) else completion_ids(opened, asked)
    given = {name: value for name, value in asked if name in SETTINGS and value is not None}
    room = recipe.max_length - len(ids)
    wanted = asked.max_tokens
    if isinstance(asked, Chat) and asked.max_completion_tokens is not None:
        wanted = asked.max_completion_tokens
    if room < (wanted or 1):
        raise RequestRefused(
            400,
            f"the prompt has {len(ids)} tokens, the answer shall have {wanted or 'at least 1'}, and both together "
            f"{recipe.max_length} at most",
            "context_length_exceeded",
        )
    if wanted and wanted > limits.max_tokens:
        raise RequestRefused(400, f"{wanted} tokens are asked for; this server writes {limits.max_tokens} at most")
    if asked.n > limits.max_requests:
        raise RequestRefused(
            400, f"`n` is {asked.n}; this server writes {limits.max_requests} answers at once", param="n"
        )
    generation = recipe.generation | drawing(given)
    config = decoding(recipe.model_copy(update={"generation": generation}), codec)
    config.max_new_tokens = wanted or min(config.max_new_tokens, limits.max_tokens, room)
    seed = recipe.eval.seed if asked.seed is None else asked.seed
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    return [Text(codec, ids, config, seed + i, stops) for i in range(asked.n)]


def completion_ids(opened: Opened, asked: Completion) -> list[int]:
    """The ids of a row, or of a text that is the whole prompt."""
    if (asked.row is None) == (asked.prompt is None):
        raise RequestRefused(400, "write either `prompt` or `row`", param="prompt")
    if asked.row is not None:
        return _ids(opened.codec, read_prompt(opened.template, asked.row, "the row"))
    assert asked.prompt is not None
    if row_of(opened.template, "") is None:
        return prompt_ids(opened.codec, opened.template, None, asked.prompt)
    return _ids(opened.codec, asked.prompt)


def chat_ids(opened: Opened, asked: Chat) -> list[int]:
    """The ids of a row, or of a conversation: its last turn is the template's first field.

    A template for conversations gets all turns. Of others, the turns before the last go in front as a chat model's
    template writes them, or, for a plain model, as so many prompts and outputs with their end tokens.
    """
    codec, template = opened.codec, opened.template
    if (asked.row is None) == (not asked.messages):
        raise RequestRefused(400, "write either `messages` or `row`", param="messages")
    if asked.row is not None:
        return _ids(codec, read_prompt(template, asked.row, "the row"))
    roles = {"developer": "system"}
    turns = [{"role": roles.get(turn.role, turn.role), "content": turn.text()} for turn in asked.messages]
    if turns[-1]["role"] != "user":
        raise RequestRefused(400, "the last turn is the user's; the model writes what follows", param="messages")
    if takes_turns(template):
        return _ids(codec, read_prompt(template, {next(iter(template.fields)): turns}, "the messages"))
    if codec.chat:
        return _ids(codec, [*turns[:-1], *_last_turns(template, turns[-1]["content"])])
    if any(turn["role"] == "system" for turn in turns):
        raise RequestRefused(
            400, "this model was trained on prompts alone; leave out the system turn", param="messages"
        )
    ids: list[int] = []
    for turn in turns:
        if turn["role"] == "assistant":
            ids += codec.outputs([turn["content"]])[0] + codec.end
        else:
            asked_ids = prompt_ids(codec, template, row_of(template, turn["content"]), turn["content"])
            ids += asked_ids[len(codec.start) :] if ids else asked_ids
    return ids


def _ids(codec: Codec, prompt: Prompt) -> list[int]:
    """The ids of a whole prompt: by now, texts that were sent in pieces stand together."""
    if codec.chat and (name := codec.special.search(as_text(prompt))):
        raise RequestRefused(
            400, f"the text holds {name[0]}, which the chat template would take for a token of its own"
        )
    return codec.prompts([prompt])[0]


def _last_turns(template: Template, content: str) -> list[Message]:
    row = row_of(template, content)
    prompt = content if row is None else read_prompt(template, row, "the message")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
