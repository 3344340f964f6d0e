"""The proof, before packed rows are trained on, that documents in one row do not see each other."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
)

from sft import UserError


@torch.no_grad()
def prove_packing(model: PreTrainedModel, rows: Dataset, together: int) -> None:
    """A document in a packed row gives the logits that it gives alone, and they do not move when the document before it
    is replaced; and a batch of packed rows goes through. Else this architecture is not packed.

    One pair of documents is tried: what lets them see each other lies in the architecture, not in the texts.
    """
    row = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    a, b = row["seq_lengths"][:2]
    ids = torch.tensor([row["input_ids"][: a + b]])
    other = torch.cat([(ids[:, :a] + 1) % model.config.get_text_config().vocab_size, ids[:, a:]], 1)
    batch = rows[: min(together, len(rows))]
    lengths = [length for row in batch["seq_lengths"] for length in row]

    def logits(ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids, positions = ids.to(model.device), positions.to(model.device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()

    model.eval()
    try:
        packed, moved, alone = logits(ids, (a, b))[a:], logits(other, (a, b))[a:], logits(ids[:, a:], (b,))
        logits(torch.tensor([[token for row in batch["input_ids"] for token in row]]), lengths)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"a packed batch fails in this architecture ({error}); write trainer.packing=false") from error
    model.train()
    leak = (packed - moved).abs().max() / alone.std()
    difference = (packed - alone).abs().mean() / alone.std()
    noise = 0.02 if getattr(model, "is_loaded_in_8bit", False) else 1e-3  # 8bit rounds by what shares a batch
    if leak > noise or difference > 0.03:
        raise UserError(
            f"packing is not safe for this architecture: a document's logits change by {max(leak, difference):.1%} of "
            "their spread with what stands before it; write trainer.packing=false"
        )
