"""What a recipe's types cannot say: bounds of the libraries' fields, and settings that do not go together."""

from collections.abc import Iterator, Mapping
from typing import Any

from sft.decoding import ABOVE_0, SETTINGS, Bounds
from sft.recipe.fields import LIBRARIES, Kind, lora_parts, model_config_fields, shown
from sft.recipe.messages import unknown_key
from sft.recipe.schema import NewTokenizer, Recipe, VocabularyFile

AFTERWARDS = "held-out rows are measured one by one, in the types of training"
TO_THE_HUB = "nothing is sent while training: write `sft export --to adapter --option push=REPOSITORY`"
CHANGES_BASE = "it changes the base model, to which the result is compared"
NO_SUCH_LOSS = "it adds to the loss, which here is that of the outputs alone"

NO_ASSISTANT = "the model writes by itself, without an assistant or a look-up"
OF_ENCODERS = "it is for models with an encoder"
OWN_CACHE = "answers are written in pieces, with a cache of their own"
CODE_OF_THE_HUB = "transformers 5 has it as code on the hub alone, and code from the hub is never run"

OWNED = {
    "trainer": {
        "output_dir": "the run's folder is `output` at the top level",
        "auto_find_batch_size": "it changes the effective batch size unseen; set `per_device_train_batch_size`",
        "resume_from_checkpoint": "the same command goes on from the last whole checkpoint by itself",
        "completion_only_loss": "the loss falls on what the template's `completion` returns, always",
        "assistant_only_loss": "the loss falls on what the template's `completion` returns, always",
        "truncation_mode": "outputs are never cut; `data.overflow` says what happens to long rows",
        "dataset_text_field": "the template reads the row; map columns with `data.columns`",
        "dataset_kwargs": "rows reach the trainer with ids and labels; there is nothing left to prepare",
        "dataset_num_proc": "rows reach the trainer with ids and labels; there is nothing left to prepare",
        "shuffle_dataset": "each epoch draws its own order; `train_sampling_strategy` says how",
        "length_column_name": "lengths are counted in the rows themselves",
        "remove_unused_columns": "the columns of a row are those that its loss needs",
        "label_names": "the labels are those of the template's `completion`",
        "eval_packing": AFTERWARDS, "prediction_loss_only": AFTERWARDS, "eval_accumulation_steps": AFTERWARDS,
        "eval_do_concat_batches": AFTERWARDS, "eval_use_gather_object": AFTERWARDS, "batch_eval_metrics": AFTERWARDS,
        "include_for_metrics": AFTERWARDS, "bf16_full_eval": AFTERWARDS, "fp16_full_eval": AFTERWARDS,
        "do_train": "write `sft train`", "do_predict": "write `sft eval`",
        "do_eval": "`eval_strategy` says when training looks at the held-out rows",
        "use_cache": "training computes all positions of a row at once, and generating always has a cache",
        "save_only_model": "an interrupted training goes on from its checkpoints, which need the optimizer's state",
        "enable_jit_checkpoint": "a stopped training would count as finished; `save_steps` says how often it is saved",
        "push_to_hub": TO_THE_HUB, "hub_model_id": TO_THE_HUB, "hub_strategy": TO_THE_HUB, "hub_token": TO_THE_HUB,
        "hub_always_push": TO_THE_HUB, "hub_revision": TO_THE_HUB, "hub_private_repo": TO_THE_HUB,
        "accelerator_config": "`per_device_train_batch_size` and `gradient_accumulation_steps` alone make a step",
        "local_rank": "processes are started by `PROCESSES=N ./launch.sh`",
        "chat_template_path": "the tokenizer's own chat template is used; see `prompt_format`",
        "trust_remote_code": "code from the hub is never run",
        "activation_offloading": "it is not supported here; use `activation_checkpointing`",
        "padding_free": "`packing` does it, and is proven not to leak before it is used",
        "fsdp": "each process holds the whole model here", "fsdp_config": "each process holds the whole model here",
        "deepspeed": "each process holds the whole model here",
        "parallelism_config": "each process holds the whole model here",
    },
    "lora": {"task_type": "it is always CAUSAL_LM", "base_model_name_or_path": "it is `model` at the top level",
             "inference_mode": "it is set by the stage",
             "peft_type": "it is always LORA; other methods of peft are not supported yet",
             "peft_version": "it is the version that is installed",
             "revision": "set that of the base, `trainer.model_init_kwargs.revision`",
             "auto_mapping": "it is for model classes that transformers does not know",
             "fan_in_fan_out": "peft sets it by the kind of each layer",
             "runtime_config": "it is not kept with the adapter, so that only training would have it",
             "megatron_config": "Megatron's layers are not supported here",
             "megatron_core": "Megatron's layers are not supported here",
             "use_qalora": "peft has it for GPTQ alone, which `quantization` does not have",
             "qalora_group_size": "peft has it for GPTQ alone, which `quantization` does not have",
             "alora_invocation_tokens": "an adapter works on the whole prompt here",
             "arrow_config": "a run has one adapter; `sft merge` sums several",
             "loftq_config": CHANGES_BASE, "eva_config": CHANGES_BASE, "corda_config": CHANGES_BASE,
             "lora_ga_config": CHANGES_BASE, "kasa_config": CHANGES_BASE, "monteclora_config": NO_SUCH_LOSS},
    "generation": {"max_length": "set `max_new_tokens`", "eos_token_id": "the end token is that of training",
                   "pad_token_id": "it is that of the tokenizer", "bos_token_id": "it is that of the tokenizer",
                   "num_return_sequences": "write `sft generate --samples N`",
                   "return_dict_in_generate": "the text alone is kept", "output_scores": "the text alone is kept",
                   "output_logits": "the text alone is kept", "output_attentions": "the text alone is kept",
                   "output_hidden_states": "the text alone is kept",
                   "transformers_version": "it is the version that is installed",
                   "token_healing": "the prompt is the one of training, token by token",
                   "forced_bos_token_id": "the prompt is the one of training, token by token"}
                  | dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "is_assistant", "use_mtp",
                                   "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_lookbehind",
                                   "assistant_confidence_threshold", "assistant_early_exit", "target_lookbehind",
                                   "assistant_ensemble_weight", "speculation_type"), NO_ASSISTANT)
                  | dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
                                   "decoder_start_token_id"), OF_ENCODERS)
                  | dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len",
                                   "compile_config", "disable_compile", "continuous_batching_config",
                                   "prefill_chunk_size"), OWN_CACHE)
                  | dict.fromkeys(("low_memory", "penalty_alpha", "dola_layers", "diversity_penalty",
                                   "num_beam_groups", "constraints", "force_words_ids"), CODE_OF_THE_HUB),
}  # fmt: skip
"""Fields of the libraries that the pipeline itself decides. Setting one would be ignored or would break a promise."""

NOT_LOADED_WITH = {
    "quantization_config": "write `quantization: 4bit` or `8bit` at the top level",
    "load_in_4bit": "write `quantization: 4bit` at the top level",
    "load_in_8bit": "write `quantization: 8bit` at the top level",
    "device_map": "each process holds the whole model, on its own device",
    "torch_dtype": "it is `dtype` now",
    "trust_remote_code": "code from the hub is never run",
    "use_safetensors": "it is always true: to load a pickle runs the code in it",
    "token": "a recipe is kept with its run; set HF_TOKEN in the environment",
    "cache_dir": "set HF_HUB_CACHE in the environment",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
}
"""Other arguments of `from_pretrained`, and what to write in their place."""

LOADED_WITH = {
    "revision": Kind((str,)),
    "dtype": Kind(choices=("float32", "bfloat16", "float16")),
    "attn_implementation": Kind((str,)),
}
"""Fields of `trainer.model_init_kwargs`: what every stage that opens the base goes by."""

NOTHING_WITHOUT = {
    "liger_kernel_config": "use_liger_kernel", "packing_strategy": "packing",
    "dataloader_persistent_workers": "dataloader_num_workers", "dataloader_prefetch_factor": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
    "run_name": "report_to", "project": "report_to", "trackio_space_id": "report_to",
    "trackio_bucket_id": "report_to", "trackio_static_space_id": "report_to",
}  # fmt: skip
"""Settings of `trainer:` that change nothing where the other one is not set."""

MEASURED = {"language_modelling": ("loss", "perplexity", "token_accuracy"), "classification": ("loss", "accuracy")}
"""What training measures on the held-out rows, as `trainer.metric_for_best_model` names it."""

SEED = Bounds(0, 2**32 - 1, whole=True)
"""Of numpy, which has 32 bits for it."""

BOUNDS: Mapping[str, Mapping[str, Bounds]] = {
    "trainer": dict.fromkeys(("max_length", "max_steps", "num_train_epochs", "per_device_train_batch_size",
                              "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate"), ABOVE_0)
               | dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), ABOVE_0)
               | dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm"), Bounds(0))
               | dict.fromkeys(("eval_delay", "neftune_noise_alpha"), Bounds(0))
               | dict.fromkeys(("ddp_bucket_cap_mb", "ddp_timeout", "torch_empty_cache_steps"), ABOVE_0)
               | {"dataloader_num_workers": Bounds(0, 1024, True), "pad_to_multiple_of": Bounds(1, 4096, True)}
               | {"label_smoothing_factor": Bounds(0, 0.99), "save_total_limit": ABOVE_0}
               | dict.fromkeys(("seed", "data_seed"), SEED),
    "lora": dict.fromkeys(("r", "lora_alpha"), ABOVE_0) | {"lora_dropout": Bounds(0, 0.99)},
    "generation": {name: setting.bounds for name, setting in SETTINGS.items() if setting.bounds}
                  | dict.fromkeys(("min_length", "min_new_tokens"), Bounds(0, whole=True))
                  | dict.fromkeys(("max_time", "num_beams"), ABOVE_0),
}  # fmt: skip
"""What numbers the libraries' fields take, which the libraries tell late or never."""

PLAIN: Mapping[tuple[str, str], tuple[Any, ...]] = {
    ("trainer", "lr_scheduler_type"): ("linear", "cosine"),
    ("trainer", "eval_strategy"): ("no", "steps", "epoch"),
    ("lora", "target_modules"): ("all-linear",),
    ("lora", "bias"): ("none",),
}
"""Values that no library has to be asked about, of settings that have others."""

NO_LIMIT = ("max_steps", -1)

AUTO = (("trainer", "per_device_train_batch_size"), "auto")
"""The one setting that a library does not know: the largest micro-batch that fits the card, by `sft.memory.fit`."""


def judged_by_their_bounds(recipe: Recipe) -> bool:
    """Whether no setting of the recipe has to be tried in its library, which takes seconds to import."""
    return all(
        (key in BOUNDS[section] and section != "generation") or value in PLAIN.get((section, key), ())
        for section in LIBRARIES
        for key, value in (getattr(recipe, section) or {}).items()
        if key not in SETTINGS
    )


def library_problems(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and values of the sections that belong to a library, and of the model that is made from scratch."""
    sections = {name: fields() for name, fields in LIBRARIES.items()}
    model = document.get("model")
    if isinstance(model, dict) and "model_type" in model:
        known = model_config_fields(str(model["model_type"]))
        if not known:
            yield ("model", "model_type"), f"transformers has no model type `{model['model_type']}`"
        else:
            sections["model"] = known
    if "lora" in document and document["lora"] is None:
        yield (
            ("lora",),
            "`lora` is empty; write `lora: {}` for peft's defaults, or take the key away to train all weights",
        )
    for section, known in sections.items():
        values = document.get(section)
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            loc = (section, str(key))
            if reason := OWNED.get(section, {}).get(key):
                yield loc, f"`{key}` cannot be set under `{section}`: {reason}"
            elif key not in known:
                yield loc, unknown_key(loc, known)
            elif ((section, key), value) == AUTO:
                continue
            elif problem := known[key].problem(value):
                yield loc, f"`{section}.{key}` {problem}"
            elif section == "lora" and value is not None and (parts := lora_parts(key)):
                yield from _part_problems(key, parts, value)
            elif (bounds := BOUNDS.get(section, {}).get(key)) and isinstance(value, int | float):
                if not bounds.hold(value) and (key, value) != NO_LIMIT:
                    yield loc, f"`{section}.{key}` is {value}; it takes {bounds}"
            elif (section, key) == ("trainer", "model_init_kwargs") and isinstance(value, dict):
                yield from _loading_problems(value)


def _part_problems(key: str, known: Mapping[str, Kind], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and values of a section within `lora:`."""
    if not isinstance(value, dict):
        yield ("lora", key), f"`lora.{key}` is {shown(value)}; it takes a mapping"
        return
    for name, given in value.items():
        loc = ("lora", key, str(name))
        if name not in known:
            yield loc, f"unknown key `{name}` under `lora.{key}`, which has {', '.join(known)}"
        elif problem := known[name].problem(given):
            yield loc, f"`lora.{key}.{name}` {problem}"


def _loading_problems(options: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys and values of what the base is loaded with."""
    section = "trainer.model_init_kwargs"
    for key, value in options.items():
        loc = ("trainer", "model_init_kwargs", str(key))
        if reason := NOT_LOADED_WITH.get(key):
            yield loc, f"`{key}` cannot be set under `{section}`: {reason}"
        elif key not in LOADED_WITH:
            yield loc, f"`{key}` cannot be set under `{section}`, which has {', '.join(LOADED_WITH)}"
        elif problem := LOADED_WITH[key].problem(value):
            yield loc, f"`{section}.{key}` {problem}"


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are right alone and wrong together."""
    if recipe.quantization != "none" and not recipe.has_adapter:
        yield (
            ("quantization",),
            (
                f"`quantization: {recipe.quantization}` needs a `lora:` section; whole 4-bit or 8-bit weights "
                "cannot be trained"
            ),
        )
    if recipe.trainer.get(AUTO[0][1]) == AUTO[1] and "gradient_accumulation_steps" not in recipe.trainer:
        yield AUTO[0], "`auto` needs `trainer.gradient_accumulation_steps`: the rows of a step, which it divides"
    if isinstance(recipe.model, dict):
        if "model_type" not in recipe.model:
            yield ("model",), "a new model needs `model_type`, for instance `model_type: gpt2`"
        if recipe.tokenizer is None:
            yield ("model",), "a new model needs a `tokenizer`: `{vocab_size: 2048}` trains one on the data"
        if recipe.has_adapter:
            yield ("lora",), "a new model is trained whole: remove `lora:` and `quantization:`"
    elif isinstance(recipe.tokenizer, NewTokenizer):
        yield ("tokenizer",), "a new tokenizer needs a new model: remove `tokenizer:`, or make `model:` a mapping"
    if recipe.task == "classification":
        if recipe.has_adapter:
            yield ("lora",), "`task: classification` trains all weights: remove `lora:` and `quantization:`"
        if recipe.eval.scratch is not None:
            yield ("eval", "scratch"), "`eval.scratch` goes with language modelling: remove it"
        if recipe.eval.ngrams:
            yield ("eval", "ngrams"), "`eval.ngrams` goes with language modelling: remove it"
        if recipe.trainer.get("packing"):
            yield ("trainer", "packing"), "`trainer.packing` goes with language modelling: remove it"
    if len(set(recipe.eval.ngrams)) < len(recipe.eval.ngrams):
        yield ("eval", "ngrams"), f"`eval.ngrams` is {recipe.eval.ngrams}; name each order once"
    if recipe.trainer.get("load_best_model_at_end") and not recipe.has_adapter:
        for key, wrong, right in (
            ("save_strategy", "best", "`epoch` or `steps`"),
            ("save_total_limit", 1, "2 or more"),
        ):
            if recipe.trainer.get(key) == wrong:
                message = (
                    f"`trainer.{key}: {wrong}` leaves no last checkpoint, of which final_model is made; write {right}"
                )
                yield ("trainer", key), message
    for key in recipe.trainer.keys() & NOTHING_WITHOUT.keys():
        if recipe.trainer[key] and recipe.trainer.get(NOTHING_WITHOUT[key], "none") in ("none", False, 0, None, []):
            needed = f"`trainer.{NOTHING_WITHOUT[key]}`"
            yield ("trainer", key), f"`trainer.{key}` changes nothing without {needed}; set that too, or remove it"
    metric = recipe.trainer.get("metric_for_best_model")
    if recipe.trainer.get("save_strategy") == "best" and metric is None:
        yield ("trainer", "save_strategy"), "`trainer.save_strategy: best` needs `trainer.metric_for_best_model`"
    if isinstance(metric, str) and metric.removeprefix("eval_") not in MEASURED[recipe.task]:
        message = f"`trainer.metric_for_best_model` is {metric!r}; write one of {', '.join(MEASURED[recipe.task])}"
        yield ("trainer", "metric_for_best_model"), message
    if (bias := (recipe.lora or {}).get("bias", "none")) in ("all", "lora_only"):
        yield ("lora", "bias"), f"`lora.bias: {bias}` trains the base's own weights, to which the result is compared"
    if (start := (recipe.lora or {}).get("init_lora_weights", True)) not in (True, False, "gaussian"):
        message = (
            f"`lora.init_lora_weights: {start}` changes the base model, to which the result is compared; leave it out"
        )
        yield ("lora", "init_lora_weights"), message
    given = isinstance(recipe.tokenizer, str | VocabularyFile)
    if given and recipe.names_a_recipe:
        yield ("tokenizer",), "`tokenizer` cannot be set where `model` is a recipe; that recipe decides it"
