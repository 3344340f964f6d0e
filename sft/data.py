"""Rows to masked tokens: the one place where text becomes ids and labels, in training and at inference.

Prompt and output are tokenised apart and joined as ids. The ids that the model reads at inference are thus the prefix
of those it was trained on, whatever tokens the two texts would have merged into at the seam.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tokenizers import Tokenizer

import data_templates
from data_templates import Segment, Template
from sft import UserError
from sft.recipe import Recipe
from sft.rows import Record, fingerprint, read
from sft.template import keys, load_template, read_prompt, read_sample, samples, template_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

MASKED = -100
"""The label of a token that is not learned, as PyTorch's cross entropy has it."""


class Codec:
    """Text to ids and back. What follows a prompt gets no space put before it that was not there."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt_format: str = "auto") -> None:
        """Raises UserError where a chat template is asked for and there is none, or it rewrites the answer."""
        self.tokenizer = tokenizer
        spec = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self.chat = bool(tokenizer.chat_template) if prompt_format == "auto" else prompt_format == "chat"
        self._prompts = Tokenizer.from_str(json.dumps(spec))
        self._outputs = Tokenizer.from_str(json.dumps(_continuing(spec)))
        self._prompts.encode_special_tokens = not self.chat  # "</s>" in a user's text is text, not an end token
        self._outputs.encode_special_tokens = True
        self.start = [] if self.chat else _added_before(tokenizer)
        self.end = self._chat_end() if self.chat else [int(tokenizer.eos_token_id)]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the model reads before it writes, one list a text, without padding."""
        if self.chat:
            texts = [self._render([{"role": "user", "content": text}]) for text in texts]
        batch = self._prompts.encode_batch_fast(list(texts), add_special_tokens=False)
        alone = [int(self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end[0])]
        return [self.start + encoding.ids or alone for encoding in batch]

    def outputs(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that follow a prompt, without their end token."""
        return [encoding.ids for encoding in self._outputs.encode_batch_fast(list(texts), add_special_tokens=False)]

    def weighted(self, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
        """The ids of an output in segments, and the loss weight of each: that of the segment it begins in."""
        encoding = self._outputs.encode("".join(s.text for s in segments), add_special_tokens=False)
        weights = [segment.weight for segment in segments for _ in segment.text]
        return encoding.ids, [weights[min(start, len(weights) - 1)] for start, _ in encoding.offsets]

    def text(self, outputs: Sequence[Sequence[int]]) -> list[str]:
        """Output ids back to text; `outputs` and `text` are each other's inverse where the tokenizer loses nothing."""
        return list(self._outputs.decode_batch([list(ids) for ids in outputs], skip_special_tokens=False))

    def unchanged(self, texts: Sequence[str], outputs: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text comes back from its ids, up to the tokenizer's own normalisation of Unicode."""
        normalizer = self._outputs.normalizer
        plain = self.text(outputs)
        return [
            a == b or (normalizer is not None and _spaced(normalizer.normalize_str(a)) == b)
            for a, b in zip(texts, plain, strict=True)
        ]

    def _render(self, messages: list[dict[str, str]], generation: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))

    def _chat_end(self) -> list[int]:
        """The ids that end an answer in the chat template, up to and with its first special token."""
        if not self.tokenizer.chat_template:
            raise UserError("`prompt_format: chat`, but this tokenizer has no chat template; write `plain`")
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        prompt, whole = self._render([question]), self._render([question, answer], generation=False)
        if not whole.startswith(prompt + "a"):
            raise UserError(
                "the chat template of this tokenizer does not put the answer right after the prompt; "
                "write `prompt_format: plain`"
            )
        tail = self._prompts.encode(whole[len(prompt) + 1 :], add_special_tokens=False).ids
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ends = [i for i, token in enumerate(tail) if token in special]
        return tail[: ends[0] + 1] if ends else [*tail, int(self.tokenizer.eos_token_id)]


def _added_before(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The ids that the tokenizer itself puts before a text, such as BOS. What it puts after it is left to us."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    where = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return [int(token) for token in full[:where]]


def _continuing(node: Any) -> Any:
    """A tokenizer's JSON without the space it puts before each text and takes off when decoding."""
    if isinstance(node, list):
        return [_continuing(item) for item in node if not (isinstance(item, dict) and _is_prefix(item))]
    if not isinstance(node, dict):
        return node
    if _is_prefix(node):
        return None
    node = {key: _continuing(value) for key, value in node.items()}
    if node.get("type") == "Metaspace":
        node["prepend_scheme"] = "never"
    if node.get("type") == "ByteLevel":
        node["add_prefix_space"] = False
    return node


def _is_prefix(node: dict[str, Any]) -> bool:
    return node.get("type") == "Prepend" or (node.get("type") == "Strip" and bool(node.get("start")))


def _spaced(text: str) -> str:
    return text.replace("▁", " ")


@dataclass
class Counts:
    """What became of the rows of one side of the split."""

    records: int = 0
    rows: int = 0
    """Rows that reach the trainer or the scorer."""
    tokens: int = 0
    supervised: int = 0
    """Tokens with a label: those of the outputs and their end tokens."""
    trimmed: int = 0
    """Rows whose prompt lost its oldest tokens to fit `trainer.max_length`."""
    dropped: int = 0
    """Rows left out because they do not fit, their outputs being longer than there is room."""
    repeated: int = 0
    """Training records left out because the held-out side has the same row, or one with the same key."""
    changed: int = 0
    """Rows whose output the tokenizer does not give back exactly."""
    changed_example: str = ""
    longest: int = 0
    weighted: int = 0
    """Rows with a loss weight other than 1."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Length in tokens, rounded up to a multiple of 16 -> rows."""

    def add(self, sample: dict[str, Any]) -> None:
        """Count a row that is kept."""
        length = len(sample["input_ids"])
        self.rows += 1
        self.tokens += length
        self.supervised += sum(label != MASKED for label in sample["labels"])
        self.weighted += "weights" in sample
        self.longest = max(self.longest, length)
        bucket = str(-(-length // 16) * 16)
        self.lengths[bucket] = self.lengths.get(bucket, 0) + 1


@dataclass(frozen=True)
class Tokens:
    """A recipe's rows as masked tokens, on disk.

    `train` has the columns input_ids and labels, and weights where a template sets them; `test` also has prompt,
    prompt_tokens, reference and where.
    """

    train: "Dataset"
    test: "Dataset"
    counts: dict[str, Counts]
    key: str
    """Hash of everything that the tokens follow from: data, tokenizer, template, settings and this code."""


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> Tokens:
    """Tokenise all rows of a recipe, or open what an earlier run left for the same content.

    Raises UserError with file and line for rows that cannot be used, and where no row is left to train on.
    """
    from datasets import Dataset

    key = _key(recipe, tokenizer)
    folder = recipe.folder.parent / ".tokens" / key
    if not folder.is_dir():
        part = folder.with_name(f"{key}.{os.getpid()}.part")
        part.mkdir(parents=True)
        try:
            _write(recipe, Codec(tokenizer, recipe.prompt_format), part)
            part.rename(folder) if not folder.is_dir() else shutil.rmtree(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    counts = {side: Counts(**c) for side, c in json.loads((folder / "counts.json").read_text("utf-8")).items()}
    train, test = (Dataset.from_file(str(folder / f"{side}.arrow")) for side in ("train", "test"))
    if not any(c.weighted for c in counts.values()):
        train, test = train.remove_columns("weights"), test.remove_columns("weights")
    return Tokens(train, test, counts, key)


def encode_prompts(recipe: Recipe, codec: Codec, rows: Iterable[dict[str, Any]]) -> list[list[int]]:
    """Rows of the template's fields -> the ids the model reads, as in training."""
    template = load_template(recipe)
    return codec.prompts([read_prompt(template, row, f"row {i}") for i, row in enumerate(rows, 1)])


def max_length(recipe: Recipe) -> int:
    """Longest row in tokens; 1024, as in SFTConfig, where the recipe says nothing."""
    length = recipe.trainer.get("max_length", 1024)
    return int(length) if length else 2**31


def _key(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> str:
    code = [
        Path(__file__),
        Path(__file__).with_name("rows.py"),
        Path(__file__).with_name("template.py"),
        Path(data_templates.__file__),
        template_file(recipe),
    ]
    parts = [
        fingerprint(recipe.data, "train"),
        fingerprint(recipe.data, "test"),
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.special_tokens_map),
        str(tokenizer.chat_template),
        repr(
            (
                recipe.template_options,
                recipe.prompt_format,
                max_length(recipe),
                recipe.data.overflow,
                recipe.data.test is None,
                recipe.data.test_fraction,
                recipe.data.seed,
            )
        ),
        *(file.read_text("utf-8") for file in code),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _write(recipe: Recipe, codec: Codec, folder: Path) -> None:
    template = load_template(recipe)
    held_out, chosen = _split(recipe, template)
    counts = {side: Counts() for side in ("test", "train")}
    for side in counts:
        records = read(recipe.data, side)
        if chosen is not None:  # one file gives both sides
            records = (
                r for r, held in zip(read(recipe.data, "train"), chosen, strict=True) if held == (side == "test")
            )
        encoded = _encode(records, side, recipe, template, codec, held_out, counts[side])
        _write_arrow(folder / f"{side}.arrow", encoded, test=side == "test")
        if not counts[side].rows:
            raise UserError(f"{recipe.data.train}: no row is left for the {side} side: {_left_out(counts[side])}")
    (folder / "counts.json").write_text(json.dumps({side: asdict(c) for side, c in counts.items()}), "utf-8")


def _left_out(counts: Counts) -> str:
    return (
        f"{counts.dropped} of {counts.records} are longer than `trainer.max_length`, "
        f"{counts.repeated} are held out already; raise `trainer.max_length` or shorten the outputs"
    )


def _split(recipe: Recipe, template: Template) -> "tuple[set[bytes], array[int] | None]":
    """Keys of the held-out records; and, where one file gives both sides, which of its records are held out.

    Records that share a key (or, by default, a prompt) stay together. The order of the file does not matter.
    """
    data = recipe.data
    if data.test is not None:
        return {key for where, record in read(data, "test") for key in _keys(template, record, where)}, None
    groups, parent = array("Q"), dict[bytes, bytes]()

    def root(key: bytes) -> bytes:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    first: list[bytes] = []
    for where, record in read(data, "train"):
        together = _keys(template, record, where, by_prompt=True)
        for key in together[1:]:
            parent[root(key)] = root(together[0])
        first.append(together[0])
    groups = array("Q", (int.from_bytes(root(key)) for key in first))
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise UserError(
            f"{data.train}: {len(groups)} records that belong together leave nothing to hold out; "
            "add rows or name a file in `data.test`"
        )
    wanted, held = max(1, round(len(groups) * data.test_fraction)), set[int]()
    for group in sorted(sizes, key=lambda g: hashlib.sha256(f"{data.seed} {g}".encode()).digest()):
        if wanted <= 0 or len(held) == len(sizes) - 1:
            break
        held.add(group)
        wanted -= sizes[group]
    return set(), array("B", (group in held for group in groups))


def _keys(template: Template, record: dict[str, Any], where: str, by_prompt: bool = False) -> list[bytes]:
    """What a record shares with others, as 8-byte hashes: its template's keys, its prompts, or its whole samples."""
    texts = keys(template, record, where)
    if not texts:
        for row in samples(template, record, where):
            prompt, segments = read_sample(template, row, where)
            output = "\0".join(segment.text for segment in segments)
            texts.append(prompt if by_prompt and prompt.strip() else f"{prompt}\0{output}")
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts or [where]]


def _encode(
    records: Iterator[Record],
    side: str,
    recipe: Recipe,
    template: Template,
    codec: Codec,
    held_out: set[bytes],
    counts: Counts,
) -> Iterator[dict[str, Any]]:
    """Records -> samples with ids and labels, in batches, counting what becomes of each."""
    while batch := list(islice(records, 512)):
        counts.records += len(batch)
        if side == "train" and held_out:
            kept = [(w, r) for w, r in batch if held_out.isdisjoint(_keys(template, r, w))]
            counts.repeated += len(batch) - len(kept)
            batch = kept
        rows = [(where, row) for where, record in batch for row in samples(template, record, where)]
        read_rows = [read_sample(template, row, where) for where, row in rows]
        texts = ["".join(s.text for s in segments) for _, segments in read_rows]
        prompts, outputs = codec.prompts([prompt for prompt, _ in read_rows]), codec.outputs(texts)
        unchanged = codec.unchanged(texts, outputs)
        for i, (prompt, segments) in enumerate(read_rows):
            where = rows[i][0]
            if not unchanged[i]:
                counts.changed += 1
                counts.changed_example = counts.changed_example or f"{where}: {texts[i][:80]!r}"
            sample = _sample(prompts[i], outputs[i], where, recipe, codec, counts)
            if sample is None:
                continue
            if any(s.weight != 1 for s in segments):
                _weigh(sample, segments, codec)
            counts.add(sample)
            if side == "test":
                length = len(sample["input_ids"]) - len(outputs[i]) - len(codec.end)
                sample |= {"prompt": prompt, "reference": texts[i], "where": where, "prompt_tokens": length}
            yield sample


def _sample(
    prompt: list[int], output: list[int], where: str, recipe: Recipe, codec: Codec, counts: Counts
) -> dict[str, Any] | None:
    """One row of ids and labels, or None where it does not fit."""
    output = output + codec.end
    room, overflow = max_length(recipe), recipe.data.overflow
    if len(prompt) + len(output) > room:
        kept = room - len(output) - len(codec.start)
        if overflow == "error":
            raise UserError(
                f"{where}: {len(prompt) + len(output)} tokens, `trainer.max_length` is {room}; raise it, "
                "or write `data.overflow: trim_prompt` or `drop`"
            )
        if overflow == "drop" or kept < 1 or codec.chat:  # a chat template with its head cut off is no prompt
            counts.dropped += 1
            return None
        counts.trimmed += 1
        prompt = codec.start + prompt[-kept:]
    return {"input_ids": prompt + output, "labels": [MASKED] * len(prompt) + output}


def _weigh(sample: dict[str, Any], segments: Sequence[Segment], codec: Codec) -> None:
    """Add the loss weight of each token; a weight of 0 takes the label away as well. End tokens weigh 1."""
    ids, weights = codec.weighted(segments)
    start = len(sample["input_ids"]) - len(ids) - len(codec.end)
    sample["weights"] = [0.0] * start + weights + [1.0] * len(codec.end)
    sample["labels"] = [
        label if weight else MASKED for label, weight in zip(sample["labels"], sample["weights"], strict=True)
    ]


def _write_arrow(path: Path, samples: Iterator[dict[str, Any]], test: bool) -> None:
    """Samples to an Arrow stream, a thousand rows in memory at a time."""
    columns = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())}
    columns |= (
        {"prompt": pa.string(), "reference": pa.string(), "where": pa.string(), "prompt_tokens": pa.int32()}
        if test
        else {}
    )
    schema = pa.schema(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(samples, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
