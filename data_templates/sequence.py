"""sequence: a sequence of tokens of your own vocabulary, all of it learned; for a small model from scratch."""

from collections.abc import Iterator
from math import isqrt

from data_templates import Row, Template, Vocabulary


def template(vocabulary: Vocabulary | None = None, width: int = 0) -> Template:
    """`vocabulary` comes from `tokenizer: {vocab: ...}`. `width` shows sequences of so many tokens a line as pictures,
    where a token's name is a square patch in 0 and 1 (`000010000`): its centre is the pixel."""
    if type(width) is not int or width < 0:
        raise ValueError(f"`width` is {width!r}; it takes a whole number, 0 for sequences that are not pictures")

    def problems(row: Row) -> Iterator[tuple[str, str]]:
        if "sequence" not in row:
            yield (
                "no column `sequence`: name yours with data.columns.sequence=...",
                f"it has {', '.join(row) or 'none'}",
            )
            return
        sequence = row["sequence"]
        ids = isinstance(sequence, list) and sequence and all(type(item) is int for item in sequence)
        if sequence is None or sequence in ("", []) or (isinstance(sequence, str) and not sequence.split()):
            yield "an empty sequence", ""
        elif not ids and not isinstance(sequence, str) and not _all_text(sequence):
            yield "a sequence that is neither a list of ids, nor one of tokens, nor tokens with spaces between", ""
        elif ids and vocabulary is None:
            yield "ids, which mean nothing without a vocabulary: write `tokenizer: {vocab: vocab.json}`", ""
        elif vocabulary is not None:
            known = range(len(vocabulary.ids)) if ids else vocabulary.ids
            items = sequence.split() if isinstance(sequence, str) else sequence
            if outside := [item for item in items if item not in known]:
                yield f"tokens outside the vocabulary of {len(vocabulary.ids)}", repr(outside[0])
                return
            inner = tokens(row)
            if not inner:
                yield "an empty sequence", ""
            for role in ("end", "pad"):
                if vocabulary.special[role] in inner:
                    yield f"the {role} token inside the sequence", ""
                    break

    def tokens(row: Row) -> list[str]:
        """The names of the tokens, without those that begin, end and pad, which every row gets anyway."""
        items = row["sequence"].split() if isinstance(row["sequence"], str) else list(row["sequence"])
        if vocabulary is None:
            return items
        names = [vocabulary.tokens[item] if isinstance(item, int) else item for item in items]
        special = vocabulary.special
        while names and names[-1] == special["pad"] != special["end"]:
            names.pop()
        begins, ends = names[:1] == [special["start"]], names[-1:] == [special["end"]]
        return names[begins : len(names) - ends if len(names) > begins else None]

    return Template(
        fields={"sequence": "ids or names of tokens, as a list; or names with spaces between"},
        prompt=lambda row: "",
        completion=lambda row: " ".join(tokens(row)),
        example={"sequence": ["C4", "E4", "G4", "C5", "G4", "E4", "C4"], "label": 0},
        problems=problems,
        label=lambda row: row.get("label"),
        picture=(lambda text: _picture(text, width)) if width else None,
    )


def _all_text(sequence: object) -> bool:
    return isinstance(sequence, list) and all(isinstance(item, str) for item in sequence)


def _picture(text: str, width: int) -> list[list[float]] | None:
    """The patches' centres, 0 to 1, in lines of `width`; None for tokens that are not patches."""
    patches = [token for token in text.split() if set(token) <= {"0", "1"} and isqrt(len(token)) ** 2 == len(token)]
    if not patches or len(patches) < len(text.split()):
        return None
    pixels = [float(patch[len(patch) // 2]) for patch in patches]
    return [pixels[i : i + width] for i in range(0, len(pixels), width)]
