"""Scores of a reward model behind HTTP, by the standard library alone.

The protocol, for any server (``python -m tre_lightning.tasks.alignment.server`` is one)::

    POST {"prompts": [P, ...], "responses": ["...", ...]}
    200  {"scores": [0.5, null, ...]}

``P`` is a string or a list of ``{"role": ..., "content": ...}``. There is one finite number a
response, in order; null = could not be scored. Everything else is an error and never a score. The
environment's proxies are not used.
"""

import http.client
import io
import json
import math
import socket
import ssl
import time
from collections.abc import Sequence
from typing import NoReturn
from urllib.parse import urlsplit

from tre_lightning.common.errors import RunError
from tre_lightning.common.validation import at_least, positive
from tre_lightning.policy.chat import ChatPrompt
from tre_lightning.tasks.alignment.scorer import check_equal_numbers

_LARGEST_REPLY = 65536  # bytes, and these for every score besides:
_BYTES_A_SCORE = 64
_SHOWN = 200  # characters of an error reply that the message repeats


class RewardServerError(RunError):
    """The reward server gave no valid scores; the message names it, what happened and the fix."""


class _Retry(Exception):
    """What may go well the next time."""


class RemoteScorer:
    """Scores by a reward server."""

    def __init__(
        self,
        url: str,
        timeout_s: float = 30.0,
        retries: int = 3,
        batch_size: int = 64,
        backoff_s: float = 0.5,
    ) -> None:
        """Check the options; no connection is made yet.

        A request takes at most ``(retries + 1) * (timeout_s + backoff_s)`` seconds, the look-up of
        the server's name excepted.

        Args:
            url: where to post, http or https; redirects are not followed.
            timeout_s: longest time of an attempt from connecting to the last byte, seconds.
            retries: further attempts after a connection error or the status 408, 429 or 5xx.
            batch_size: responses a request.
            backoff_s: pause before a further attempt, seconds.

        Raises:
            ValueError: for an address or option that cannot work.
        """
        _check_url(url)
        positive("data.reward.timeout_s", timeout_s)
        at_least("data.reward.retries", retries, 0)
        at_least("data.reward.batch_size", batch_size, 1)
        if not backoff_s >= 0.0:
            raise ValueError(f"data.reward.backoff_s={backoff_s} must be 0 or more")
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self.batch_size = batch_size
        self.backoff_s = backoff_s

    def score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        """A score of each response to the prompt at its place; NaN = could not be scored.

        Raises:
            ValueError: for unequal numbers of prompts and responses.
            RewardServerError: if the server gives no valid scores.
        """
        check_equal_numbers(prompts, responses)
        scores: list[float] = []
        for start in range(0, len(responses), self.batch_size):
            rows = slice(start, start + self.batch_size)
            scores += self._request(prompts[rows], responses[rows])
        return scores

    def _request(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        plain = [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
        body = json.dumps({"prompts": plain, "responses": list(responses)}).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s)
            try:
                return self._scores(self._post(body, len(responses)), len(responses))
            except _Retry as error:
                last = str(error)
        self._fail(
            f"{last} ({self.retries + 1} attempts)",
            "check that the server runs and can be reached from here, or raise "
            "data.reward.timeout_s",
        )

    def _post(self, body: bytes, count: int) -> bytes:
        """The reply to one attempt; raises _Retry where another may help."""
        largest = _LARGEST_REPLY + _BYTES_A_SCORE * count
        connection = _Connection(self.url, time.monotonic() + self.timeout_s)
        path = urlsplit(self.url)
        target = (path.path or "/") + (f"?{path.query}" if path.query else "")
        try:
            connection.request("POST", target, body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                reply = response.read(largest + 1)
                if response.length and len(reply) <= largest:  # no error to a read with a size
                    raise http.client.IncompleteRead(reply, response.length)
        except TimeoutError:
            raise _Retry(f"no whole reply within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"{type(error).__name__}: {_short(str(error))}") from error
        finally:
            connection.close()
        status = response.status
        said = _short(reply.decode(errors="replace"))
        if status in (408, 429) or status >= 500:
            raise _Retry(f"status {status}: {said}")
        if 300 <= status < 400:
            self._fail(f"status {status}, a redirect", "give the address it leads to")
        if status != 200:
            self._fail(f"status {status}: {said}", "check the address and what the server expects")
        if len(reply) > largest:
            self._fail(
                f"a reply of more than {largest} bytes for {count} scores",
                'let the server answer {"scores": [...]} alone',
            )
        return reply

    def _scores(self, reply: bytes, count: int) -> list[float]:
        fix = 'let the server answer {"scores": [...]}, a finite number or null a response'
        try:
            values = json.loads(reply)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._fail(f"a reply without scores: {_short(reply.decode(errors='replace'))}", fix)
        if not isinstance(values, list):
            self._fail(f"scores that are no list: {_short(str(values))}", fix)
        if len(values) != count:
            self._fail(f"{len(values)} scores for {count} responses", fix)
        scores = []
        for value in values:
            number = math.nan if value is None else _as_float(value)
            if number is None:
                self._fail(f"the score {_short(repr(value))}, no finite number", fix)
            scores.append(number)
        return scores

    def _fail(self, what: str, fix: str) -> NoReturn:
        raise RewardServerError(f"reward server {self.url}: {what}; {fix}")


class _Connection(http.client.HTTPConnection):
    """A connection that ends at a deadline, however slowly bytes trickle in."""

    def __init__(self, url: str, deadline: float) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        port = parts.port or (443 if self._tls else 80)
        super().__init__(str(parts.hostname), port)
        self._deadline = deadline
        # http.client calls this to make a response of the socket.
        self.response_class = self._response  # type: ignore[assignment]

    def connect(self) -> None:
        """Connect to the first address that answers in time."""
        last: OSError = TimeoutError()
        for family, kind, protocol, _, address in socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_left(self._deadline))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:
                    context = ssl.create_default_context()
                    sock = context.wrap_socket(sock, server_hostname=self.host)
                sock.settimeout(_left(self._deadline))
            except OSError as error:
                sock.close()
                last = error
            else:
                self.sock = sock
                return
        raise last

    def send(self, data: object) -> None:
        """Send in the time that is left."""
        if self.sock is not None:
            self.sock.settimeout(_left(self._deadline))
        super().send(data)  # type: ignore[arg-type]

    def _response(self, sock: socket.socket, *args: object, **options: object) -> object:
        response = http.client.HTTPResponse(sock, *args, **options)  # type: ignore[arg-type]
        raw = response.fp.detach()
        response.fp = io.BufferedReader(_Reader(raw, sock, self._deadline))
        return response


class _Reader(io.RawIOBase):
    """Bytes of a socket, each wait bounded by the time that is left."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds until the deadline; raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0.0:
        raise TimeoutError
    return left


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character <= " " or character > "~" for character in url):
        raise ValueError(
            f"data.reward.url={url!r} is no http or https address; give one like "
            "http://127.0.0.1:8765"
        )
    if parts.username is not None:
        raise ValueError(
            "data.reward.url holds a user name or password, which are not sent; leave them out"
        )


def _as_float(value: object) -> float | None:
    """The number as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(text: str) -> str:
    """The beginning of a text of any origin, printable and on one line."""
    line = " ".join(text[: 4 * _SHOWN].split())
    shown = "".join(c if c.isprintable() else "?" for c in line[:_SHOWN])
    return shown or "nothing"
