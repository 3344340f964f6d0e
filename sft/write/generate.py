"""What a model writes after the prompts of training: in batches of like length, bounded in memory."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from sft import UserError
from sft.decoding import of_whole_texts
from sft.model.loss import batches_by_length
from sft.tokens.codec import Codec

PIECE_TOKENS = 16
"""Tokens after which the rows that ended leave their batch."""


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
        room = min(config.max_new_tokens, limit - width)
        for i, row in zip(batch, _continued(model, codec, [prompts[i] for i in batch], config, room), strict=True):
            written[i] = read(codec, row)
    return [written[i] for i in range(len(prompts))]


def _continued(
    model: Any, codec: Codec, prompts: Sequence[Sequence[int]], config: GenerationConfig, room: int
) -> list[list[int]]:
    """The ids after each prompt, written piece by piece: a row that ended leaves the batch, and costs no more."""
    width, settings = max(map(len, prompts)), copy(config)
    in_pieces = not of_whole_texts(config.to_diff_dict())
    cache = DynamicCache(config=model.config) if in_pieces else None
    ids = torch.tensor([[codec.pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    outputs: dict[int, list[int]] = {}
    going = list(range(len(prompts)))
    while going:
        left = room - (ids.shape[1] - width)
        settings.max_new_tokens = min(left, PIECE_TOKENS) if in_pieces else left
        more = {"past_key_values": cache} if in_pieces else {}
        ids = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, tokenizer=codec.tokenizer, **more
        )
        rows = ids[:, width:].tolist()
        full = not in_pieces or len(rows[0]) >= room
        stay = [n for n, row in enumerate(rows) if not full and codec.end[-1] not in row]
        outputs |= {going[n]: row for n, row in enumerate(rows) if n not in stay}
        going = [going[n] for n in stay]
        if cache is not None and going:
            kept = torch.tensor(stay, device=model.device)
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], torch.nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
    return [outputs[i] for i in range(len(prompts))]


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
