"""What a recipe's types cannot say: bounds of the libraries' fields, and settings that do not go together."""

from collections.abc import Iterator, Mapping
from typing import Any

from sft.recipe.fields import LIBRARIES, model_config_fields
from sft.recipe.messages import unknown_key
from sft.recipe.schema import NewTokenizer, Recipe, VocabularyFile

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
        "chat_template_path": "the tokenizer's own chat template is used; see `prompt_format`",
        "trust_remote_code": "code from the hub is never run",
        "activation_offloading": "it is not supported here; use `activation_checkpointing`",
        "padding_free": "`packing` does it, and is proven not to leak before it is used",
        "fsdp": "each process holds the whole model here", "fsdp_config": "each process holds the whole model here",
        "deepspeed": "each process holds the whole model here",
        "parallelism_config": "each process holds the whole model here",
    },
    "lora": {"task_type": "it is always CAUSAL_LM", "base_model_name_or_path": "it is `model` at the top level",
             "inference_mode": "it is set by the stage", "auto_mapping": "PEFT fills it in",
             "peft_type": "it is LORA; other methods of PEFT are not supported yet",
             "peft_version": "PEFT fills it in", "runtime_config": "it is not kept with the adapter",
             "revision": "that of the base is `trainer.model_init_kwargs.revision`"},
    "generation": {"max_length": "set `max_new_tokens`", "eos_token_id": "the end token is that of training",
                   "pad_token_id": "it is that of the tokenizer", "bos_token_id": "it is that of the tokenizer",
                   "num_return_sequences": "write `sft generate --samples N`",
                   "return_dict_in_generate": "the text alone is kept", "output_scores": "the text alone is kept",
                   "output_logits": "the text alone is kept", "output_attentions": "the text alone is kept",
                   "output_hidden_states": "the text alone is kept"},
}  # fmt: skip
"""Fields of the libraries that the pipeline itself decides. Setting one would be ignored or would break a promise."""

POSITIVE = {"max_length", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "r",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_alpha", "max_new_tokens",
            "temperature", "repetition_penalty"}  # fmt: skip
"""Fields of the libraries that make no sense at 0 or below, which the libraries tell late or never."""

NO_LIMIT = ("max_steps", -1)

SHARES, COUNTS = {"top_p", "min_p", "typical_p"}, {"top_k", "no_repeat_ngram_size"}
"""Fields of `generation:` that run from 0 to 1, and those that run from 0 up."""

SEEDS = {"seed", "data_seed"}
"""Fields of `trainer:` that numpy takes too, which has 32 bits for them."""

AUTO = (("trainer", "per_device_train_batch_size"), "auto")
"""The one setting that a library does not know: the largest micro-batch that fits the card, by `sft.fit`."""


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
            elif key in POSITIVE and isinstance(value, int | float) and value <= 0 and (key, value) != NO_LIMIT:
                yield loc, f"`{section}.{key}` is {value}; it takes a number above 0"
            elif key in SHARES and isinstance(value, int | float) and not 0 <= value <= 1:
                yield loc, f"`{section}.{key}` is {value}; it takes a number from 0 to 1"
            elif key in COUNTS and isinstance(value, int) and value < 0:
                yield loc, f"`{section}.{key}` is {value}; it takes a whole number from 0 up"
            elif key in SEEDS and isinstance(value, int) and not 0 <= value < 2**32:
                yield loc, f"`{section}.{key}` is {value}; it takes a whole number from 0 to {2**32 - 1}"


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
    if (recipe.trainer.get("model_init_kwargs") or {}).get("trust_remote_code"):
        yield ("trainer", "model_init_kwargs"), "`trust_remote_code` cannot be set: code from the hub is never run"
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
