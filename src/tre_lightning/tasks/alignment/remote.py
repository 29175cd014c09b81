"""Scores of a reward model behind HTTP, in one of three protocols.

``scores`` is ours; ``python -m tre_lightning.tasks.alignment.server`` speaks it::

    POST {"prompts": [P, ...], "responses": ["...", ...]}
    200  {"scores": [0.5, null, ...]}

``P`` is a string or a list of ``{"role": ..., "content": ...}``; null = could not be scored.

``predict`` is that of the authors of TRE, whose server puts prompt and response into the reward
model's chat template itself; a prompt is the text of its only message, the user's::

    POST /predict {"prompts": ["...", ...], "responses": ["...", ...]}
    200           {"rewards": [0.5, ...]}

``openrlhf`` is that of OpenRLHF's remote reward (``--reward.remote_url``), whose servers read
``query``: the prompt as the policy reads it, the response, and the end token, which here stands
behind a response that was cut off, too. Labels are empty::

    POST /get_reward {"query": ["...", ...], "prompts": ["...", ...], "labels": ["", ...]}
    200              {"rewards": [0.5, ...], ...}

In all of them there is one finite number a response, in order. Everything else is an error and
never a score. The environment's proxies are not used.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from tre_lightning.common.errors import RunError
from tre_lightning.common.validation import at_least, one_of, positive
from tre_lightning.policy.chat import ChatPrompt, as_messages
from tre_lightning.tasks.alignment.scorer import check_equal_numbers

_LARGEST_REPLY = 65536  # bytes, and these for every score besides:
_BYTES_A_SCORE = 64  # of one list of numbers
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
_SHOWN = 200  # characters of an error reply that the message repeats


Protocol = Literal["scores", "predict", "openrlhf"]


@dataclass(frozen=True)
class _Spoken:
    """A protocol: where to post, the request, and the list of numbers in the reply.

    ``path`` is that of an address without one; ``lists`` are the lists of numbers that a reply may
    hold beside other things.
    """

    path: str
    request: Callable[[Sequence[ChatPrompt], Sequence[str]], dict[str, Any]]
    reply: str
    lists: int
    null: bool  # whether null = could not be scored

    @property
    def expected(self) -> str:
        """What a server should answer, for error messages."""
        what = "a finite number or null" if self.null else "a finite number"
        return f'let the server answer {{"{self.reply}": [...]}}, {what} a response'


def only_message(prompt: ChatPrompt) -> str:
    """The text of a prompt that is one message of the user.

    Raises:
        ValueError: for another prompt.
    """
    messages = as_messages(prompt)
    if [message["role"] for message in messages] != ["user"]:
        roles = " ".join(message["role"] for message in messages)
        raise ValueError(
            "data.reward.protocol=predict sends a prompt as the text of one message of the user, "
            f"and this one has messages of the roles {roles[:80]}; use scores, or other prompts"
        )
    return messages[0]["content"]


def _as_scores(prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> dict[str, Any]:
    plain = [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
    return {"prompts": plain, "responses": list(responses)}


def _as_predict(prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> dict[str, Any]:
    return {"prompts": [*map(only_message, prompts)], "responses": list(responses)}


def _as_openrlhf(prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> dict[str, Any]:
    texts = [str(prompt) for prompt in prompts]
    query = [prompt + response for prompt, response in zip(texts, responses, strict=True)]
    return {"query": query, "prompts": texts, "labels": [""] * len(texts)}


_PROTOCOLS: dict[Protocol, _Spoken] = {
    "scores": _Spoken("", _as_scores, "scores", 1, null=True),
    "predict": _Spoken("/predict", _as_predict, "rewards", 1, null=False),
    "openrlhf": _Spoken("/get_reward", _as_openrlhf, "rewards", 8, null=False),
}


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
        protocol: Protocol = "scores",
    ) -> None:
        """Check the options; no connection is made yet.

        A request takes at most ``(retries + 1) * (timeout_s + backoff_s)`` seconds, the look-up of
        the server's name excepted.

        Args:
            url: where to post, http or https; redirects are not followed. Where it has no path, it
                gets that of the protocol.
            timeout_s: longest time of an attempt from connecting to the last byte, seconds.
            retries: further attempts after a connection error or the status 408, 429 or 5xx.
            batch_size: responses a request.
            backoff_s: pause before a further attempt, seconds.
            protocol: what the server speaks.

        Raises:
            ValueError: for an address or option that cannot work.
        """
        one_of("data.reward.protocol", protocol, get_args(Protocol))
        _check_url(url)
        positive("data.reward.timeout_s", timeout_s)
        at_least("data.reward.retries", retries, 0)
        at_least("data.reward.batch_size", batch_size, 1)
        if not backoff_s >= 0.0:
            raise ValueError(f"data.reward.backoff_s={backoff_s} must be 0 or more")
        self.protocol = protocol
        self._spoken = _PROTOCOLS[protocol]
        parts = urlsplit(url)
        bare = parts.path in ("", "/") and not (parts.query or parts.fragment)
        self.url = url.rstrip("/") + self._spoken.path if bare and self._spoken.path else url
        self.timeout_s = timeout_s
        self.retries = retries
        self.batch_size = batch_size
        self.backoff_s = backoff_s

    def score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        """A score of each response to the prompt at its place; NaN = could not be scored.

        ``openrlhf`` takes prompts as the policy reads them, and responses with the end token.

        Raises:
            ValueError: for unequal numbers of prompts and responses, or a prompt that the protocol
                cannot send.
            RewardServerError: if the server gives no valid scores.
        """
        check_equal_numbers(prompts, responses)
        with start_blocking_portal() as portal:  # a notebook has a running event loop of its own
            return portal.call(self._score, prompts, responses)

    async def _score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        scores: list[float] = []
        # No time-outs of single reads: a deadline bounds the attempt.
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
            for start in range(0, len(responses), self.batch_size):
                rows = slice(start, start + self.batch_size)
                scores += await self._request(client, prompts[rows], responses[rows])
        return scores

    async def _request(
        self, client: httpx2.AsyncClient, prompts: Sequence[ChatPrompt], responses: Sequence[str]
    ) -> list[float]:
        body = json.dumps(self._spoken.request(prompts, responses)).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                await anyio.sleep(self.backoff_s)
            try:
                reply = await self._post(client, body, len(responses))
                return self._scores(reply, len(responses))
            except _Retry as error:
                last = str(error)
        self._fail(
            f"{last} ({self.retries + 1} attempts)",
            "check that the server runs and can be reached from here, or raise "
            "data.reward.timeout_s",
        )

    async def _post(self, client: httpx2.AsyncClient, body: bytes, count: int) -> bytes:
        """The reply to one attempt; raises _Retry where another may help."""
        largest = _LARGEST_REPLY + _BYTES_A_SCORE * self._spoken.lists * count
        post = client.stream("POST", self.url, content=body, headers=_HEADERS)
        reply = b""
        try:
            with anyio.fail_after(self.timeout_s):
                async with post as response:
                    async for chunk in response.aiter_raw():
                        reply += chunk
                        if len(reply) > largest:
                            break
        except TimeoutError:
            raise _Retry(f"no whole reply within {self.timeout_s:g} s") from None
        except httpx2.TransportError as error:
            cause = _innermost(error)
            raise _Retry(f"{type(cause).__name__}: {_short(str(cause))}") from error
        status = response.status_code
        said = _short(reply.decode(errors="replace"))
        if status in (408, 429) or status >= 500:
            raise _Retry(f"status {status}: {said}")
        if 300 <= status < 400:
            self._fail(f"status {status}, a redirect", "give the address it leads to")
        if status != 200:
            fix = "lower data.reward.batch_size, or" if status == 413 else "check the address and"
            self._fail(f"status {status}: {said}", f"{fix} see what the server expects")
        if len(reply) > largest:
            self._fail(
                f"a reply of more than {largest} bytes for {count} scores",
                f'let the server answer {{"{self._spoken.reply}": [...]}} alone',
            )
        return reply

    def _scores(self, reply: bytes, count: int) -> list[float]:
        fix, name = self._spoken.expected, self._spoken.reply
        try:
            values = json.loads(reply)[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._fail(f"a reply without {name}: {_short(reply.decode(errors='replace'))}", fix)
        if not isinstance(values, list):
            self._fail(f"{name} that are no list: {_short(str(values))}", fix)
        if len(values) != count:
            self._fail(f"{len(values)} {name} for {count} responses", fix)
        scores = []
        for value in values:
            number = math.nan if value is None and self._spoken.null else _as_float(value)
            if number is None:
                said = f"the {name.removesuffix('s')} {_short(repr(value))}, no finite number"
                self._fail(said, fix)
            scores.append(number)
        return scores

    def _fail(self, what: str, fix: str) -> NoReturn:
        raise RewardServerError(f"reward server {self.url}: {what}; {fix}")


def _innermost(error: BaseException) -> BaseException:
    """What a chain of errors began with; of several addresses, at the first one."""
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    inner = error.__cause__ or error.__context__ or next(iter(parts), None)
    return _innermost(inner) if inner else error


def _check_url(url: str) -> None:
    try:
        httpx2.URL(url)  # has rules of its own
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx2.InvalidURL):
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
