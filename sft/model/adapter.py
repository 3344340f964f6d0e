"""The adapter: what is trained beside a base that stays as it is.

No other module imports peft, and none asks what kind of adapter a recipe has. peft takes seconds to import, so each
function imports what it needs.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft import UserError
from sft.recipe import Recipe
from sft.recipe.messages import blamed, not_accepted
from sft.show import say

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

MIX_METHODS = ("cat", "linear", "svd", "ties", "dare_ties")
"""Of `peft.LoraModel.add_weighted_adapter`. `cat` is the weighted sum itself, `svd` its best part of the old rank;
`linear` sums A and B apart, `ties` and `dare_ties` leave small or random parts out of them."""

MIXED_WRONG = ("use_dora", "use_bdlora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices")
"""Settings of `lora:` that add_weighted_adapter takes without a word, and whose adapters it does not sum."""

NOT_LOW_RANK = (
    "use_dora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)
"""Settings of `lora:` whose adapters are more than two matrices beside each weight, or other ones."""

PROBE_TOKENS, PROBE_TOLERANCE = 8, 1e-3
"""Tokens on which a model with its adapter in its weights is compared, and how far its logits may move, as a share of
their spread. fp32 rounds to a thousandth of that; a shared weight moves them by more than their spread."""


class Summed(NamedTuple):
    """A model with an adapter in its weights."""

    model: "PreTrainedModel"
    changed: bool
    """Whether any weight is another one than before, in the dtype that it has."""
    layers: int
    """Layers that answered a random input before and after the sum, in float32."""
    error: float
    """How far the farthest of these answers moved, as a share of its largest value."""


@dataclass(frozen=True)
class Mix:
    """How several adapters become one."""

    weights: tuple[float, ...]
    method: str = "cat"
    density: float | None = None
    """For `ties` and `dare_ties`: the share of values that is kept."""


class LowRank(NamedTuple):
    """What LoRA adds to the weight of a layer: `b` [out, r] times `a` [r, in], the scale in `b`. In GPT-2's layers,
    which hold their weights as [in, out], it is `b` [in, r] times `a` [r, out]."""

    layer: str
    a: "Tensor"
    b: "Tensor"


def peft_arguments(recipe: Recipe) -> dict[str, Any] | None:
    """Arguments of `peft.LoraConfig`, for all linear layers where the recipe names none. None: there is no adapter."""
    return None if recipe.lora is None else {"target_modules": "all-linear"} | recipe.lora


def check_adapter(recipe: Recipe, skeleton: "PreTrainedModel") -> None:
    """Make the recipe's adapter on a model without weights, which is used up by it.

    Raises UserError for a name, a pattern or an index under `lora:` that hits nothing there, which peft passes over
    where another one fits, and for what peft cannot make. An adapter that will not merge is reported.
    """
    lora, arguments = recipe.lora, peft_arguments(recipe)
    if lora is None or arguments is None:
        return
    _check_names(lora, skeleton)
    _check_token_indices(lora, skeleton)
    without = {key: value for key, value in arguments.items() if key != "exclude_modules"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if without != arguments:
            wider = _made_or_culprit(skeleton, without)
            otherwise, skeleton = {*wider.base_model.targeted_module_names}, wider.unload()
        adapted = _made_or_culprit(skeleton, arguments)
    if without != arguments:
        _check_exclusions(lora["exclude_modules"], otherwise - {*adapted.base_model.targeted_module_names})
    _check_hits(lora, adapted)
    if not plain_head(adapted):
        for key in recipe.trainer.keys() & {"loss_type", "label_smoothing_factor"}:
            if recipe.trainer[key] not in ("nll", 0):
                raise UserError(
                    f"`trainer.{key}` does not go with `lora.trainable_token_indices` in the head; remove one"
                )
    if lora.get("ensure_weight_tying") and any("ensure_weight_tying" in str(warning.message) for warning in said):
        raise UserError("`lora.ensure_weight_tying` changes nothing: no layer whose weight is shared is adapted")
    if reason := not_mergeable(recipe) or _cannot_merge(adapted):
        say(f"this adapter can be trained and used beside its base, and cannot be merged: {reason}")


def _made_or_culprit(skeleton: "PreTrainedModel", arguments: Mapping[str, Any]) -> Any:
    """The adapter on the skeleton. Raises UserError with the setting without which peft would make it."""
    import torch

    def remake(others: dict[str, Any]) -> None:
        with torch.device("meta"):
            fresh = type(skeleton)(skeleton.config)
        make_adapter(fresh, others)

    try:
        return make_adapter(skeleton, dict(arguments))
    except UserError as error:
        raise UserError(not_accepted("lora", blamed(arguments, remake), "peft", error.__cause__)) from error


def _check_names(lora: Mapping[str, Any], skeleton: "PreTrainedModel") -> None:
    """The names of `lora:` that the model lacks, and the patterns that no name fits."""
    modules, layers = dict(skeleton.named_modules()), skeleton.config.get_text_config().num_hidden_layers
    if lora.get("target_modules", "all-linear") == "all-linear":
        for key in lora.keys() & {"layers_to_transform", "layers_pattern"}:
            raise UserError(f"`lora.{key}` needs a list in `lora.target_modules`, such as [{_leaf(skeleton)}]")
    wanted = lora.get("layers_to_transform")
    for index in wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]:
        if type(index) is not int or not 0 <= index < layers:
            raise UserError(f"`lora.layers_to_transform` names layer {index!r}; there are 0 to {layers - 1}")
    leaves = {path.rsplit(".", 1)[-1] for path, module in modules.items() if hasattr(module, "weight")}
    there = f"there are {', '.join(sorted(leaves))}"
    if lora.get("layers_to_transform") == []:
        raise UserError(f"`lora.layers_to_transform` is empty; there are 0 to {layers - 1}; name some, or leave it out")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        wanted = lora.get(key)
        if wanted in ([], {}, "") and (key != "target_modules" or not lora.get("target_parameters")):
            raise UserError(f"`lora.{key}` is empty; {there}; name some of them, or leave it out")
        paths = dict(skeleton.named_parameters()) if key == "target_parameters" else modules
        for name in wanted if isinstance(wanted, list) else ():
            if not isinstance(name, str) or not any(_ends(path, name) for path in paths):
                raise UserError(f"`lora.{key}` names `{name}`, which this model does not have; {there}")
        if isinstance(wanted, str) and wanted.lower() != "all-linear":
            with _patterns(f"lora.{key}"):
                if not any(re.fullmatch(wanted, path) for path in modules):
                    raise UserError(
                        f"`lora.{key}` is `{wanted}`, a pattern for whole paths such as {_path(skeleton)}, which no "
                        "layer's fits; to give names, write a list"
                    )
    full = max(min(weight.shape) for weight in skeleton.parameters() if weight.ndim == 2)
    if lora.get("r", 1) > full:
        raise UserError(f"`lora.r` is {lora['r']}; no layer here has a rank above {full}: write less")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (lora.get(key) or {}).items():
            whole = key == "rank_pattern"
            if type(value) not in ((int,) if whole else (int, float)) or value <= 0 or (whole and value > full):
                kind = f"a whole number from 1 to {full}" if whole else "a number above 0"
                raise UserError(f"`lora.{key}` gives `{pattern}` the value {value!r}; it takes {kind}")
            with _patterns(f"lora.{key}"):
                re.compile(str(pattern))
    if wanted := lora.get("layers_pattern"):
        with _patterns("lora.layers_pattern"):
            re.compile(str(wanted if isinstance(wanted, str) else "|".join(map(str, wanted))))
    for name in lora.get("modules_to_save") or ():
        if not any(_ends(path, name) and [*module.parameters()] for path, module in modules.items()):
            raise UserError(f"`lora.modules_to_save` names `{name}`, which holds no weights; {there}")


def _check_token_indices(lora: Mapping[str, Any], skeleton: Any) -> None:
    """`trainable_token_indices`, which peft looks up in the embedding when it first trains."""
    given = lora.get("trainable_token_indices")
    if given is None:
        return
    key, rows = "lora.trainable_token_indices", skeleton.get_input_embeddings().num_embeddings
    for name, indices in given.items() if isinstance(given, dict) else [(None, given)]:
        if name is not None and not any(
            _ends(path, name) and hasattr(module, "weight") for path, module in skeleton.named_modules()
        ):
            raise UserError(f"`{key}` names `{name}`, which this model does not have; write a list of ids alone")
        if not isinstance(indices, list) or not indices:
            raise UserError(f"`{key}` holds {indices!r}; write a list of token ids")
        for index in indices:
            if type(index) is not int or not 0 <= index < rows:
                raise UserError(
                    f"`{key}` holds {index!r}; this model's token ids are the whole numbers 0 to {rows - 1}"
                )
        if len(set(indices)) < len(indices):
            raise UserError(f"`{key}` holds an id twice; name each once")


def _check_hits(lora: Mapping[str, Any], adapted: Any) -> None:
    """What peft passed over without a word, or with a warning, while it made the adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import get_pattern_key

    if isinstance(adapted.get_output_embeddings(), LoraLayer):
        raise UserError(
            "`lora.target_modules` gives LoRA to the head, whose weight the loss reads directly, so that LoRA "
            "would not be trained; take it out, or train the head whole by `lora.modules_to_save`"
        )
    hit = [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]
    for key in ("target_modules", "target_parameters"):
        wanted = lora.get(key)
        for name in wanted if isinstance(wanted, list) else ():
            if not any(_ends(path, name) for path in hit):
                raise UserError(f"`lora.{key}` names `{name}`, and the rest of `lora:` leaves none of these layers")
    if (wanted := lora.get("layers_to_transform")) is not None:
        given = lora.get("layers_pattern") or r"[^.]*"
        found = {
            pattern: {int(at[1]) for path in hit if (at := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path))}
            for pattern in ([given] if isinstance(given, str) else given)
        }
        if none := [pattern for pattern, at in found.items() if not at]:
            raise UserError(f"`lora.layers_pattern` names `{none[0]}`, under which no layer gets LoRA")
        if lost := {*(wanted if isinstance(wanted, list) else [wanted])} - set[int]().union(*found.values()):
            raise UserError(
                f"`lora.layers_to_transform` names layer {min(lost)}, where the rest of `lora:` fits nothing"
            )
    for part in ("target_modules_bd_a", "target_modules_bd_b"):
        for name in (lora.get("use_bdlora") or {}).get(part) or ():
            if not any(str(name) in path for path in hit):
                raise UserError(f"`lora.use_bdlora.{part}` names `{name}`, and no layer with LoRA has that in its path")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = lora.get(key) or {}
        used = {get_pattern_key([*patterns], path) for path in hit}
        for pattern in patterns:
            if pattern not in used:
                raise UserError(f"`lora.{key}` has `{pattern}`, which fits no layer with LoRA that an earlier pattern "
                                f"leaves; it is held against the end of paths such as {hit[0]}")  # fmt: skip


def _check_exclusions(excluded: str | list[str], lost: Collection[str]) -> None:
    """Whether each of `exclude_modules` keeps LoRA from a layer; `lost` are those that have it otherwise."""
    for name in [excluded] if isinstance(excluded, str) else excluded:
        if not any(re.fullmatch(name, path) if isinstance(excluded, str) else _ends(path, name) for path in lost):
            raise UserError(f"`lora.exclude_modules` has `{name}`, which gets no LoRA in any case; remove it")


def _cannot_merge(adapted: Any) -> str | None:
    """Why the adapter cannot become part of the weights, as peft says when it tries; or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        try:
            layer.merge(safe_merge=False)
        except Exception as error:  # each kind of layer has its own reasons
            return " ".join(str(error).split())
    return None


@contextmanager
def _patterns(key: str) -> Iterator[None]:
    """Within, a regular expression that is none is a mistake of the recipe."""
    try:
        yield
    except re.error as error:
        raise UserError(f"`{key}` holds `{error.pattern!s}`, which is not a regular expression: {error.msg}") from error


def _ends(path: str, name: str) -> bool:
    """Whether peft takes a name for this path."""
    return path == name or path.endswith(f".{name}")


def _path(skeleton: "PreTrainedModel") -> str:
    """The path of a layer in the stack, as an example."""
    stacked = [path for path, weight in skeleton.named_parameters() if weight.ndim == 2 and re.search(r"\.\d+\.", path)]
    return stacked[-1].rpartition(".")[0]


def _leaf(skeleton: "PreTrainedModel") -> str:
    return _path(skeleton).rpartition(".")[2]


def add_adapter(model: "PreTrainedModel", recipe: Recipe) -> Any:
    """The model with the recipe's adapter, fresh: its first values follow from `trainer.seed`."""
    from transformers import set_seed

    arguments = peft_arguments(recipe)
    assert arguments is not None, "without an adapter all weights are trained"
    set_seed(int(recipe.trainer.get("seed", 42)))
    return make_adapter(model, arguments)


def make_adapter(model: "PreTrainedModel", arguments: dict[str, Any]) -> Any:
    """The model with an adapter of these `peft_arguments`, on the meta device where the model is there."""
    from peft import LoraConfig, PeftType, get_peft_model
    from peft.tuners.lora import LoraLayer

    try:
        config = LoraConfig(task_type="CAUSAL_LM", **arguments)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    except Exception as error:  # peft raises what the operation raises that a wrong value ends in
        raise UserError(not_accepted("lora", arguments, "peft", error)) from error
    made = adapted.peft_config["default"]
    assert made.peft_type == PeftType.LORA, f"peft made an adapter of type {made.peft_type}, the recipe says LoRA"
    assert any(isinstance(layer, LoraLayer) for layer in adapted.modules()), "peft gave LoRA to no layer"
    return adapted


def open_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """The model with the adapter of a folder, which is the one in use; beside the others that it has.

    Raises UserError where the adapter is one of another model.
    """
    from peft import PeftModel

    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        model.load_adapter(str(folder), adapter_name=name)
        model.set_adapter(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: does not fit its base: {' '.join(str(error).split())[:300]}") from error
    return model


def save_adapter(model: Any, folder: Path, name: str = "default") -> None:
    """Write an adapter: the default one into the folder itself, any other into a folder of its name below it."""
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)  # else peft asks the hub
    (folder / "README.md").unlink(missing_ok=True)  # peft's form of a card, with nothing filled in


def plain_head(model: Any) -> bool:
    """Whether the head is a layer with weight and bias, as TRL takes it to be. Where single tokens of it are trained,
    peft has something else in its place."""
    return hasattr(model.get_output_embeddings(), "bias")


def has_adapter(model: Any) -> bool:
    """Whether a model has one. (To ask peft would import it, for whole models too.)"""
    return hasattr(model, "peft_config")


def inner_model(model: Any) -> Any:
    """The transformers model, with the adapter in its layers: peft's wrapper around it computes nothing."""
    return model.get_base_model() if has_adapter(model) else model


def as_base(model: Any) -> AbstractContextManager[Any]:
    """Within, an adapted model answers as its base."""
    return model.disable_adapter() if has_adapter(model) else nullcontext()


@contextmanager
def in_weights(model: Any) -> Iterator[None]:
    """Within, an adapter in fp32 is part of the weights: at each token that saves two products a layer, and changes
    what fp32 rounds.

    Weights of fewer bits are left alone, in which the merged model would be another; and so is a model whose logits are
    seen to change, as where a head shares the weight of an adapted embedding.
    """
    import torch

    if not has_adapter(model) or any(p.dtype != torch.float32 for p in model.parameters()):
        yield
        return
    probe = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        apart = model(probe, use_cache=False).logits
        model.merge_adapter()
        merged = model(probe, use_cache=False).logits
    equal = torch.allclose(merged, apart, rtol=0, atol=PROBE_TOLERANCE * float(apart.std()))
    if not equal:
        model.unmerge_adapter()
    try:
        yield
    finally:
        if equal:
            model.unmerge_adapter()


def without_copies(recipe: Recipe, model: Any, args: "TrainingArguments") -> AbstractContextManager[None]:
    """Within, LoRA layers on a CPU leave their input as it is: they would copy it to fp32, and autocast back to bf16.
    (DoRA computes norms in its input's type, and peft's layer of single tokens has no such switch. On a GPU, `sft fit`
    foresees the copies.)"""
    from peft.helpers import disable_input_dtype_casting

    needed = any((recipe.lora or {}).get(key) for key in ("use_dora", "trainable_token_indices"))
    exact = args.device.type == "cpu" and args.bf16 and not needed
    return disable_input_dtype_casting(model, active=exact)


def sum_into_weights(plain: "PreTrainedModel", adapter: Path, name: str) -> Summed:
    """Put the adapter of a folder into the weights of a model, summed in float32, a layer at a time.

    Raises UserError for an adapter that does not fit or holds no numbers; `name` is for them.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, errors, changed = open_adapter(plain, adapter).eval(), [], False
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        _own_weight(base, plain)
        kept = [parameter.data for parameter in base.parameters()]
        base.float()
        with torch.no_grad():
            probe = _probe(layer)
            apart = None if probe is None else layer(probe)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise UserError(f"{name}: holds values that are not finite; train with a lower rate") from error
            except RuntimeError as error:  # a bias for a layer that has none
                raise UserError(f"{name}: peft cannot merge it: {error}") from error
            if apart is not None:
                errors.append(float((layer(probe) - apart).abs().max() / apart.abs().max()))
        for parameter, data in zip(base.parameters(), kept, strict=True):
            changed |= not torch.equal(data, parameter.data.to(data.dtype))
            parameter.data = data.copy_(parameter.data)  # where it was: new places would hold the model twice
    whole = model.unload().to(plain.dtype)  # layers in `modules_to_save` come in float32
    head = whole.get_output_embeddings()
    if head is not None and head.weight is not whole.get_input_embeddings().weight:
        whole.config.get_text_config().tie_word_embeddings = False
    return Summed(whole, changed, len(errors), max(errors, default=0.0))


def _own_weight(layer: Any, model: "PreTrainedModel") -> None:
    """Give an embedding that shares its weight with the head a weight of its own: the adapter is the embedding's."""
    import torch

    head = model.get_output_embeddings()
    if head is not layer and head is not None and getattr(layer, "weight", None) is head.weight:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _probe(layer: Any) -> "Tensor | None":
    """Inputs on which a layer is compared before and after its sum; None for one whose input is something else."""
    import torch

    base = layer.get_base_layer()
    if isinstance(base, torch.nn.Embedding):
        return torch.arange(base.num_embeddings, device=base.weight.device)[-PROBE_TOKENS:]
    if not hasattr(base, "weight") or base.weight.dim() != 2:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PROBE_TOKENS, layer.in_features, generator=generator).to(base.weight.device)


def mix_adapters(plain: "PreTrainedModel", adapters: Sequence[Path], mix: Mix, seed: int, folder: Path) -> Path:
    """The weighted sum of adapters of one base, written as an adapter below `folder`. `dare_ties` draws by the seed."""
    from transformers import set_seed

    names = [f"run_{number}" for number in range(len(adapters))]  # peft takes "0" for the layer of that number as well
    model: Any = plain
    for name, adapter in zip(names, adapters, strict=True):
        model = open_adapter(model, adapter, name)
    set_seed(seed)
    try:
        weights, density = list(mix.weights), mix.density
        model.add_weighted_adapter(names, weights, "sum", combination_type=mix.method, density=density)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"peft cannot sum these adapters by `{mix.method}`: {error}") from error
    save_adapter(model, folder, "sum")
    model.unload()
    return folder / "sum"


def low_rank(model: Any) -> Iterator[LowRank]:
    """What a LoRA adapter adds to the weight of each layer, as the layer holds it; rsLoRA and patterns are in the
    scale."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a = layer.lora_A["default"].weight.detach()
            b = layer.lora_B["default"].weight.detach() * layer.scaling["default"]
            yield LowRank(name, b.T, a.T) if layer.fan_in_fan_out else LowRank(name, a, b)


def not_mergeable(recipe: Recipe) -> str | None:
    """Why the adapter cannot become part of its base's weights, or None."""
    if (recipe.lora or {}).get("layer_replication"):
        return "`lora.layer_replication` has one weight in several layers, each with another adapter"
    return None


def not_mixable(recipe: Recipe) -> str | None:
    """Why the adapter cannot be summed with others, or None."""
    if not recipe.has_adapter:
        return "all weights were trained, there is no adapter; merge adapters alone"
    if wrong := next((key for key in MIXED_WRONG if (recipe.lora or {}).get(key)), None):
        return f"`lora.{wrong}` is set, and peft cannot sum such adapters; merge it alone"
    return None


def not_for_llama_cpp(recipe: Recipe) -> str | None:
    """Why llama.cpp cannot run the adapter beside its base, or None."""
    if not recipe.has_adapter:
        return "all weights were trained, there is no adapter; leave out `lora`"
    if wrong := next((key for key in NOT_LOW_RANK if (recipe.lora or {}).get(key)), None):
        return f"`lora.{wrong}` is set, and llama.cpp knows plain LoRA alone; export the merged model instead of `lora`"
    return None


def training_method(recipe: Recipe) -> str:
    """How a model is trained, in few words: `QLoRA, 4 bit`."""
    if recipe.lora is None:
        return "from scratch" if isinstance(recipe.model, dict) else "all weights"
    if recipe.quantization == "4bit":
        return "QLoRA, 4 bit"
    variants = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    name = next((name for key, name in variants.items() if recipe.lora.get(key)), "LoRA")
    return f"{name} on 8 bit" if recipe.quantization == "8bit" else name


def adapter_size(recipe: Recipe) -> str:
    """How large an adapter the recipe asks for: `r = 8`; nothing where all weights are trained."""
    return "" if recipe.lora is None else f"r = {recipe.lora.get('r', 8)}"


def hub_tags(recipe: Recipe) -> list[str]:
    """The tags by which the hub's users look for such an adapter."""
    return ["lora", "qlora"] if recipe.quantization == "4bit" else ["lora"]
