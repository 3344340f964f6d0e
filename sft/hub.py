"""The hub: what a name on it means, which commit that is now, and what to do where something is not to be had."""

import os
import socket
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from sft import UserError

Kind = Literal["model", "dataset"]

PATIENCE_SECONDS = 2.0
"""How long the hub is waited for."""
SHOWN_NAMES = 10
"""Branches and tags that a message shows."""
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
SECTIONS = {"spaces", "buckets", "collections", "papers", "docs", "blog"}
"""Of the hub's pages, beside models and data sets."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WHAT = {"model": "model", "dataset": "data set"}
KEYS = {"model": "model", "dataset": "data.train"}
FOLDERS = {"model": "the model into a folder and name that: model=path/to/folder",
           "dataset": "its files into a folder and name that: data.train=path/to/folder"}  # fmt: skip


class Place(NamedTuple):
    """A repository on the hub, and its revision where one is named."""

    name: str
    revision: str | None


def place(text: str, kind: Kind = "model") -> Place:
    """What `ORG/NAME`, `ORG/NAME@REVISION` or the address of a page on the hub names.

    Raises UserError for an address of something else, with what to write instead.
    """
    if not is_address(text):
        return _split(text)
    if text.startswith("hf://"):
        host, path = "hf.co", text.removeprefix("hf://")
    else:
        address = urlsplit(text if "://" in text else f"https://{text}")
        host, path = address.netloc, unquote(address.path)
    parts, key = [part for part in path.split("/") if part], KEYS[kind]
    if host not in HOSTS | {urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}:
        hint = "download it and name the file" if kind == "dataset" else f"write {key}=ORG/NAME"
        raise UserError(f"{text}: is not an address of the hub; {hint}, and for a mirror of it set HF_ENDPOINT")
    if parts[:1] and parts[0] in SECTIONS:
        raise UserError(f"{text}: is not the page of a {WHAT[kind]}; write {key}=ORG/NAME")
    is_data = parts[:1] == ["datasets"]
    parts = parts[1:] if is_data or parts[:1] == ["models"] else parts
    (name, revision), rest = _split("/".join(parts[:2])), parts[2:]
    if not name:
        raise UserError(f"{text}: names no repository; write {key}=ORG/NAME")
    if is_data != (kind == "dataset"):
        other: Kind = "dataset" if is_data else "model"
        raise UserError(
            f"{text}: is the page of a {WHAT[other]}, and `{key}` is a {WHAT[kind]}; {KEYS[other]}={name} names it"
        )
    if len(parts) > 1 and rest[:1] and rest[0] in ("blob", "resolve", "raw"):
        hint = f"write {key}={name}" + (", or download it and name the file" if is_data else "")
        raise UserError(f"{text}: is the address of one file; {hint}")
    return Place(name, "/".join(rest[1:]) or revision if rest[:1] == ["tree"] else revision)


def is_more_than_an_id(text: str) -> bool:
    """Whether `place` has something to take from a text: an address, or a revision behind an id."""
    return is_address(text) or text.find("@") > 0


def is_address(text: str) -> bool:
    """Whether a text is an address, and no id, file or folder."""
    return "://" in text or text.split("/")[0] in HOSTS


def _split(name: str) -> Place:
    name, _, revision = name.partition("@")
    return Place(name, revision or None)


@cache
def commit(name: str, revision: str) -> str:
    """The hash of the commit that a revision of a model is now, on the hub or as its cache has it.

    The same for as long as the process runs, so that what is recorded is what was loaded. Raises as the hub's client.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline())).parent.name


def check_published(name: str, revision: str) -> None:
    """Raise UserError for a model on the hub, or in a folder, that is not there, not let out, or has no safetensors.

    Where the hub does not answer, its cache may have the model: nothing is said but of pickles that are there alone.
    """
    if os.path.isdir(name):
        check_weights(name, os.listdir(name))
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        return
    elif offline():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(found, str):
            check_weights(name, os.listdir(os.path.dirname(found)))
    else:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(name, revision=revision, timeout=PATIENCE_SECONDS)
            check_weights(name, [file.rfilename for file in info.siblings or []])
            _look(name, "model", revision)
        except UserError:
            raise
        except Exception as error:  # the hub client raises dozens of classes
            if reason := advice(name, "model", revision, error):
                raise UserError(reason) from error


def _look(name: str, kind: Kind, revision: str | None) -> None:
    """Ask for a file, as a gated repository lets anyone read its page. Raises as the hub's client."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    file = "config.json" if kind == "model" else "README.md"
    get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=revision), timeout=PATIENCE_SECONDS)


def check_weights(name: str, files: Sequence[str]) -> None:
    """Raise UserError where a model's files hold no weights that are loaded here."""
    if any(file.endswith(".safetensors") for file in files):
        if "config.json" not in files and "adapter_config.json" in files:
            raise UserError(
                f"{name}: is an adapter, not a whole model; name its base, or merge the two with peft first"
            )
    elif any(file.endswith(PICKLES) for file in files):
        raise UserError(no_safetensors(name))
    elif any(file.endswith(".gguf") for file in files):
        raise UserError(f"{name}: holds GGUF files, which are not trained; name the model that they were made from")


def no_safetensors(name: str) -> str:
    """The message for weights that are there as pickles alone: loading a pickle runs the code that is in it."""
    convert = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({name!r}, use_safetensors=False).save_pretrained('converted'); "
        f"T.from_pretrained({name!r}).save_pretrained('converted')"
    )
    return (
        f"{name}: has no safetensors, and a pickle is not loaded, as that runs the code in it; where you trust its "
        f'publisher, convert it once with `python -c "{convert}"` and write model=converted'
    )


def why(name: str, kind: Kind, revision: str | None, error: BaseException) -> str | None:
    """What to do about something that could not be fetched: by what was raised, or what the hub says when asked.

    None where both are of no help.
    """
    if said := advice(name, kind, revision, error):
        return said
    if not offline():
        try:  # the libraries hide what the client raised
            _look(name, kind, revision)
        except Exception as answer:
            return advice(name, kind, revision, answer)
    return None


def advice(name: str, kind: Kind, revision: str | None, error: BaseException) -> str | None:
    """What to do about an exception of the hub's client, or one that was raised from it. None for others."""
    from huggingface_hub import constants, errors

    found, page = list(_chain(error)), f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if any(isinstance(e, errors.GatedRepoError) for e in found):
        return (
            f"{name}: is gated: open {page} and accept its licence, then run `hf auth login`, or set HF_TOKEN to a "
            "token of the account that accepted"
        )
    if any(isinstance(e, errors.DisabledRepoError) for e in found):
        return f"{name}: was disabled on the hub ({page} says why); name another {WHAT[kind]}"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in found):
        return f"{name}: has no revision `{revision}`; {_revisions(name, kind)}"
    if any(isinstance(e, errors.HFValidationError) for e in found):
        return f"{name}: is not an id on the hub, which are written ORG/NAME, nor a folder here"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in found):
        near = (
            get_close_matches(name.lower(), ids := {i.lower(): i for i in _known_ids()}, n=3) if kind == "model" else []
        )
        hint = f"did you mean {', '.join(ids[i] for i in near)}?" if near else "check its spelling"
        there = "nor is there such a file or folder here" if kind == "dataset" else "nor such a folder here"
        return (
            f"{name}: there is no such {WHAT[kind]} on {constants.ENDPOINT}, {there}; {hint} (a private one wants "
            "`hf auth login` or HF_TOKEN)"
        )
    status = next((e.response.status_code for e in found if isinstance(e, errors.HfHubHTTPError)), None)
    if status in (401, 403):
        return f"{name}: the hub refuses your token ({status}); run `hf auth login` again, or set HF_TOKEN to another"
    if status == 429 or (status and status >= 500):
        return f"{name}: the hub is busy or out of order ({status}); try again later"
    silent = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    if status or not any(isinstance(e, silent) for e in found):
        return None
    return not_cached(name, kind) if offline() else None


def not_cached(name: str, kind: Kind = "model") -> str:
    """The message for what the cache does not have while the hub is not asked, or does not answer."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return (
            f"{name}: is not in the hub's cache, {constants.HF_HUB_CACHE}, and the hub is not asked, as "
            f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, or put {FOLDERS[kind]}"
        )
    return (
        f"{name}: is not in the hub's cache, and {constants.ENDPOINT} does not answer; check the network, set "
        f"HF_ENDPOINT to a mirror of it, or put {FOLDERS[kind]}"
    )


@cache
def offline() -> bool:
    """Whether the hub is not to be asked, or does not answer: its client would try again for half a minute."""
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        return True
    address = urlsplit(ENDPOINT)
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    address = urlsplit(proxy) if proxy else address
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), PATIENCE_SECONDS).close()
    except OSError:
        return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from, or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known_ids() -> list[str]:
    """The ids of the models whose facts are shipped, those of all shipped recipes among them."""
    files = Path(__file__).parent.joinpath("memory", "models").glob("*.json")
    return sorted(file.stem.replace("--", "/", 1) for file in files)


def _revisions(name: str, kind: Kind) -> str:
    """The branches and tags that there are."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:  # the hub client raises dozens of classes, each of which means that it does not say
        return "its page lists those that there are"
    shown = []
    for what, names in (("branches", refs.branches), ("tags", refs.tags)):
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        if names:
            shown.append(f"{what} {', '.join(ref.name for ref in names[:SHOWN_NAMES])}{more}")
    return f"there are {' and '.join(shown)}, and hashes of commits" if shown else "its page lists those that there are"
