"""Text to ids and back, for prompts and for what follows them: tokenised apart, joined as ids.

The ids that the model reads at inference are thus the prefix of those it was trained on, whatever tokens the two texts
would have merged into at the seam.
"""

import json
import re
from collections.abc import Sequence
from datetime import date
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from data_templates import Message, Prompt, Segment, as_text
from sft import UserError
from sft.tokens.conversation import Difference, Ours, differences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


CLOCK = "strftime_now"
"""The function by which chat templates print the day; transformers has no other clock for them."""
DIRECTIVES = ("%Y", "%m", "%d", "%-d", "%-m", "%y", "%B", "%b", "%A", "%a", "%j", "%H", "%M", "%S", "%I", "%p", "%F")
"""What of `strftime` such a template may write."""
ANSWER = "0193"
"""Stands for an answer where a chat template is tried out; no template writes it by itself."""


class Codec:
    """Text to ids and back. What follows a prompt gets no space put before it that was not there."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", prompt_format: str = "auto", day: date | None = None
    ) -> None:
        """`day` is what a chat template prints as today. Raises UserError where a chat template is asked for and there
        is none, or it rewrites the answer."""
        self.tokenizer, self.date = tokenizer, day or date.today()
        self.chat = bool(tokenizer.chat_template) if prompt_format == "auto" else prompt_format == "chat"
        whole = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
        self.prints_date = self.chat and CLOCK in whole
        self.template = _dated(self.date) + whole if self.prints_date else whole
        """The chat template, its clock stopped at the date."""
        spec = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._prompts = Tokenizer.from_str(json.dumps(spec))
        self._outputs = Tokenizer.from_str(json.dumps(_continuing(spec)))
        self._parts, self._keeps_bytes = _parts(spec), _keeps_bytes(spec)
        self._prompts.encode_special_tokens = not self.chat  # "</s>" in a user's text is text, not an end token
        self.start = [] if self.chat else _added_before(tokenizer)
        self.opening, self.lead, self.closing, self.end = "", "", "", [int(tokenizer.eos_token_id)]
        if self.chat:
            self.opening, self.lead, self.closing, self.end = self._turn()
        self._outputs.encode_special_tokens = True
        names = sorted(special(tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        """The names of special tokens: in a text that goes through a chat template they would become such tokens."""
        self.pad = self.end[-1] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids that the model reads before it writes, one list a prompt, without padding."""
        return self.heads(self.rendered(prompts))

    def heads(self, written: Sequence[str]) -> list[list[int]]:
        """The ids of prompts that are written out."""
        batch = self._prompts.encode_batch_fast(written, add_special_tokens=False)
        alone = [int(self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.end[0])]
        return [self.start + encoding.ids or alone for encoding in batch]

    def trimmed(self, head: Sequence[int], room: int) -> list[int] | None:
        """A prompt's ids without its oldest tokens, to fit into so many. None where nothing would be left of it, and
        for a prompt in a chat template, which is none with its head cut off."""
        kept = room - len(self.start)
        return None if self.chat or kept < 1 else self.start + list(head[len(self.start) :][-kept:])

    def outputs(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that follow a prompt, without their end token."""
        led = [self.lead + text for text in texts]
        return [encoding.ids for encoding in self._outputs.encode_batch_fast(led, add_special_tokens=False)]

    def going_on(self, text: str) -> list[int]:
        """The ids that the model reads where it shall go on with a text, as in training: what stands before every text,
        then the text. Raises UserError as `added` does."""
        return self.prompts([""])[0] + self.added(text)

    def added(self, text: str) -> list[int]:
        """The ids of a text of the user's that follows others.

        Raises UserError for a word that a vocabulary of whole words lacks, of which nothing would be left.
        """
        (tail,) = self.outputs([text])
        if isinstance(self._outputs.model, WordLevel) and self.text([tail])[0].split() != text.split():
            missing = [word for word in text.split() if self._outputs.token_to_id(word) is None]
            shown = ", ".join(map(repr, missing[:3]))
            raise UserError(f"{shown}: not in the vocabulary, whose tokens stand with spaces between them")
        return tail

    def weights(self, segments: Sequence[Segment]) -> list[float]:
        """The loss weight of each token of an output in segments: that of the segment it begins in.

        Raises UserError for a segment with a text and a weight of which no token is learned with that weight.
        """
        encoding = self._outputs.encode(self.lead + "".join(s.text for s in segments), add_special_tokens=False)
        of = [0 for _ in self.lead] + [number for number, segment in enumerate(segments) for _ in segment.text]
        begun = [of[min(start, len(of) - 1)] for start, _ in encoding.offsets]
        for number in set(of) - set(begun):
            segment, around = segments[number], [segments[other].weight for other in begun if other < number][-1:]
            if segment.text.strip() and segment.weight and around != [segment.weight]:
                raise UserError(
                    f"no token begins in segment `{segment.name}` ({segment.text[:40]!r}), so none is learned with its "
                    f"weight {segment.weight:g}: it is part of a token of the text before it; begin it with a space or "
                    "a line break, or weigh both the same"
                )
        return [segments[number].weight for number in begun]

    def text(self, outputs: Sequence[Sequence[int]]) -> list[str]:
        """Output ids back to text; `outputs` and `text` are each other's inverse where the tokenizer loses nothing."""
        texts = self._outputs.decode_batch([list(ids) for ids in outputs], skip_special_tokens=False)
        return [text.removeprefix(self.lead) for text in texts]

    def unchanged(self, texts: Sequence[str], outputs: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text comes back from its ids, up to how Unicode composes its characters (NFC)."""
        pairs = zip(texts, self.text(outputs), strict=True)
        return [a == b or normalize("NFC", a) == normalize("NFC", b) for a, b in pairs]

    def prompts_unchanged(self, written: Sequence[str], heads: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of each prompt comes back from its ids, up to NFC, and to the white space that tokenizers
        put or take away where a text begins and around special tokens."""
        if self._keeps_bytes:
            return [True] * len(heads)
        ids = [list(head[len(self.start) :]) for head in heads]
        found = zip(written, self._prompts.decode_batch(ids, skip_special_tokens=False), strict=True)
        return [a == b or not a or self._bare(a) == self._bare(b) for a, b in found]

    def _bare(self, text: str) -> list[str]:
        text = normalize("NFC", text)
        return [part.strip() for part in self.special.split(text)] if self.chat else [text.removeprefix(" ")]

    def merged(
        self,
        prompts: Sequence[str],
        outputs: Sequence[str],
        heads: Sequence[Sequence[int]],
        tails: Sequence[Sequence[int]],
    ) -> list[bool]:
        """Whether prompt and output, tokenised as one text, would have been other ids than theirs joined."""
        merged = [False] * len(prompts)
        if self.chat:
            return merged  # between them stand the template's own tokens
        pairs = zip(prompts, outputs, strict=True)
        doubtful = [i for i, (prompt, output) in enumerate(pairs) if prompt and not self._apart(prompt, output)]
        texts = [prompts[i] + outputs[i] for i in doubtful]
        for i, together in zip(doubtful, self._prompts.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            merged[i] = together.ids != [*heads[i][len(self.start) :], *tails[i]]
        return merged

    def _apart(self, prompt: str, output: str) -> bool:
        """Whether two texts are certain not to merge where they meet: no token holds the two characters there side by
        side, so that none spans the seam; and no run of white space meets it, nor a sign after it, which tokenizers
        split by what stands around them.
        """
        here = prompt[-1] + output[:1]
        if not here.isascii() or not (output[:1].isalnum() or output[:1] == " "):
            return False
        if here.isspace() or prompt[-2:].isspace() or output[:2].isspace():
            return False
        before, after = map(_spelled, here)
        known = not (self._parts.isdisjoint(before) and self._parts.isdisjoint(after))  # unknown ones may become one
        return known and self._parts.isdisjoint(x + y for x in before for y in after)

    def written(self, prompt: Prompt) -> str:
        """A prompt as the text that is tokenised."""
        return self.rendered([prompt])[0]

    def rendered(self, prompts: Sequence[Prompt]) -> list[str]:
        """Prompts as the texts that are tokenised."""
        if not self.chat:
            return [as_text(prompt) for prompt in prompts]
        return [text + self.opening for text in self._render([_turns(prompt) for prompt in prompts])]

    def differences(
        self, prompts: Sequence[Prompt], outputs: Sequence[str], written: Sequence[str]
    ) -> list[list[Difference]]:
        """Where each row is other than what the chat template makes of its whole conversation. `written` are the
        prompts as they are tokenised."""
        if not self.chat:
            return [[] for _ in prompts]
        asked = [_turns(prompt) for prompt in prompts]
        answered = [
            [*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, outputs, strict=True)
        ]
        return [
            differences(turns, answer, whole, Ours(prompt, self.opening, self.lead, self.closing))
            for turns, answer, whole, prompt in zip(
                asked, outputs, self._render(answered, generation=False), written, strict=True
            )
        ]

    def _render(self, conversations: Sequence[Sequence[Message]], generation: bool = True) -> list[str]:
        turns = [[dict(message) for message in messages] for messages in conversations]
        try:
            found = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # a template may raise what it likes
            raise UserError(
                f"the chat template of this tokenizer refuses it ({error}); mend it, or write `prompt_format: plain`"
            ) from error
        return list(map(str, found))

    def _turn(self) -> tuple[str, str, str, list[int]]:
        """What the chat template puts between a prompt and its answer, and what ends the answer, up to and with its
        first special token, as text and as ids. A space before the answer is learned with it; text, such as an
        empty block of thoughts, belongs to the prompt."""
        if not self.tokenizer.chat_template:
            raise UserError("`prompt_format: chat`, but this tokenizer has no chat template; write `plain`")
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": ANSWER}
        (prompt,), (whole,) = self._render([[question]]), self._render([[question, answer]], generation=False)
        lead, _, tail = whole.removeprefix(prompt).partition(ANSWER)
        if not whole.startswith(prompt) or not tail:
            raise UserError(
                "the chat template of this tokenizer does not put the answer right after the prompt; "
                "write `prompt_format: plain`"
            )
        encoding = self._outputs.encode(tail, add_special_tokens=False)  # it still reads special tokens as such
        ids = encoding.ids
        ends = [i for i, token in enumerate(ids) if token in special(self.tokenizer).values()]
        end = ids[: ends[0] + 1] if ends else [*ids, int(self.tokenizer.eos_token_id)]
        closing = tail[: encoding.offsets[ends[0]][1]] if ends else tail
        return (lead, "", closing, end) if lead.strip() else ("", lead, closing, end)


def _turns(prompt: Prompt) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _dated(day: date) -> str:
    """Jinja that puts a fixed day, at midnight, in place of the clock."""
    steps = "".join(f" | replace({json.dumps(each)}, {json.dumps(day.strftime(each))})" for each in DIRECTIVES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}"


def special(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """Name -> id of the tokens that mean something apart from text."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _added_before(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The ids that the tokenizer itself puts before a text, such as BOS. What it puts after it is left to us."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    where = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return [int(token) for token in full[:where]]


def _continuing(node: Any) -> Any:
    """A tokenizer's JSON without the space it puts before each text and takes off when decoding. Offsets are those of
    whole tokens."""
    if isinstance(node, list):
        return [_continuing(item) for item in node if not (isinstance(item, dict) and _is_prefix(item))]
    if not isinstance(node, dict):
        return node
    if _is_prefix(node):
        return None
    node = {key: value if key == "model" else _continuing(value) for key, value in node.items()}
    if node.get("type") == "Metaspace":
        node["prepend_scheme"] = "never"
    if node.get("type") == "ByteLevel":
        node["add_prefix_space"] = False
    if "trim_offsets" in node:
        node["trim_offsets"] = False  # a space before a word is part of its token, for every tokenizer
    return node


def _parts(spec: dict[str, Any]) -> frozenset[str]:
    """Single characters, and pairs of them side by side, of a vocabulary's tokens; nothing where the kind of tokenizer
    puts its tokens together in another way."""
    if spec["model"]["type"] not in ("BPE", "Unigram"):
        return frozenset()
    words = [entry[0] if isinstance(entry, list) else entry for entry in spec["model"]["vocab"]]
    words += [token["content"] for token in spec["added_tokens"]]
    return frozenset(chain.from_iterable(words)) | {a + b for word in words for a, b in pairwise(word)}


def _keeps_bytes(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer is certain to lose no text: a byte-level one that has a token for each byte."""
    kinds = [(spec[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "decoder")]
    whole = kinds in ([None, "ByteLevel", "ByteLevel"], ["NFC", "ByteLevel", "ByteLevel"])
    return whole and spec["model"]["type"] == "BPE" and set(ByteLevel.alphabet()) <= spec["model"]["vocab"].keys()


def _spelled(character: str) -> list[str]:
    """How an ASCII character may stand in a vocabulary: as it is, or a white one as byte-level BPE or SentencePiece
    writes it."""
    white = [chr(256 + ord(character)), "\u2581"] if character <= " " else []
    return [character, *white]


def _is_prefix(node: dict[str, Any]) -> bool:
    return node.get("type") == "Prepend" or (node.get("type") == "Strip" and bool(node.get("start")))
