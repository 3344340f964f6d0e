"""How far two models are apart on the same tokens: logits, distributions, first choices and the loss on outputs."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.show import table
from sft.tokens.prepare import MASKED, Tokens

Rows = Sequence[Mapping[str, list[int]]]
"""`input_ids` and `labels` of each."""

Found = Mapping[str, Any]
"""What `differences` returns."""

Logits = Callable[[list[int]], NDArray[np.float32]]
"""Ids -> logits [positions, vocabulary] of the token after each of them."""

COMPARED_ROWS, COMPARED_TOKENS = 16, 256
"""Held-out rows that are compared, and the tokens of each."""

TOLERANCE: Mapping[str, Mapping[str, float]] = {
    "float32": {"relative_difference": 1e-5, "loss_difference": 1e-5},
    "float16": {"relative_difference": 5e-3, "loss_difference": 1e-3},
    "bfloat16": {"relative_difference": 2.5e-2, "loss_difference": 5e-3},
}
"""How far a model may be from the one that was trained, by the coarser arithmetic of the two.

Measured with stories260K: 6e-7, 1e-3 and 1e-2 of the logits' spread, 5e-8, 9e-5 and 1e-4 of loss; the adapter of its
4-bit base on the original weights is 1.3e-1 and 2e-2 away. `bench/parity.py` measures every architecture. First choices
and KL are shown and not judged: they differ wherever two tokens are almost as good.
"""

NAMES = {
    "largest_logit_difference": "largest difference of a logit",
    "mean_logit_difference": "mean difference of a logit",
    "relative_difference": "difference of logits over their spread",
    "largest_kl": "largest KL divergence, nats",
    "mean_kl": "mean KL divergence, nats",
    "disagreement": "positions with another first choice",
    "reference_loss": "loss on outputs, trained model",
    "candidate_loss": "loss on outputs, this model",
    "loss_difference": "difference of the two losses",
}


def rows_to_compare(
    tokens: Tokens, count: int = COMPARED_ROWS, length: int = COMPARED_TOKENS
) -> list[dict[str, list[int]]]:
    """The held-out rows to compare, spread evenly over all of them: `input_ids` and `labels`, each cut to `length`
    tokens around the seam of prompt and output."""
    places = np.linspace(0, len(tokens.test) - 1, min(count, len(tokens.test))).round().astype(int)
    rows = tokens.test.select(places.tolist())
    starts = [max(0, min(row["prompt_tokens"] - length // 2, len(row["input_ids"]) - length)) for row in rows]
    return [
        {name: row[name][start : start + length] for name in ("input_ids", "labels")}
        for row, start in zip(rows, starts, strict=True)
    ]


def differences(rows: Rows, reference: Logits, candidate: Logits) -> dict[str, Any]:
    """Compare two models on rows, one row in memory at a time. Ready for JSON.

    `relative_difference` is the root mean square of the logits' differences over the standard deviation of the
    reference's logits at a position; `largest_kl` and `mean_kl` are KL(reference || candidate) of the next token, in
    nats; `disagreement` is the share of positions where the two rank another token first; the losses are means over all
    labels, and `reference_sums` and `candidate_sums` their sums row by row.
    """
    return compared(rows, {"reference": reference, "candidate": candidate}, [("reference", "candidate")])[0]


def compared(rows: Rows, models: Mapping[str, Logits], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The differences of several pairs of these models, each reference first. Each model is asked once for each row."""
    gaps: list[list[dict[str, Any]]] = [[] for _ in pairs]
    for row in rows:
        logits = {name: model(row["input_ids"]) for name, model in models.items()}
        for found, (reference, candidate) in zip(gaps, pairs, strict=True):
            found.append(_of_row(np.array(row["labels"][1:]), logits[reference], logits[candidate]))
    return [_of_rows(found) for found in gaps]


def _of_row(labels: NDArray[np.int64], r: NDArray[np.float32], c: NDArray[np.float32]) -> dict[str, Any]:
    """What the differences of all rows are computed from, of one."""
    if r.shape != c.shape:
        raise ValueError(f"logits of another shape: {r.shape} and {c.shape}")
    gap = np.abs(r - c)
    log_r, log_c = _log_softmax(r), _log_softmax(c)
    at = np.flatnonzero(labels != MASKED)
    return {
        "largest": gap.max(),
        "gap": gap.mean(-1, dtype=np.float64),
        "squares": (np.square(gap, dtype=np.float64).mean(-1).sum(), r.var(-1, dtype=np.float64).sum()),
        "kl": (np.exp(log_r) * (log_r - log_c)).sum(-1),
        "differ": r.argmax(-1) != c.argmax(-1),
        "losses": np.stack([-log[at, labels[at]] for log in (log_r, log_c)]),
    }


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def joined(name: str) -> Any:
        return np.concatenate([row[name] for row in rows], axis=-1)

    kl, (loss_r, loss_c) = joined("kl"), joined("losses")
    sums = [row["losses"].sum(-1).tolist() for row in rows]
    return {
        "rows": len(rows),
        "positions": len(kl),
        "largest_logit_difference": float(max(row["largest"] for row in rows)),
        "mean_logit_difference": float(joined("gap").mean()),
        "relative_difference": float(np.sqrt(np.divide(*np.sum([row["squares"] for row in rows], axis=0)))),
        "largest_kl": float(kl.max()),
        "mean_kl": float(kl.mean()),
        "disagreement": float(joined("differ").mean()),
        "reference_loss": float(loss_r.mean()),
        "candidate_loss": float(loss_c.mean()),
        "loss_difference": float(abs(loss_r.mean() - loss_c.mean())),
        "reference_sums": [reference for reference, _ in sums],
        "candidate_sums": [candidate for _, candidate in sums],
    }


def of_model(model: Any) -> Logits:
    """The logits of a transformers model, or one with an adapter."""
    import torch

    model.eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> NDArray[np.float32]:
        return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu().numpy()

    return logits


def recorded(rows: Rows, logits: Logits, folder: Path) -> Logits:
    """The same logits of these rows, kept in files, so that the model can make room for the one to compare."""
    folder.mkdir(parents=True)
    files = {tuple(row["input_ids"]): folder / f"{number}.npy" for number, row in enumerate(rows)}
    for ids, file in files.items():
        stream = io.BytesIO()  # into a file, numpy does not say why it cannot write
        np.save(stream, logits(list(ids)))
        file.write_bytes(stream.getvalue())
    return lambda ids: np.load(files[tuple(ids)])


def past_tolerance(parity: Mapping[str, Any], tolerance: Mapping[str, float]) -> list[str]:
    """What of a comparison is past the tolerance, a sentence each; nothing where the two models are the same."""
    return [
        f"{NAMES[name]} is {parity[name]:.3g}, where {limit:g} is tolerated"
        for name, limit in tolerance.items()
        if not parity[name] <= limit  # so that what is not a number is past it too
    ]


def tolerance(dtype: str) -> Mapping[str, float]:
    """The tolerance of a model written in this dtype."""
    return TOLERANCE[dtype]


def as_lines(parity: Mapping[str, Any], tolerance: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """What was measured, in lines of name, figure and, where there is one, its tolerance."""
    losses = ("reference_loss", "candidate_loss")
    return [
        (
            text,
            f"{parity[name]:.5f}" if name in losses else f"{parity[name]:.2g}",
            f"{tolerance[name]:g}" if name in tolerance else "",
        )
        for name, text in NAMES.items()
    ]


def as_table(parity: Mapping[str, Any], tolerance: Mapping[str, float]) -> str:
    """The same for the terminal."""
    header = [f"{parity['positions']:,} positions of {parity['rows']} held-out rows", "", "tolerated"]
    return table(header, as_lines(parity, tolerance))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
