"""Serve a reward model over HTTP: ``python -m tre_lightning.tasks.alignment.server --model DIR``.

POST / scores by the protocol of :mod:`tre_lightning.tasks.alignment.remote`; GET /health answers
``{"status": "ok"}``. A bad request is answered by 400, 404, 411 or 413 and a failure of the model
by 500, each with ``{"error": "..."}``. There is no authentication: keep it on a trusted network.
"""

import argparse
import json
import math
import signal
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

import torch

from tre_lightning.common.errors import one_line, one_line_errors
from tre_lightning.common.paths import expanded
from tre_lightning.policy.chat import as_messages
from tre_lightning.tasks.alignment.scorer import (
    Dtype,
    PreferenceScorer,
    RewardModelScorer,
    check_equal_numbers,
)

LARGEST_REQUEST = 64 * 2**20  # bytes


class RewardServer(ThreadingHTTPServer):
    """Answers requests side by side, but scores them one after the other."""

    def __init__(
        self, scorer: PreferenceScorer, host: str, port: int, largest_request: int = LARGEST_REQUEST
    ) -> None:
        """Bind the address; ``serve_forever`` answers.

        Args:
            scorer: what scores.
            host: address to listen on.
            port: port to listen on; 0 = a free one.
            largest_request: bytes.

        Raises:
            ValueError: if the address cannot be bound.
        """
        self.scorer = scorer
        self.largest_request = largest_request
        self.scoring = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--host {host} --port {port} cannot be listened on ({error}); give another port, "
                "or 0 for a free one"
            ) from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds that a client may be silent

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        else:
            self._answer(404, {"error": f"no {self.path[:80]} here; GET /health or POST /"})

    def do_POST(self) -> None:
        if self.path != "/":
            self._answer(404, {"error": f"no {self.path[:80]} here; GET /health or POST /"})
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            self._answer(411, {"error": "the request has no Content-Length; send one"})
            return
        if int(length) > self.server.largest_request:
            largest = self.server.largest_request
            self._answer(413, {"error": f"{length} bytes are more than {largest}; send fewer rows"})
            return
        try:
            prompts, responses = _read_request(self.rfile.read(int(length)))
        except ValueError as error:
            self._answer(400, {"error": one_line(str(error))})
            return
        try:
            with self.server.scoring:
                scores = self.server.scorer.score(prompts, responses)
        except Exception as error:  # whatever it is, the next request may go well
            self._answer(500, {"error": f"{type(error).__name__}: {one_line(str(error))}"})
            return
        self._answer(200, {"scores": [s if math.isfinite(s) else None for s in scores]})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Say nothing of single requests."""


def _read_request(body: bytes) -> tuple[list[Any], list[str]]:
    """Prompts and responses of a request; raises ValueError for anything else."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    fields = request if isinstance(request, dict) else {}
    prompts, responses = fields.get("prompts"), fields.get("responses")
    if not (isinstance(prompts, list) and isinstance(responses, list)):
        raise ValueError('the request is not {"prompts": [...], "responses": [...]}')
    if not all(isinstance(response, str) for response in responses):
        raise ValueError("responses holds something else than strings")
    check_equal_numbers(prompts, responses)
    for prompt in prompts:
        as_messages(prompt)
    return prompts, responses


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8765,
    batch_size: int = 64,
    max_length: int | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
) -> None:
    """Load a reward model and answer until SIGINT or SIGTERM.

    Prints ``serving MODEL on http://HOST:PORT`` when it is ready. Only for the main thread.

    Args:
        model: directory or hub name of a sequence classifier with one label.
        host: address to listen on.
        port: port to listen on; 0 = a free one.
        batch_size: texts in a forward pass.
        max_length: longest text, tokens; None = the model's context.
        dtype: of the weights.
        device: where to score; None = a GPU where there is one.

    Raises:
        ValueError: if the model cannot be loaded or the address cannot be bound.
    """
    scorer = RewardModelScorer(model, batch_size, max_length, dtype, prefix="--")
    scorer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with RewardServer(scorer, host, port) as server:
        scorer.score(["Hello"], ["Hello"])  # loads the weights
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        try:
            print(f"serving {model} on {server.url}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            # Let the batch in work end; a thread inside torch would crash the interpreter's exit.
            server.scoring.acquire()


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve as the arguments say; ``None`` = those of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m tre_lightning.tasks.alignment.server",
        description="Serve a reward model over HTTP until SIGINT or SIGTERM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, type=expanded, help="directory or hub name of the reward model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765, help="port; 0 = a free one")
    parser.add_argument("--batch_size", type=int, default=64, help="texts in a forward pass")
    parser.add_argument("--max_length", type=int, help="longest text, tokens; none = the context")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of weights")
    parser.add_argument("--device", help="where to score; none = a GPU where there is one")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors():
        serve(**vars(options))


if __name__ == "__main__":
    main()
