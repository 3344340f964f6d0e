"""Rows to masked tokens, on disk, with an account of what became of every row.

The loss falls on the output and its end token alone: `labels` repeats `input_ids` there and is -100 elsewhere.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import data_templates
from data_templates import Row, Template
from sft import UserError
from sft.files import read_json, whole_folder, write_json
from sft.recipe import Recipe
from sft.rows.notes import Note
from sft.rows.read import read
from sft.rows.split import REPEATED, Sample, Split, hashed
from sft.rows.template import Loaded, call, samples
from sft.rows.unusable import refuse_unusable
from sft.rows.watch import unchanged
from sft.tokens.codec import Codec
from sft.tokens.conversation import Difference
from sft.tokens.counts import FACTS, Counts, Tally, looks
from sft.tokens.provenance import digest, first_records, made_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

MADE = "made.json"
"""The file in a folder of tokens that says what they are, and what their template read to make them."""
TRAINED_ON = ("input_ids", "labels", "weights")
"""The columns that a trainer sees."""

MASKED = -100
"""The label of a token that is not learned, as PyTorch's cross entropy has it."""

BATCH_ROWS, BATCH_CHARACTERS = 1024, 2**24
"""Rows that are read and tokenised together, fewer where they have so many characters."""
PIECE_BYTES = 2**22
"""Bytes of rows that stand together in the files: to open one, a page of each piece is read."""

SIDES = {"train": ["input_ids", "labels", "weights"],
         "test": ["input_ids", "labels", "weights", "prompt", "reference", "where", "prompt_tokens"]}  # fmt: skip
"""The columns of each side; the texts are kept of held-out rows alone."""


@dataclass(frozen=True)
class Tokens:
    """A recipe's rows as masked tokens, on disk.

    `train` has the columns input_ids and labels, and weights where a template sets them; `test` also has prompt,
    prompt_tokens, reference and where.
    """

    train: "Dataset"
    test: "Dataset"
    counts: dict[str, Counts]
    digests: Mapping[str, str]
    """Side -> SHA-256 of its arrays: what a run was trained on, whatever files they were made from."""
    made_of: Mapping[str, Any]
    """What they follow from, as JSON has it: settings, data, tokenizer, template, and under `called` the files that the
    template read while it was called."""
    notes: Sequence[Note] = ()
    """What of the files nothing reads, or what else came in unseen."""


def prepare(recipe: Recipe, loaded: Loaded, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> Tokens:
    """Tokenise all rows of a recipe, or open what an earlier run left for the same content.

    Raises UserError with file and line for rows that cannot be used, and where no row is left to train on.
    """
    from datasets import Dataset

    parts = made_of(recipe, loaded, tokenizer, codec)
    folder = recipe.folder.parent / ".tokens" / f"{digest(parts)}-{_code()}"
    if not _as_made(folder, recipe, loaded):
        refuse_unusable(recipe, loaded.template)
        with whole_folder(folder) as part:
            _write(recipe, loaded, codec, part)
    made = read_json(folder / MADE)
    counts = {side: Counts(**c) for side, c in made["counts"].items()}
    train, test = (Dataset.from_file(str(folder / f"{side}.arrow")) for side in ("train", "test"))
    if not any(c.weighted for c in counts.values()):
        train, test = train.remove_columns("weights"), test.remove_columns("weights")
    notes = [Note(*note) for note in made["notes"]]
    return Tokens(train, test, counts, made["digests"], parts | {"called": made["files"]}, notes)


def _as_made(folder: Path, recipe: Recipe, loaded: Loaded) -> bool:
    """Whether the tokens are there, and the template still reads and makes what it did when they were made."""
    if not folder.is_dir():
        return False
    made = read_json(folder / MADE)
    return unchanged(made["files"], loaded.home) and made["first"] == first_records(recipe, loaded.template)


def _code() -> str:
    """Hash of the code that makes tokens: after an edit of it they are made again."""
    rooms = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("rows/*.py")]
    return digest(
        [file.read_text("utf-8") for file in sorted(rooms)] + [Path(data_templates.__file__).read_text("utf-8")]
    )


def _write(recipe: Recipe, loaded: Loaded, codec: Codec, folder: Path) -> None:
    """The facts of every row, then each row on its side, and the counts. Some thousand rows are in memory at once."""
    split, facts = Split(recipe.data, loaded.template), folder / "facts.arrow"
    with _stream(facts, FACTS) as stream:
        for batch in _facts(recipe, loaded.template, codec, split):
            stream.write_batch(batch)
    if loaded.template.label is not None:  # the template reads a class, whatever task it is used for
        where, record = next(read(recipe.data, "train"))
        with suppress(UserError):  # it may not be there
            for row in samples(loaded.template, record, where):
                call(loaded.template.label, split.notes.watching(row), where)
    counts, digests = _deal(facts, split.sides(), codec, folder)
    facts.unlink()
    for side, found in counts.items():
        if not found.rows:
            raise UserError(_nothing_left(recipe, side, found))
    made = {"counts": {side: asdict(c) for side, c in counts.items()}, "digests": digests}
    made["notes"] = split.notes.all()
    write_json(folder / MADE, made | {"first": first_records(recipe, loaded.template), "files": loaded.when_called()})


def _nothing_left(recipe: Recipe, side: str, found: Counts) -> str:
    """The message where no row of a side is left: all are too long, or held out already."""
    source = recipe.data.test if side == "test" and recipe.data.test else recipe.data.train
    reasons = []
    if found.dropped:
        reasons.append(
            f"{found.dropped} are longer than `trainer.max_length` ({recipe.max_length} tokens): raise it, or shorten "
            "the outputs"
        )
    if found.repeated:
        reasons.append(f"{found.repeated} stand in `data.test` too, and what is held out is not trained on: add others")
    if not reasons:
        reasons.append("the template makes no row of its records: see its `samples`")
    return f"{source}: no row is left to {'train on' if side == 'train' else 'hold out'}; {'; '.join(reasons)}"


class _Ids(NamedTuple):
    """A batch of samples as ids, and what was found while making them."""

    heads: list[list[int]]
    tails: list[list[int]]
    unchanged: list[bool]
    prompts_unchanged: list[bool]
    merged: list[bool]
    written: list[str]
    """The prompts as they were tokenised."""


def _facts(recipe: Recipe, template: Template, codec: Codec, split: Split) -> Iterator[pa.RecordBatch]:
    """The rows in batches. While one is tokenised, which leaves Python free, the next is read."""
    rows = split.samples()
    before: tuple[list[Sample], Future[_Ids]] | None = None
    with ThreadPoolExecutor(1) as background:
        for batch in _batches(rows):
            ids = background.submit(_encode, codec, batch)
            if before is not None:
                yield _look(recipe, template, codec, before[0], before[1].result())
            before = batch, ids
        if before is not None:
            yield _look(recipe, template, codec, before[0], before[1].result())


def _batches(rows: Iterator[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text) + len(row.output)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _empty(template: Template, row: Row) -> str | None:
    """The first field that holds nothing."""
    for name in template.fields:
        text = row.get(name)
        if isinstance(text, str) and (not text or text.isspace()):
            return name
    return None


def _encode(codec: Codec, batch: Sequence[Sample]) -> _Ids:
    prompts = [sample.prompt for sample in batch]
    texts, outputs = [sample.text for sample in batch], [sample.output for sample in batch]
    written = _rendered(batch, lambda some: codec.rendered(prompts[some]))
    heads, tails = codec.heads(written), codec.outputs(outputs)
    return _Ids(
        heads,
        tails,
        codec.unchanged(outputs, tails),
        codec.prompts_unchanged(written, heads),
        codec.merged(texts, outputs, heads, tails),
        written,
    )


def _differences(codec: Codec, batch: Sequence[Sample], written: Sequence[str]) -> list[list[Difference]]:
    prompts, outputs = [sample.prompt for sample in batch], [sample.output for sample in batch]
    return _rendered(batch, lambda some: codec.differences(prompts[some], outputs[some], written[some]))


def _rendered(batch: Sequence[Sample], render: Callable[[slice], list[Any]]) -> list[Any]:
    """What a chat template makes of all samples; where it refuses one, which it does not know, the message names it."""
    try:
        return render(slice(None))
    except UserError:
        for i, sample in enumerate(batch):
            try:
                render(slice(i, i + 1))
            except UserError as error:
                raise UserError(f"{sample.where}: {error}") from error
        raise


def _look(recipe: Recipe, template: Template, codec: Codec, batch: Sequence[Sample], ids: _Ids) -> pa.RecordBatch:
    """What is known of each row of a batch."""
    heads, tails = ids.heads.copy(), [tail + codec.end for tail in ids.tails]
    whole = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    kept = [True] * len(batch)
    for i, sample in enumerate(batch):
        if codec.end[-1] in ids.tails[i]:
            raise UserError(
                f"{sample.where}: the output holds the text of the end token, at which a model stops; take it out"
            )
        if whole[i] > recipe.max_length:
            fitted = _fitted(recipe, codec, sample.where, heads[i], len(tails[i]))
            kept[i], heads[i] = fitted is not None, fitted or []
    rows = [head + tail if keep else [] for head, tail, keep in zip(heads, tails, kept, strict=True)]
    weights = [
        _weights(codec, sample, len(head)) if keep else None
        for sample, head, keep in zip(batch, heads, kept, strict=True)
    ]
    ends, labels = _labels(rows, [len(head) for head in heads], weights)
    row_of = np.repeat(np.arange(len(rows)), np.diff(ends))
    special = codec.special if codec.chat else None
    columns = {
        "record": [sample.record for sample in batch],
        "where": [sample.where for sample in batch],
        "prompt": [sample.text for sample in batch],
        "reference": [sample.output for sample in batch],
        "hash": np.array([hashed(f"{sample.text}\0{sample.output}") for sample in batch], dtype=np.uint64),
        "input_ids": rows,
        "labels": pa.ListArray.from_arrays(ends, labels),
        "weights": weights,
        "prompt_tokens": [len(head) for head in heads],
        "tokens": np.diff(ends),
        "learned": np.bincount(row_of[labels != MASKED], minlength=len(rows)),
        "whole": whole,
        "output_tokens": [len(tail) for tail in tails],
        "kept": kept,
        "ended": [labels[end - len(codec.end) : end].tolist() == codec.end for end in ends[1:]],
        "changed": [not same for same in ids.unchanged],
        "prompt_changed": [not same for same in ids.prompts_unchanged],
        "seam": ids.merged,
        "empty": [_empty(template, sample.row) for sample in batch],
        "differences": [
            [difference._asdict() for difference in some] for some in _differences(codec, batch, ids.written)
        ],
        "looks": [looks(sample.text, special) + looks(sample.output, special) for sample in batch],
    }
    return pa.RecordBatch.from_pydict(columns, schema=FACTS)


def _fitted(recipe: Recipe, codec: Codec, where: str, head: list[int], output: int) -> list[int] | None:
    """A prompt without its oldest tokens, so that its row fits, or None where the row is left out."""
    room, overflow = recipe.max_length, recipe.data.overflow
    if overflow == "error":
        raise UserError(
            f"{where}: {len(head) + output} tokens, `trainer.max_length` is {room}; raise it, "
            "or write `data.overflow: trim_prompt` or `drop`"
        )
    return None if overflow == "drop" else codec.trimmed(head, room - output)


def _weights(codec: Codec, sample: Sample, head: int) -> list[float] | None:
    """The loss weight of each token of a row, where one is not 1. The end token weighs 1."""
    if all(segment.weight == 1 for segment in sample.segments):
        return None
    try:
        return [0.0] * head + codec.weights(sample.segments) + [1.0] * len(codec.end)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from error


def _labels(
    rows: Sequence[Sequence[int]], heads: Sequence[int], weights: Sequence[Sequence[float] | None]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where each row ends, and the labels of all, one behind the other: their ids, but for the prompts and for what
    weighs 0."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    labels = np.fromiter(chain.from_iterable(rows), np.int32, ends[-1])
    place = np.arange(ends[-1]) - np.repeat(ends[:-1], np.diff(ends))
    labels[place < np.repeat(heads, np.diff(ends))] = MASKED
    for start, some in zip(ends[:-1], weights, strict=True):
        if some is not None:
            labels[start : start + len(some)][np.array(some) == 0] = MASKED
    return ends, labels


def _deal(facts: Path, sides: NDArray[np.int8], codec: Codec, folder: Path) -> tuple[dict[str, Counts], dict[str, str]]:
    """Each row that is kept into the file of its side; the counts of each, and the hashes of their arrays. `sides` has
    one for each record."""
    tallies = {name: Tally(codec.special) for name in SIDES}
    arrays = {name: _Arrays() for name in SIDES}
    with ExitStack() as files:
        pieces = {
            name: _Pieces(
                files.enter_context(
                    _stream(folder / f"{name}.arrow", pa.schema([FACTS.field(column) for column in columns]))
                )
            )
            for name, columns in SIDES.items()
        }
        for batch in pa.ipc.open_stream(files.enter_context(pa.OSFile(str(facts)))):
            side_of = sides[batch["record"].to_numpy()]
            for side, (name, columns) in enumerate(SIDES.items()):
                mine = batch.filter(pa.array(side_of == side))
                tallies[name].add(mine)
                kept = mine.filter(mine["kept"])
                arrays[name].add(kept)
                pieces[name].add(kept.select(columns))
        for some in pieces.values():
            some.write()
    counts = {name: tally.counts() for name, tally in tallies.items()}
    for side, name in enumerate(SIDES):
        counts[name].records = int((sides == side).sum())
    counts["train"].repeated = int((sides == REPEATED).sum())
    return counts, {name: some.digest() for name, some in arrays.items()}


class _Arrays:
    """The hash of what rows hold for a trainer, however they are cut into batches."""

    def __init__(self) -> None:
        self._hashes = {name: hashlib.sha256() for column in TRAINED_ON for name in (column, f"lengths of {column}")}

    def add(self, rows: pa.RecordBatch) -> None:
        for column in TRAINED_ON:
            lengths = pc.list_value_length(rows[column]).fill_null(-1)
            self._hashes[f"lengths of {column}"].update(lengths.to_numpy(zero_copy_only=False).tobytes())
            self._hashes[column].update(rows[column].flatten().to_numpy(zero_copy_only=False).tobytes())

    def digest(self) -> str:
        return digest([some.hexdigest() for some in self._hashes.values()])


class _Pieces:
    """Batches that are written together to a stream."""

    def __init__(self, stream: pa.ipc.RecordBatchStreamWriter) -> None:
        self._stream, self._waiting, self._size = stream, list[pa.RecordBatch](), 0

    def add(self, batch: pa.RecordBatch) -> None:
        if len(batch):
            self._waiting.append(batch)
            self._size += batch.nbytes
        if self._size > PIECE_BYTES:
            self.write()

    def write(self) -> None:
        """Write what waits, as one batch."""
        if self._waiting:
            self._stream.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
        self._waiting, self._size = [], 0


@contextmanager
def _stream(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """An Arrow stream to write to, as `datasets` reads it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        yield stream
