"""Each form of the model gives, in the program that it is for, the ids and logits of the model that was merged."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from sft import UserError
from sft.cli import main
from sft.export import Source, export, target_names
from sft.files import read_json
from sft.model import parity
from sft.recipe import Recipe, load
from sft.tokens.opened import Opened

OWN_TEMPLATE = '''"""Prompts with a head, a tail, and what Go's templates and Modelfiles read as their own."""

from data_templates import Template

HEAD = """"Quote" {{ not an action }} and \\"\\"\\" too.

Opening: A dog barked.
Story: It was hungry.

Opening: """


def template() -> Template:
    return Template(
        fields={"prompt": "the opening", "output": "what follows it"},
        prompt=lambda row: HEAD + row["prompt"] + "\\nStory:",
        completion=lambda row: " " + row["output"],
    )
'''


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
) -> Callable[..., Recipe]:
    """`trained(model_type, tokenizer, **changes)`: a recipe with its run, made once for each set of arguments."""
    made: dict[str, Recipe] = {}

    def train_one(kind: str, tokenizer: str, config: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        from sft.train.stage import train

        key = json.dumps([kind, tokenizer, config, changes])
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            shape = {"num_key_value_heads": 2} if kind in ("llama", "mistral", "qwen2", "gemma3_text") else {}
            tiny_model(folder / "model", request.getfixturevalue(tokenizer), kind, **(shape | (config or {})))
            if changes.get("template") == "own.py":
                (folder / "own.py").write_text(OWN_TEMPLATE, encoding="utf-8")
                changes["template"] = str(folder / "own.py")
            trainer = {"learning_rate": 0.03, "bf16": False, "logging_steps": 9} | changes.pop("trainer", {})
            recipe = load(write_recipe(folder, trainer=trainer, **changes))
            train(recipe)
            made[key] = recipe
        return made[key]

    return train_one


@pytest.fixture(scope="module")
def llama(trained: Callable[..., Recipe]) -> Recipe:
    """A QLoRA run of a Llama, with a tokenizer that puts a space and BOS before a text."""
    return trained("llama", "sentencepiece_like", {"hidden_size": 64}, quantization="4bit")


def report(recipe: Recipe, target: str) -> Any:
    return read_json(recipe.folder / "export" / target / "parity.json")


@pytest.mark.slow
def test_onnx_gives_the_logits_and_the_greedy_text_of_the_merged_model(llama: Recipe) -> None:
    assert export(llama, ["onnx"]) == []
    found = report(llama, "onnx")
    assert found["greedy"] == {"prompts": 4, "tokens": 32, "different": 0}
    for name in ("model.onnx", "model_with_past.onnx"):
        assert found[name]["largest_logit_difference"] < 1e-4
        assert found[name]["positions"] > 100
    names = {path.name for path in (llama.folder / "export" / "onnx").iterdir()}
    assert {"recipe.yaml", "tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"} < names


def test_onnx_graphs_heed_padding_and_go_on_from_a_cache(llama: Recipe) -> None:
    from sft.export.onnx import Session

    export(llama, ["onnx"])
    plain, cached = (Session(llama.folder / "export" / "onnx" / f"{n}.onnx") for n in ("model", "model_with_past"))
    assert {"past_key_values.0.key", "past_key_values.1.value"} < set(cached.inputs)
    alone = plain.logits([5, 6, 7])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    feed = {"input_ids": np.array([[9, 9, 5, 6, 7], [3, 4, 5, 6, 7]]), "attention_mask": mask}
    feed["position_ids"] = (mask.cumsum(1) - 1).clip(0)
    together = plain.session.run(["logits"], feed)[0]
    np.testing.assert_allclose(together[0, 2:], alone, atol=1e-5)
    first = cached.run([5, 6], 0, cached.empty)
    past = {name: first[name.replace("past_key_values", "present")] for name in cached.empty}
    np.testing.assert_allclose(cached.run([7], 2, past)["logits"][0, -1], alone[-1], atol=1e-5)


@pytest.mark.slow
def test_onnx_caches_what_sliding_attention_no_longer_sees(trained: Callable[..., Recipe]) -> None:
    recipe = trained("mistral", "metaspace_like", {"sliding_window": 8})
    assert export(recipe, ["onnx"]) == []
    assert report(recipe, "onnx")["greedy"]["different"] == 0


@pytest.mark.slow
def test_onnx_of_an_architecture_without_a_cache_is_one_graph(trained: Callable[..., Recipe]) -> None:
    recipe = trained("openai-gpt", "gpt2_like")
    assert export(recipe, ["onnx"]) == []
    assert [path.name for path in (recipe.folder / "export" / "onnx").glob("*.onnx")] == ["model.onnx"]


def test_a_graph_of_another_model_is_past_the_tolerance(llama: Recipe) -> None:
    from sft.export.onnx import Session

    export(llama, ["onnx"])
    source = Source(Opened(llama), llama.folder / "merged")
    model = source.model
    model.get_input_embeddings().weight.data[5:] *= 1.01
    graph = Session(llama.folder / "export" / "onnx" / "model.onnx")
    found = parity.differences(source.rows, parity.of_model(model), graph.logits)
    assert parity.past_tolerance(found, parity.TOLERANCE["float32"])


OWN_BPE = [("gemma3_text", "gpt2_like"), ("qwen2", "gpt2_like")]
CASES = [
    ("gpt2", "gpt2_like"),
    ("gpt_neox", "neox_like"),
    ("gpt_bigcode", "chat_like"),
    ("llama", "sentencepiece_like"),
]


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize(("kind", "tokenizer"), [*CASES, *OWN_BPE, ("mistral", "metaspace_like")])
def test_llama_cpp_gives_the_ids_and_the_logits(kind: str, tokenizer: str, trained: Callable[..., Recipe]) -> None:
    recipe = trained(kind, tokenizer)
    assert export(recipe, ["gguf"], {"gguf": "f32"}) == []
    found = report(recipe, "gguf")["f32"]
    assert found["largest_logit_difference"] < 0.01
    assert found["tokens"]["different_prompts"] == 0
    assert found["tokens"]["prompts"] >= 5
    unknown = {"gpt_neox": 2, "llama": 0}  # NFC is not done in llama.cpp
    assert found["tokens"]["different_odd"] <= unknown.get(kind, 1)


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_gguf_is_quantised_and_says_what_that_costs(llama: Recipe) -> None:
    assert export(llama, ["gguf"], {"gguf": "f16,bf16,q8_0,q4_k_m"}) == []
    found = report(llama, "gguf")
    assert found["f16"]["mean_kl"] < found["q8_0"]["mean_kl"] < found["q4_k_m"]["mean_kl"]
    assert found["q4_k_m"]["bytes"] < found["f16"]["bytes"]
    assert not list((llama.folder / "export" / "gguf").glob("*whole*"))


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("kind", "tokenizer", "lora"),
    [("gpt2", "gpt2_like", {"r": 4, "use_rslora": True, "lora_alpha": 16}), ("llama", "sentencepiece_like", {"r": 4})],
)
def test_the_adapter_alone_runs_in_llama_cpp(
    kind: str, tokenizer: str, lora: dict[str, Any], trained: Callable[..., Recipe]
) -> None:
    recipe = trained(kind, tokenizer, lora=lora)
    assert export(recipe, ["gguf"], {"gguf": "lora"}) == []
    assert report(recipe, "gguf")["lora"]["largest_logit_difference"] < 0.01


@pytest.mark.llama_cpp
def test_an_architecture_that_llama_cpp_does_not_run_is_one_message(trained: Callable[..., Recipe]) -> None:
    recipe = trained("openai-gpt", "gpt2_like")
    with pytest.raises(UserError, match=r"llama\.cpp does not run openai-gpt models"):
        export(recipe, ["gguf"])
    assert not (recipe.folder / "export" / "gguf").exists()


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("kind", "tokenizer", "changes"),
    [
        ("llama", "sentencepiece_like", {"template": "own.py", "generation": {"do_sample": True, "temperature": 0.7}}),
        ("gpt_bigcode", "chat_like", {}),
    ],
)
def test_the_modelfile_gives_prompts_the_ids_of_training(
    kind: str, tokenizer: str, changes: dict[str, Any], trained: Callable[..., Recipe]
) -> None:
    recipe = trained(kind, tokenizer, **changes)
    assert export(recipe, ["ollama"]) == []
    assert report(recipe, "ollama")["tried"] >= 5
    text = (recipe.folder / "export" / "ollama" / "Modelfile").read_text("utf-8")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert f"PARAMETER temperature {recipe.generation.get('temperature', 0)}\n" in text


def test_a_go_template_leaves_the_texts_of_others_as_they_are(trained: Callable[..., Recipe]) -> None:
    from sft.export.ollama import rendered, template
    from sft.model.artifact import furnish

    recipe = trained("gpt2", "gpt2_like", template="own.py")
    source = Source(Opened(recipe), recipe.folder / "furnished")
    source.merged.mkdir(exist_ok=True)
    furnish(source.opened, source.merged)
    from transformers import AutoTokenizer

    go = template(source.opened.codec, AutoTokenizer.from_pretrained(source.merged))
    assert '"""' not in go
    assert "{{ not" not in go
    prompts = source.opened.tokens.test["prompt"]
    openings = [prompt.rpartition("Opening: ")[2].removesuffix("\nStory:") for prompt in prompts]
    assert [rendered(go, opening) for opening in openings] == list(prompts)


def test_a_go_template_of_a_chat_takes_a_system_text(chat_like: Path) -> None:
    from transformers import AutoTokenizer

    from sft.export.ollama import rendered, template
    from sft.tokens.codec import Codec

    tokenizer: Any = AutoTokenizer.from_pretrained(chat_like)
    go = template(Codec(tokenizer), tokenizer)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for some, system in ((turns, "Be brief."), (turns[1:], "")):
        text = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True)
        assert rendered(go, "Why?", system) == text


def test_the_adapter_folder_has_a_card_that_the_hub_reads(trained: Callable[..., Recipe]) -> None:
    from huggingface_hub import ModelCard

    recipe = trained("gpt2", "gpt2_like")
    assert export(recipe, ["adapter"]) == []
    folder = recipe.folder / "export" / "adapter"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert "base_model" not in card.data.to_dict()  # a local folder is no id on the hub
    assert "18 rows" in card.text
    assert "PeftModel.from_pretrained" in card.text
    assert str(recipe.folder.parent) not in card.text + (folder / "adapter_config.json").read_text("utf-8")
    assert report(recipe, "adapter")["largest_logit_difference"] == 0


@pytest.mark.parametrize(("quantization", "said"), [("4bit", "load_in_4bit=True"), ("8bit", "load_in_8bit=True")])
def test_the_code_of_the_card_opens_the_base_as_it_was_in_training(
    trained: Callable[..., Recipe], quantization: str, said: str
) -> None:
    recipe = trained("llama", "gpt2_like", {"hidden_size": 64, "intermediate_size": 128}, quantization=quantization)
    assert export(recipe, ["adapter"]) == []
    assert said in (recipe.folder / "export" / "adapter" / "README.md").read_text("utf-8")
    assert report(recipe, "adapter")["by_card"]["relative_difference"] < 1e-2


def test_a_card_whose_code_does_not_run_is_not_written(
    trained: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trained("llama", "sentencepiece_like", lora={"r": 2})
    monkeypatch.setenv("PYTHONPATH", str(recipe.folder.parent))
    (recipe.folder.parent / "peft.py").write_text("raise ImportError('no peft here')")
    with pytest.raises(UserError, match=r"README.md does not run here, .* not written: ImportError: no peft here"):
        export(recipe, ["adapter"])
    assert not (recipe.folder / "export" / "adapter").exists()


def test_a_card_tells_the_scores_once_there_are_some(trained: Callable[..., Recipe]) -> None:
    from eval.evaluate import evaluate_run

    recipe = trained("gpt2", "gpt2_like", generation={"max_new_tokens": 4}, eval={"rows": 2})
    export(recipe, ["adapter"])
    assert "Not scored" in (recipe.folder / "export" / "adapter" / "README.md").read_text("utf-8")
    evaluate_run(recipe)
    export(recipe.model_copy(update={"generation": {"max_new_tokens": 5}}), ["adapter"])
    assert read_json(recipe.folder / "export" / "adapter" / "generation_config.json")["max_new_tokens"] == 5
    export(recipe, ["adapter"])
    assert "| loss on outputs |" in (recipe.folder / "export" / "adapter" / "README.md").read_text("utf-8")


def test_a_run_of_all_weights_has_no_adapter_to_export(trained: Callable[..., Recipe]) -> None:
    recipe = trained("gpt2", "gpt2_like", lora=None)
    with pytest.raises(UserError, match="there is no adapter; write --to safetensors"):
        export(recipe, ["adapter"])
    assert export(recipe, ["safetensors"]) == []


def test_a_push_without_a_hub_is_one_message(trained: Callable[..., Recipe]) -> None:
    recipe = trained("gpt2", "gpt2_like")
    with pytest.raises(UserError, match="it goes with --to adapter"):
        export(recipe, ["safetensors"], {"push": "me/it"})
    with pytest.raises(UserError, match="me/it: the hub did not take"):
        export(recipe, ["adapter"], {"push": "me/it"})


def test_safetensors_are_written_once_and_read_by_transformers_alone(trained: Callable[..., Recipe]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = trained("gpt2", "gpt2_like")
    assert export(recipe, ["safetensors"]) == []
    folder = recipe.folder / "export" / "safetensors"
    written = (folder / "parity.json").stat().st_mtime_ns
    assert export(recipe, ["safetensors"]) == []
    assert (folder / "parity.json").stat().st_mtime_ns == written
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    source = Source(Opened(recipe), recipe.folder / "merged")
    prompt = source.opened.tokens.test[0]["prompt"]
    turns = [{"role": "user", "content": prompt.removesuffix("\n")}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == source.opened.codec.prompts([prompt])[0]
    assert model.generation_config.eos_token_id == source.opened.codec.end[-1]


def test_a_truncated_source_and_a_folder_of_somebody_else_are_refused(trained: Callable[..., Recipe]) -> None:
    recipe = trained("gpt2", "gpt2_like", trainer={"max_steps": 3})
    export(recipe, ["safetensors"])
    folder = recipe.folder / "export" / "safetensors"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="was not written by sft"):
        export(recipe, ["safetensors"])
    assert (folder / "mine.txt").read_text() == "mine"
    weights = recipe.folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        export(recipe, ["adapter"])


def test_unknown_targets_types_and_missing_packages_name_what_to_write(
    trained: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trained("gpt2", "gpt2_like")
    with pytest.raises(UserError, match="unknown target `ggml`; there are adapter, gguf, ollama, onnx, safetensors;"):
        export(recipe, ["ggml"])
    with pytest.raises(UserError, match="names no target"):
        export(recipe, [])
    monkeypatch.setattr("sft.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx needs onnx, .*pip install 'sft-recipes\[onnx\]'"):
        export(recipe, ["onnx"])


def test_a_package_that_does_not_load_is_told(
    trained: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text("raise ImportError('libprotobuf.so: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="onnx is installed but does not load: libprotobuf"):
        export(trained("gpt2", "gpt2_like"), ["onnx"])


@pytest.mark.llama_cpp
def test_unknown_weights_and_a_converter_that_is_not_there_are_told_first(
    trained: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = trained("gpt2", "gpt2_like")
    with pytest.raises(UserError, match=r"unknown type `q5_z`.*q4_k_m"):
        export(recipe, ["gguf"], {"gguf": "q5_z"})
    with pytest.raises(UserError, match="--gguf names no type"):
        export(recipe, ["gguf"], {"gguf": ""})
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        export(recipe, ["gguf"], {"llama-cpp": str(tmp_path)})


def test_the_command_line_exports_and_says_what_is_wrong(
    trained: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = trained("gpt2", "gpt2_like")
    assert main(["export", str(recipe.folder), "--to", "safetensors,adapter"]) == 0
    assert main(["export", str(recipe.folder), "--to", "coreml"]) == 2
    assert "unknown target `coreml`" in capsys.readouterr().err


def test_every_target_is_a_file_of_the_package() -> None:
    folder = Path(__file__).parents[1] / "sft" / "export"
    assert target_names() == sorted({path.stem for path in folder.glob("*.py")} - {"__init__", "_to_gguf"})


def test_an_export_keeps_the_merged_folder_that_is_there(
    trained: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained("llama", "sentencepiece_like", {"hidden_size": 64}).folder)
    weights = Path(run) / "merged" / "model.safetensors"
    assert main(["merge", run, "--dtype", "float32"]) == 0
    before = weights.stat().st_mtime_ns
    assert main(["export", run, "--to", "safetensors"]) == 0
    assert weights.stat().st_mtime_ns == before
    assert {str(w.dtype) for w in load_file(Path(run) / "export" / "safetensors" / "model.safetensors").values()} == {
        "torch.float32"
    }
    capsys.readouterr()
    assert main(["export", run, "--to", "safetensors", "--dtype", "bfloat16"]) in (0, 1)
    said = capsys.readouterr().err
    assert "holds --dtype float32 --route dequantized, and is written again as asked" in said
    assert "export/safetensors: written" in said
    assert {str(w.dtype) for w in load_file(weights).values()} == {"torch.bfloat16"}
    assert main(["export", run, "--to", "adapter", "--dtype", "float32"]) == 2
    assert "--dtype is of a merged model, and --to adapter needs none" in capsys.readouterr().err


def test_a_model_of_16_bits_is_compared_as_it_is_loaded_in_32(trained: Callable[..., Recipe]) -> None:
    """Gemma scales its embeddings by a number that no file holds, and that loading in bfloat16 rounds."""
    recipe = trained("gemma3_text", "gpt2_like", {"hidden_size": 48, "num_attention_heads": 2, "head_dim": 24})
    main(["merge", str(recipe.folder), "--dtype", "bfloat16"])
    export(recipe, ["safetensors"])
    assert report(recipe, "safetensors")["problems"] == []
