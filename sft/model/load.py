"""Base model and quantisation of a recipe, each checked after it was made; and the model that its training left."""

import copy
import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import UserError
from sft.decoding import of_whole_texts
from sft.hub import check_published, not_cached, offline
from sft.model.adapter import check_adapter, open_adapter
from sft.recipe import Recipe
from sft.recipe.messages import blamed, not_accepted
from sft.run import check_files, check_language_model
from sft.tokens.codec import Codec
from sft.tokens.tokenizer import base_commit, named_revision, unreachable

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TRIED_TOKENS = 4
"""Tokens that are written to try `generation:` out."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


class OutOfReach(UserError):
    """The model's config cannot be had."""


def check_model(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """Find what is wrong with the model before any row is read or weight loaded: its config, built without memory.

    Returns it, as it is without an adapter. Raises UserError where the model cannot be reached (OutOfReach), has fewer
    positions than `trainer.max_length` or fewer embeddings than the tokenizer has tokens, or where the adapter of
    `lora:` cannot be made on it as the recipe says.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(recipe, tokenizer)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = recipe.trainer.get("max_length", 1024)
    if positions and positions > 0 and (length or 2**31) > positions:
        raise UserError(
            f"`trainer.max_length` is {length or 'without bound'}, but {_name(recipe)} has {positions} positions; "
            f"write trainer.max_length={positions} or less"
        )
    with torch.device("meta"):
        try:
            skeleton = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # a config may be wrong in as many ways as there are models
            raise UserError(f"{_name(recipe)}: no causal language model can be made of its config: {error}") from error
    rows = skeleton.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{_name(recipe)}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}; "
            "use the tokenizer that the model was trained with"
        )
    check_adapter(recipe, copy.deepcopy(skeleton))
    return skeleton


def load_base(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", training: bool = False, exact: bool = False
) -> "PreTrainedModel":
    """The base model with its quantisation, on the device at hand; a new model is made from `trainer.seed`.

    `exact` leaves a CPU's 4-bit layers as training has them; else they are repacked when they first answer, to be fast.
    Raises UserError where the model cannot be reached, is not safetensors, or cannot be quantised.
    """
    from transformers import AutoModelForCausalLM, set_seed

    without_bars()
    if isinstance(recipe.model, dict):
        set_seed(int(recipe.trainer.get("seed", 42)))
        return AutoModelForCausalLM.from_config(_config(recipe, tokenizer)).to(device(recipe))

    try:
        options = _options(recipe, training)
        if recipe.quantization != "none":
            options["quantization_config"] = quantization_config(recipe.quantization)
        options.setdefault("device_map", {"": device(recipe)})
        model = AutoModelForCausalLM.from_pretrained(_name(recipe), use_safetensors=True, **options)
    except Exception as error:
        raise _refused(recipe, "model", error) from error
    if recipe.quantization != "none":
        _check_quantized(model, _name(recipe), training or exact)
    return model


def load_classifier(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", classes: Sequence[str]) -> "PreTrainedModel":
    """The base model, or a new one, with a fresh head in place of its own: logits of the classes at the last token that
    is not padding.

    Raises UserError where the model cannot be reached, or has no such form in transformers.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    without_bars()
    config = _config(recipe, tokenizer)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(int(recipe.trainer.get("seed", 42)))
    try:
        if isinstance(recipe.model, dict):
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                _name(recipe), config=config, use_safetensors=True, **_options(recipe, training=True)
            )
    except Exception as error:  # as above, or an architecture without such a head
        raise _refused(recipe, "model with a head for classes", error) from error
    return model.to(device(recipe))


def load_trained(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """The tuned model of a finished run: the base with its adapter, or the whole model."""
    from transformers import AutoModelForCausalLM

    check_language_model(recipe)
    check_files(recipe)
    without_bars()
    if not recipe.has_adapter:
        whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(recipe.trained, dtype=_dtype(recipe))
        return whole.to(device(recipe))  # type: ignore[arg-type]  # its signature is lost in a decorator
    return open_adapter(load_base(recipe, tokenizer), recipe.trained)


def decoding(recipe: Recipe, codec: Codec) -> "GenerationConfig":
    """The recipe's `generation:`, greedy where it says nothing, ending at the end token of training and no other.

    Raises UserError for a setting that transformers does not accept.
    """
    from transformers import GenerationConfig

    settings = {"max_new_tokens": 128, "do_sample": False} | recipe.generation
    ids = {"eos_token_id": codec.end[-1], "pad_token_id": codec.pad, "bos_token_id": codec.tokenizer.bos_token_id}
    try:
        config = GenerationConfig(**settings, **ids)
        config.validate(strict=True)
        if not config.max_new_tokens:
            raise ValueError("`max_new_tokens` is empty; write a number above 0")
    except Exception as error:  # each field has its own way to be wrong
        guilty = blamed(recipe.generation, lambda others: GenerationConfig(**others).validate(strict=True))
        raise UserError(not_accepted("generation", guilty, "transformers", error)) from error
    return config


def check_decoding(recipe: Recipe, codec: Codec) -> None:
    """Write some tokens by the recipe's `generation:` with a model of one small layer and this vocabulary: what
    `generate` finds wrong, it finds while it writes.

    Raises UserError for a setting that transformers does not accept.
    """
    try:
        _try_decoding(recipe, codec)
    except UserError:
        raise
    except Exception as error:  # each field has its own way to be wrong
        guilty = blamed(
            recipe.generation, lambda others: _try_decoding(recipe.model_copy(update={"generation": others}), codec)
        )
        raise UserError(not_accepted("generation", guilty, "transformers", error)) from error


def _try_decoding(recipe: Recipe, codec: Codec) -> None:
    """The same, with whatever `generate` raises."""
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    config, vocabulary = decoding(recipe, codec), len(codec.tokenizer)
    for key in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        given = recipe.generation.get(key)
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise UserError(f"`generation.{key}` names token {token!r}; the ids here are 0 to {vocabulary - 1}")
    if not of_whole_texts(config.to_diff_dict()):
        return  # each has its bounds in sft.decoding
    sizes = GPT2Config(vocab_size=vocabulary, n_positions=32, n_embd=4, n_layer=1, n_head=1, bos_token_id=0,
                       eos_token_id=0)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(sizes).eval()
        model.generation_config = GenerationConfig()
        config.max_new_tokens = min(TRIED_TOKENS, int(config.max_new_tokens or 1))
        prompt = torch.zeros(2, 4, dtype=torch.long)
        model.generate(input_ids=prompt, attention_mask=prompt + 1, generation_config=config, tokenizer=codec.tokenizer)


def device(recipe: Recipe) -> str:
    """Where models run: on the GPU of this process, if there is one and `trainer.use_cpu` does not say otherwise."""
    import torch

    on_gpu = torch.cuda.is_available() and not recipe.trainer.get("use_cpu")
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"


def has_bf16() -> bool:
    """Whether bfloat16 is fast here: a GPU from Ampere on, or a CPU with instructions for it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def without_bars() -> None:
    """No bars of transformers where there is no terminal to draw them on."""
    from transformers import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _options(recipe: Recipe, training: bool) -> dict[str, Any]:
    """What the weights are loaded with: the recipe's settings, in place of our type of them, and the base's commit."""
    settings = recipe.trainer.get("model_init_kwargs") or {}
    return {"dtype": _dtype(recipe, training)} | settings | {"revision": base_commit(recipe)}


def _dtype(recipe: Recipe, training: bool = False) -> Any:
    """Frozen weights in bf16 where a GPU has it, as memory counts there; trained weights and the CPU's in fp32.

    On a CPU, training in bf16 has the frozen weights in it as well: products round them to it in any case.
    """
    import torch

    frozen = recipe.has_adapter and has_bf16()
    if frozen and device(recipe) == "cpu":
        whole = (recipe.lora or {}).get("modules_to_save")  # in fp32, as a LayerNorm in bf16 does not take it
        frozen = training and recipe.quantization == "none" and bool(recipe.trainer.get("bf16", True)) and not whole
    return torch.bfloat16 if frozen else torch.float32


def computes_in(recipe: Recipe, stored: str) -> str:
    """The dtype in which the tuned model is scored, by its torch name: that of its layers, coarsest where they differ.
    `stored` is that of the base's files."""
    dtype = "bfloat16" if recipe.quantization != "none" else str(_options(recipe, training=False)["dtype"])
    return stored if dtype == "auto" else dtype.removeprefix("torch.")


def keep_freed_memory() -> None:
    """Let glibc keep buffers that a model on a CPU frees at each layer: to give them back and get new ones, page by
    page, costs up to a quarter of the time. (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of the environment do
    the same, but only for who knows of them.)"""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _refused(recipe: Recipe, what: str, error: Exception) -> UserError:
    """The error for weights that could not be loaded; raises that of a model whose weights are pickles alone."""
    name = _name(recipe)
    check_published(name, named_revision(recipe))
    if offline() and not os.path.isdir(name) and "safetensors" in str(error):  # transformers names the file it misses
        return UserError(not_cached(name))
    return UserError(unreachable(name, what, error, named_revision(recipe)))


def _name(recipe: Recipe) -> str:
    """The hub id or folder of the base model."""
    if isinstance(recipe.model, dict):
        return "the new model"
    return str(recipe.base.trained) if recipe.base else recipe.model


def _config(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    """The config of the base model, or that of a new one, whose vocabulary is the tokenizer's."""
    from transformers import AutoConfig

    if not isinstance(recipe.model, dict):
        try:
            return AutoConfig.from_pretrained(_name(recipe), revision=base_commit(recipe))
        except Exception as error:  # the hub client raises dozens of classes
            raise OutOfReach(unreachable(_name(recipe), "model", error, named_revision(recipe))) from error
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return AutoConfig.for_model(**({"vocab_size": len(tokenizer)} | ids | recipe.model))
    except Exception as error:
        raise UserError(f"`model:` is not accepted by transformers: {error}") from error


def quantization_config(kind: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_quantized(model: "PreTrainedModel", name: str, exact: bool) -> None:
    """Falcon says it is loaded in 4 bits with no layer quantised: count them."""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)]
    if not layers:
        raise UserError(
            f"{name}: bitsandbytes found no layer to quantise in this architecture; write quantization=none"
        )
    for layer in layers:
        # On CPUs with avx512_bf16 one forward without gradients repacks a 4-bit layer in place, for speed. After that
        # every training step gets wrong gradients, silently; and it fails where 32 and 64 do not divide the sizes.
        if exact or layer.out_features % 32 or layer.in_features % 64:
            layer.support_avx512bf16_for_cpu = False
