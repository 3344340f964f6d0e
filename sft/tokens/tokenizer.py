"""The tokenizer of a recipe: loaded and tried out, trained on the recipe's own rows, or made of a given vocabulary."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_templates import Template, Vocabulary
from sft import UserError
from sft.files import read_json, whole_folder, write_json
from sft.hub import commit, is_more_than_an_id, place, why
from sft.recipe import Recipe
from sft.recipe.schema import NewTokenizer, VocabularyFile
from sft.rows.read import contents
from sft.rows.split import TRAIN, Split
from sft.rows.template import Loaded
from sft.rows.watch import unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE = 'Once, in May, two  foxes\nmet 12 hens; "why?" they said.'
END = "<|endoftext|>"
READ = "read.json"
"""The file beside a tokenizer that was trained here: what the template read while it was called."""


def load_tokenizer(recipe: Recipe, loaded: Loaded, vocabulary: Vocabulary | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer, with a pad token, and proven to give back the words it was given.

    One that is new is trained on the rows as the template reads them; one for a `vocabulary` knows its tokens alone.

    Raises UserError where it cannot be reached, has no end token, or loses text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if isinstance(recipe.tokenizer, VocabularyFile):
        assert vocabulary is not None
        return _of_vocabulary(recipe, recipe.tokenizer, vocabulary)
    if isinstance(recipe.tokenizer, NewTokenizer):
        name = str(_train(recipe, recipe.tokenizer, loaded))
    elif recipe.base is not None:
        name = str(recipe.base.trained)
        if not Path(name).is_dir():
            raise UserError(f"{recipe.model}: this base is not trained yet; run ./launch.sh {recipe.model} first")
    else:
        name = recipe.tokenizer or str(recipe.model)
    revision = named_revision(recipe) if name == recipe.model else "main"
    if not os.path.exists(name) and is_more_than_an_id(name):
        name, tokenizer_revision = place(name)
        revision = tokenizer_revision or "main"
    try:
        pinned = base_commit(recipe) if name == recipe.model else revision
        tokenizer = AutoTokenizer.from_pretrained(name, revision=pinned)
    except Exception as error:  # the hub client, the tokenizers library and sentencepiece each raise their own classes
        raise UserError(unreachable(name, "tokenizer", error, revision)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{name}: its tokenizer has no tokenizer.json; convert it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) where sentencepiece is installed"
        )
    if eos := recipe.trainer.get("eos_token"):
        if eos not in tokenizer.get_vocab():
            raise UserError(f"`trainer.eos_token` is {eos!r}, which is not in the vocabulary of {name}")
        tokenizer.eos_token = eos
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end token; name one of its tokens in `trainer.eos_token`")
    if (pad := recipe.trainer.get("pad_token")) and pad not in tokenizer.get_vocab():
        raise UserError(f"`trainer.pad_token` is {pad!r}, which is not in the vocabulary of {name}")
    tokenizer.pad_token = pad or tokenizer.pad_token or tokenizer.eos_token
    _try_out(tokenizer, name)
    return tokenizer


def named_revision(recipe: Recipe) -> str:
    """The branch, tag or commit of the base that the recipe names."""
    return str((recipe.trainer.get("model_init_kwargs") or {}).get("revision", "main"))


def base_commit(recipe: Recipe) -> str:
    """The commit of a base on the hub: the one that the run in the recipe's folder was trained on, else the one that
    its revision means now. For a base in a folder, the revision as it is named.

    Raises as the hub's client.
    """
    if not isinstance(recipe.model, str) or os.path.exists(recipe.model):
        return named_revision(recipe)
    trained = recipe.folder / "train.json"
    kept = read_json(trained).get("base") if trained.is_file() else None
    if kept and (kept["model"], kept["revision"]) == (recipe.model, named_revision(recipe)):
        return str(kept["commit"])
    return commit(recipe.model, named_revision(recipe))


def described_base(recipe: Recipe) -> dict[str, str] | None:
    """A base on the hub: its id, the revision that the recipe names, and the commit that this is. None for others."""
    if not isinstance(recipe.model, str) or os.path.exists(recipe.model):
        return None
    return {"model": recipe.model, "revision": named_revision(recipe), "commit": base_commit(recipe)}


def unreachable(name: str, what: str, error: Exception, revision: str = "main") -> str:
    """The message for a model or tokenizer that could not be loaded, locally or from the hub."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if (Path(name) / "run.json").is_file():
        inner = next((n for n in ("best_model", "model", "merged") if (Path(name) / n).is_dir()), None)
        wanted = f"the model in it, {Path(name, inner)}" if inner else "what `sft merge` makes of its adapter"
        return f"{name}: is the folder of a run; name {wanted}"
    if Path(name).is_dir():
        return f"{name}: cannot load the {what} of this folder: {reason}"
    if what == "tokenizer" and name.endswith(".json"):
        return f"{name}: is not the folder of a tokenizer; a vocabulary of your own is named tokenizer={{vocab: ...}}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{name}: no such folder; `model` is a local folder, an id on the hub, or a recipe"
    return why(name, "model", revision, error) or (
        f"{name}: the {what} of this id on the hub cannot be loaded: {reason}; put a model that can into a folder and "
        "name that: model=path/to/folder"
    )


def _try_out(tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
    """A wrong tokenizer class loses spaces or letters without an error: encode and decode a sentence, or all tokens of
    one that knows whole words alone."""
    from tokenizers import models

    if isinstance(tokenizer.backend_tokenizer.model, models.WordLevel):
        tokens = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
        ids = tokenizer(" ".join(tokens), add_special_tokens=False)["input_ids"]
        for i, token in enumerate(tokens):
            if ids[i : i + 1] != [i] or str(tokenizer.decode([i])) != token:
                raise UserError(f"{name}: the token {token!r} does not come back as it is; does it hold the name of a "
                                "special token, or an odd character?")  # fmt: skip
        return
    back = str(tokenizer.decode(tokenizer(PROBE, add_special_tokens=False)["input_ids"]))
    if "".join(back.lower().split()) != "".join(PROBE.lower().split()) or len(back.split()) < len(PROBE.split()):
        raise UserError(
            f"{name}: its tokenizer does not give back what it is given: {PROBE!r} becomes {back!r}; its "
            "files or its class (`tokenizer_class` in tokenizer_config.json) are not those of the model"
        )


def _of_vocabulary(recipe: Recipe, given: VocabularyFile, vocabulary: Vocabulary) -> "PreTrainedTokenizerFast":
    """A tokenizer that splits at spaces, whose tokens and ids are those of the given file.

    Raises UserError where `model` is a folder whose tokenizer has other tokens, or where a token does not come back.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = vocabulary.special
    words = Tokenizer(models.WordLevel(dict(vocabulary.ids), unk_token=names["unknown"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = (names["start"], vocabulary.ids[names["start"]])
    words.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, clean_up_tokenization_spaces=False, pad_token=names["pad"], bos_token=names["start"],
        eos_token=names["end"], unk_token=names["unknown"],
    )  # fmt: skip
    _try_out(tokenizer, given.vocab)
    if isinstance(recipe.model, str) and (Path(recipe.model) / "tokenizer.json").is_file():
        theirs = Tokenizer.from_file(str(Path(recipe.model) / "tokenizer.json")).get_vocab()
        if theirs != vocabulary.ids:
            raise UserError(f"{given.vocab}: is not the vocabulary that {recipe.model} was trained with; name that one")
    return tokenizer


def _train(recipe: Recipe, new: NewTokenizer, loaded: Loaded) -> Path:
    """Train a byte-level BPE on the training side, once for each content of data and template; return its folder.

    One token ends every text, begins every text, and pads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    settings = [recipe.data.model_dump(exclude={"train", "test"}), recipe.template_options, new.vocab_size]
    held_out = contents(recipe.data, "test") if recipe.data.test else None  # is not trained on
    parts = [contents(recipe.data, "train"), held_out, settings, loaded.at_load]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = recipe.folder.parent / ".tokens" / f"tokenizer-{key}"
    if folder.is_dir() and unchanged(read_json(folder / READ), loaded.home):
        return folder
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=new.vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_texts(recipe, loaded.template), trainer)
    end = (END, bpe.token_to_id(END))
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[end])
    names = {"bos_token": END, "eos_token": END, "pad_token": END}
    with whole_folder(folder) as part:
        PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(part)
        write_json(part / READ, loaded.when_called())
    return folder


def _texts(recipe: Recipe, template: Template) -> Iterator[str]:
    """The texts of the training side, which is known once all records were seen."""
    split, again = (Split(recipe.data, template) for _ in range(2))
    for _ in split.samples():
        pass
    sides = split.sides()
    for sample in again.samples():
        if sides[sample.record] == TRAIN:
            yield sample.text + sample.output
