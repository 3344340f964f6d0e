"""One training step without weights and without a GPU: which bytes are alive at each moment, and what they are for.

Tensors are fake: they have shape, type and storage, and no content. The model, its quantisation, the adapter and the
optimizer are the libraries' own, and so is every operation of the step, forward and backward; only what CUDA does in
another way than a CPU is put in its place by `OnCuda`. What a GPU allocates inside a kernel, where no operation shows
it, stands in `_workspace`. docs/fit.md lists both.
"""

# ruff: noqa: SIM905  a list of names is easier to compare with its source as running text

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft import UserError
from sft.model.adapter import inner_model, make_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

aten = torch.ops.aten
ALLOCATED_BYTES_STEP = 512
"""PyTorch's CUDA allocator gives out multiples of so many bytes."""

KINDS = ("weights", "quantisation state", "adapter", "gradients", "optimizer", "activations", "head")
"""What bytes are for. `weights` are those of the base model, or of the whole model where there is no adapter."""

TRACED_WHOLE = 6
"""A deeper model is traced at two smaller depths, and extended: each further layer adds the same."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, as far as memory goes."""

    config: "PreTrainedConfig"
    adapter: dict[str, Any] | None
    """What `sft.model.adapter` makes the adapter of, or None where all weights are trained."""
    quantization: Any = None
    """A `transformers.BitsAndBytesConfig`, or None."""
    rows: int = 8
    length: int = 1024
    """Tokens of the longest row, which all rows are padded to."""
    packed: bool = False
    """Whether rows are joined into one, as TRL does with `packing`."""
    padded: bool = True
    """Whether some row is shorter than the others, so that attention needs a mask."""
    accumulate: int = 1
    """Micro-batches of one step: with more than one, gradients are alive during forward passes too."""
    dtype: torch.dtype = torch.bfloat16
    """Type of the base weights."""
    adapter_dtype: torch.dtype = torch.float32
    """Type of what is trained, where the base weights are of a lower one."""
    autocast: torch.dtype | None = torch.bfloat16
    checkpointing: dict[str, Any] | None = field(default_factory=dict)
    """Arguments of activation checkpointing, or None where it is off."""
    head: Literal["tiles", "learned", "all", "classes"] = "tiles"
    """TRL's fused head, which scores learned positions in tiles; ours for weighted rows, whose logits are those of all
    learned positions; the model's own loss on the logits of all positions; or, in place of that head, one for the
    config's classes."""
    learned: int | None = None
    """Positions with a label in the batch; all of them where nothing is said."""
    optimizer: Callable[[list[Any]], torch.optim.Optimizer] | None = None
    """Makes the optimizer from parameters; AdamW where nothing is said."""
    clip: float = 1.0
    """Bound on the gradient norm, 0 for none."""
    attention: str | None = None
    """Name of transformers' attention implementation; its own choice where nothing is said."""
    adjust: Callable[[Any], None] | None = None
    """Called with the model before the step, for instance to freeze a part of it."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, at the moment when most are alive."""

    bytes: dict[str, int]
    parameters: int
    trainable: int
    moment: str
    """Where in the step that is."""

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())


class ParameterCount(NamedTuple):
    """How many numbers a model holds."""

    total: int
    trainable: int


def trace(step: Step, whole: bool = False) -> Memory:
    """The peak of a step. A deep model is traced at two depths and extended, unless `whole`.

    Layers are alike, and every other where they alternate, so each segment of a step (the head, the backward pass of
    the first layer, the optimizer, ...) holds a linear function of the number of layers; `tests/test_fit.py` compares
    it with whole traces.
    """
    depth = step.config.get_text_config().num_hidden_layers
    if whole or depth <= TRACED_WHOLE:
        return _highest(*_trace(step))
    low, high = TRACED_WHOLE - 2, TRACED_WHOLE
    (small, small_count), (large, large_count) = (
        _trace(replace(step, config=_cut(step.config, n))) for n in (low, high)
    )

    def extended(a: int, b: int) -> int:
        return a + (b - a) * (depth - low) // (high - low)

    segments = {
        name: {kind: extended(small[name][kind], large[name][kind]) for kind in KINDS}
        for name in large
        if name in small
    }
    return _highest(segments, ParameterCount(*map(extended, small_count, large_count)))


def _cut(config: "PreTrainedConfig", layers: int) -> "PreTrainedConfig":
    """The same model with fewer layers."""
    import copy

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "attention_layers"):  # one entry a layer
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:layers])
    if getattr(text, "attention_types", None):  # GPT-Neo's form of the same: [[[global, local], 12]]
        (kinds, _), *_ = text.attention_types
        text.attention_types = [[kinds, layers // len(kinds)]]
    return config


def _highest(segments: dict[str, dict[str, int]], count: ParameterCount) -> Memory:
    moment = max(segments, key=lambda name: sum(segments[name].values()))
    return Memory(segments[moment], count.total, count.trainable, moment)


def _trace(step: Step) -> tuple[dict[str, dict[str, int]], ParameterCount]:
    """Bytes by kind at the peak of each segment of the step, and the parameters of its model."""
    from torch.utils.checkpoint import DefaultDeviceType

    model, base = skeleton(step)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = ParameterCount(sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained))
    ledger = Ledger()
    before = torch.is_autocast_enabled("cuda"), DefaultDeviceType.get_device_type()
    with FakeTensorMode(allow_non_fake_inputs=True), OnCuda(step.autocast), ledger:
        torch.set_autocast_enabled("cuda", step.autocast is not None)  # peft asks it; the fake tensors are on a CPU
        DefaultDeviceType.set_device_type("cpu")
        try:
            _materialise(model, base, step, ledger)
            _run(model, step, ledger)
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            DefaultDeviceType.set_device_type(before[1])
    return ledger.segments, count


def skeleton(step: Step) -> tuple[Any, set[int]]:
    """The model on the meta device, quantised in the layers of transformers' choice, with its adapter; and the ids of
    the base model's parameters."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    options = {"attn_implementation": step.attention} if step.attention else {}
    kind = AutoModelForSequenceClassification if step.head == "classes" else AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        model = kind.from_config(step.config, dtype=step.dtype, **options)
        model.tie_weights()
        if step.quantization is not None:
            replace_with_bnb_linear(model, get_keys_to_not_convert(model), step.quantization)
            model.is_loaded_in_4bit = step.quantization.load_in_4bit
            model.is_loaded_in_8bit = step.quantization.load_in_8bit
        base = {id(p) for p in model.parameters()}
        if step.adapter is not None:
            model = make_adapter(model, step.adapter)
    if step.adjust is not None:
        step.adjust(model)
    return model, base


def _materialise(model: Any, base: set[int], step: Step, ledger: "Ledger") -> None:
    """Put fake tensors in the place of meta tensors, adapters in fp32 as `sft.train` has them."""
    import bitsandbytes

    made: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = _four_bits(module, ledger)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.weight = _eight_bits(module, ledger)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in made:
                    dtype = step.adapter_dtype if parameter.requires_grad else parameter.dtype
                    fake = torch.empty(parameter.shape, dtype=dtype)
                    ledger.own(fake, "weights" if id(parameter) in base else "adapter")
                    made[id(parameter)] = torch.nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = ledger.own(torch.empty(buffer.shape, dtype=buffer.dtype), "weights")


def _four_bits(module: Any, ledger: "Ledger") -> torch.nn.Parameter:
    """A weight as bitsandbytes leaves it on a GPU: two values in a byte, one scale for 64, the scales in a byte each.

    `Params4bit` itself quantises when it is moved to a GPU, which a fake tensor cannot be.
    """
    from bitsandbytes.functional import QuantState

    def state(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return ledger.own(torch.empty(shape, dtype=dtype), "quantisation state")

    meta, shape = module.weight, module.weight.shape
    blocks = math.ceil(shape.numel() / 64)
    scales: dict[str, Any] = {"absmax": state(blocks)}
    if meta.compress_statistics:
        nested = QuantState(state(math.ceil(blocks / 256)), code=state(256), blocksize=256, dtype=torch.float32)
        scales = {"absmax": state(blocks, dtype=torch.uint8), "state2": nested, "offset": state()}
    packed = ledger.own(torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), "weights")
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_type, weight.compress_statistics = meta.quant_type, meta.compress_statistics
    weight.quant_storage, weight.blocksize, weight.bnb_quantized = torch.uint8, 64, True
    weight.quant_state = QuantState(
        shape=shape, code=state(16), blocksize=64, quant_type=meta.quant_type, dtype=meta.dtype, **scales
    )
    module.support_avx512bf16_for_cpu = False
    return weight


def _eight_bits(module: Any, ledger: "Ledger") -> torch.nn.Parameter:
    """A weight in a byte a value, and a scale a row. Outliers, which depend on content, are taken to be none."""
    shape = module.weight.shape
    weight: Any = torch.nn.Parameter(ledger.own(torch.empty(shape, dtype=torch.int8), "weights"), requires_grad=False)
    weight.CB, weight.SCB = weight.data, ledger.own(torch.empty(shape[0]), "quantisation state")
    weight.has_fp16_weights = False
    module.state.CB, module.state.SCB, module.state.threshold = weight.CB, weight.SCB, 0.0
    return weight


def _run(model: Any, step: Step, ledger: "Ledger") -> None:
    """One step in which the optimizer has its state already, as every step but the first has."""
    trained = [p for p in model.parameters() if p.requires_grad]
    causal = inner_model(model)
    if step.checkpointing is not None:
        if step.adapter is not None:
            model.enable_input_require_grads()
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), OnCuda(step.autocast))}
        try:
            causal.activation_checkpointing_enable(step.checkpointing | again)  # OnCuda has left the backward pass
        except ValueError as error:
            raise UserError(f"{error} Write trainer.activation_checkpointing=false") from error
    model.train()
    _mark_layers(causal, ledger)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(ledger.own_gradient)

    with unset_fake_temporarily():  # bitsandbytes' optimizers make tables of real numbers
        optimizer = step.optimizer(trained) if step.optimizer else torch.optim.AdamW(trained, fused=True)
    ledger.enter("start", "optimizer")
    for parameter in trained:
        parameter.grad = ledger.own(torch.zeros_like(parameter), "gradients")
    optimizer.step()
    if step.accumulate == 1:
        optimizer.zero_grad()

    ledger.segments.clear()
    ledger.enter("before the layers", "activations")
    loss = _loss(model, causal, step, ledger)
    ledger.enter("backward pass of the head", "head")
    loss.backward()
    ledger.enter("optimizer", "optimizer")
    if step.clip:
        torch.nn.utils.clip_grad_norm_(trained, step.clip)
    optimizer.step()


def _mark_layers(causal: Any, ledger: "Ledger") -> None:
    """Name the segments of the step after the first two and the last two layers; those between lie between."""
    stacks = [m for m in causal.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(stacks, key=len)
    for i, layer in enumerate(layers):
        name = f"layer {i + 1}" if i < 2 else f"layer {i - len(layers)}" if i >= len(layers) - 2 else "a layer between"

        def entered(_module: Any, _inputs: Any, name: str = name) -> None:
            ledger.enter(f"forward pass, {name}", "activations")

        def left(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.enter(f"backward pass, {name}", "activations"))

        layer.register_forward_pre_hook(entered)
        layer.register_forward_hook(left)


def _loss(model: Any, causal: Any, step: Step, ledger: "Ledger") -> torch.Tensor:
    """The loss as SFTTrainer computes it on a GPU, from a batch as its collator makes it."""
    shape = (1, step.rows * step.length) if step.packed else (step.rows, step.length)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    labels = torch.zeros(shape, dtype=torch.long)
    if step.packed:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
    elif step.padded:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    with torch.autocast("cpu", step.autocast or torch.bfloat16, enabled=step.autocast is not None):
        if step.head == "classes":
            labels = labels[:, 0]
        if step.head in ("all", "classes"):
            return model(**inputs, labels=labels, use_cache=False).loss
        hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        ledger.enter("head", "head")
        learned = min(step.learned or math.inf, hidden.shape[0] * hidden.shape[1])
        rows, columns = (torch.zeros(int(learned), dtype=torch.long) for _ in range(2))
        head, picked = causal.get_output_embeddings(), hidden[rows, columns]
        if step.head == "tiles":
            return -FusedHead.apply(picked, head.weight, head.bias)[0].sum() / learned
        losses = functional.cross_entropy(head(picked).float(), rows, reduction="none")
        return (losses * torch.ones(len(rows))).sum() / learned


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until the last reference to it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys(KINDS, 0)
        self.total = 0
        self.segment, self.kind = "start", "weights"
        self.segments: dict[str, dict[str, int]] = {}
        self._highest = 0
        self._entries: dict[int, list[Any]] = {}

    def enter(self, segment: str, kind: str) -> None:
        """From here on, new storages are of this kind, and the peak is that of this segment."""
        self.segment, self.kind = segment, kind
        self._highest = sum(self.segments[segment].values()) if segment in self.segments else 0
        self._note()

    def own(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        """Count a tensor's storage as being of this kind, whatever it was before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._entries:
            size = -(-storage.nbytes() // ALLOCATED_BYTES_STEP) * ALLOCATED_BYTES_STEP
            self._entries[key] = [size, kind, weakref.ref(storage, lambda _: self._freed(key))]
            self.live[kind] += size
            self.total += size
        elif self._entries[key][1] != kind:
            size, old, _ = self._entries[key]
            self._entries[key][1] = kind
            self.live[old] -= size
            self.live[kind] += size
        return tensor

    def own_gradient(self, parameter: torch.Tensor) -> None:
        """Count a parameter's gradient as one: what autograd calls once it is there."""
        assert parameter.grad is not None
        self.own(parameter.grad, "gradients")

    def _freed(self, key: int) -> None:
        size, kind, _ = self._entries.pop(key)
        self.live[kind] -= size
        self.total -= size

    def _note(self, extra: int = 0) -> None:
        if self.total + extra > self._highest:
            self._highest = self.total + extra
            self.segments[self.segment] = self.live | {self.kind: self.live[self.kind] + extra}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._entries:
                self.own(leaf, self.kind)
        self._note(_workspace(func, args))
        return result


def _workspace(func: Any, args: Any) -> int:
    """Bytes that CUDA takes within an operation and gives back at its end."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default:  # many rows: the weight is dequantised, then multiplied
        values = math.prod(args[2])
        return values * args[0].element_size() + -(-values // 64) * 4
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        query, key = args[1], args[2]  # sums for the query in fp32; keys and values of grouped heads are expanded
        return query.numel() * (4 + (2 * query.element_size() if key.shape[1] != query.shape[1] else 0))
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        return args[1].numel() * 4
    return 0


FP32 = frozenset(
    "acos asin cosh cumprod cumsum erfinv exp expm1 group_norm layer_norm log log10 log1p log2 log_softmax logsumexp "
    "norm pow reciprocal rms_norm rpow rsqrt sinh softmax softplus tan cosine_similarity mse_loss nll_loss".split()
)
"""What autocast computes in fp32 on CUDA and leaves alone on a CPU: `torch_fp32` of torch's AutocastTestLists."""


class OnCuda(TorchFunctionMode):
    """What CUDA does in another way than a CPU, as far as memory shows it: attention, dropout, and autocast's list."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casting = self.autocast is not None and torch.is_autocast_enabled("cpu")
        if func is functional.scaled_dot_product_attention:
            dtype = self.autocast if casting else None
            return _attention(dtype, *args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if casting and getattr(func, "__name__", "").strip("_") in FP32:
            args = [_wide(value) for value in args]
            kwargs = {key: _wide(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of a byte a value."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    dtype: torch.dtype | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """CUDA's kernels: flash attention where there is no mask; memory-efficient attention adds a mask as a bias."""
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


class FusedHead(torch.autograd.Function):
    """The buffers of TRL's head on a GPU (trl.kernels.chunked_logprob): its Triton kernels work in place on a tile."""

    TOKENS, VOCABULARY = 4096, 32768

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Hidden states [n, width] of the learned positions to their log-probabilities, entropies and top-1 [n]."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        n = hidden.shape[0]
        sums = [hidden.new_zeros(n, dtype=torch.float32) for _ in range(7)]
        for _ in _tiles(hidden, weight, bias, dtype):
            pass
        log_z = sums[0] + torch.log(sums[1])
        log_probs, entropy = sums[6] - log_z, log_z - sums[2] / sums[1]
        is_top1 = (sums[6] >= sums[0]) & (sums[6] > sums[5])
        ctx.save_for_backward(hidden, weight, bias, log_z, entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, bias = inputs = ctx.saved_tensors[:3]
        grads = [
            torch.zeros_like(value, dtype=torch.float32) if needed else None
            for value, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        ]
        for _ in _tiles(hidden, weight, bias, ctx.dtype):
            pass
        return tuple(None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=True))


def _tiles(hidden: Any, weight: Any, bias: Any, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The logits of 4,096 positions and 32,768 tokens at a time, all in one buffer."""
    tokens, vocabulary = FusedHead.TOKENS, FusedHead.VOCABULARY
    buffer = hidden.new_empty((min(len(hidden), tokens), vocabulary), dtype=dtype)
    for some in hidden.split(tokens)[:2]:  # further ones take and give back the same
        chunk = some.to(dtype)
        for part in weight.split(vocabulary):
            tile = buffer[: len(chunk), : len(part)]
            part = part.to(dtype)
            if bias is not None:
                tile.add_(bias[: len(part)].to(dtype))
            yield tile
