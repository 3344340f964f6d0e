"""ONNX: the model as a graph for ONNX Runtime, once without and once with a cache of keys and values."""

import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sft import UserError
from sft.export import Source, travel
from sft.model import parity
from sft.show import table
from sft.tokens.prepare import MASKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}

ONE_PASS_FILE, CACHE_FILE = "model.onnx", "model_with_past.onnx"

CONTINUED_TOKENS, CONTINUED_PROMPTS = 32, 4
"""Tokens written, greedily, after so many held-out prompts."""


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the graphs, and compare logits and greedy continuations in ONNX Runtime with those of transformers."""
    model = source.model
    names = write_graphs(model, folder)
    travel(source, folder)
    compared: dict[str, Any] = {"problems": []}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        reference = parity.recorded(source.rows, parity.of_model(model), Path(scratch) / "reference")
        largest = float(np.abs(reference(source.rows[0]["input_ids"])).max())
        tolerance = dict(parity.TOLERANCE["float32"]) | {"largest_logit_difference": max(1e-4, 1e-5 * largest)}
        for name in names:
            found = parity.differences(source.rows, reference, Session(folder / name).logits)
            compared["problems"] += [f"{name}: {problem}" for problem in parity.past_tolerance(found, tolerance)]
            compared[name] = found
    compared["greedy"] = _greedy(source, Session(folder / names[-1]))
    if different := compared["greedy"]["different"]:
        compared["problems"].append(f"{different} of {CONTINUED_PROMPTS} greedy continuations are another text")
    return compared | {"table": _table(compared, names)}


def _greedy(source: Source, session: "Session") -> dict[str, int]:
    """Of how many held-out prompts the greedy continuation is not that of transformers."""
    from transformers import GenerationConfig

    model: Any = source.model
    end = source.opened.codec.end[-1]
    config = GenerationConfig(
        max_new_tokens=CONTINUED_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=source.opened.codec.pad
    )
    room = (
        min(parity.COMPARED_TOKENS, getattr(model.config, "max_position_embeddings", parity.COMPARED_TOKENS))
        - CONTINUED_TOKENS
    )
    different = 0
    for row in source.rows[:CONTINUED_PROMPTS]:
        start = next(i for i, label in enumerate(row["labels"]) if label != MASKED)
        prompt = row["input_ids"][: max(start, 1)][-room:]
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        different += session.greedy(prompt, CONTINUED_TOKENS, end) != theirs.tolist()
    return {"prompts": min(CONTINUED_PROMPTS, len(source.rows)), "tokens": CONTINUED_TOKENS, "different": different}


def _table(compared: dict[str, Any], names: list[str]) -> str:
    lines = [
        [name, f"{c['largest_logit_difference']:.2g}", f"{c['largest_kl']:.2g}", f"{c['disagreement']:.1%}"]
        for name, c in ((name, compared[name]) for name in names)
    ]
    greedy = compared["greedy"]
    same = greedy["prompts"] - greedy["different"]
    return (
        table(["in ONNX Runtime", "logits", "largest KL", "other choice"], lines)
        + f"\ngreedy continuations of {greedy['tokens']} tokens that are the same: {same} of {greedy['prompts']}"
    )


def write_graphs(model: "PreTrainedModel", folder: Path) -> list[str]:
    """Write the graphs of a model in fp32 and return their file names; the second is left out where the architecture
    has no cache.

    Both take input_ids, attention_mask and position_ids [rows, length] and give logits [rows, length, vocabulary]. The
    second also takes past_key_values.N.key and .value, of any length from 0 on, which its mask covers too, and gives
    present.N.key and .value.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    with _quiet():
        exporter = OnnxExporter()
    names = []
    for name, sample in zip((ONE_PASS_FILE, CACHE_FILE), _samples(model), strict=False):
        with _quiet():
            program, _ = exporter.export_program(model, sample, OnnxConfig(dynamic=True))
        for value in (*program.graph.inputs, *program.graph.outputs):
            value.name = _usual_name(str(value.name))
        try:
            exporter.save_program(program, folder / name)
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"{name}: cannot be written: {error}; is the disk full?") from error  # numpy does not say
        names.append(name)
    return names


@torch.no_grad()
def _samples(model: "PreTrainedModel") -> list[dict[str, Any]]:
    """What the graphs are traced with. Two rows, one of them padded: what all rows share would become a constant."""
    from transformers import DynamicCache

    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]), "attention_mask": mask}
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    plain = inputs | {"use_cache": False}
    first = {name: value[:, :3] for name, value in inputs.items()}
    cache = DynamicCache()  # of all positions, also where attention slides: the mask leaves out the old ones
    if "past_key_values" not in model(**first, past_key_values=cache, use_cache=True):
        return [inputs]
    rest = {name: value[:, 3:] for name, value in inputs.items()} | {"attention_mask": mask}
    return [plain, rest | {"past_key_values": cache, "use_cache": True}]


def _usual_name(name: str) -> str:
    """The exporter's name of a layer's keys or values -> the one that other tools have for it."""
    side = "present" if name.startswith("output.") else "past_key_values"
    return re.sub(r"^.*past_key_values\.layers\.(\d+)\.(key|value)s$", rf"{side}.\1.\2", name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class Session:
    """A graph in ONNX Runtime, on the CPU."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.empty = {
            name: np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values")
        }

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits [positions, vocabulary]."""
        logits: NDArray[np.float32] = self.run(ids, 0, self.empty)["logits"][0]
        return logits

    def greedy(self, prompt: list[int], new: int, end: int) -> list[int]:
        """So many ids at most, each the likeliest after those before it: through the cache, where there is one."""
        written: list[int] = []
        past, seen = self.empty, 0
        while len(written) < new and end not in written:
            output = self.run([*prompt, *written][seen:], seen, past)
            written.append(int(output["logits"][0, -1].argmax()))
            if self.empty:
                past = {name: output[name.replace("past_key_values", "present")] for name in self.empty}
                seen = len(prompt) + len(written) - 1
        return written

    def run(self, ids: list[int], seen: int, past: dict[str, Any]) -> dict[str, Any]:
        """The graph's outputs for ids that follow so many others, whose keys and values are in `past`."""
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
            "position_ids": np.arange(seen, seen + len(ids), dtype=np.int64)[None],
        }
        outputs = self.session.run(None, {n: v for n, v in (feed | past).items() if n in self.inputs})
        return dict(zip(self.outputs, outputs, strict=True))
