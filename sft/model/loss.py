"""The loss on output tokens: the head sees the supervised positions alone, and every mean is a mean over tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from sft.tokens.prepare import MASKED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class RowLoss(NamedTuple):
    """How well a model foresees the output of one row; in JSON, a list of the three numbers."""

    loss: float
    """Summed over the output tokens, in nats."""
    correct: int
    """Output tokens that the model ranks first."""
    tokens: int
    """Output tokens."""


def supervised_logits(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] of the positions whose next token has a label, and those n labels, row by row.

    `inputs` holds `labels` [rows, length] and what the model's forward takes. The other positions never reach the
    head, which at a vocabulary of 50 thousand would cost more than the model itself.
    """
    labels = inputs["labels"][:, 1:]
    keep = labels != MASKED
    head = _unwrapped(model).get_output_embeddings()
    with _only(head, keep):
        logits = model(**{k: v for k, v in inputs.items() if k not in ("labels", "weights")}, use_cache=False).logits
    return logits, labels[keep]


@torch.no_grad()
def output_losses(model: "PreTrainedModel", rows: "Dataset", batch_tokens: int, pad: int) -> list[RowLoss]:
    """The loss of each row's output.

    The sum over rows divided by the sum of tokens is the true token mean, whatever the batches were.
    """
    was_training = model.training
    model.eval()
    results: dict[int, RowLoss] = {}
    for batch in batches_by_length([len(ids) for ids in rows["input_ids"]], batch_tokens):
        inputs = right_padded([rows[i] for i in batch], pad, model.device)
        logits, targets = supervised_logits(model, inputs)
        chunks = list(zip(logits.split(1024), targets.split(1024), strict=True))  # the head's width is the vocabulary
        losses = torch.cat([cross_entropy(some.float(), right, reduction="none") for some, right in chunks])
        correct = torch.cat([some.argmax(-1) == right for some, right in chunks])
        counts = (inputs["labels"][:, 1:] != MASKED).sum(1).tolist()
        for i, loss, right in zip(batch, losses.split(counts), correct.split(counts), strict=True):
            results[i] = RowLoss(loss.double().sum().item(), int(right.sum()), len(loss))
    model.train(was_training)
    return [results[i] for i in range(len(rows))]


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, the longest first, in batches of at most `batch_tokens` tokens with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def right_padded(rows: Sequence[dict[str, Any]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """A batch of ids, mask and labels. Padding stands on the right: on the left, position ids would be wrong."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], by: int) -> torch.Tensor:
        return torch.tensor([v + [by] * (width - len(v)) for v in values], device=device)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": filled(ids, pad),
        "attention_mask": filled([[1] * len(i) for i in ids], 0),
        "labels": filled([row["labels"] for row in rows], MASKED),
    }


@contextmanager
def _only(head: torch.nn.Module, keep: torch.Tensor) -> Iterator[None]:
    """Within, the head gets hidden states [n, width] of the kept positions instead of [rows, length, width]."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][keep], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _unwrapped(model: Any) -> Any:
    """The model without the wrapper of distributed training."""
    return model.module if hasattr(model, "module") else model
