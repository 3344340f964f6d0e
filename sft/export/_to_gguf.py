"""A model folder to GGUF by llama.cpp's own converter, in a process of its own: `python -m sft.export._to_gguf JOB`.

The converter's class of the architecture writes the weights. What its subclass here adds is what the converter does not
know of: settings that transformers 5 saves under other names, tokenizers that were trained here, merge ranks of
byte-fallback tokenizers, and which tokens begin and end a text in training.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

UNSUPPORTED = 3
"""Exit status where llama.cpp has no such architecture."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The expression by which transformers has every tokenizer of a Qwen2 cut text, also one that was trained on rows."""


def main(job: dict[str, Any]) -> int:
    """Convert `job["model"]` to the file `job["out"]` with weights of the type `job["type"]`."""
    sys.path[:0] = [job["llama_cpp"], str(Path(job["llama_cpp"]) / "gguf-py")]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.basicConfig(level=logging.ERROR)
    folder = Path(job["model"])
    config = settings(ModelBase.load_hparams(folder, False))
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    try:
        architecture = get_model_class(get_model_architecture(config, ModelType.TEXT))
    except NotImplementedError:
        return UNSUPPORTED

    class Model(architecture):  # type: ignore[misc, valid-type]
        model_arch = architecture.model_arch

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if config.get("n_inner"):
                self.gguf_writer.add_feed_forward_length(config["n_inner"])

        def set_vocab(self) -> None:
            if spec["model"].get("byte_fallback"):
                self._write_byte_fallback()
            else:
                self._set_vocab_gpt2()
            self.gguf_writer.add_add_bos_token(job["add_bos"])
            self.gguf_writer.add_eos_token_id(job["eos"])

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            return _cut(spec) or str(super().get_vocab_base_pre(tokenizer))

        def _write_byte_fallback(self) -> None:
            tokens = _byte_fallback(spec, config["vocab_size"])
            self.gguf_writer.add_tokenizer_model("llama")
            self.gguf_writer.add_tokenizer_pre("default")
            self.gguf_writer.add_token_list([text for text, _, _ in tokens])
            self.gguf_writer.add_token_scores([score for _, score, _ in tokens])
            self.gguf_writer.add_token_types([int(gguf.TokenType[kind]) for _, _, kind in tokens])
            self.gguf_writer.add_add_space_prefix(job["space"])
            gguf.SpecialVocab(folder, n_vocab=len(tokens)).add_to_gguf(self.gguf_writer)

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    with torch.inference_mode():
        kind = gguf.LlamaFileType[kinds[job["type"]]]
        Model(folder, kind, Path(job["out"]), hparams=config, model_name=job["name"]).write()
    return 0


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the names and values that the converter looks for, and transformers 5 no longer saves."""
    kind = config["model_type"]
    if kind == "gpt2":
        return config | {"n_ctx": config["n_positions"]}
    if kind == "gpt_neox":
        return config | {"rotary_pct": config["rope_parameters"]["partial_rotary_factor"]}
    if kind == "gemma3_text" and set(config["layer_types"]) == {"full_attention"}:
        return config | {"sliding_window_pattern": 1}
    if kind == "falcon" and config["multi_query"] and not config["new_decoder_architecture"]:
        return config | {"num_kv_heads": 1}
    return config


def _cut(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level BPE cuts text into words, where that is GPT-2's or Qwen2's way. The
    converter knows tokenizers by the ids they give to a text of its own, and so none that was trained on rows."""
    cut = spec["pre_tokenizer"] or {}
    split, *rest = cut.get("pretokenizers", [cut])
    if split.get("pattern") == {"Regex": QWEN2} and [step["type"] for step in rest] == ["ByteLevel"]:
        return "qwen2"
    by_bytes = split.get("type") == "ByteLevel" and not rest
    return "gpt-2" if by_bytes and split.get("use_regex", True) and not split["add_prefix_space"] else None


def _byte_fallback(spec: dict[str, Any], size: int) -> list[tuple[str, float, str]]:
    """Text, score and type of each token. llama.cpp first merges what gives the token of the highest score: that is the
    order of the merges. (The converter's own class gives all tokens the same score, and other ids come out.)"""
    added = {token["id"]: token for token in spec["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(spec["model"]["merges"]):
        ranks.setdefault(left + right, rank)
    texts = {i: text for text, i in spec["model"]["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens = []
    for i in range(size):
        if i not in texts:
            tokens.append((f"[PAD{i}]", -1e6, "UNUSED"))
        elif texts[i] == spec["model"].get("unk_token"):
            tokens.append((texts[i], 0.0, "UNKNOWN"))
        elif i in added:
            kind = "CONTROL" if added[i]["special"] else "USER_DEFINED"
            tokens.append((texts[i] if kind == "CONTROL" else texts[i].replace("▁", " "), 0.0, kind))
        else:
            byte = len(texts[i]) == 6 and texts[i].startswith("<0x")
            tokens.append((texts[i], -float(ranks.get(texts[i], 1e6)), "BYTE" if byte else "NORMAL"))
    return tokens


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
