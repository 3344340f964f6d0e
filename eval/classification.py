"""The evaluation of a classifier: beside it, on the same rows, a logistic regression on which token stands where."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from eval.evaluate import predictions_of
from eval.open_metric import open_metric
from eval.score import scored
from sft import UserError
from sft.bootstrap import Mean, drawn, mean_of, with_intervals
from sft.files import read_json, seal, sealed, whole_folder, write_text
from sft.model.load import device, without_bars
from sft.model.loss import batches_by_length
from sft.recipe import Recipe
from sft.run import check_owner, finished
from sft.show import say
from sft.tokens.opened import Opened
from sft.train.classification import Labelled, labelled

LOGARITHMS = "log_probabilities.npy"
"""The file of one side's log probabilities, [rows, classes]."""
NAMES = {"base": "logistic regression", "tuned": "network"}


def evaluate_run(recipe: Recipe) -> Path:
    """Predict the classes of the held-out rows into `runs/NAME/eval`, score them, and return that folder."""
    if not finished(recipe):
        raise UserError(f"{recipe.folder}: not trained yet; run `sft train` first")
    opened = Opened(recipe)
    rows = labelled(opened)
    check_owner(opened, rows.digests)
    trained = read_json(recipe.folder / "train.json")["sha256"]
    made_of = {"rows": dict(rows.digests), "eval": recipe.eval.model_dump(), "trained": trained}
    folder = recipe.folder / "eval"
    if not sealed(folder, made_of):
        with whole_folder(folder) as part:
            _write(rows, _baseline(rows), part / "base")
            _write(rows, _network(recipe, rows, opened.tokenizer), part / "tuned")
            seal(part, made_of)
    return _scored(opened, rows)


def score_run(recipe: Recipe) -> Path:
    """Score the predicted classes, without a model, and return the folder."""
    opened = Opened(recipe)
    rows = labelled(opened)
    check_owner(opened, rows.digests)
    return _scored(opened, rows)


def _scored(opened: Opened, rows: Labelled) -> Path:
    """The same for a run that is known to be this recipe's."""
    folder = predictions_of(opened.recipe)
    sides = {side: np.load(folder / side / LOGARITHMS) for side in ("base", "tuned")}
    return scored(opened, folder, lambda: score(rows, sides, opened.recipe.eval.seed))


def score(rows: Labelled, sides: dict[str, NDArray[np.float64]], seed: int) -> dict[str, Any]:
    """Loss, accuracy and mean F1 of each side's log probabilities [rows, classes], with paired bootstrap intervals, in
    the shape of `eval.score.score`."""
    right = np.array(rows.test["label"])
    accuracy, f1 = open_metric("accuracy"), open_metric("f1")
    means: dict[str, dict[str, Mean]] = {"loss": {}, "accuracy": {}, "f1": {}}
    for side, logarithms in sides.items():
        answers = {"predictions": logarithms.argmax(1).tolist(), "references": right.tolist()}
        means["loss"][side] = mean_of((-logarithms[np.arange(len(right)), right]).tolist())
        means["accuracy"][side] = mean_of(accuracy.compute(**answers)["accuracy"])
        means["f1"][side] = _f1(logarithms.argmax(1), right)
    resampled = drawn(len(right), seed)
    intervals = {name: with_intervals(by_side, resampled) for name, by_side in means.items()}
    for side, logarithms in sides.items():  # the value is the metric's; its intervals are those of the same formula
        answers = {"predictions": logarithms.argmax(1).tolist(), "references": right.tolist()}
        intervals["f1"][side]["value"] = f1.compute(**answers)["f1"]
    metrics = {name: both | {"lower_is_better": name == "loss"} for name, both in intervals.items()}
    metrics["f1"]["shown_as"] = f1.shown_as["f1"]
    return {"metrics": metrics, "rows": len(right), "generated": len(right), "others": [], "names": NAMES}


def _baseline(rows: Labelled) -> NDArray[np.float64]:
    """Log probabilities [rows, classes] of a logistic regression on how often each token stands in a row, and where."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def facts(ids: list[int]) -> dict[str, int]:
        return Counter(map(str, ids)) | {f"{token} at {place}": 1 for place, token in enumerate(ids)}

    started = time.monotonic()
    model = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([facts(ids) for ids in rows.train["input_ids"]], rows.train["label"])
    result: NDArray[np.float64] = model.predict_log_proba([facts(ids) for ids in rows.test["input_ids"]])
    say(f"logistic regression: trained and asked in {time.monotonic() - started:.0f} s")
    return result


@torch.no_grad()
def _network(recipe: Recipe, rows: Labelled, tokenizer: PreTrainedTokenizerFast) -> NDArray[np.float64]:
    """Log probabilities [rows, classes] of the trained model."""
    without_bars()
    model = AutoModelForSequenceClassification.from_pretrained(recipe.trained, dtype=torch.float32)
    model = model.to(device(recipe)).eval()
    ids, collate = rows.test["input_ids"], DataCollatorWithPadding(tokenizer)
    result = np.zeros((len(ids), len(rows.classes)))
    for batch in batches_by_length([len(some) for some in ids], recipe.eval.batch_tokens):
        inputs = collate([{"input_ids": ids[i]} for i in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        result[batch] = model(**inputs).logits.double().log_softmax(-1).cpu().numpy()
    return result


def _write(rows: Labelled, logarithms: NDArray[np.float64], folder: Path) -> None:
    """The predicted classes, in the shape of what language models write."""
    lines = [
        json.dumps(
            {"where": row["where"], "prompt": row["text"], "reference": row["name"],
             "prediction": rows.classes[int(answer)], "ended": True}, ensure_ascii=False
        )
        for row, answer in zip(rows.test, logarithms.argmax(1), strict=True)
    ]  # fmt: skip
    write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    np.save(folder / LOGARITHMS, logarithms)


def _f1(answers: NDArray[np.intp], right: NDArray[np.intp]) -> Mean:
    """Mean F1 over the classes that occur in a resample or in the answers to it: 2 hits / (answered + there)."""

    def mean(index: NDArray[np.intp]) -> NDArray[np.float64]:
        total, classes = np.zeros(len(index)), np.zeros(len(index))
        for number in np.union1d(answers, right):
            ours, theirs = (answers == number)[index], (right == number)[index]
            hits, size = (ours & theirs).sum(-1), ours.sum(-1) + theirs.sum(-1)
            total += np.divide(2 * hits, size, out=np.zeros(len(index)), where=size > 0)
            classes += size > 0
        return total / classes

    return mean
