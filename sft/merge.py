"""An adapter and its base as one ordinary model folder, proven to be the model that was trained.

A 4-bit or 8-bit base is dequantised first: the sum of its values and the adapter's is the trained model, which a sum
with the original weights, or one that is quantised again, is not. No GPU is needed. The model is held in the dtype that
is written, and summed in float32 a layer at a time; models that are compared are loaded one after the other. Which
dtype is written is found by trial: the smallest in which the folder keeps what tuning gained.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from data_templates import Template
from sft import UserError
from sft.files import read_json, seal, sealed, whole_folder, write_json, write_text
from sft.memory.fit import size_on_disk
from sft.model import parity
from sft.model.adapter import Mix, mix_adapters, not_mergeable, not_mixable, open_adapter, sum_into_weights
from sft.model.artifact import furnish
from sft.model.gain import Trained, Written, lines, logits_in, of_folder, of_trained, problems, sentence, weights_keep
from sft.model.load import computes_in, decoding, device, load_base, load_trained
from sft.model.loss import output_losses
from sft.recipe import Recipe
from sft.run import check_files, check_language_model, check_owner
from sft.show import say, table
from sft.tokens.opened import Opened
from sft.write.predict import predict, rows_to_ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JUDGED = ("judged by", "gain")
"""What tells folders apart from those of earlier versions, whose parity.json holds other figures."""
UNEQUAL = "NOT_THE_TRAINED_MODEL.txt"
"""The file in a merged folder that says what is past the tolerance."""


@dataclass(frozen=True)
class MergeOptions:
    """How a merged folder is written."""

    route: str = "dequantized"
    """What the adapter of a quantised base is added to: `dequantized` reproduces the model that was trained, `original`
    takes the base as it was before it was quantised, which is another model."""

    dtype: str = "auto"
    """float32, bfloat16 or float16; `auto` is the smallest in which the folder is the trained model."""

    score: bool = False
    """Whether both models also write their predictions, to be compared by the template's metrics."""

    shard: str = "5GB"
    """Largest size of a file of weights."""


@dataclass(frozen=True)
class _Job:
    """What is merged, and where files lie meanwhile."""

    runs: Sequence[Opened]
    mix: Mix | None
    options: MergeOptions
    folder: Path
    work: Path

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that is merged, or of the whole model."""
        return self.work / "mix" / "sum" if self.mix else self.recipe.trained

    @cached_property
    def rows(self) -> parity.Rows:
        """Held-out rows to compare on."""
        return parity.rows_to_compare(self.runs[0].tokens)


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
    made_of, with_scores = (_made_of(recipes, mix, how) for how in (options, replace(options, score=True)))
    if sealed(folder, made_of) or (not options.score and sealed(folder, with_scores)):
        say(f"{folder}: up to date")
        _show(folder)
        return folder
    if (before := options_of(folder)) and before != replace(options, score=False):
        say(f"{folder}: holds --dtype {before.dtype} --route {before.route}, and is written again as asked")
    with whole_folder(folder) as part:
        job = _Job(runs, mix, options, folder, part / ".work")
        found = _write(job, part, score)
        furnish(opened, part)
        write_json(part / "parity.json", found)
        if found["problems"]:
            write_text(part / UNEQUAL, "".join(f"{problem}\n" for problem in found["problems"]))
        shutil.rmtree(job.work)
        seal(part, made_of)
    _show(folder)
    return folder


def options_of(folder: Path) -> MergeOptions | None:
    """How the merged folder that is there was written, so that who needs one does not undo it, or None."""
    if not (folder / "files.json").is_file():
        return None
    made_of = read_json(folder / "files.json")["made_of"]
    return MergeOptions(**made_of["options"] | {"score": False}) if JUDGED in made_of.items() else None


def _made_of(recipes: Sequence[Recipe], mix: Mix | None, options: MergeOptions) -> dict[str, Any]:
    """What a merged folder follows from: the runs with the bytes they left, how they are asked, and what is wanted."""
    runs = [[read_json(r.folder / "run.json"), read_json(r.folder / "train.json")["sha256"]] for r in recipes]
    digest = hashlib.sha256(json.dumps(runs).encode()).hexdigest()
    evaluation = recipes[0].eval.model_dump() if options.score else None
    wanted = {"options": asdict(options), "mix": mix and asdict(mix), "generation": recipes[0].generation}
    return {"runs": digest, "eval": evaluation} | wanted | dict([JUDGED])


def _write(job: _Job, folder: Path, score: Scorer | None) -> dict[str, Any]:
    """Write the weights in the first dtype in which they are the trained model, else in the last that is tried. Returns
    what was measured."""
    opened, options, recipe = job.runs[0], job.options, job.recipe
    asked = rows_to_ask(opened.tokens.test, recipe.eval.rows, recipe.eval.seed)

    def predicted(model: Any, side: str) -> None:
        if options.score:
            config, place = decoding(recipe, opened.codec), job.work / "scores" / side
            predict(model, opened.codec, opened.tokens.test, asked, config, recipe, place)

    trained, exact = _measure(job, predicted)
    dtypes = _dtypes(job, trained.stored)
    refused: dict[str, list[str]] = {}
    for dtype in dtypes:
        layers, error = _write_weights(job, trained.stored, dtype, job.work / dtype)
        merged = _placed(_stored(job.work / dtype, "auto"), recipe)
        written = Written(dtype, layers, error, *of_folder(job.rows, merged, exact))
        if not (wrong := problems(trained, written)) or dtype == dtypes[-1]:
            break
        refused[dtype] = wrong
        shutil.rmtree(job.work / dtype)
    predicted(merged, "tuned")
    for file in (job.work / dtype).iterdir():
        file.rename(folder / file.name)
    return {
        "dtype": dtype,
        "route": options.route if recipe.quantization != "none" else None,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "asked": options.dtype != "auto" or options.route != "dequantized",
        "problems": wrong,
        "refused": refused,
        "table": lines(trained, written),
        "sentence": sentence(trained, written),
        "trained": trained._asdict(),
        "folder": written._asdict() | {"weights_keep": weights_keep(trained, written)},
        "mixed": _alone(job.runs, job.mix, job.adapter) if job.mix else None,
        "scores": score(job.work / "scores", opened.template, recipe.eval.seed) if options.score and score else None,
    }


def _measure(job: _Job, predicted: Callable[[Any, str], None]) -> tuple[Trained, parity.Logits]:
    """The trained model, and its logits in float32."""
    model = _unmerged(job)
    stored = str(model.dtype).removeprefix("torch.")
    scored_in = computes_in(job.recipe, stored)
    exact = parity.recorded(job.rows, logits_in(model, torch.float32), job.work / "logits")
    gain, moved = of_trained(job.rows, model, exact, {scored_in, *_dtypes(job, stored)} - {"float32"})
    del model
    gc.collect()
    scored = _scored(job)
    as_scored = parity.differences(job.rows, exact, parity.of_model(scored))
    predicted(scored, "base")
    del scored
    gc.collect()
    torch.cuda.empty_cache()
    return Trained(stored, gain, moved, as_scored, scored_in), exact


def _dtypes(job: _Job, stored: str) -> list[str]:
    """The dtypes to try, the smallest first: as the base is stored, then float16, then float32, which loses nothing."""
    if job.options.dtype != "auto":
        return [job.options.dtype]
    if not job.recipe.has_adapter or (job.recipe.quantization != "none" and job.options.route == "original"):
        return [stored]
    return list(dict.fromkeys([stored if stored != "float32" else "float16", "float16", "float32"]))


def _scored(job: _Job) -> Any:
    """The model that was trained, as it is scored. A CPU's 4-bit layers are left as they were in training."""
    recipe, tokenizer = job.recipe, job.runs[0].tokenizer
    if not recipe.has_adapter:
        return load_trained(recipe, tokenizer)
    return open_adapter(load_base(recipe, tokenizer, exact=True), job.adapter)


def _unmerged(job: _Job) -> Any:
    """The model that was trained, as it is stored, its adapter beside the weights; whole where there is no adapter."""
    if not job.recipe.has_adapter:
        return _stored(job.recipe.trained, "auto")
    plain = _base(job, "auto", "dequantized")
    if job.mix:
        seed = int(job.recipe.trainer.get("seed", 42))
        mix_adapters(plain, [run.recipe.trained for run in job.runs], job.mix, seed, job.adapter.parent)
    return _placed(open_adapter(plain, job.adapter), job.recipe)


def _write_weights(job: _Job, stored: str, dtype: str, folder: Path) -> tuple[int, float]:
    """Write the merged model in a dtype. Returns the layers that were tried while they were summed, and how far the
    farthest was from its layer and adapter apart.

    Raises UserError where what is written is the base.
    """
    recipe, layers, error = job.recipe, 0, 0.0
    if recipe.has_adapter:
        plain = _base(job, stored if stored == "float32" else dtype, job.options.route)
        name = "the sum of the adapters" if job.mix else str(recipe.trained)
        model, changed, layers, error = sum_into_weights(plain, job.adapter, name)
        if not changed:
            way_out = "" if dtype == "float32" else ", or write --dtype float32"
            raise UserError(
                f"{name}: changes no weight of its base in {dtype}: its own are 0, or too small; train longer{way_out}"
            )
    else:
        model = _stored(recipe.trained, dtype)
    model = model.to(getattr(torch, dtype))
    model.generation_config = decoding(recipe, job.runs[0].codec)
    try:
        model.save_pretrained(folder, max_shard_size=job.options.shard)
    except SafetensorError as reason:
        raise UserError(f"{job.folder}: the weights could not be written: {reason}") from reason
    return layers, error


def _base(job: _Job, dtype: str, route: str) -> "PreTrainedModel":
    """The base that the adapter is added to, in memory that is not the GPU's."""
    recipe, tokenizer = job.recipe, job.runs[0].tokenizer
    plain = load_base(_plain(recipe, dtype), tokenizer)
    if getattr(plain.config, "quantization_config", None) is not None:
        raise UserError(f"{recipe.model}: is stored quantised; an adapter is merged into a base of 16 or 32 bits")
    if recipe.quantization != "none" and route == "dequantized":
        _dequantize_into(plain, load_base(recipe, tokenizer))
    return plain


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


def _placed(model: Any, recipe: Recipe) -> Any:
    """The model on the GPU where it fits: one that trained a quantised base may be too small for the whole weights."""
    roomy = device(recipe) != "cpu" and model.get_memory_footprint() * 1.2 < torch.cuda.mem_get_info()[0]
    return model.to(device(recipe) if roomy else "cpu")


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
        mixed = [[m["run"], f"{m['weight']:g}", f"{m['alone']:.3f}", f"{m['sum']:.3f}"] for m in found["mixed"]]
        print(table(["loss on held-out rows of", "weight", "its adapter alone", "the sum"], mixed) + "\n")
    print(table(*found["table"]))
    for name, metric in (found["scores"] or {"metrics": {}})["metrics"].items():
        d = metric["difference"]
        sides = f"{metric['base']['value']:.3f} trained, {metric['tuned']['value']:.3f} merged"
        print(f"{name}: {sides}, difference {d['value']:.3f} (95 % interval {d['low']:.3f} to {d['high']:.3f})")
    for dtype, why in found["refused"].items():
        say(f"{folder}: not in {dtype}: {why[0]}")
    for problem in found["problems"]:
        say(f"{folder}: is not the trained model: {problem}")
    if found["problems"] and found["asked"]:
        say(f"{folder}: without --dtype and --route it is written in the smallest dtype that is the trained model")
    route = f", onto the {found['route']} base" if found["route"] else ""
    say(f"{folder}: --dtype {found['dtype']}, {size_on_disk(found['bytes'])}{route}")
