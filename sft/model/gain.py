"""What written weights keep of what tuning gained, and where the rest went: into the sum, rounding or arithmetic.

Three things stand between a trained adapter and a folder of weights. The *sum* of base and adapter is exact in
float32. *Rounding* it to the dtype that is written loses what is finer than that dtype, as much of a small adapter is.
And whoever loads the folder *computes* in its dtype, which moves the base alone as well: that is no fault of the
folder, so how far it moves the base is measured beside it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sft.bootstrap import Interval, drawn, percentiles
from sft.model import parity
from sft.model.adapter import as_base, has_adapter, inner_model

EXACT = 1e-4
"""How far float32 may be from float32, as a share of the logits' spread. Measured: 5e-6 in 30 layers."""

TIMES_THE_BASE = 3.0
"""How many times as far as arithmetic moves the base a folder may be from the trained model."""

KEPT = 0.03
"""How far the share of the gain that a folder keeps may be from 1, by either end of its 95 % interval."""

LOSS = 5e-3
"""Where tuning gained nothing that is clear: how far the loss on outputs may be from the trained model's, in nats."""


class Trained(NamedTuple):
    """The trained model as it is measured, each a comparison by `parity.differences`."""

    stored: str
    """The dtype of the base's files."""
    gain: parity.Found | None
    """The base and the trained model, both in float32. None for a model without a base."""
    moved: dict[str, parity.Found]
    """By dtype: the base in float32, and computed in that dtype. Without a base it is the model itself."""
    as_scored: parity.Found
    """The trained model in float32, and as training and evaluation compute it."""
    scored_in: str
    """The dtype of that."""


class Written(NamedTuple):
    """A folder of weights as it is measured beside the trained model."""

    dtype: str
    layers: int
    """Layers whose sum of base and adapter was tried on a random input, in float32."""
    sum_error: float
    """How far the farthest of them moved, as a share of its largest output."""
    rounding: parity.Found
    """The trained model and these weights, both in float32."""
    arithmetic: parity.Found
    """These weights in float32, and in the dtype they are written in."""
    in_use: parity.Found
    """Both at once: the trained model in float32, and the folder as it is loaded."""


def of_trained(
    rows: parity.Rows, model: Any, exact: parity.Logits, dtypes: Iterable[str]
) -> tuple[parity.Found | None, dict[str, parity.Found]]:
    """`gain` and `moved` of a trained model: a base with its adapter, or a whole model. `exact` are its logits in
    float32."""
    with as_base(model):
        models = {"base": logits_in(model, torch.float32), "trained": exact}
        models |= {name: logits_in(model, getattr(torch, name)) for name in dtypes}
        gain, *moved = parity.compared(rows, models, [("base", name) for name in models if name != "base"])
        return gain if has_adapter(model) else None, dict(zip(list(models)[2:], moved, strict=True))


def of_folder(rows: parity.Rows, model: Any, exact: parity.Logits) -> list[dict[str, Any]]:
    """`rounding`, `arithmetic` and `in_use` of the model in a folder."""
    models = {"trained": exact, "float32": logits_in(model, torch.float32), "own": logits_in(model, model.dtype)}
    return parity.compared(rows, models, [("trained", "float32"), ("float32", "own"), ("trained", "own")])


def weights_keep(trained: Trained, folder: Written) -> Interval | None:
    """The share of the gain that the weights keep, whatever they are computed in; None where no gain is clear."""
    if trained.gain is None:
        return None
    return _share(trained.gain, trained.gain["reference_sums"], folder.rounding["candidate_sums"])


def folder_keeps(trained: Trained, folder: Written) -> Interval | None:
    """The share that is left where both folder and base compute in the dtype of the folder."""
    if trained.gain is None:
        return None
    return _share(trained.gain, trained.moved[folder.dtype]["candidate_sums"], folder.arithmetic["candidate_sums"])


def _share(gain: parity.Found, base: Sequence[float], tuned: Sequence[float]) -> Interval | None:
    """The gain of another pair of models as a share of this one, from summed losses of the same rows, which are
    resampled for the interval."""
    rows = drawn(len(base), seed=0)
    whole, part = np.subtract(gain["reference_sums"], gain["candidate_sums"]), np.subtract(base, tuned)
    if not percentiles(whole.sum(), whole[rows].sum(-1)).low > 0:
        return None
    return percentiles(float(part.sum() / whole.sum()), part[rows].sum(-1) / whole[rows].sum(-1))


def problems(trained: Trained, folder: Written) -> list[str]:
    """Why the folder is not the trained model, a sentence each. What is not a number is past every limit."""
    found, dtype = [], folder.dtype
    limit = bound(trained.moved.get(dtype))
    if not trained.as_scored["relative_difference"] <= bound(trained.moved.get(trained.scored_in)):
        found.append(f"the model as it was scored is {_apart(trained.as_scored)} from base and adapter in float32")
    if not folder.sum_error <= EXACT:
        found.append(f"a layer with the adapter in its weight is {folder.sum_error:.2g} from the layer beside it")
    if not folder.rounding["relative_difference"] <= limit:
        found.append(
            f"its weights are {_apart(folder.rounding)} from the trained model, where {limit:.2g} is tolerated"
        )
    share = weights_keep(trained, folder)
    if share and not (share.low >= 1 - KEPT and share.high <= 1 + KEPT):
        found.append(f"in {dtype} its weights keep {_percent(share)} of the gain over the base")
    if not share and not folder.rounding["loss_difference"] <= LOSS:
        found.append(f"its loss on outputs is {folder.rounding['loss_difference']:.2g} from the trained model's")
    if not np.isfinite(folder.arithmetic["relative_difference"]):
        found.append(f"it computes what is not a number in {dtype}: its activations leave the range")
    elif not folder.arithmetic["relative_difference"] <= limit:
        found.append(f"computing in {dtype} moves it by {_apart(folder.arithmetic)}, where {limit:.2g} is tolerated")
    return found


def sentence(trained: Trained, folder: Written) -> str:
    """The same in one line, for a card."""
    share = weights_keep(trained, folder)
    return (
        f"{folder.dtype}; on {folder.rounding['positions']:,} positions of {folder.rounding['rows']} held-out rows its "
        f"weights are {_apart(folder.rounding)} from the trained model"
        + (f" and keep {_percent(share)} of the gain over the base" if share else "")
    )


def bound(moved: parity.Found | None) -> float:
    """How far two models may be apart, as a share of the logits' spread, where arithmetic moves the base so far."""
    return max(EXACT, TIMES_THE_BASE * moved["relative_difference"]) if moved else EXACT


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _apart(found: parity.Found) -> str:
    return f"{found['relative_difference']:.2g} of the logits' spread"


def lines(trained: Trained, folder: Written) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of what was measured."""
    dtype = folder.dtype

    def line(name: str, found: parity.Found, side: str = "candidate", share: Interval | None = None) -> list[str]:
        far = f"{found['relative_difference']:.1e}" if side == "candidate" else ""
        return [name, far, f"{found[f'{side}_loss']:.4f}", _percent(share) if share else ""]

    found = [line("base model, in float32", trained.gain, "reference")] if trained.gain else []
    found += [line("trained model, in float32", trained.as_scored, "reference")]
    found += [line("trained model, as it was scored", trained.as_scored)]
    if folder.layers:
        found += [[f"sum of base and adapter, {folder.layers} layers", f"{folder.sum_error:.1e}", "", ""]]
    found += [line(f"this folder's weights, {dtype}", folder.rounding, share=weights_keep(trained, folder))]
    if dtype != "float32":
        found += [line(f"computed in {dtype}", folder.arithmetic, share=folder_keeps(trained, folder))]
        found += [line(f"the base, computed in {dtype}", trained.moved[dtype])] if trained.gain else []
    positions = f"{folder.rounding['positions']:,} positions of {folder.rounding['rows']} held-out rows"
    return [positions, "moved, of logits' spread", "loss on outputs", "gain kept (95 % interval)"], found


def logits_in(model: Any, dtype: torch.dtype) -> parity.Logits:
    """The logits of a model that computes as if it had been loaded in this dtype, whatever its weights are stored in.

    Weights are converted a block at a time, so that a model of 16 bits needs no second copy of itself in 32. Buffers
    that no file holds, such as the scale of Gemma's embeddings, are those that loading in this dtype makes.
    """
    plain, blocks, buffers = parity.of_model(model), list(_blocks(model)), list(_other_buffers(model, dtype))

    def logits(ids: list[int]) -> NDArray[np.float32]:
        with _converted(blocks, buffers, dtype):
            return plain(ids)

    return logits


@contextmanager
def _converted(
    blocks: list[nn.Module], buffers: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> Iterator[None]:
    kept: dict[nn.Parameter, torch.Tensor] = {}

    def convert(block: nn.Module, _: Any) -> None:
        for parameter in block.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)

    def put_back(block: nn.Module, *_: Any) -> None:
        for parameter in block.parameters():
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    hooks = [block.register_forward_pre_hook(convert) for block in blocks]
    hooks += [block.register_forward_hook(put_back, always_call=True) for block in blocks]
    own = [buffer.data for buffer, _ in buffers]
    for buffer, other in buffers:
        buffer.data = other
    try:
        yield
    finally:
        for (buffer, _), data in zip(buffers, own, strict=True):
            buffer.data = data
        for hook in hooks:
            hook.remove()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that are called one after the other: each layer of a stack, and what stands around it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from _blocks(child)
        else:
            yield child


def _other_buffers(model: Any, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers of a model that have another dtype where it is loaded in this one, each with what is there then."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    inner = inner_model(model)
    with init_empty_weights(include_buffers=False):
        loaded = dict(AutoModelForCausalLM.from_config(inner.config, dtype=dtype).named_buffers())
    for name, buffer in inner.named_buffers():
        other = loaded.get(name.replace(".base_layer", ""))
        if other is not None and other.dtype != buffer.dtype:
            yield buffer, other.to(buffer.device)
