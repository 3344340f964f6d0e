"""Text to words, for metrics that count them: Chinese and Japanese by the character, other scripts by the word."""

import re

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


def words(text: str) -> list[str]:
    """Lower-case words in the order of the text, without punctuation."""
    return WORD.findall(text.lower())


def ngrams(items: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n items."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
