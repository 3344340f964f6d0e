"""Memory, predicted: the trace against itself, against what libraries really make, and through the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from sft import UserError
from sft.cli import main
from sft.memory import model_facts
from sft.memory.fit import (
    HEADER,
    automatic,
    fit,
    header,
    listing,
    parse_size,
    predicted,
    solve_batch,
    solve_length,
    step_of,
)
from sft.memory.trace import KINDS, FusedHead, Ledger, OnCuda, Step, trace
from sft.recipe.read import load, shipped

SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1000, "num_hidden_layers": 11}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "openai-gpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 6]], "num_hidden_layers": 12, "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neox": {"intermediate_size": 128},
    "gpt_bigcode": {},
    "falcon": {},
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
    "gemma": {"intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 16},
}
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def step(kind: str, **changes: Any) -> Step:
    config = AutoConfig.for_model(kind, **(SMALL | SHAPES[kind]))
    settings: dict[str, Any] = {"adapter": {"target_modules": "all-linear"}, "rows": 2, "length": 96}
    settings["checkpointing"] = None if kind == "openai-gpt" else {}
    return Step(config, **(settings | changes))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("gpt2", "llama") else pytest.mark.slow) for kind in SHAPES]
)
def test_two_depths_extended_are_the_whole_trace(kind: str) -> None:
    assert trace(step(kind)) == trace(step(kind), whole=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": None},
        {"quantization": FOUR_BITS},
        {"quantization": BitsAndBytesConfig(load_in_8bit=True)},
        {"adapter": None, "dtype": torch.float32},
        {"accumulate": 4, "adapter": None, "dtype": torch.float32},
        {"packed": True},
        {"head": "all", "autocast": None},
        {"head": "learned", "padded": False},
    ],
    ids=str,
)
def test_two_depths_extended_are_the_whole_trace_with_other_settings(changes: dict[str, Any]) -> None:
    assert trace(step("llama", **changes)) == trace(step("llama", **changes), whole=True)


def test_weights_adapter_and_optimizer_are_those_that_the_libraries_make() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    one = step("llama", adapter={"target_modules": "all-linear", "r": 4}, dtype=torch.float32)
    real = AutoModelForCausalLM.from_config(one.config)
    counts = [p.numel() for p in real.parameters()]
    buffers = [b.numel() for b in real.buffers()]
    model = get_peft_model(real, LoraConfig(task_type="CAUSAL_LM", **(one.adapter or {})))
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    memory = trace(one)
    assert (memory.parameters, memory.trainable) == (sum(counts) + sum(trained), sum(trained))
    blocks = [4 * n + -4 * n % 512 for n in counts + buffers]
    assert memory.bytes["weights"] == sum(blocks)
    assert memory.bytes["adapter"] == sum(4 * n + -4 * n % 512 for n in trained)
    steps = 512 * len(trained)  # AdamW counts the steps of each parameter on the device
    assert memory.bytes["optimizer"] == 2 * memory.bytes["adapter"] + steps


def test_four_bit_weights_are_those_that_bitsandbytes_makes() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compress_statistics=True, quant_type="nf4")
    layer.to("cpu")
    state = layer.weight.quant_state
    real = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    from sft.memory.trace import _four_bits

    ledger = Ledger()
    fake = _four_bits(bitsandbytes.nn.Linear4bit(64, 128, bias=False, compress_statistics=True, device="meta"), ledger)
    made = fake.quant_state  # type: ignore[attr-defined]
    mine = [fake, made.absmax, made.code, made.offset, made.state2.absmax, made.state2.code]
    assert [(t.dtype, t.numel()) for t in mine] == [(t.dtype, t.numel()) for t in real]


def test_the_head_takes_what_that_of_trl_takes_beside_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes  # noqa: F401  the ledger knows its operations
    from trl.kernels import chunked_logprob

    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # on a GPU all of these work in place
        monkeypatch.setattr(chunked_logprob, name, lambda *_, **__: None)
    outputs = ("log_probs", "entropy", "is_top1")

    def peak(head: Callable[..., Any]) -> dict[str, int]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        ledger = Ledger()
        with FakeTensorMode(), ledger:
            hidden = torch.empty(5000, 64, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(70_000, 64, dtype=torch.bfloat16)
            ledger.enter("head", "head")
            head(hidden, weight)[0].sum().backward()
        return ledger.segments["head"]

    theirs = peak(
        lambda hidden, weight: chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.zeros(5000, dtype=torch.long), 1.0, 32768, None, 1.0, outputs
        )
    )
    ours = peak(lambda hidden, weight: FusedHead.apply(hidden, weight, None))
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.005)  # apart from the targets, 40 kB


@pytest.mark.slow
def test_what_takes_more_memory_is_predicted_to() -> None:
    plain = trace(step("llama")).peak
    assert trace(step("llama", length=192)).peak > plain
    assert trace(step("llama", checkpointing=None)).peak > plain
    assert trace(step("llama", quantization=FOUR_BITS)).bytes["weights"] < trace(step("llama")).bytes["weights"]
    assert trace(step("llama", adapter=None, accumulate=2)).peak >= trace(step("llama", adapter=None)).peak
    assert set(trace(step("llama")).bytes) == set(KINDS)


def test_cuda_computes_norms_in_fp32_under_autocast_and_keeps_a_byte_of_a_dropout_mask() -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    with OnCuda(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.float32
        assert x.pow(2).dtype == (x**2).dtype == torch.float32
        assert torch.nn.functional.gelu(x).dtype == torch.bfloat16
    with OnCuda(torch.bfloat16):
        assert x.pow(2).dtype == torch.bfloat16


def test_a_trace_leaves_no_trace() -> None:
    before = torch.utils.checkpoint.DefaultDeviceType.get_device_type()
    trace(step("llama"))
    assert not torch.is_autocast_enabled("cuda")
    assert torch.utils.checkpoint.DefaultDeviceType.get_device_type() == before
    assert torch.ones(1).item() == 1


def test_the_solved_context_fits_and_a_longer_one_does_not() -> None:
    recipe = load("recipes/story_distilgpt2_lora.yaml", ["trainer.per_device_train_batch_size=16"])
    size = 2 * 2**30
    length = solve_length(recipe, size)
    assert 64 <= length < 1024
    assert length % 64 == 0
    for longer, fits in ((0, True), (64, False)):
        changed = recipe.model_copy(update={"trainer": recipe.trainer | {"max_length": length + longer}})
        assert (fit(changed).needed <= size) == fits


@pytest.mark.slow
def test_the_solved_batch_fits_and_auto_keeps_the_rows_of_a_step() -> None:
    auto = ["trainer.per_device_train_batch_size=auto", "trainer.gradient_accumulation_steps=24"]
    recipe = load("recipes/story_distilgpt2_lora.yaml", auto)
    size = 3 * 2**29
    most = solve_batch(recipe, size)
    chosen = automatic(recipe, size).trainer
    rows, accumulate = chosen["per_device_train_batch_size"], chosen["gradient_accumulation_steps"]
    assert rows * accumulate == 24
    assert rows == max(n for n in range(1, most + 1) if 24 % n == 0)
    assert automatic(recipe, None).trainer["per_device_train_batch_size"] == 8
    assert predicted(recipe, rows) == fit(automatic(recipe, size)).memory.peak
    with pytest.raises(UserError, match="does not fit"):
        automatic(recipe, 2**29)


def test_auto_without_the_rows_of_a_step_is_a_mistake() -> None:
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        load("recipes/quickstart.yaml", ["trainer.per_device_train_batch_size=auto"])


def test_weighted_rows_keep_their_logits() -> None:
    assert step_of(load("recipes/evolution_codellama_7b_qlora.yaml"))[1].head == "learned"
    assert step_of(load("recipes/story_gpt2_lora.yaml"))[1].head == "tiles"


def test_sizes_are_read_as_they_are_written() -> None:
    assert parse_size("24GiB") == parse_size("24") == parse_size("24 gib") == 24 * 2**30
    assert parse_size("24GB") == 24 * 10**9
    with pytest.raises(UserError, match="24GiB"):
        parse_size("much")


def test_the_command_says_what_fits_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "recipes/story_gpt2_lora.yaml"
    assert main(["fit", recipe, "--gpu", "8GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] == {"8GiB": True}
    assert found["needed"] == sum(found["memory"]["bytes"].values()) + found["reserve"]
    assert main(["fit", recipe, "--gpu", "1.4GiB"]) == 1
    said = capsys.readouterr().err
    assert "reserve: CUDA context, allocator slack" in said
    assert "1.4GiB: does not fit" in said
    assert said.rstrip().endswith("fits")


def test_an_unknown_model_is_named(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(
        UserError, match=r"nobody/nothing-1b: is not in the hub's cache, .*; unset it, or put the model"
    ):
        fit(load(write_recipe(tmp_path, model="nobody/nothing-1b")))


PUBLISHED = {
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "openai-community/openai-gpt": 116_534_784,
    "EleutherAI/gpt-neo-1.3B": 1_315_575_808,
    "EleutherAI/gpt-neo-2.7B": 2_651_307_520,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "codellama/CodeLlama-7b-Instruct-hf": 6_738_546_688,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b-it": 8_537_680_896,
    "bigcode/starcoder": 15_517_456_384,
    "bigcode/starcoderbase-1b": 1_137_207_296,
}
"""Parameters of the published weights, tied ones counted once."""


def test_shipped_configs_have_the_published_number_of_parameters() -> None:
    from transformers import AutoModelForCausalLM

    files = sorted(model_facts.FOLDER.glob("*.json"))
    assert len(files) >= 24
    for file in files:
        fact = json.loads(file.read_text("utf-8"))
        assert model_facts.known(fact["model"]) == fact
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fact["config"]))
        if fact["model"] in PUBLISHED:
            assert sum(p.numel() for p in model.parameters()) == PUBLISHED[fact["model"]], fact["model"]


@pytest.mark.slow
def test_every_recipe_says_in_its_header_what_fit_says() -> None:
    import re

    assert len(shipped()) > 20
    for path in shipped():
        said = re.search(HEADER, path.read_text("utf-8"), re.MULTILINE)
        now = re.search(HEADER, header(load(path)), re.MULTILINE)
        assert said, f"{path.name} has no line of `fit`"
        assert now
        assert said[1] == now[1], path.name
        for a, b in zip(said.groups()[1:], now.groups()[1:], strict=True):
            assert float(a.split()[0]) == pytest.approx(float(b.split()[0]), rel=0.03), path.name


def test_listing_recipes_imports_no_torch() -> None:
    code = "import sys; from sft.memory.fit import listing; listing(80); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "story_mistral_7b_qlora" in listing(80)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_listing_fits_the_terminal_and_leaves_nothing_out(width: int) -> None:
    lines = listing(width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("story_mistral_7b_qlora" in line for line in lines)
    assert sum("QLoRA, 4 bit" in line for line in lines) > 3
    assert sum("Mistral-7B" in line for line in lines) > 1


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("llama", None), ("llama", FOUR_BITS), ("llama", BitsAndBytesConfig(load_in_8bit=True)), ("gpt2", FOUR_BITS)],
)
def test_the_model_that_is_measured_is_the_one_that_is_traced(kind: str, quantization: Any) -> None:
    from sft.train.measure import random_model

    wanted = step(kind, quantization=quantization)
    model, traced = random_model(wanted, "cpu"), trace(wanted)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == traced.trainable
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    base = {p.data_ptr(): p.nbytes for p in model.parameters() if not p.requires_grad}
    assert adapter == pytest.approx(traced.bytes["adapter"], rel=0.05), "the trace rounds up to blocks of 512"
    assert sum(base.values()) == pytest.approx(traced.bytes["weights"], rel=0.05)
    assert all(torch.isfinite(p.float()).all() for p in model.parameters())


def test_what_is_measured_is_two_steps_of_the_recipe(
    tmp_path: Path, tiny_model: Callable[..., Path], gpt2_like: Path, write_recipe: Callable[..., Path]
) -> None:
    from sft.train.measure import two_steps

    trainer = {"max_length": 40, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "use_cpu": True}
    model = str(tiny_model(tmp_path / "model", gpt2_like))
    recipe = load(write_recipe(tmp_path, model=model, quantization="4bit", lora={"r": 4}, trainer=trainer))
    ran = two_steps(recipe, step_of(recipe)[1], "cpu")
    assert ran.state.global_step == 2
    assert ran.tokens_learned == 2 * 3 * (39 + 38), "the first token of a row has nothing before it"
    assert not recipe.folder.exists(), "nothing is left behind"


def test_measuring_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["fit", "--measure", "recipes/story_gpt2_lora.yaml"]) == 2
    assert "no GPU to measure on" in capsys.readouterr().err


def test_a_classifier_has_no_head_for_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, vocab_size: 50000}"
    rest = "template: sequence\ndata: {train: x.jsonl}\ntrainer: {max_length: 64}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\ntokenizer: {{vocab: v.json}}\n{rest}", "utf-8")
    (tmp_path / "x.jsonl").write_text('{"sequence": ["a"], "label": 1}\n', "utf-8")
    (tmp_path / "v.json").write_text('{"a": 0, "<pad>": 1, "<s>": 2, "</s>": 3}', "utf-8")
    tokens, classes = (fit(load(path, [f"task={task}"])).memory for task in ("language_modelling", "classification"))
    assert classes.parameters == tokens.parameters + 2 * 32, "the language model's head is tied to its embedding"
    assert classes.bytes["head"] < 1_000 < 50_000 * 512 < tokens.bytes["head"], "scores of 50,000 tokens, 8 x 63 times"
    assert main(["fit", "--measure", str(path), "task=classification"]) == 2
    assert "language model" in capsys.readouterr().err
