"""What a model writes after the prompts of training: in batches of like length, bounded in memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from transformers import GenerationConfig

from sft import UserError
from sft.codec import Codec
from sft.loss import batches_by_length


@torch.no_grad()
def write(
    model: Any, codec: Codec, prompts: Sequence[Sequence[int]], config: GenerationConfig, batch_tokens: int
) -> list[tuple[str, bool]]:
    """What the model writes after each prompt's ids, without its end token, and whether it ended by itself."""
    model.eval()
    model.generation_config = GenerationConfig()  # else generate() fills what we leave out from the model's own file
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    written: dict[int, tuple[str, bool]] = {}
    for batch in _batches([len(ids) for ids in prompts], config.max_new_tokens, limit, batch_tokens):
        width = max(len(prompts[i]) for i in batch)
        if width >= limit:
            raise UserError(f"a prompt has {width} tokens, and the model {limit} positions; shorten the prompt")
        ids = [[codec.pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        room = copy(config)
        room.max_new_tokens = min(config.max_new_tokens, limit - width)
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=room,
            tokenizer=codec.tokenizer,
        )
        for i, row in zip(batch, output[:, width:].tolist(), strict=True):
            written[i] = read(codec, row)
    return [written[i] for i in range(len(prompts))]


def read(codec: Codec, ids: list[int]) -> tuple[str, bool]:
    """Generated ids -> the text before the end token, and whether there is one."""
    ended = codec.end[-1] in ids
    if ended:
        ids = ids[: ids.index(codec.end[-1]) + 1]
        ids = ids[: -len(codec.end)] if ids[-len(codec.end) :] == codec.end else ids[:-1]
    return codec.text([ids])[0], ended


def _batches(lengths: list[int], new: int, limit: int, batch_tokens: int) -> Iterator[list[int]]:
    """Batches by length. Near the end of the position table only prompts of one length share a batch, so that the room
    of a prompt never depends on its neighbours."""
    for batch in batches_by_length([length + new for length in lengths], batch_tokens):
        tight = [i for i in batch if lengths[i] + new > limit]
        for length in sorted({lengths[i] for i in tight}):
            yield [i for i in tight if lengths[i] == length]
        if roomy := [i for i in batch if lengths[i] + new <= limit]:
            yield roomy


def as_base(model: Any) -> AbstractContextManager[Any]:
    """Within, an adapted model answers as its base."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
