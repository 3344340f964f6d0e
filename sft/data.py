"""Rows to masked tokens, on disk, with an account of what became of every row.

The loss falls on the output and its end token alone: `labels` repeats `input_ids` there and is -100 elsewhere.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import data_templates
from data_templates import Row, Segment, Template, as_text
from sft import UserError
from sft.codec import Codec
from sft.files import whole_folder
from sft.recipe import Recipe
from sft.rows import Record, fingerprint
from sft.split import Split, hashed
from sft.template import has_prompt, load_template, read_sample, samples, template_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

MASKED = -100
"""The label of a token that is not learned, as PyTorch's cross entropy has it."""

BATCH = 512
"""Records that are read, tokenised and written together."""

SUSPICIOUS = {
    "a replacement character (�): bytes were lost when the text was decoded": re.compile("\ufffd"),
    "a control character": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "a byte order mark inside the text": re.compile("\ufeff"),
    "UTF-8 that was read as Latin-1 (mojibake)": re.compile("[\u00c2\u00c3][\u0080-\u00bf]|â€|ã€|å[\u0080-\u00bf]{2}"),
}
SPECIAL = "the name of a special token, which becomes that token in a chat template"


@dataclass
class Counts:
    """What became of the rows of one side of the split."""

    records: int = 0
    """Records read, after those that are held out already were left out."""
    rows: int = 0
    """Rows that reach the trainer or the scorer."""
    tokens: int = 0
    supervised: int = 0
    """Tokens with a label: those of the outputs and their end tokens."""
    ended: int = 0
    """Rows whose last label is the end token, so that the model learns to stop."""
    trimmed: int = 0
    """Rows whose prompt lost its oldest tokens to fit `trainer.max_length`."""
    dropped: int = 0
    """Rows left out because they do not fit, their outputs being longer than there is room."""
    repeated: int = 0
    """Training records left out because the held-out side has the same row, or one with the same key."""
    duplicates: int = 0
    """Rows that are there more than once, counted without their first."""
    seams: int = 0
    """Rows whose prompt and output, tokenised together, would have merged into one token where they meet."""
    changed: int = 0
    """Rows whose output the tokenizer does not give back exactly."""
    weighted: int = 0
    """Rows with a loss weight other than 1."""
    longest: int = 0
    empty: int = 0
    """Rows with a field that holds nothing."""
    damaged: int = 0
    """Rows with a text that looks wrong."""
    suspicious: dict[str, int] = field(default_factory=dict)
    """What looks wrong -> texts, of which a row has two."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Length in tokens, rounded up to a multiple of 16 -> rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Count -> the first row that was counted."""

    def note(self, name: str, where: str, text: str) -> None:
        """Keep the first example of something counted."""
        self.examples.setdefault(name, f"{where}: {text}")


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
    """Hash of everything that the tokens follow from: data, tokenizer, template and settings."""


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> Tokens:
    """Tokenise all rows of a recipe, or open what an earlier run left for the same content.

    Raises UserError with file and line for rows that cannot be used, and where no row is left to train on.
    """
    from datasets import Dataset

    key = _key(recipe, tokenizer)
    folder = recipe.folder.parent / ".tokens" / f"{key}-{_code()}"
    if not folder.is_dir():
        with whole_folder(folder) as part:
            _write(recipe, codec_of(recipe, tokenizer), part)
    counts = {side: Counts(**c) for side, c in json.loads((folder / "counts.json").read_text("utf-8")).items()}
    train, test = (Dataset.from_file(str(folder / f"{side}.arrow")) for side in ("train", "test"))
    if not any(c.weighted for c in counts.values()):
        train, test = train.remove_columns("weights"), test.remove_columns("weights")
    return Tokens(train, test, counts, key)


def codec_of(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> Codec:
    """The codec of a recipe. A template without a prompt, as for running text, has no turns for a chat template."""
    running = recipe.prompt_format == "auto" and not has_prompt(load_template(recipe))
    return Codec(tokenizer, "plain" if running else recipe.prompt_format)


def max_length(recipe: Recipe) -> int:
    """Longest row in tokens; 1024, as in SFTConfig, where the recipe says nothing."""
    length = recipe.trainer.get("max_length", 1024)
    return int(length) if length else 2**31


def _key(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> str:
    data = recipe.data
    settings: list[Any] = [recipe.template_options, recipe.prompt_format, max_length(recipe), data.overflow]
    settings += [data.test is None, data.test_fraction, data.seed]
    parts = [fingerprint(data, "train"), fingerprint(data, "test") if data.test else "", repr(settings)]
    parts += [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return _digest(*parts, template_file(recipe).read_text("utf-8"))


def _code() -> str:
    """Hash of the code that makes tokens: an edit of it makes them anew."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("data", "codec", "split", "rows", "template")]
    return _digest(*(file.read_text("utf-8") for file in [*files, Path(data_templates.__file__)]))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _write(recipe: Recipe, codec: Codec, folder: Path) -> None:
    """Both sides as Arrow streams, and their counts; some hundred rows are in memory at a time."""
    template = load_template(recipe)
    split = Split(recipe, template)
    encoders = {side: _Encoder(recipe, template, codec) for side in ("train", "test")}
    waiting: dict[str, list[Record]] = {side: [] for side in encoders}
    with ExitStack() as files:
        writers = {side: files.enter_context(_Arrow(folder / f"{side}.arrow", side == "test")) for side in encoders}
        for side, record in split.records():
            waiting[side].append(record)
            if len(waiting[side]) == BATCH:
                writers[side].write(encoders[side].samples(waiting[side]))
                waiting[side] = []
        for side, records in waiting.items():
            writers[side].write(encoders[side].samples(records))
    counts = {side: encoder.finish() for side, encoder in encoders.items()}
    counts["train"].repeated = split.repeated
    for side, found in counts.items():
        if not found.rows:
            raise UserError(
                f"{recipe.data.train}: no row is left for the {side} side: {found.dropped} "
                f"are longer than `trainer.max_length` ({max_length(recipe)} tokens), and {found.repeated} more are "
                "held out already; raise `trainer.max_length` or shorten the outputs"
            )
    (folder / "counts.json").write_text(json.dumps({side: asdict(c) for side, c in counts.items()}), "utf-8")


class _Encoder:
    """Records to samples with ids and labels, in batches, counting what becomes of each."""

    def __init__(self, recipe: Recipe, template: Template, codec: Codec) -> None:
        self.recipe, self.template, self.codec = recipe, template, codec
        self.counts, self.seen = Counts(), array("Q")
        self.room = max_length(recipe)

    def finish(self) -> Counts:
        """The counts, once all records were seen."""
        self.counts.duplicates = len(self.seen) - len(np.unique(np.array(self.seen, dtype=np.uint64)))
        return self.counts

    def samples(self, batch: Sequence[Record]) -> Iterator[dict[str, Any]]:
        """Every row that fits, with its ids and labels, and what the scorer needs beside them."""
        self.counts.records += len(batch)
        places = [(where, row) for where, record in batch for row in samples(self.template, record, where)]
        rows = [read_sample(self.template, row, where) for where, row in places]
        prompts = [as_text(prompt) for prompt, _ in rows]
        outputs = ["".join(segment.text for segment in segments) for _, segments in rows]
        self.seen.extend(hashed(f"{prompt}\0{output}") for prompt, output in zip(prompts, outputs, strict=True))
        try:
            heads = self.codec.prompts([prompt for prompt, _ in rows])
        except UserError:  # a chat template that refuses a prompt does not know which row it is
            for (where, _), (prompt, _) in zip(places, rows, strict=True):
                try:
                    self.codec.prompts([prompt])
                except UserError as error:
                    raise UserError(f"{where}: {error}") from error
            raise
        tails = self.codec.outputs(outputs)
        self._look_at(places, prompts, outputs, heads, tails)
        for (where, _), (_, segments), prompt, output, head, tail in zip(
            places, rows, prompts, outputs, heads, tails, strict=True
        ):
            if (sample := self._sample(where, head, tail, segments)) is not None:
                start = len(sample["input_ids"]) - len(tail) - len(self.codec.end)
                yield sample | {"prompt": prompt, "reference": output, "where": where, "prompt_tokens": start}

    def _look_at(
        self,
        places: Sequence[tuple[str, Row]],
        prompts: Sequence[str],
        outputs: Sequence[str],
        heads: Sequence[list[int]],
        tails: Sequence[list[int]],
    ) -> None:
        """Count what a person should know of the texts before they are trained on."""
        patterns = SUSPICIOUS | ({SPECIAL: self.codec.special} if self.codec.chat else {})
        unchanged, merged = self.codec.unchanged(outputs, tails), self.codec.merged(prompts, outputs, heads, tails)
        for (where, row), prompt, output, same, seam in zip(places, prompts, outputs, unchanged, merged, strict=True):
            if not same:
                self.counts.changed += 1
                self.counts.note("changed", where, repr(output[:80]))
            if seam:
                self.counts.seams += 1
                self.counts.note("seams", where, f"{prompt[-12:]!r} + {output[:12]!r}")
            for name in self.template.fields:
                if isinstance(row.get(name), str) and not row[name].strip():
                    self.counts.empty += 1
                    self.counts.note("empty", where, f"`{name}`")
                    break
            damaged = False
            for text in (prompt, output):
                for what, pattern in patterns.items():
                    if found := pattern.search(text):
                        damaged = True
                        self.counts.suspicious[what] = self.counts.suspicious.get(what, 0) + 1
                        self.counts.note(what, where, repr(text[max(0, found.start() - 20) : found.end() + 20]))
            self.counts.damaged += damaged

    def _sample(
        self, where: str, head: list[int], tail: list[int], segments: Sequence[Segment]
    ) -> dict[str, Any] | None:
        """One row of ids and labels, or None where it does not fit."""
        if self.codec.end[-1] in tail:
            raise UserError(f"{where}: the output holds the text of the end token, at which a model stops; take it out")
        tail, counts = tail + self.codec.end, self.counts
        length = len(head) + len(tail)
        if length > self.room:
            if self.recipe.data.overflow == "error":
                raise UserError(
                    f"{where}: {length} tokens, `trainer.max_length` is {self.room}; raise it, "
                    "or write `data.overflow: trim_prompt` or `drop`"
                )
            if (
                self.recipe.data.overflow == "drop"
                or (trimmed := self.codec.trimmed(head, self.room - len(tail))) is None
            ):
                counts.dropped += 1
                counts.note("dropped", where, f"{length} tokens, {len(tail)} of them output")
                return None
            counts.trimmed += 1
            counts.note("trimmed", where, f"{length} tokens, {len(tail)} of them output")
            head = trimmed
        sample: dict[str, Any] = {"input_ids": head + tail, "labels": [MASKED] * len(head) + tail}
        if any(segment.weight != 1 for segment in segments):
            _weigh(sample, segments, self.codec)
            counts.weighted += 1
        counts.rows += 1
        counts.tokens += len(head) + len(tail)
        counts.supervised += len(sample["labels"]) - sample["labels"].count(MASKED)
        counts.ended += sample["labels"][-len(self.codec.end) :] == self.codec.end
        counts.longest = max(counts.longest, len(head) + len(tail))
        bucket = str(-(-(len(head) + len(tail)) // 16) * 16)
        counts.lengths[bucket] = counts.lengths.get(bucket, 0) + 1
        return sample


def _weigh(sample: dict[str, Any], segments: Sequence[Segment], codec: Codec) -> None:
    """Add the loss weight of each token. A weight of 0 takes the label away as well; the end token weighs 1."""
    weights = codec.weights(segments)
    weights += [1.0] * len(codec.end)
    start = len(sample["input_ids"]) - len(weights)
    sample["weights"] = [0.0] * start + weights
    for i, weight in enumerate(weights, start):
        if not weight:
            sample["labels"][i] = MASKED


class _Arrow:
    """An Arrow stream of samples. The texts are kept of held-out rows alone."""

    def __init__(self, path: Path, test: bool) -> None:
        ids, text = pa.list_(pa.int32()), pa.string()
        columns = {"input_ids": ids, "labels": ids, "weights": pa.list_(pa.float32())}
        columns |= {"prompt": text, "reference": text, "where": text, "prompt_tokens": pa.int32()} if test else {}
        self._path, self._schema = path, pa.schema(columns)

    def __enter__(self) -> "_Arrow":
        self._sink = pa.OSFile(str(self._path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        return self

    def write(self, samples: Iterator[dict[str, Any]]) -> None:
        self._stream.write_batch(pa.RecordBatch.from_pylist(list(samples), schema=self._schema))

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._sink.close()
