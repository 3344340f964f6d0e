"""Every architecture that a recipe names, as a tiny random model: LoRA learns, packing and merging are exact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from sft import UserError
from sft.memory import model_facts
from sft.recipe import Recipe
from sft.recipe.read import load, shipped

TINY: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"intermediate_size": None},
    "openai-gpt": {"intermediate_size": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8, "intermediate_size": None},
    "gpt_bigcode": {"n_inner": 128, "intermediate_size": None},
    "falcon": {"intermediate_size": None},
    "mistral": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
}
"""What the shape of each needs besides; None takes a key away."""

UNPACKED = {"falcon", "openai-gpt"}
"""Architectures in whose packed rows documents see each other: training refuses to pack them."""


def architecture(recipe: Recipe) -> str:
    fact = model_facts.known(str(recipe.model))
    assert fact is not None, f"{recipe.model} has no file in sft/memory/models: sft add-facts"
    return str(fact["config"]["model_type"])


def cases() -> list[Any]:
    """A recipe for each architecture, quantisation and `lora:` section among those shipped."""
    found: dict[str, Any] = {}
    for path in shipped():
        recipe = load(path)
        if recipe.lora is not None and recipe.base is None:
            key = f"{architecture(recipe)}-{recipe.quantization}-{json.dumps(recipe.lora, sort_keys=True)}"
            found.setdefault(key, pytest.param(recipe, id=path.stem))
    return list(found.values())


@pytest.fixture
def tiny(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], request: pytest.FixtureRequest
) -> tuple[Any, Any, Recipe]:
    """The recipe's architecture with its adapter and its quantisation, in fp32; its tokenizer; the recipe."""
    from transformers import AutoTokenizer

    from sft.model.adapter import add_adapter
    from sft.model.load import load_base

    recipe: Recipe = request.param
    kind = architecture(recipe)
    fact = model_facts.known(str(recipe.model))
    assert fact is not None
    kept = ["rotary_pct", "use_parallel_residual", "multi_query", "parallel_attn", "bias", "alibi", "afn", "hidden_act"]
    kept += ["new_decoder_architecture", "activation_function", "hidden_activation", "tie_word_embeddings"]
    config = TINY | {key: fact["config"][key] for key in kept if key in fact["config"]} | OWN.get(kind, {})
    config = {key: value for key, value in config.items() if value is not None}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout"), 0.0)
    folder = tiny_model(tmp_path / "model", gpt2_like, kind, **config, **dropouts)
    recipe = recipe.model_copy(update={"model": str(folder)})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return add_adapter(load_base(recipe, tokenizer, exact=True), recipe), tokenizer, recipe


def ids(tokenizer: Any, *texts: str) -> list[torch.Tensor]:
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", cases(), indirect=True)
def test_every_targeted_layer_learns_packing_is_exact_and_merging_keeps_the_logits(tiny: Any) -> None:
    from peft import PeftModel

    from sft.model.load import load_base

    model, tokenizer, recipe = tiny
    first, second = ids(tokenizer, "Mira went to the well and found a silver key.", "Tom asked whose lantern it was.")
    linear = {"Linear", "Conv1D", "FalconLinear", "Linear4bit"}
    base = model.get_base_model()
    head = base.get_output_embeddings()
    targets = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
    inner = [m for _, m in base.named_modules() if type(m).__name__ in linear and m is not head]
    wrapped = [m for m in inner if any(m is t.get_base_layer() for t in model.modules() if hasattr(t, "lora_A"))]
    assert len(targets) == len(wrapped) > 0
    assert (recipe.quantization == "4bit") == any(type(m).__name__ == "Linear4bit" for m in wrapped)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(first).logits[0, :-1], first[0, 1:]).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    model.eval()
    with torch.no_grad():
        apart = [model(row, use_cache=False).logits[0] for row in (first, second)]
        a, b = first.shape[1], second.shape[1]
        positions = torch.cat([torch.arange(a), torch.arange(b)])[None]
        if architecture_of(base) not in UNPACKED:
            packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits[0]
            torch.testing.assert_close(packed, torch.cat(apart), atol=2e-3, rtol=2e-3)
        if recipe.quantization == "4bit":  # a merge into 4-bit weights is not the trained model
            model.save_pretrained(Path(recipe.model) / "adapter", save_embedding_layers=False)
            plain = load_base(recipe, tokenizer, exact=True).dequantize()
            model = PeftModel.from_pretrained(plain, Path(recipe.model) / "adapter")
        merged = model.merge_and_unload()(first, use_cache=False).logits[0]
        tolerance = 0.05 if recipe.quantization == "4bit" else 1e-4
        assert (merged - apart[0]).abs().max() < tolerance * max(1.0, float(apart[0].abs().max()))


def architecture_of(model: Any) -> str:
    return str(model.config.model_type)


def test_there_is_a_recipe_for_every_model_that_is_promised() -> None:
    named = {str(load(path).model).rsplit("/", 1)[-1].lower() for path in shipped()}
    promised = (
        "distilgpt2 gpt2 gpt2-medium gpt2-large gpt2-xl openai-gpt gpt-neo-1.3b gpt-neo-2.7b gpt-j-6b gpt-neox-20b "
        "pythia-2.8b falcon-7b mistral-7b-v0.1 mistral-7b-instruct-v0.2 codellama-7b-instruct-hf meta-llama-3-8b "
        "qwen1.5-1.8b gemma-2b gemma-7b-it starcoder starcoderbase-1b wizardcoder-1b-v1.0 wizardcoder-3b-v1.0 "
        "wizardcoder-python-13b-v1.0"
    )
    assert not {*promised.split()} - named


def test_no_recipe_runs_code_from_the_hub() -> None:
    assert shipped()
    assert not [path for path in shipped() if "trust_remote_code" in path.read_text("utf-8")]


def test_a_checkpoint_of_pickles_alone_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    from sft.model.load import load_base

    folder = tiny_model(tmp_path / "model", gpt2_like)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    recipe = load(write_recipe(tmp_path))
    with pytest.raises(UserError, match=r"pickle.*save_pretrained"):
        load_base(recipe, AutoTokenizer.from_pretrained(folder))
