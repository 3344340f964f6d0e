"""GGUF: the model for llama.cpp, written by llama.cpp's own converter and compared in llama.cpp itself."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft import UserError
from sft.export import Options, Source, travel
from sft.export._to_gguf import UNSUPPORTED, settings
from sft.files import read_json, whole_folder, write_json
from sft.model import parity
from sft.model.adapter import low_rank, not_for_llama_cpp, open_adapter
from sft.model.load import load_base
from sft.show import say, table
from sft.tokens.codec import Codec

NEEDS = {"llama_cpp": "gguf"}
OPTIONS = {
    "gguf": "types of the weights between commas, f16,q8_0 unless given; lora is the adapter alone",
    "llama-cpp": "a checkout of llama.cpp, for its converter; else that of llama-cpp-python's source is fetched once",
}

STORED_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""dtype of a merged folder -> type in which the converter writes it as it is. llama.cpp makes all others of that."""

TOLERANCE = {
    "f32": {"relative_difference": 3e-3, "loss_difference": 1e-3},
    "f16": {"relative_difference": 5e-3, "loss_difference": 2e-3},
    "bf16": {"relative_difference": 2.5e-2, "loss_difference": 1e-2},
    "q8_0": {"relative_difference": 1e-1, "loss_difference": 2e-2},
    "lora": {"relative_difference": 3e-3, "loss_difference": 1e-3},
}
"""How far llama.cpp may be from transformers, by the type of the weights. Of smaller types it is shown and not judged.

llama.cpp reads its GELU from a table in float16, so that models with it are a thousandth of the spread away in f32."""

ODD_TEXTS = (
    "Hello,   world!\n\n  Tabs\tand trailing spaces   ", "I've 1234567890 dollars; she'd 3.14—and you'll? WE'RE!",
    "从前有座山，山上有座庙。", "naïve café Zoë résumé", "🦊🚀 emoji 👩‍👩‍👧", "<s> </s> <|endoftext|> [INST]",
    "\n", " ", "a", "\t\t x", "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}\n", "x" * 70,
    "Ελληνικά العربية עברית हिन्दी ไทย", "\u00a0non\u2009breaking\u3000spaces", "ﬁ ligature, e\u0301 combining",
)  # fmt: skip
"""Texts on which tokenizers come to differ."""


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write `NAME-TYPE.gguf` for each type asked for, and compare each; `NAME-lora.gguf` goes with the base's GGUF."""
    kinds, name = kinds_of(source.options), source.recipe.folder.name
    report: dict[str, Any] = {"problems": unseen_window(source)}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        reference = parity.recorded(source.rows, parity.of_model(source.model), Path(scratch) / "reference")
        for kind in kinds:
            file = folder / f"{name}-{kind}.gguf"
            if kind == "lora":
                report[kind] = found = write_adapter(source, file, Path(scratch))
            else:
                write_model(source, file, kind, Path(scratch))
                report[kind] = found = compare(source, file, reference)
            found["bytes"] = file.stat().st_size
            report["problems"] += [f"{file.name}: {problem}" for problem in judged(found, kind)]
    travel(source, folder, "recipe.yaml", "template.py", "generation_config.json")
    return report | {"table": kinds_table({kind: report[kind] for kind in kinds})}


def check(options: Options) -> None:
    """Raise UserError for a type of weights that there is not, and where there is no converter."""
    types = (*_types(), "lora")
    if not kinds_of(options):
        raise UserError(f"--gguf names no type of weights; there are {', '.join(types)}")
    if unknown := [kind for kind in kinds_of(options) if kind not in types]:
        raise UserError(f"unknown type `{unknown[0]}` of GGUF weights; there are {', '.join(types)}")
    converter(options.get("llama-cpp"))


def kinds_of(options: Options) -> tuple[str, ...]:
    """The types of weights that are asked for."""
    return tuple(word.strip().lower() for word in options.get("gguf", "f16,q8_0").split(",") if word.strip())


def write_model(source: Source, file: Path, kind: str, scratch: Path) -> None:
    """Write the merged model with weights of this type."""
    whole, stored = scratch / "whole.gguf", STORED_TYPES[read_json(source.merged / "config.json")["dtype"]]
    if not whole.is_file():
        convert(source, source.merged, whole, stored)
    if kind == stored:
        shutil.copyfile(whole, file)
    else:
        _quantize(whole, file, kind)


def convert(source: Source, model: Path, file: Path, kind: str) -> None:
    """Convert a transformers folder by llama.cpp's converter."""
    codec = source.opened.codec
    job = {
        "llama_cpp": str(converter(source.options.get("llama-cpp"))),
        "model": str(model), "out": str(file), "type": kind,
        "name": source.recipe.folder.name, "eos": codec.end[-1], "add_bos": adds_bos(codec), "space": adds_space(codec),
    }  # fmt: skip
    _run(["-m", "sft.export._to_gguf", json.dumps(job)], source)


def adds_bos(codec: Codec) -> bool:
    """Whether a prompt begins with BOS, which llama.cpp then puts there itself."""
    return codec.prompts(["a"])[0][0] == codec.tokenizer.bos_token_id


def text_of(codec: Codec, prompt: str) -> str:
    """The text that llama.cpp is given for a prompt: without the BOS that it puts there itself."""
    bos = str(codec.tokenizer.bos_token)
    return codec.written(prompt).removeprefix(bos) if codec.chat and adds_bos(codec) else codec.written(prompt)


def adds_space(codec: Codec) -> bool:
    """Whether the tokenizer puts a space before the prompt."""
    first = codec.prompts(["a"])[0][int(adds_bos(codec))]
    token = str(codec.tokenizer.convert_ids_to_tokens(first))
    return token.startswith("▁") and not text_of(codec, "a").startswith((" ", "▁"))


def _run(command: list[str], source: Source) -> None:
    """Run a converter in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode == UNSUPPORTED:
        kind = source.model.config.model_type
        raise UserError(f"llama.cpp does not run {kind} models; export safetensors or onnx instead")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if f"[Errno {errno.ENOSPC}]" in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise UserError(f"llama.cpp's converter refuses this model: {reason}")


def write_adapter(source: Source, file: Path, scratch: Path) -> dict[str, Any]:
    """Write the adapter alone, and compare it, in llama.cpp on the base's GGUF, with PEFT on the same base.

    The base is the one before quantisation: an adapter that was trained on a 4-bit base sits on another one there.
    """
    recipe = source.recipe.model_copy(update={"quantization": "none"})
    if reason := not_for_llama_cpp(recipe):
        raise UserError(f"{recipe.folder}: {reason}")
    model = open_adapter(load_base(recipe, source.opened.tokenizer).cpu().float(), recipe.trained)
    reference = parity.recorded(source.rows, parity.of_model(model), scratch / "logits")
    base, adapter = scratch / "base", scratch / "adapter"
    _write_scaled(model, adapter)
    model.unload().save_pretrained(base)
    write_json(base / "config.json", settings(read_json(base / "config.json")))  # which its script reads by itself
    source.opened.tokenizer.save_pretrained(base)
    convert(source, base, scratch / "base.gguf", "f32")
    script = converter(source.options.get("llama-cpp")) / "convert_lora_to_gguf.py"
    _run([str(script), "--base", str(base), "--outtype", "f32", "--outfile", str(file), str(adapter)], source)
    with LlamaCpp(scratch / "base.gguf", _longest(source), file) as runner:
        return parity.differences(source.rows, reference, runner.logits) | {"tokens": runner.same_tokens(source)}


def _write_scaled(model: Any, folder: Path) -> None:
    """An adapter as the converter reads it, which transposes GPT-2's layers once more."""
    from safetensors.torch import save_file

    tensors = {}
    for added in low_rank(model):
        tensors[f"{added.layer}.lora_A.weight"] = added.a.contiguous()
        tensors[f"{added.layer}.lora_B.weight"] = added.b.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"lora_alpha": 0})  # 0 is llama.cpp's word for no scale


def _longest(source: Source) -> int:
    return max(len(row["input_ids"]) for row in source.rows)


def converter(named: str | None = None) -> Path:
    """The folder of llama.cpp that holds its converter: the one named, that of LLAMA_CPP, or the one in the source of
    the installed llama-cpp-python, which pip fetches once into the user's cache."""
    if chosen := named or os.environ.get("LLAMA_CPP"):
        if not (Path(chosen) / "convert_hf_to_gguf.py").is_file():
            raise UserError(f"{chosen}: has no convert_hf_to_gguf.py; name a checkout of llama.cpp")
        return Path(chosen)
    folder = cached()
    if not folder.is_dir():
        _fetch(folder)
    return folder


def cached() -> Path:
    """Where the converter is kept once it was fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sft" / f"llama.cpp-{version('llama-cpp-python')}"


def _fetch(folder: Path) -> None:
    package = f"llama-cpp-python=={version('llama-cpp-python')}"
    say(f"fetching llama.cpp's converter from the source of {package}, 80 MB, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        options = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", scratch]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, package], capture_output=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise UserError(
                f"pip cannot fetch the source of {package}, which holds llama.cpp's converter; "
                "name a checkout of llama.cpp: --llama-cpp PATH"
            )
        with tarfile.open(archives[0]) as archive, whole_folder(folder) as part:
            root = f"{archives[0].name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
            wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
            for member in archive.getmembers():
                member.name = member.name.removeprefix(root)
                if member.name.startswith(wanted):
                    archive.extract(member, part, filter="data")


def _types() -> dict[str, int]:
    """Type of weights -> llama.cpp's number of it."""
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    names = {name.removeprefix(prefix).lower(): n for name, n in vars(llama_cpp).items() if name.startswith(prefix)}
    plain = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "f16": names["f16"], "bf16": names["bf16"]}
    return plain | {name: number for name, number in names.items() if name.startswith("q")}


def _quantize(whole: Path, file: Path, kind: str) -> None:
    import llama_cpp

    with _silent():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = _types()[kind]
        failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), settings)
    if failed:
        raise UserError(f"{file.name}: llama.cpp cannot quantise this model to {kind}, or the disk is full")


def compare(source: Source, file: Path, reference: parity.Logits) -> dict[str, Any]:
    """How far llama.cpp with this file is from transformers with the merged folder."""
    with LlamaCpp(file, _longest(source)) as runner:
        return parity.differences(source.rows, reference, runner.logits) | {"tokens": runner.same_tokens(source)}


def judged(compared: dict[str, Any], kind: str) -> list[str]:
    """What is past the tolerance of this type of weights."""
    problems = parity.past_tolerance(compared, TOLERANCE.get(kind, {}))
    tokens = compared["tokens"]
    if tokens["different_prompts"]:
        problems.append(
            f"{tokens['different_prompts']} of {tokens['prompts']} held-out prompts get other tokens in llama.cpp than "
            f"in training, such as {tokens['examples'][0]!r}"
        )
    return problems


def unseen_window(source: Source) -> list[str]:
    """What the rows that are compared may be too short to show: llama.cpp runs a Mistral without its sliding window."""
    config = source.model.config
    window = config.sliding_window if config.model_type == "mistral" else None
    if window and window < source.recipe.max_length:
        return [f"llama.cpp attends to more than the last {window} tokens of this model: texts longer than that differ"]
    return []


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, its cache in fp32."""

    def __init__(self, file: Path, length: int, lora: Path | None = None) -> None:
        import llama_cpp
        import torch

        threads = torch.get_num_threads()
        try:
            with _silent():
                self.model = llama_cpp.Llama(
                    str(file), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False,
                    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
                    lora_path=str(lora) if lora else None, n_threads=threads, n_threads_batch=threads,
                )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{file.name}: llama.cpp does not load it: {error}") from error

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [positions, vocabulary]."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)], np.float32)

    def ids(self, text: str, chat: bool) -> list[int]:
        """The ids of a prompt as llama.cpp's programs make them, the names of special tokens read only in a chat."""
        return self.model.tokenize(text.encode(), add_bos=True, special=chat)

    def same_tokens(self, source: Source) -> dict[str, Any]:
        """On how many held-out prompts (texts, where there are none) and odd texts the ids are not as in training."""
        test, codec = (
            source.opened.tokens.test.select(range(min(len(source.opened.tokens.test), 100))),
            source.opened.codec,
        )
        prompts = [text for text in test["prompt"] if text] or test["reference"]
        sides = [
            [
                t
                for t, ids in zip(texts, codec.prompts(texts), strict=True)
                if self.ids(text_of(codec, t), codec.chat) != ids
            ]
            for texts in (prompts, ODD_TEXTS)
        ]
        return {
            "prompts": len(prompts), "different_prompts": len(sides[0]),
            "odd": len(ODD_TEXTS), "different_odd": len(sides[1]), "examples": (sides[0] + sides[1])[:3],
        }  # fmt: skip


def kinds_table(kinds: dict[str, Any]) -> str:
    """A line for each file."""
    header = ["in llama.cpp", "size", "logits", "of spread", "mean KL", "other choice", "perplexity", "of the merged"]
    lines = []
    for kind, found in kinds.items():
        tokens = found["tokens"]
        figures = [f"{found[name]:.1e}" for name in ("largest_logit_difference", "relative_difference", "mean_kl")]
        losses = [f"{np.exp(found[name]):.4f}" for name in ("candidate_loss", "reference_loss")]
        ids = [f"{tokens[name] - tokens[f'different_{name}']}/{tokens[name]}" for name in ("prompts", "odd")]
        lines.append(
            [kind, f"{found['bytes'] / 2**20:,.1f} MB", *figures, f"{found['disagreement']:.1%}", *losses, *ids]
        )
    return table([*header, "prompts", "odd texts"], lines) + "\nprompts, odd texts: how many have the ids of training"


@contextmanager
def _silent() -> Iterator[None]:
    """Without what llama.cpp prints to the terminal past Python."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
