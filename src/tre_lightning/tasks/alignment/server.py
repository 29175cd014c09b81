"""Serve a reward model over HTTP: ``python -m tre_lightning.tasks.alignment.server --model DIR``.

POST / scores by the protocol of :mod:`tre_lightning.tasks.alignment.remote`; GET /health answers
``{"status": "ok"}``. A bad request is answered by 400, 404 or 413 and a failure of the model by
500, with what is wrong. There is no authentication: keep it on a trusted network. It needs the
extra ``serve``.
"""

import argparse
import json
import math
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

import anyio
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

if TYPE_CHECKING:  # the serve extra
    import uvicorn
    from starlette.applications import Starlette

LARGEST_REQUEST = 64 * 2**20  # bytes


def reward_app(scorer: PreferenceScorer, largest_request: int = LARGEST_REQUEST) -> "Starlette":
    """The ASGI application; it answers side by side, but scores one request after the other.

    Args:
        scorer: what scores.
        largest_request: bytes.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route

    one_at_a_time = anyio.CapacityLimiter(1)

    def answer(status: int, content: dict[str, Any]) -> Response:
        # A JSONResponse would fail on half a surrogate pair, which an error may repeat.
        return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")

    async def health(request: Request) -> Response:
        return answer(200, {"status": "ok"})

    async def score(request: Request) -> Response:
        try:
            prompts, responses = _read_request(await request.body())
        except (ValueError, ClientDisconnect) as error:
            return answer(400, {"error": one_line(str(error))})
        try:
            scores = await anyio.to_thread.run_sync(
                scorer.score, prompts, responses, limiter=one_at_a_time
            )
        except Exception as error:  # whatever it is, the next request may go well
            return answer(500, {"error": f"{type(error).__name__}: {one_line(str(error))}"})
        return answer(200, {"scores": [s if math.isfinite(s) else None for s in scores]})

    async def elsewhere(request: Request, error: Exception) -> Response:
        path = request.url.path[:80]
        return answer(404, {"error": f"no {path} here; GET /health or POST /"})

    return Starlette(
        routes=[Route("/", score, methods=["POST"]), Route("/health", health)],
        exception_handlers={404: elsewhere, 405: elsewhere},
        max_body_size=largest_request,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds requests until a server takes it over; port 0 = a free one.

    Raises:
        ValueError: if the address cannot be bound.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on ({error}); give another port, "
            "or 0 for a free one"
        ) from error


def uvicorn_server(app: "Starlette") -> "uvicorn.Server":
    """A server of the application that says nothing of single requests."""
    import uvicorn

    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="error")
    return uvicorn.Server(config)


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
        ValueError: if the model cannot be loaded, the address cannot be bound or a package is
            missing.
    """
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise ValueError(
            "the server needs starlette and uvicorn; pip install 'tre-lightning[serve]'"
        )
    scorer = RewardModelScorer(model, batch_size, max_length, dtype, prefix="--")
    scorer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with listen(host, port) as listening:
        scorer.score(["Hello"], ["Hello"])  # loads the weights
        server = uvicorn_server(reward_app(scorer))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):  # uvicorn ends the batch in work, then raises it again
            address, at = listening.getsockname()
            print(f"serving {model} on http://{address}:{at}", flush=True)
            server.run(sockets=[listening])


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
