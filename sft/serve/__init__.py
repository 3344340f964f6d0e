"""`sft serve`: a model behind OpenAI's HTTP interface, its prompts built by the code that built them in training.

`routes` reads requests and sends answers, in the event loop; `prompts` turns requests into ids; `writer` is the thread
that calls the model; `api` is what goes over the wire.
"""

import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from sft import UserError
from sft.model.load import decoding
from sft.serve.prompts import ServerLimits
from sft.serve.routes import application
from sft.serve.writer import Writer
from sft.show import say
from sft.write.ask import Answerer
from sft.write.stream import processors


def serve(
    load: Callable[[], Answerer], host: str, port: int, key: str | None, max_tokens: int | None, max_requests: int
) -> None:
    """Serve until SIGINT or SIGTERM. The address is taken before the model is loaded.

    Raises UserError for an address that cannot be had, and for generation settings that cannot be streamed.
    """
    listening = _listen(host, port)
    answerer = load()
    opened = answerer.opened
    processors(decoding(opened.recipe, opened.codec))
    limits = ServerLimits(max_tokens or opened.recipe.max_length, max_requests)
    writer = Writer(answerer.model, opened.recipe.eval.batch_tokens, max_requests)
    url = "http://{}:{}/v1".format(f"[{host}]" if ":" in host else host, listening.getsockname()[1])
    app = application(opened, writer, limits, key, partial(say, f"{opened.recipe.folder.name} answers at {url}"))
    _warn(listening, key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when all is closed
    with suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5), writer).run([listening])
    say("stopped")


def serve_with_vllm(folder: Path, host: str, port: int, key: str | None) -> None:
    """Become `vllm serve`. Raises UserError where it is not installed, the folder holds no whole model, or the address
    cannot be had."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: vLLM serves whole models; run `sft merge` and name the folder that it writes")
    if (vllm := shutil.which("vllm")) is None or importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed; pip install vllm on a machine with a GPU, or leave out --engine vllm")
    with _listen(host, port) as listening:  # it is free again for vLLM
        _warn(listening, key)
    if key:
        os.environ["VLLM_API_KEY"] = key  # unlike an argument, others on the machine cannot see it
    name = folder.resolve().name
    os.execv(vllm, [vllm, "serve", str(folder), "--host", host, "--port", str(port), "--served-model-name", name])


class Server(uvicorn.Server):
    """uvicorn, whose streams end when it has to stop."""

    def __init__(self, config: uvicorn.Config, writer: Writer) -> None:
        super().__init__(config)
        self.writer = writer

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.writer.stop()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that has the address. Raises UserError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # until then, others can bind it too
    except (OSError, UnicodeError) as error:  # the latter for what cannot name a host
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{host}:{port}: {why}; name another --port or --host") from error
    return listening


def _warn(listening: socket.socket, key: str | None) -> None:
    if not key and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        say("anyone who reaches this address can use the model: give --api-key, or SFT_API_KEY in the environment")
