"""A vocabulary that the user brings: token -> id from a JSON file, and which of its tokens pad, begin and end."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from data_templates import Vocabulary
from sft import UserError
from sft.recipe import Recipe
from sft.recipe.fields import shown
from sft.recipe.schema import VocabularyFile

USUAL = {"pad": {"pad"}, "start": {"s", "bos", "sos", "start", "cls", "startoftext"},
         "end": {"/s", "eos", "end", "sep", "endoftext"}, "unknown": {"unk", "unknown"}}  # fmt: skip
"""Role of a special token -> the names it usually has, in brackets: `<s>`, `[CLS]`, `<|endoftext|>`."""


def given_vocabulary(recipe: Recipe) -> Vocabulary | None:
    """The vocabulary that the recipe, or the one it starts from, names; a template with an argument `vocabulary` is
    given it."""
    if recipe.base is not None:
        return given_vocabulary(recipe.base)
    if not isinstance(recipe.tokenizer, VocabularyFile):
        return None
    named = recipe.tokenizer.model_dump()
    return read_vocabulary(Path(named.pop("vocab")), named)


def read_vocabulary(file: Path, named: Mapping[str, str | None]) -> Vocabulary:
    """Read a vocabulary. `named` are the special tokens that the recipe names; others are known by their usual names.

    Without a start or pad token the end token serves, without one for the unknown the pad token. Raises UserError for a
    file that is not a mapping of tokens to ids without gaps, for tokens with spaces in them, and without an end token.
    """
    try:
        ids = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, from {Path.cwd()}; name a vocabulary in `tokenizer.vocab`") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a vocabulary: {error}; write JSON, {{token: id, ...}}") from None
    if not isinstance(ids, dict) or not ids or any(type(number) is not int for number in ids.values()):
        raise UserError(f"{file}: a vocabulary is a JSON object of tokens and their ids, {{token: id, ...}}")
    if sorted(ids.values()) != list(range(len(ids))):
        twice = [number for number, count in Counter(ids.values()).items() if count > 1]
        wrong = twice or sorted(set(ids.values()) - set(range(len(ids))))
        what = "stands for two tokens" if twice else "leaves a gap"
        raise UserError(f"{file}: the id {wrong[0]} {what}; ids of {len(ids)} tokens run from 0 to {len(ids) - 1}")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        raise UserError(f"{file}: a token holds half a character (a lone surrogate, `\\ud800` to `\\udfff`)") from None
    if spaced := [token for token in ids if token.split() != [token]]:
        raise UserError(
            f"{file}: {len(spaced)} tokens are empty or hold white space, the first is {shown(spaced[0])}; spaces "
            "stand between tokens: write another character for those inside"
        )
    return Vocabulary(ids, _special(file, ids, named))


def _once(pairs: list[tuple[str, int]]) -> dict[str, int]:
    """JSON itself takes the last of two equal keys."""
    twice = [token for token, count in Counter(token for token, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the token {shown(twice[0])} stands there twice")
    return dict(pairs)


def _special(file: Path, ids: Mapping[str, int], named: Mapping[str, str | None]) -> dict[str, str]:
    """The token of each role."""
    found: dict[str, str] = {}
    for role, usual in USUAL.items():
        token = named.get(role)
        if token is not None and token not in ids:
            raise UserError(f"{file}: `tokenizer.{role}` is {token!r}, which is not among its {len(ids)} tokens")
        known = [t for t in ids if (name := re.fullmatch(r"[<\[]\|?(.+?)\|?[>\]]", t)) and name[1].lower() in usual]
        if token is None and len(known) > 1:
            raise UserError(f"{file}: {' and '.join(map(repr, known))} may both be the {role} token; name it: "
                            f"tokenizer.{role}={known[0]!r}")  # fmt: skip
        if token or known:
            found[role] = token or known[0]
    if "end" not in found:
        raise UserError(f"{file}: none of its tokens is known as an end token; name one: tokenizer.end=...")
    for role, other in (("pad", "end"), ("start", "end"), ("unknown", "pad")):
        found.setdefault(role, found[other])
    return found
