"""Tokens a second and the wait for the first one, of a server that `sft serve` started, with 1, 8 and 32 streams.

python bench/serve.py http://127.0.0.1:8000/v1 "a prompt"
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai


def main(url: str, prompt: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model = next(iter(client.models.list())).id

    def stream(seed: int) -> tuple[float, int]:
        """Seconds to the first token, and the number of tokens."""
        started, first, tokens = time.monotonic(), 0.0, 0
        for event in client.completions.create(
            model=model, prompt=f"{prompt} {seed}\n", stream=True, max_tokens=128, temperature=1.0, seed=seed,
            stream_options={"include_usage": True},
        ):  # fmt: skip
            first = first or time.monotonic() - started
            tokens = event.usage.completion_tokens if event.usage else tokens
        return first, tokens

    stream(0)
    print("| streams | tokens a second | to the first token, median | worst |\n|---|---|---|---|")
    for streams in (1, 8, 32):
        started = time.monotonic()
        with ThreadPoolExecutor(streams) as clients:
            found = sorted(clients.map(stream, range(streams)))
        speed = sum(tokens for _, tokens in found) / (time.monotonic() - started)
        median, worst = found[streams // 2][0], found[-1][0]
        print(f"| {streams} | {speed:.0f} | {median * 1000:.0f} ms | {worst * 1000:.0f} ms |")


if __name__ == "__main__":
    main(*sys.argv[1:])
