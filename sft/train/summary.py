"""What was trained on what, in lines of name and value: for the report and for a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.model.adapter import adapter_size, training_method
from sft.recipe import Recipe

PROMPT_FORMATS = {"chat": "through the chat template", "plain": "as plain text"}


def summary(recipe: Recipe, trained: dict[str, Any], scores: dict[str, Any]) -> list[tuple[str, str]]:
    """What was trained on what, in lines of name and value."""
    how = training_method(recipe) + (f", {adapter_size(recipe)}" if recipe.has_adapter else "")
    train, test = trained["counts"]["train"], trained["counts"]["test"]
    return [
        ("Model", short_name(recipe.model) if isinstance(recipe.model, str) else f"a new {recipe.model['model_type']}"),
        ("Method", f"{how}; {trained['trainable_parameters']:,} of {trained['parameters']:,} parameters trained"),
        (
            "Template",
            f"{short_name(recipe.template)}; prompt {PROMPT_FORMATS[trained['prompt_format']]}",
        ),
        (
            "Training data",
            f"{short_name(recipe.data.train)}: {train['rows']:,} rows, {train['tokens']:,} tokens, "
            f"{train['supervised'] / max(train['tokens'], 1):.0%} of them learned",
        ),
        (
            "Held out",
            f"{test['rows']:,} rows, {test['tokens']:,} tokens; predictions for {scores['generated']:,} of them",
        ),
        (
            "Left out",
            f"training: {train['trimmed']:,} prompts trimmed, {train['dropped']:,} rows too long, "
            f"{train['repeated']:,} held out already; held out: {test['trimmed']:,} prompts trimmed, "
            f"{test['dropped']:,} rows too long",
        ),
        (
            "Training",
            (f"from step {trained['since']:,}, where it was interrupted, to " if trained["since"] else "")
            + f"{trained['steps']:,} steps, {trained['epochs']:.2f} epochs, {_duration(trained['seconds'])} on "
            f"{trained['device']}, {trained['processes']} process{'es' if trained['processes'] > 1 else ''}, "
            f"{trained['tokens_seen'] / max(trained['seconds'], 1e-9):,.0f} tokens a second",
        ),
        (
            "Kept",
            "the weights of the last step"
            if trained["best_step"] is None
            else f"the weights of step {trained['best_step']:,}, chosen by the held-out rows, whose scores are thus a "
            "little better than those of rows that nothing was chosen by"
            + ("; final_model/ has those of the last step" if not recipe.has_adapter else ""),
        ),
        *_beside(recipe, scores.get("others", ())),
        (
            "Peak memory",
            f"{trained['peak_memory_bytes'] / 2**30:.2f} GiB"
            + (f", predicted {predicted / 2**30:.2f} GiB" if (predicted := trained["predicted_memory_bytes"]) else ""),
        ),
        ("Versions", ", ".join(f"{name} {number}" for name, number in trained["versions"].items())),
    ]


def _beside(recipe: Recipe, others: Sequence[str]) -> list[tuple[str, str]]:
    """What the further columns are."""
    counted = [name for name in others if name != "scratch"]
    found = [f"{' and '.join(counted)}: counts of the training rows' tokens"] if counted else []
    if "scratch" in others:
        found.insert(0, f"scratch: {short_name(str(recipe.eval.scratch))}, trained from nothing on the same rows")
    return [("Other columns", "; ".join(found))] if found else []


def short_name(name: str) -> str:
    """A path as seen from here, or by its last two parts where it lies elsewhere; a hub id as it is."""
    path = Path(name)
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(Path(*path.parts[-2:]))


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
