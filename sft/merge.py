"""An adapter and its base as one ordinary model folder, proven to be the model that was trained.

A 4-bit or 8-bit base is dequantised first: the sum of its values and the adapter's is the trained model, which a sum
with the original weights, or one that is quantised again, is not. No GPU is needed. The model is held in the dtype that
is written, and summed in float32 a layer at a time; the two models that are compared are loaded one after the other.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from data_templates import Template
from sft import UserError
from sft.files import read_json, seal, sealed, whole_folder, write_json, write_text
from sft.model import parity
from sft.model.adapter import Mix, mix_adapters, not_mergeable, not_mixable, open_adapter, sum_into_weights
from sft.model.artifact import furnish
from sft.model.load import decoding, device, load_base, load_trained
from sft.model.loss import output_losses
from sft.recipe import Recipe
from sft.run import check_files, check_language_model, check_owner
from sft.show import say, table
from sft.tokens.opened import Opened
from sft.write.predict import predict, rows_to_ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROUTES = ("dequantized", "original")
UNEQUAL = "NOT_THE_TRAINED_MODEL.txt"
"""The file in a merged folder that says what is past the tolerance."""


@dataclass(frozen=True)
class MergeOptions:
    """How a merged folder is written."""

    route: str = "dequantized"
    """What the adapter of a quantised base is added to: `dequantized` reproduces the model that was trained, `original`
    takes the base as it was before it was quantised, which is another model."""

    dtype: str = "auto"
    """float32, bfloat16 or float16; `auto` is the dtype in which the base is stored."""

    score: bool = False
    """Whether both models also write their predictions, to be compared by the template's metrics."""

    shard: str = "5GB"
    """Largest size of a file of weights."""


Scorer = Callable[[Path, Template, int], dict[str, Any]]
"""Scores of a folder of predictions, by the template's metrics; the seed is for the intervals."""


def merge(
    recipe: Recipe, options: MergeOptions = MergeOptions(), folder: Path | None = None, score: Scorer | None = None
) -> Path:
    """Write the trained model of a run as an ordinary transformers folder, `runs/NAME/merged`, and return it.

    Its `parity.json` says how far it is from the model that was trained; what is past the tolerance stands there under
    `problems`, and in `NOT_THE_TRAINED_MODEL.txt`. A folder that is up to date is kept.
    Raises UserError for a run that is not finished, was altered or has another base, for an adapter that changes
    nothing, and for a folder that holds something else.
    """
    return _merge([recipe], None, options, folder or recipe.folder / "merged", score)


def merge_several(
    recipes: Sequence[Recipe],
    mix: Mix,
    folder: Path,
    options: MergeOptions = MergeOptions(),
    score: Scorer | None = None,
) -> Path:
    """The same for the weighted sum of several runs' adapters, which have one base and one quantisation in common.

    The folder is prompted as the first run; what each adapter loses on its own held-out rows is shown as well.
    """
    if len(mix.weights) != len(recipes):
        raise UserError(f"--weights: {len(mix.weights)} weights for {len(recipes)} runs; write one for each")
    if mix.density is None and "ties" in mix.method:
        raise UserError(f"--method {mix.method} needs --density: the share of values that is kept, for instance 0.5")
    if mix.density is not None and "ties" not in mix.method:
        raise UserError(f"--density is for ties and dare_ties; `{mix.method}` keeps all values, so leave it out")
    for recipe in recipes:
        if reason := not_mixable(recipe):
            raise UserError(f"{recipe.folder}: {reason}")
        if recipe.quantization != recipes[0].quantization:
            raise UserError(
                f"{recipe.folder}: has another `quantization` than {recipes[0].folder}; adapters of one base sum"
            )
    return _merge(recipes, mix, options, folder, score)


def _merge(
    recipes: Sequence[Recipe], mix: Mix | None, options: MergeOptions, folder: Path, score: Scorer | None
) -> Path:
    for one in recipes:
        if reason := not_mergeable(one):
            raise UserError(f"{one.folder}: {reason}; use the adapter beside its base: sft export --to adapter")
        check_language_model(one)
        check_files(one)
    runs = [Opened(recipe) for recipe in recipes]
    recipe, opened = recipes[0], runs[0]
    check_owner(opened, opened.tokens.digests)
    for other, run in zip(recipes[1:], runs[1:], strict=True):
        check_owner(run)
        if read_json(other.folder / "run.json")["base"] != read_json(recipe.folder / "run.json")["base"]:
            raise UserError(
                f"{other.folder}: was trained on another base than {recipe.folder}; adapters of one base sum"
            )
    made_of = _made_of(recipes, mix, options)
    if sealed(folder, made_of):
        say(f"{folder}: up to date")
        _show(folder)
        return folder
    with whole_folder(folder) as part:
        model, adapter = _merged(recipes, mix, opened.tokenizer, options, part)
        model.generation_config = decoding(recipe, opened.codec)
        try:
            model.save_pretrained(part, max_shard_size=options.shard)
        except SafetensorError as error:
            raise UserError(f"{folder}: the weights could not be written: {error}") from error
        dtype = str(model.dtype).removeprefix("torch.")
        del model
        furnish(opened, part)
        found = _compare(opened, options, adapter, part, score)
        found |= {"route": options.route if recipe.quantization != "none" else None, "dtype": dtype}
        found |= {"mixed": _alone(runs, mix, adapter) if mix else None}
        found |= {"tolerance": parity.tolerance(dtype, recipe.quantization)}
        found |= {"problems": parity.past_tolerance(found, found["tolerance"])}
        write_json(part / "parity.json", found)
        if found["problems"]:
            write_text(part / UNEQUAL, "".join(f"{problem}\n" for problem in found["problems"]))
        shutil.rmtree(part / ".work")
        seal(part, made_of)
    _show(folder)
    return folder


def _made_of(recipes: Sequence[Recipe], mix: Mix | None, options: MergeOptions) -> dict[str, Any]:
    """What a merged folder follows from: the runs with the bytes they left, how they are asked, and what is wanted."""
    runs = [[read_json(r.folder / "run.json"), read_json(r.folder / "train.json")["sha256"]] for r in recipes]
    digest = hashlib.sha256(json.dumps(runs).encode()).hexdigest()
    evaluation = recipes[0].eval.model_dump() if options.score else None
    wanted = {"options": asdict(options), "mix": mix and asdict(mix), "generation": recipes[0].generation}
    return {"runs": digest, "eval": evaluation} | wanted


def _merged(
    recipes: Sequence[Recipe], mix: Mix | None, tokenizer: "PreTrainedTokenizerFast", options: MergeOptions, part: Path
) -> tuple["PreTrainedModel", Path]:
    """The merged model in its dtype, and the folder of the adapter that is in it."""
    recipe = recipes[0]
    if not recipe.has_adapter:
        return _stored(recipe.trained, options.dtype), recipe.trained
    plain = load_base(_plain(recipe, options.dtype), tokenizer)
    if getattr(plain.config, "quantization_config", None) is not None:
        raise UserError(f"{recipe.model}: is stored quantised; an adapter is merged into a base of 16 or 32 bits")
    if recipe.quantization != "none" and options.route == "dequantized":
        _dequantize_into(plain, load_base(recipe, tokenizer))
    if mix is None:
        return sum_into_weights(plain, recipe.trained, str(recipe.trained)), recipe.trained
    seed = int(recipe.trainer.get("seed", 42))
    adapter = mix_adapters(plain, [r.trained for r in recipes], mix, seed, part / ".work" / "mix")
    return sum_into_weights(plain, adapter, "the sum of the adapters"), adapter


def _plain(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe with its base as it is stored, in memory that is not the GPU's."""
    revision = (recipe.trainer.get("model_init_kwargs") or {}).get("revision", "main")
    options = {"revision": revision, "dtype": dtype, "device_map": {"": "cpu"}}
    return recipe.model_copy(
        update={"quantization": "none", "trainer": recipe.trainer | {"model_init_kwargs": options}}
    )


def _stored(folder: Path, dtype: str) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)


@torch.no_grad()
def _dequantize_into(plain: "PreTrainedModel", quantized: "PreTrainedModel") -> None:
    """Give the plain model the values of the quantised layers. GPT-2's own layers hold them transposed."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.pytorch_utils import Conv1D

    for name, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit):
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            values = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        else:
            continue
        place: Any = plain.get_submodule(name)
        place.weight.data.copy_(values.T if isinstance(place, Conv1D) else values)


def _compare(opened: Opened, options: MergeOptions, adapter: Path, part: Path, score: Scorer | None) -> dict[str, Any]:
    """The folder, loaded afresh, against the model that was trained: quantised base and adapter, as it was scored."""
    recipe, codec, test = opened.recipe, opened.codec, opened.tokens.test
    work, rows = part / ".work", parity.rows_to_compare(opened.tokens)
    asked = rows_to_ask(test, recipe.eval.rows, recipe.eval.seed)
    config = decoding(recipe, codec)

    def written(model: Any, side: str) -> None:
        if options.score:
            predict(model, codec, test, asked, config, recipe, work / "scores" / side)

    trained = _trained(recipe, opened.tokenizer, adapter)
    reference = parity.recorded(rows, parity.of_model(trained), work / "logits")
    written(trained, "base")
    del trained
    gc.collect()
    torch.cuda.empty_cache()
    merged = _placed(_stored(part, "auto"), recipe)
    found = parity.differences(rows, reference, parity.of_model(merged))
    written(merged, "tuned")
    scores = score(work / "scores", opened.template, recipe.eval.seed) if options.score and score else None
    return found | {"scores": scores}


def _placed(model: Any, recipe: Recipe) -> Any:
    """The model on the GPU where it fits: one that trained a quantised base may be too small for the whole weights."""
    roomy = device(recipe) != "cpu" and model.get_memory_footprint() * 1.2 < torch.cuda.mem_get_info()[0]
    return model.to(device(recipe) if roomy else "cpu")


def _trained(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", adapter: Path) -> Any:
    """The model that was trained, as it is scored. A CPU's 4-bit layers are left as they were in training."""
    if not recipe.has_adapter:
        return load_trained(recipe, tokenizer)
    return open_adapter(load_base(recipe, tokenizer, exact=True), adapter)


def _alone(runs: Sequence[Opened], mix: Mix, adapter: Path) -> list[dict[str, Any]]:
    """Of each run: its weight, and the loss on its own held-out rows by its adapter alone and by the sum."""
    tokenizer = runs[0].tokenizer
    model = open_adapter(load_base(runs[0].recipe, tokenizer, exact=True), adapter, "sum")
    found = []
    for number, (run, weight) in enumerate(zip(runs, mix.weights, strict=True)):
        recipe = run.recipe
        model = open_adapter(model, recipe.trained, f"run_{number}")
        rows = run.tokens.test
        rows = rows.select(range(min(len(rows), 64)))
        losses = {}
        for name, side in (("alone", f"run_{number}"), ("sum", "sum")):
            model.set_adapter(side)
            results = output_losses(model, rows, recipe.eval.batch_tokens, int(tokenizer.pad_token_id or 0))
            losses[name] = sum(row.loss for row in results) / sum(row.tokens for row in results)
        found.append({"run": recipe.folder.name, "weight": weight, "rows": len(rows)} | losses)
    return found


def _show(folder: Path) -> None:
    """Print what a folder's parity.json holds."""
    found = read_json(folder / "parity.json")
    if found["mixed"]:
        lines = [[m["run"], f"{m['weight']:g}", f"{m['alone']:.3f}", f"{m['sum']:.3f}"] for m in found["mixed"]]
        print(table(["loss on held-out rows of", "weight", "its adapter alone", "the sum"], lines) + "\n")
    print(parity.as_table(found, found["tolerance"]))
    for name, metric in (found["scores"] or {"metrics": {}})["metrics"].items():
        d = metric["difference"]
        sides = f"{metric['base']['value']:.3f} trained, {metric['tuned']['value']:.3f} merged"
        print(f"{name}: {sides}, difference {d['value']:.3f} (95 % interval {d['low']:.3f} to {d['high']:.3f})")
    for problem in found["problems"]:
        say(f"{folder}: is not the trained model: {problem}")
    say(f"{folder}: {found['dtype']}" + (f", onto the {found['route']} base" if found["route"] else ""))
