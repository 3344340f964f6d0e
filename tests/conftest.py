"""Small things that the tests share: tokenizers trained in the session, tiny models, and a recipe with its rows.

def test_it(tmp_path, sentencepiece_like, tiny_model, write_recipe):
    model = tiny_model(tmp_path / "model", sentencepiece_like, "llama")
    recipe = load(write_recipe(tmp_path, model=str(model), trainer={"max_steps": 1}))
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the libraries that read it: no test reaches a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEVICE = os.environ.get("SFT_TEST_DEVICE", "cpu")
"""Where recipes of the tests are trained: `cpu`, or `gpu` for the one at hand."""
ON_DEVICE = {"use_cpu": True} if DEVICE == "cpu" else {}

NAMES = ["Mira", "Tom", "Ada", "Wen", "Zoë", "小明", "老王", "Jürgen"]
PLACES = ["well", "mill", "forest", "market", "lighthouse", "森林", "village", "café"]
THINGS = ["silver key", "lantern", "red kite", "map", "drum", "铃铛", "letter", "pair of boots"]

ROWS = [
    {
        "prompt": f"{name} went to the {place} and found a {thing}.",
        "output": f'"Whose {thing} is this?" asked {name}. Nobody at the {place} knew, so {name} kept it.',
    }
    for i, name in enumerate(NAMES)
    for place, thing in [(PLACES[i], THINGS[i]), (PLACES[i - 3], THINGS[i - 5]), (PLACES[i - 1], THINGS[i - 2])]
]
"""24 rows for the story template, English with some Chinese and accents, no two with the same prompt."""

CORPUS = [text for row in ROWS for text in row.values()] + [
    "def answer(question):\n    if question:\n        return 42\n",
    "  Two spaces, then\n\na blank line;   and\ttabs.  ",
    "从前有座山，山上有座庙，庙里有个老和尚在讲故事。",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 2024 3.14",
]
END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def gpt2_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE as GPT-2 has it: no BOS added, <|endoftext|> for BOS and EOS, no pad token."""
    return _save(_byte_level([END]), tmp_path_factory, "gpt2_like", bos_token=END, eos_token=END, unk_token=END)


@pytest.fixture(scope="session")
def neox_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE as GPT-NeoX has it: NFC, and added tokens for runs of 2 to 24 spaces."""
    from tokenizers import AddedToken, normalizers

    bpe = _byte_level([END])
    bpe.normalizer = normalizers.NFC()
    bpe.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return _save(bpe, tmp_path_factory, "neox_like", bos_token=END, eos_token=END, unk_token=END)


@pytest.fixture(scope="session")
def chat_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE with a ChatML chat template: EOS is <|im_end|>, pad is <|endoftext|>, no BOS."""
    bpe = _byte_level([END, "<|im_start|>", "<|im_end|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": END, "extra_special_tokens": ["<|im_start|>"]}
    return _save(bpe, tmp_path_factory, "chat_like", chat_template=CHATML, **names)


@pytest.fixture(scope="session")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BPE with byte fallback as Llama 2 and Mistral v1 have it: `▁` is prepended by the normaliser, and
    <s> is added. EOS is </s>, there is no pad token."""
    from tokenizers import normalizers

    bpe = _byte_fallback()
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _save(bpe, tmp_path_factory, "sentencepiece_like", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def metaspace_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same BPE as Mistral v3 has it: a Metaspace pre-tokeniser puts `▁` before the text's first word."""
    from tokenizers import pre_tokenizers

    bpe = _byte_fallback()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _save(bpe, tmp_path_factory, "metaspace_like", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ["gpt2_like", "neox_like", "chat_like", "sentencepiece_like", "metaspace_like"]


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> Path:
    """Each of the tokenizer folders above in turn."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Path]:
    """`tiny_model(folder, tokenizer_folder, model_type="gpt2", **config) -> folder`, saved with its tokenizer.

    Random weights from a fixed seed, two layers, 256 positions. `config` is set on top of the sizes.
    """

    def save(folder: Path, tokenizer_folder: Path, model_type: str = "gpt2", **config: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"max_position_embeddings": 256, "vocab_size": len(tokenizer)}
        sizes |= {} if model_type == "gpt2" else {"intermediate_size": 64}
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        set_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | ids | config)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """`write_recipe(folder, rows=ROWS, **changes) -> folder / "recipe.yaml"`, beside it `rows.jsonl` and no model.

    A LoRA recipe of two steps for the story template, its model `folder/model`, its run `folder/runs/run`. A mapping in
    `changes` is merged into its section (`trainer={"max_steps": 1}`), any other value replaces, None takes a key away.
    """

    def write(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
        from ruamel.yaml import YAML

        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        recipe: dict[str, Any] = {
            "model": str(folder / "model"),
            "template": "story",
            "data": {"train": str(folder / "rows.jsonl"), "test_fraction": 0.25},
            "lora": {"r": 4},
            "trainer": {"max_length": 256, "max_steps": 2, "per_device_train_batch_size": 4} | ON_DEVICE,
            "output": str(folder / "runs" / "run"),
        }
        for key, value in changes.items():
            merge = isinstance(value, dict) and isinstance(recipe.get(key), dict)
            recipe[key] = recipe[key] | value if merge else value
        recipe = {key: value for key, value in recipe.items() if value is not None}
        yaml = YAML()
        yaml.width = 10_000  # one key, one line
        yaml.dump(recipe, folder / "recipe.yaml")
        return folder / "recipe.yaml"

    return write


@pytest.fixture(scope="session")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Any
) -> Any:
    """The recipe of a finished run: LoRA on a tiny llama, which then writes and ends as the rows do."""
    from sft.recipe import load
    from sft.train.stage import train

    folder = tmp_path_factory.mktemp("tuned")
    tiny_model(folder / "model", gpt2_like, "llama")
    trainer = {"max_steps": 80, "learning_rate": 2e-2}
    recipe = load(write_recipe(folder, trainer=trainer, generation={"max_new_tokens": 40}))
    train(recipe)
    return recipe


def popen(command: list[str], **options: Any) -> "subprocess.Popen[str]":
    """A process that heeds Ctrl-C, also where the tests were started in the background, without it."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, preexec_fn=heed, **pipes, **options)


def _byte_level(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def _byte_fallback() -> Any:
    """A BPE on `▁`-marked words, its vocabulary laid out as SentencePiece does: specials, 256 bytes, then pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [tuple(pair) for pair in learned["merges"]]

    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(back)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", vocab["<s>"])])
    return bpe


def _save(tokenizer: Any, factory: pytest.TempPathFactory, name: str, **settings: Any) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = factory.mktemp(name)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE not in ("cpu", "gpu"):
        raise pytest.UsageError(f"SFT_TEST_DEVICE is {DEVICE!r}; write cpu or gpu")
    config.addinivalue_line("markers", "slow: trains or exports by the dozen, or waits for whole processes")
    config.addinivalue_line("markers", "llama_cpp: runs in llama.cpp, where it and its converter are there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if "llama_cpp" in item.keywords]
    if wanting and (why := _no_llama_cpp()):
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say whether llama.cpp was there, which a row of dots does not."""
    reports = [r for some in terminalreporter.stats.values() for r in some if isinstance(r, pytest.TestReport)]
    kinds = [report.outcome for report in reports if "llama_cpp" in report.keywords and report.when != "teardown"]
    if "skipped" in kinds:
        terminalreporter.write_line(f"GGUF NOT TESTED, {kinds.count('skipped')} tests skipped: {_no_llama_cpp()}")
    elif kinds:
        terminalreporter.write_line("GGUF was tested in llama.cpp")


def _no_llama_cpp() -> str | None:
    """Why GGUF cannot be tested, or None where it can."""
    from sft.export.gguf import cached

    if find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed (pip install -e '.[gguf]')"
    if not os.environ.get("LLAMA_CPP") and not cached().is_dir():
        return "llama.cpp's converter is not here; `sft export --to gguf` fetches it, or LLAMA_CPP names a checkout"
    return None


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that REAL_DATA names, with real models, tokenizers and data; tests that ask are skipped without."""
    if not os.environ.get("REAL_DATA"):
        pytest.skip("REAL_DATA is not set")
    return Path(os.environ["REAL_DATA"])
