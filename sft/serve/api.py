"""OpenAI's requests and answers: what a request may hold, and how answers and errors look on the wire."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from sft.write.stream import Text

NOT_WRITTEN = "the answer could not be written, or the server is stopping; ask again"

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=0.01, le=100)]
"""Scores are divided by it: what overflows could fail the step that it shares with other answers."""
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(lambda t: t if t > 1e-4 else 0.0)]
"""The same; so near to 0, it means 0."""
Empty = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Strict(BaseModel):
    """What is not listed would be passed over in silence, so it is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Strict):
    """What both kinds of requests may hold. What a request leaves out is as the recipe says it."""

    model: str | None = None
    row: dict[str, Any] | None = None
    """The template's fields, in place of a prompt. Not OpenAI's: `extra_body={"row": ...}`, as are those down to
    `no_repeat_ngram_size`."""

    top_k: Count | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Penalty | None = None
    no_repeat_ngram_size: Count | None = None

    temperature: Temperature | None = None
    top_p: Share | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**62), lt=2**62)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    metadata: dict[str, str] = {}
    store: bool = False
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    service_tier: Literal["auto", "default"] = "auto"
    """This and what follows is accepted where it asks for nothing."""
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0
    logit_bias: dict[str, Zero] = {}
    logprobs: Literal[False] = False


class Completion(Asked):
    prompt: str | None = None
    """The template's whole prompt, as a text."""
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    best_of: Literal[1] = 1


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Turn(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str = ""
    refusal: None = None
    """This and what follows stands, empty, in answers that a client sends back as turns."""
    audio: None = None
    function_call: None = None
    annotations: Empty | None = None
    tool_calls: Empty | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Strict):
    type: Literal["text"]


class Chat(Asked):
    messages: list[Turn] = Field(default=[], max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: TextFormat | None = None
    """This and what follows is accepted where it asks for nothing."""
    modalities: list[Literal["text"]] = []
    tools: Empty = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    functions: Empty = []
    function_call: Literal["none", "auto"] = "none"
    top_logprobs: Literal[0] = 0


class RequestRefused(HTTPException):
    """A request that is not answered, with what is said about it in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class Part:
    """A stretch of one of a request's answers."""

    choice: int
    text: str
    end: str | None


class Answers:
    """A request's answers in the shape of OpenAI's."""

    def __init__(self, asked: Completion | Chat, model: str, texts: list[Text]) -> None:
        self.asked, self.texts, self.chat = asked, texts, isinstance(asked, Chat)
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    async def whole(self, parts: "asyncio.Queue[Part]") -> dict[str, Any]:
        """All answers at once."""
        written, ends = [""] * len(self.texts), dict[int, str]()
        while len(ends) < len(self.texts):
            part = await parts.get()
            written[part.choice] += part.text
            if part.end == "error":
                raise RequestRefused(500, NOT_WRITTEN)
            if part.end:
                ends[part.choice] = part.end
        choices = [
            {"index": i, "logprobs": None, "finish_reason": ends[i]}
            | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})
            for i, text in enumerate(written)
        ]
        return self.head | {"choices": choices, "usage": self._usage()}

    async def events(self, parts: "asyncio.Queue[Part]") -> AsyncIterator[str]:
        """The answers as they are written, one event a stretch."""
        left = len(self.texts)
        if self.chat:
            for i in range(left):
                yield self._event([self._delta(i, {"role": "assistant", "content": ""}, None)])
        while left:
            part = await parts.get()
            if part.end == "error":
                yield f"data: {json.dumps(shaped(500, NOT_WRITTEN))}\n\n"
                return
            if part.text or part.end:
                text = {"content": part.text} if self.chat and part.text else {} if self.chat else part.text
                yield self._event([self._delta(part.choice, text, part.end)])
            left -= part.end is not None
        if self.asked.stream_options.include_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _delta(self, choice: int, text: Any, end: str | None) -> dict[str, Any]:
        return {"index": choice, "delta" if self.chat else "text": text, "logprobs": None, "finish_reason": end}

    def _event(self, choices: list[Any], **more: Any) -> str:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return f"data: {json.dumps(self.head | kind | {'choices': choices} | more, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, written = len(self.texts[0].prompt), sum(len(text.written) for text in self.texts)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def shaped(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
