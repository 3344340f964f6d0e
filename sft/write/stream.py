"""Texts that a model writes at once, a token each a step: they join and leave between steps, their letters come whole.

`transformers`' own continuous batching writes other text, and says nothing, for architectures without paged attention
(GPT-J, GPT-Neo, Falcon, GPT: measured, see docs/serve.md). This has no kernels of its own: it calls the model.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from sft import UserError
from sft.decoding import of_whole_texts
from sft.model.adapter import inner_model
from sft.tokens.codec import Codec
from sft.write.generate import read

TOP_K = 50
"""What `generate` takes where it samples and nothing is said."""

BYTE = re.compile("<0x[0-9A-F]{2}>")


class Text:
    """An answer that is being written after the ids of a prompt."""

    def __init__(
        self, codec: Codec, prompt: Sequence[int], config: GenerationConfig, seed: int, stops: Sequence[str] = ()
    ) -> None:
        """`stops` are texts that end the answer and do not belong to it. The seed alone decides what is drawn."""
        self.codec, self.prompt, self.config, self.stops = codec, list(prompt), config, stops
        self.written: list[int] = []
        self.text = ""
        """What later tokens cannot change any more: all of it once there is an `end`."""
        self.end: str | None = None
        """`stop` after the end token or a stop text, `length` at the limit; None while it is being written."""
        self._given = 0
        self._change = processors(config)
        self._random = torch.Generator().manual_seed(seed)

    def take(self, logits: torch.Tensor) -> None:
        """Go on by one token, from the logits of the next one, [vocabulary]."""
        scores = self.scores(logits)
        if self.config.do_sample:
            token = int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._random))
        else:
            token = int(scores.argmax())
        self.written.append(token)
        if token == self.codec.end[-1]:
            self.end = "stop"
        elif len(self.written) == self.config.max_new_tokens:
            self.end = "length"
        self.text = read(self.codec, self.written)[0] if self.end else _settled(self.codec, self.written)
        self._stop()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the next token as the settings change them, [vocabulary]."""
        ids: Any = torch.tensor([self.prompt + self.written], device=logits.device)
        scores: Any = logits.float()[None]
        for change in self._change:
            scores = change(ids, scores)
        return scores[0]

    def news(self) -> str:
        """What was added to the text since this was last asked."""
        fresh = self.text[self._given :]
        self._given += len(fresh)
        return fresh

    def _stop(self) -> None:
        """Cut at the first stop text, and hold back what may become the beginning of one."""
        if places := [place for stop in self.stops if (place := self.text.find(stop)) >= 0]:
            self.text, self.end = self.text[: min(places)], "stop"
        elif self.end is None:
            starts = [size for stop in self.stops for size in range(1, len(stop)) if self.text.endswith(stop[:size])]
            self.text = self.text[: len(self.text) - max(starts, default=0)]


class TextBatch:
    """The texts that one model writes at once. Not for several threads."""

    def __init__(self, model: Any) -> None:
        model.eval()
        self.model = inner_model(model)
        takes = inspect.signature(self.model.forward).parameters
        self._caches = "past_key_values" in takes
        self._positions = "position_ids" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.texts: list[Text] = []
        self._cache: Any = DynamicCache()  # keys and values of each row's tokens, padded on the left
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self.model.device)

    def join(self, text: Text) -> None:
        """Read a prompt, by itself, and write its first token."""
        cache, mask = DynamicCache(), torch.ones(1, len(text.prompt), dtype=torch.long, device=self.model.device)
        logits = self._forward([text.prompt], mask, cache)
        text.take(logits[0])
        if text.end is None:
            self._add(text, cache, mask)

    @torch.no_grad()
    def step(self) -> None:
        """Write a token of each text; those that ended leave."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.texts), 1)], 1)
        width = 1 if self._caches else self._mask.shape[1]
        ids = [
            [0] * (width - len(known)) + known
            for text in self.texts
            for known in [(text.prompt + text.written)[-width:]]
        ]
        logits = self._forward(ids, self._mask, self._cache)
        for text, row in zip(self.texts, logits, strict=True):
            text.take(row)
        self._keep([i for i, text in enumerate(self.texts) if text.end is None])

    def leave(self, text: Text) -> None:
        """Forget a text that nobody waits for."""
        if text in self.texts:
            self._keep([i for i, other in enumerate(self.texts) if other is not text])

    def next(self, prompt: Sequence[int]) -> torch.Tensor:
        """The logits of the token after these ids, [vocabulary]."""
        mask = torch.ones(1, len(prompt), dtype=torch.long, device=self.model.device)
        return self._forward([list(prompt)], mask, DynamicCache())[0]

    @torch.no_grad()
    def _forward(self, ids: list[list[int]], mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits after each row's last id, [rows, vocabulary]; the cache grows by the ids."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self.model.device), "attention_mask": mask}
        if self._caches:
            inputs |= {"past_key_values": cache, "use_cache": True}
        if self._positions:  # counted from a row's first token, not from its padding
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -len(ids[0]) :]
        return self.model(**inputs, **self._last).logits[:, -1]

    def _add(self, text: Text, cache: Any, mask: torch.Tensor) -> None:
        """One more row, the shorter of both padded on the left."""
        width = max(mask.shape[1], self._mask.shape[1])
        if self.texts:
            for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                ours.keys = torch.cat([_wider(ours.keys, width), _wider(theirs.keys, width)])
                ours.values = torch.cat([_wider(ours.values, width), _wider(theirs.values, width)])
            pads = [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in (self._mask, mask)]
            self._mask = torch.cat(pads)
        else:
            self._cache, self._mask = cache, mask
        self.texts.append(text)

    def _keep(self, rows: list[int]) -> None:
        """Only these rows, and no more padding than the longest of them needs."""
        if len(rows) == len(self.texts):
            return
        self.texts = [self.texts[i] for i in rows]
        if not rows:
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask = self._mask[chosen]
        spare = self._mask.shape[1] - int(self._mask.sum(1).max())
        self._mask = self._mask[:, spare:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[chosen][..., spare:, :], layer.values[chosen][..., spare:, :]


def stream(model: Any, text: Text) -> Iterator[str]:
    """A text as it is written, in pieces of whole letters."""
    batch = TextBatch(model)
    batch.join(text)
    yield text.news()
    while text.end is None:
        batch.step()
        yield text.news()


def processors(config: GenerationConfig) -> LogitsProcessorList:
    """What changes the scores of the next token, in the order of `generate`.

    Raises UserError for a setting that needs more than the tokens so far, such as beams.
    """
    if whole := of_whole_texts(config.to_diff_dict()):
        raise UserError(f"`generation.{whole[0]}` cannot be used where text is written token by token; remove it")
    steps = LogitsProcessorList()
    if (config.repetition_penalty or 1) != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if not config.do_sample:
        return steps
    if (config.temperature or 1) != 1:
        steps.append(TemperatureLogitsWarper(config.temperature))
    if top_k := TOP_K if config.top_k is None else config.top_k:
        steps.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        steps.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        steps.append(TypicalLogitsWarper(config.typical_p))
    return steps


def _settled(codec: Codec, ids: Sequence[int]) -> str:
    """The text of ids that may go on: without letters whose bytes are not all there, and what may be the end's."""
    for size in range(min(len(codec.end) - 1, len(ids)), 0, -1):
        if list(ids[-size:]) == codec.end[:size]:
            ids = ids[:-size]
            break
    while ids and BYTE.fullmatch(str(codec.tokenizer.convert_ids_to_tokens(ids[-1]))):
        ids = ids[:-1]  # such a row of bytes is read as a whole
    text = codec.text([ids])[0].rstrip("\ufffd")
    return "" if codec.lead.startswith(text) else text


def _wider(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [rows, heads, positions, size], padded on the left to so many positions."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[-2], 0))
