"""What a recipe leaves open is chosen here, by the machine and the rows, each choice with its reason."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Sampler

from sft.memory.fit import automatic, card_memory, checkpointing_needed
from sft.model.load import has_bf16
from sft.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

PACKED_EXACTLY = ("gpt2", "llama", "mistral", "qwen2", "gpt_neox", "gemma", "gpt_bigcode")
"""Architectures in which a packed row was seen to give each of its documents the logits and gradients that it has
alone. Falcon's documents see each other."""
SHORT_ROW_TOKENS, SCORES_BYTES = 256, 2**30
"""On a CPU, plain attention is used up to this mean length in tokens, and up to these bytes of scores kept."""
TOLERATED_PADDING = 0.5
"""Rows stay in random order up to this waste. A step of rows of one length teaches less: the quickstart's held-out loss
was 0.160 with grouped rows, and 0.121 with mixed ones."""
LENGTH_JITTER = 0.02
"""Lengths this far apart count as like, so that each epoch puts other rows together."""
SAMPLED_ROWS = 20_000
"""Rows from which the waste of each order is worked out."""


@dataclass(frozen=True)
class Choice:
    """A setting that the recipe left open."""

    setting: str
    """Its key under `trainer:`."""
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"trainer.{self.setting}={str(self.value).lower()}: {self.reason}"


def by_machine(recipe: Recipe) -> list[Choice]:
    """What follows from the machine alone, before a row is read."""
    card = card_memory(recipe)
    settings = recipe.trainer
    choices = []
    if settings.get("per_device_train_batch_size") == "auto":
        choices += [*_micro_batch(recipe, card)]
    if "bf16" not in settings:
        choices.append(_numbers(recipe, card))
    if not {"activation_checkpointing", "gradient_checkpointing"} & settings.keys():
        choices.append(_checkpointing(settle(recipe, choices), card))
    return choices


def by_rows(recipe: Recipe, rows: "Dataset", config: "PreTrainedConfig", processes: int) -> list[Choice]:
    """What follows from the rows and the model as well. `recipe` has the machine's choices in it."""
    lengths, settings, choices = row_lengths(rows), recipe.trainer, []
    on_cpu = card_memory(recipe) is None
    if on_cpu and "attn_implementation" not in (settings.get("model_init_kwargs") or {}):
        choices += [*_attention(recipe, config, lengths)]
    if not {"train_sampling_strategy", "packing", "padding_free"} & settings.keys():
        some = np.random.default_rng(0).permutation(lengths)[:SAMPLED_ROWS]
        choices += [*_order(recipe, config, some, processes)]
    return choices


def settle(recipe: Recipe, choices: Sequence[Choice]) -> Recipe:
    """The recipe with these choices written into it."""
    trainer: dict[str, Any] = dict(recipe.trainer)
    for choice in choices:
        section, _, key = choice.setting.rpartition(".")
        if section:
            trainer[section] = (trainer.get(section) or {}) | {key: choice.value}
        else:
            trainer[key] = choice.value
    return recipe.model_copy(update={"trainer": trainer})


def row_lengths(rows: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, read from Arrow's offsets, not from the rows."""
    lengths: np.ndarray[Any, Any] = pc.list_value_length(rows.data.column("input_ids")).to_numpy()
    return lengths.astype(np.int64)


class ByLength(Sampler[int]):
    """Steps of rows of like length, in an order that follows from seed and epoch alone, so that a run that goes on sees
    what it would have seen.

    The steps stand in random order. (Trainer's own sampler goes from long to short over and over, and draws from the
    global generator, which a run that goes on finds elsewhere.)
    """

    def __init__(self, lengths: Any, step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        blurred = self.lengths * random.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(self.lengths))
        order, whole = np.argsort(-blurred), len(self.lengths) // self.step * self.step
        steps = random.permutation(order[:whole].reshape(-1, self.step))
        return iter([*steps.flatten().tolist(), *order[whole:].tolist()])


def _micro_batch(recipe: Recipe, card: int | None) -> Iterator[Choice]:
    """`auto`: `sft fit` finds the largest micro-batch; accumulation makes up the rest of the step."""
    settled = automatic(recipe, card).trainer
    where = "at most 8 rows at a time on a CPU" if card is None else "the most rows that fit into this GPU"
    for setting in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        yield Choice(setting, settled.get(setting, 1), where)


def _numbers(recipe: Recipe, card: int | None) -> Choice:
    where = "this CPU" if card is None else "this GPU"
    if recipe.trainer.get("fp16"):
        return Choice("bf16", False, "the recipe has fp16")
    return Choice("bf16", has_bf16(), f"{where} {'computes in' if has_bf16() else 'has no'} bfloat16")


def _checkpointing(recipe: Recipe, card: int | None) -> Choice:
    if card is None:
        needed, reason = False, "it would save memory for time"
    else:
        needed, reason = checkpointing_needed(recipe, card)
    return Choice("activation_checkpointing", needed, reason)


def _attention(recipe: Recipe, config: "PreTrainedConfig", lengths: Any) -> Iterator[Choice]:
    """PyTorch's fused attention on a CPU is slow in bfloat16 on short rows, for its gradient above all."""
    text, longest = config.get_text_config(), int(lengths.max())
    rows = recipe.trainer.get("per_device_train_batch_size", 8)
    scores = rows * longest**2 * text.num_attention_heads * text.num_hidden_layers * 8
    if recipe.trainer.get("bf16") and lengths.mean() <= SHORT_ROW_TOKENS and scores <= SCORES_BYTES:
        reason = f"faster on a CPU than the fused one for rows of {lengths.mean():.0f} tokens"
        yield Choice("model_init_kwargs.attn_implementation", "eager", reason)


def _order(recipe: Recipe, config: "PreTrainedConfig", lengths: Any, processes: int) -> Iterator[Choice]:
    """Grouping rows by length or packing them, by which wastes less. `lengths` stand in random order."""
    rows = recipe.trainer.get("per_device_train_batch_size", 8)
    step = rows * recipe.trainer.get("gradient_accumulation_steps", 1) * processes
    random = waste(lengths, rows, config)
    if rows == 1:
        yield Choice("train_sampling_strategy", "random", "a micro-batch of one row has no padding")
        return
    if random <= TOLERATED_PADDING:
        reason = f"a random order wastes {random:.0%} of the work on padding, which is the price of mixed steps"
        yield Choice("train_sampling_strategy", "random", reason)
        return
    grouped = waste(lengths[list(ByLength(lengths, step, 0))], rows, config)
    packed = packing_waste(lengths, recipe.max_length, config)
    reason = f"grouping rows by length wastes {grouped:.0%} of the work on padding, a random order {random:.0%}"
    if config.model_type not in PACKED_EXACTLY:
        reason += f"; {config.model_type} is never packed"
    elif packed >= grouped:
        reason += f", packing {packed:.0%} on attention between rows"
    elif packs := round(step / processes * lengths.mean() / recipe.max_length):
        yield Choice("packing", True, f"it wastes {packed:.0%} of the work on attention between rows; {reason}")
        same = f"of packed rows, so that a step learns from some {step} rows as before"
        yield Choice("per_device_train_batch_size", 1, same)
        yield Choice("gradient_accumulation_steps", packs, same)
        return
    yield Choice("train_sampling_strategy", "group_by_length", reason)


def waste(lengths: Any, rows: int, config: "PreTrainedConfig") -> float:
    """The share of useful work that micro-batches of so many rows, taken in this order, add by padding."""
    done = 0.0
    for i in range(0, len(lengths), rows):
        batch = lengths[i : i + rows]
        done += len(batch) * float(_work(batch.max(), config))
    return done / float(_work(lengths, config).sum()) - 1


def packing_waste(lengths: Any, longest: int, config: "PreTrainedConfig") -> float:
    """The share that packed rows add: without a kernel for it, attention is computed over all tokens of a packed row,
    and masked between its documents."""
    tokens = min(longest, int(lengths.sum()))
    packed = lengths.sum() / tokens * _work(tokens, config)
    return float(packed) / float(_work(lengths, config).sum()) - 1


def _work(length: Any, config: "PreTrainedConfig") -> Any:
    """Work on a row, in units of a token's products with weights: attention adds length / (6 x width) to each, where a
    layer has 12 x width² weights."""
    return length * (1 + length / (6 * config.get_text_config().hidden_size))
