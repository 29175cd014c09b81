"""Scores over HTTP: the real server, and servers that misbehave."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from reward_servers import rewarding
from tre_lightning.policy.chat import ChatPrompt
from tre_lightning.tasks.alignment import server as reward_server
from tre_lightning.tasks.alignment.remote import RemoteScorer, RewardServerError
from tre_lightning.tasks.alignment.scorer import RewardModelScorer
from tre_lightning.tasks.alignment.server import main

PROMPTS: list[ChatPrompt] = [
    "w1 w2",
    [{"role": "user", "content": "w3"}],
    "\n\nHuman: w4\n\nAssistant: w5\n\nHuman: w6\n\nAssistant:",
    "w1 w2",
    "w7",
]
RESPONSES = ["w8", "w9 w10", "", "\ud800 <pad> \N{SNOWMAN}", "w11 w12 w13 w14 w15 w16"]


@pytest.fixture(scope="module")
def reward_dir(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random reward model of one layer."""
    directory = tmp_path_factory.mktemp("reward")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# ----- servers


class Scripted(ThreadingHTTPServer):
    """Answers the requests one after the other by a script; the last answer repeats."""

    def __init__(self, script: Sequence[Callable[[BaseHTTPRequestHandler, Any], None]]) -> None:
        super().__init__(("127.0.0.1", 0), Scribe)
        self.script = list(script)
        self.requests: list[Any] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Scribe(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        number = min(len(self.server.requests), len(self.server.script)) - 1
        with suppress(OSError):  # the client may have hung up
            self.server.script[number](self, body)

    def do_GET(self) -> None:
        self.server.requests.append("GET")
        send(self, 200, b'{"scores": [0.0]}')

    def log_message(self, *args: object) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def answer(status: int, body: bytes = b"", **headers: str) -> Callable[..., None]:
    return lambda handler, request: send(handler, status, body, **headers)


def lengths(handler: BaseHTTPRequestHandler, request: Any) -> None:
    """The right answer: the length of each response."""
    scores = [len(response) for response in request["responses"]]
    send(handler, 200, json.dumps({"scores": scores}).encode())


def hang(handler: BaseHTTPRequestHandler, request: Any) -> None:
    handler.server.released.wait(30)  # type: ignore[attr-defined]


def dripping(start: bytes) -> Callable[..., None]:
    """A reply of seconds, each byte well within the time-out of a single read."""

    def drip(handler: BaseHTTPRequestHandler, request: Any) -> None:
        handler.wfile.write(start)
        for _ in range(500):
            if handler.server.released.wait(0.02):  # type: ignore[attr-defined]
                break
            handler.wfile.write(b"1")

    return drip


DRIPPING_HEADER = dripping(b"HTTP/1.0 200 OK\r\nX: ")
DRIPPING_BODY = dripping(b'HTTP/1.0 200 OK\r\n\r\n{"scores": [1')


def cut_off(handler: BaseHTTPRequestHandler, request: Any) -> None:
    send(handler, 200, b'{"scores": [1', Content_Length="1000")


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        if isinstance(server, Scripted):
            server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def scripted(*script: Callable[..., None]) -> Iterator[Scripted]:
    server = Scripted(script)
    with serving(server):
        yield server


def impatient(url: str, retries: int = 2) -> RemoteScorer:
    return RemoteScorer(url, timeout_s=0.25, retries=retries, backoff_s=0.01)


def failure(scorer: RemoteScorer, rows: int = 2) -> str:
    """The message of the error with which scoring ends."""
    with pytest.raises(RewardServerError) as caught:
        scorer.score(["p"] * rows, ["r"] * rows)
    message = str(caught.value)
    assert scorer.url in message and "\n" not in message and len(message) < 600
    return message


# ----- what goes well


def test_the_server_gives_the_scores_of_the_model_in_this_process(reward_dir: Path) -> None:
    local = RewardModelScorer(str(reward_dir))
    expected = local.score(PROMPTS, RESPONSES)
    assert len(set(expected)) == 5
    with rewarding(local) as url:
        for batch_size in (64, 2):
            scores = RemoteScorer(url, batch_size=batch_size).score(PROMPTS, RESPONSES)
            # Other batches are other matrix products.
            assert scores == pytest.approx(expected, rel=1e-5)
        assert RemoteScorer(url).score(PROMPTS, RESPONSES) == expected
        assert RemoteScorer(url).score([], []) == []


def test_null_is_a_response_that_could_not_be_scored(reward_dir: Path) -> None:
    local = RewardModelScorer(str(reward_dir), max_length=8)
    with rewarding(local) as url:
        short, long = RemoteScorer(url).score(["w1", "w1"], ["w2", "w2 " * 9])
    assert math.isfinite(short) and math.isnan(long)


def test_rows_are_cut_into_requests_in_order() -> None:
    with scripted(lengths) as server:
        prompts = [f"p{i}" for i in range(5)]
        scores = RemoteScorer(server.url, batch_size=2).score(prompts, ["", "a", "bb", "ccc", "d"])
    assert scores == [0.0, 1.0, 2.0, 3.0, 1.0]
    assert [request["prompts"] for request in server.requests] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4"],
    ]


def test_path_and_query_are_kept() -> None:
    paths = []

    def note(handler: BaseHTTPRequestHandler, request: Any) -> None:
        paths.append(handler.path)
        lengths(handler, request)

    with scripted(note) as server:
        RemoteScorer(server.url + "/v1/score?model=a").score(["p"], ["r"])
    assert paths == ["/v1/score?model=a"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_tried_again(status: int) -> None:
    with scripted(answer(status), answer(status), lengths) as server:
        assert RemoteScorer(server.url, backoff_s=0.01).score(["p"], ["rrr"]) == [3.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize("failing", [hang, DRIPPING_HEADER, DRIPPING_BODY, cut_off])
def test_a_passing_break_of_the_connection_is_tried_again(failing: Callable[..., None]) -> None:
    with scripted(failing, lengths) as server:
        assert impatient(server.url).score(["p"], ["rrr"]) == [3.0]
    assert len(server.requests) == 2


# ----- other protocols


def authors_server(scorer: RewardModelScorer) -> Callable[..., None]:
    """As the authors of TRE serve: prompts and responses as texts, a list of numbers back."""

    def reply(handler: BaseHTTPRequestHandler, request: Any) -> None:
        assert handler.path == "/predict" and {*request} == {"prompts", "responses"}
        messages: list[ChatPrompt] = [
            [{"role": "user", "content": prompt}] for prompt in request["prompts"]
        ]
        rewards = scorer.score(messages, request["responses"])
        send(handler, 200, json.dumps({"rewards": rewards}).encode())

    return reply


def openrlhf_server(scorer: RewardModelScorer) -> Callable[..., None]:
    """As OpenRLHF serves: whole texts, tokenized without anything around them."""

    def reply(handler: BaseHTTPRequestHandler, request: Any) -> None:
        assert handler.path == "/get_reward" and {*request} == {"query", "prompts", "labels"}
        rewards = []
        for text in request["query"]:
            ids = torch.tensor([scorer.tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                rewards.append(scorer.model(input_ids=ids).logits.item())
        more = {"scores": rewards, "extra_logs": {"dummy_scores": rewards}}
        send(handler, 200, json.dumps({"rewards": rewards, **more}).encode())

    return reply


def test_the_authors_server_gives_the_scores_of_its_model(reward_dir: Path) -> None:
    local = RewardModelScorer(str(reward_dir))
    prompts: list[ChatPrompt] = ["w1 w2", [{"role": "user", "content": "w3"}], "w7"]
    responses = ["w8", "w9 w10", ""]
    with scripted(authors_server(local)) as server:
        remote = RemoteScorer(server.url, batch_size=2, protocol="predict")
        assert remote.score(prompts, responses) == pytest.approx(
            local.score(prompts, responses), rel=1e-5
        )
    assert [len(request["prompts"]) for request in server.requests] == [2, 1]


def test_openrlhfs_server_gives_the_scores_of_its_model(reward_dir: Path) -> None:
    local = RewardModelScorer(str(reward_dir))
    end = local.tokenizer.eos_token
    texts: list[ChatPrompt] = ["\n\nHuman: w1 w2\n\nAssistant:", "\n\nHuman: w3\n\nAssistant:"]
    with scripted(openrlhf_server(local)) as server:
        remote = RemoteScorer(server.url, protocol="openrlhf")
        found = remote.score(texts, [f" w8 {end}", f" w9 w10 {end}"])
    assert found == pytest.approx(local.score(["w1 w2", "w3"], ["w8", "w9 w10"]), rel=1e-5)


@pytest.mark.parametrize("protocol", ["predict", "openrlhf"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"rewards": [1.0]}', "1 rewards for 2 responses"),
        (b'{"rewards": [1.0, NaN]}', "the reward nan, no finite number"),
        (b'{"rewards": [1.0, null]}', "the reward None, no finite number"),
        (b'{"rewards": [1.0, "2.0"]}', "the reward '2.0', no finite number"),
        (b'{"rewards": [[1.0], [2.0]]}', "the reward [1.0], no finite number"),
        (b'{"rewards": 1.0}', "rewards that are no list: 1.0"),
        (b'{"scores": [1.0, 2.0]}', "a reply without rewards"),
        (b"Internal Server Error", "a reply without rewards: Internal Server Error"),
    ],
)
def test_a_bad_reply_of_another_protocol_fails_at_once(
    protocol: Any, body: bytes, said: str
) -> None:
    with scripted(answer(200, body)) as server:
        message = failure(RemoteScorer(server.url, retries=2, protocol=protocol))
    assert said in message and 'let the server answer {"rewards": [...]}' in message
    assert "or null" not in message and len(server.requests) == 1


@pytest.mark.parametrize("failing", [answer(500, b"CUDA out of memory"), hang])
def test_another_protocol_is_as_patient(failing: Callable[..., None]) -> None:
    with scripted(failing) as server:
        options = {"timeout_s": 0.25, "retries": 2, "backoff_s": 0.01}
        message = failure(RemoteScorer(server.url, protocol="predict", **options))  # type: ignore[arg-type]
    assert "(3 attempts)" in message and len(server.requests) == 3


@pytest.mark.parametrize(
    ("protocol", "given", "asked"),
    [
        ("scores", "", "/"),
        ("predict", "/", "/predict"),
        ("predict", "/v2/predict", "/v2/predict"),
        ("openrlhf", "", "/get_reward"),
        ("openrlhf", "/rm?key=1", "/rm?key=1"),
    ],
)
def test_an_address_without_a_path_gets_that_of_the_protocol(
    protocol: Any, given: str, asked: str
) -> None:
    paths = []

    def note(handler: BaseHTTPRequestHandler, request: Any) -> None:
        paths.append(handler.path)
        send(handler, 200, b'{"scores": [1.0], "rewards": [1.0]}')

    with scripted(note) as server:
        scorer = RemoteScorer(server.url + given, protocol=protocol)
        assert scorer.score(["p"], ["r"]) == [1.0]
    assert paths == [asked]


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.reward\.protocol=trl must be one of the words"):
        RemoteScorer("http://host", protocol="trl")  # type: ignore[arg-type]


# ----- what goes wrong


def test_a_refusing_server_is_an_error_and_no_score() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = failure(impatient(f"http://127.0.0.1:{port}"))
    assert "ConnectionRefusedError" in message and "3 attempts" in message
    assert "check that the server runs" in message


def test_an_unknown_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    message = failure(impatient("http://nowhere.invalid"))
    assert "Name or service not known (3 attempts)" in message


@pytest.mark.parametrize("hanging", [hang, DRIPPING_HEADER, DRIPPING_BODY])
def test_a_hanging_server_is_an_error_in_bounded_time(hanging: Callable[..., None]) -> None:
    with scripted(hanging) as server:
        assert "no whole reply within 0.25 s (3 attempts)" in failure(impatient(server.url))
    assert len(server.requests) == 3


def test_a_server_that_never_accepts_is_an_error_in_bounded_time() -> None:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=1)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert "(3 attempts)" in failure(impatient(url))


def test_a_failing_server_is_an_error_with_its_words() -> None:
    with scripted(answer(500, b'{"error": "out of\n memory"}')) as server:
        message = failure(impatient(server.url))
    assert 'status 500: {"error": "out of memory"} (3 attempts)' in message
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [201, 400, 401, 404, 413])
def test_another_status_fails_at_once(status: int) -> None:
    with scripted(answer(status, b'{"scores": [1.0, 1.0]}'), lengths) as server:
        assert f"status {status}" in failure(impatient(server.url))
    assert len(server.requests) == 1


def test_a_request_that_is_too_large_names_the_option() -> None:
    with scripted(answer(413, b"Too Large")) as server:
        message = failure(impatient(server.url))
    assert "status 413: Too Large; lower data.reward.batch_size" in message


def test_redirects_are_not_followed() -> None:
    with scripted(lengths) as other, scripted(answer(302, Location=other.url)) as server:
        assert "redirect" in failure(impatient(server.url))
    assert len(server.requests) == 1 and not other.requests


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"scores": [1.0]}', "1 scores for 2 responses"),
        (b'{"scores": [1.0, 2.0, 3.0]}', "3 scores for 2 responses"),
        (b'{"scores": []}', "0 scores for 2 responses"),
        (b'{"scores": [1.0, NaN]}', "the score nan"),
        (b'{"scores": [Infinity, 1.0]}', "the score inf"),
        (b'{"scores": [1.0, -Infinity]}', "the score -inf"),
        (b'{"scores": [1.0, 1e999]}', "the score inf"),
        (b'{"scores": [1.0, ' + b"9" * 400 + b"]}", "no finite number"),
        (b'{"scores": [1.0, ' + b"9" * 5000 + b"]}", "without scores"),
        (b'{"scores": [1.0, "2.0"]}', "the score '2.0'"),
        (b'{"scores": [1.0, true]}', "the score True"),
        (b'{"scores": [1.0, [2.0]]}', "the score [2.0]"),
        (b'{"scores": {"0": 1.0, "1": 2.0}}', "no list"),
        (b'{"scores": null}', "no list"),
        (b'{"rewards": [1.0, 2.0]}', "without scores"),
        (b"[1.0, 2.0]", "without scores"),
        (b"1.0", "without scores"),
        (b"<html>\x00\xff</html>", "without scores"),
        (b"", "without scores: nothing"),
        (b"[" * 60_000, "without scores"),
    ],
)
def test_a_reply_that_is_no_scores_fails_at_once(body: bytes, said: str) -> None:
    with scripted(answer(200, body)) as server:
        message = failure(impatient(server.url))
    assert said in message and message.isprintable()
    assert len(server.requests) == 1


def test_a_huge_reply_is_not_read() -> None:
    sent = 0

    def flood(handler: BaseHTTPRequestHandler, request: Any) -> None:
        nonlocal sent
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while sent < 2**30:
            sent += handler.wfile.write(b" " * 65536)

    with scripted(flood) as server:
        assert "more than 65664 bytes for 2 scores" in failure(impatient(server.url))
    assert sent < 2**26  # what fits into the system's buffers
    assert len(server.requests) == 1


def test_https_is_spoken() -> None:
    with scripted(lengths) as server:
        message = failure(impatient(server.url.replace("http:", "https:")))
    assert "SSL" in message
    assert not server.requests


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/", "file:///etc/hosts", "host:8765", "", "http://", "http://host:99999"),
        *("http://host:port", "http://host/a b", "http://host/\r\nX: y", "http://h\N{SNOWMAN}st"),
        *("http://[::1", "http://host/" + "a" * 70_000),
    ],
)
def test_only_addresses_of_http_are_taken(url: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.url=.* is no http or https address"):
        RemoteScorer(url)


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="user name or password") as caught:
        RemoteScorer("http://user:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("timeout_s", 0.0), ("timeout_s", math.nan), ("retries", -1)),
        *(("batch_size", 0), ("backoff_s", -1.0)),
    ],
)
def test_options_that_cannot_work_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^data\.reward\.{option}="):
        RemoteScorer("http://host", **{option: value})  # type: ignore[arg-type]


def test_unequal_numbers_are_refused_before_any_request() -> None:
    with scripted(lengths) as server, pytest.raises(ValueError, match="2 prompts and 1 responses"):
        RemoteScorer(server.url).score(["p", "p"], ["r"])
    assert not server.requests


# ----- the server's side


class Sums:
    """Scores by length; says how many are at work at once."""

    def __init__(self) -> None:
        self.at_work = self.most = 0

    def score(self, prompts: Sequence[ChatPrompt], responses: Sequence[str]) -> list[float]:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        time.sleep(0.02)
        self.at_work -= 1
        if responses[0] == "fail":
            raise RuntimeError("out\nof memory")
        return [math.inf if r == "inf" else float(len(r)) for r in responses]


@pytest.fixture(scope="module")
def scorer() -> Sums:
    return Sums()


@pytest.fixture(scope="module")
def sums(scorer: Sums) -> Iterator[str]:
    """Address of a server of a scorer by length."""
    with rewarding(scorer, largest_request=10_000) as url:
        yield url


def ask(
    url: str, body: bytes = b"", method: str = "POST", path: str = "/", **headers: str
) -> tuple[int, Any]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    with closing(connection):
        connection.putrequest(method, path)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        response = connection.getresponse()
        reply = response.read()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(reply) if is_json else reply.decode()


def test_health(sums: str) -> None:
    assert ask(sums, method="GET", path="/health") == (200, {"status": "ok"})


def test_requests_at_once_are_scored_one_by_one(sums: str, scorer: Sums) -> None:
    with ThreadPoolExecutor(6) as pool:
        replies = pool.map(lambda n: RemoteScorer(sums).score(["p"], ["r" * n]), range(6))
        assert list(replies) == [[float(n)] for n in range(6)]
    assert scorer.most == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 9_000, "not JSON"),
        (b"[]", "is not {"),
        (b'{"prompts": ["p"]}', "is not {"),
        (b'{"prompts": "p", "responses": "r"}', "is not {"),
        (b'{"prompts": ["p"], "responses": []}', "1 prompts and 0 responses"),
        (b'{"prompts": ["p"], "responses": [1]}', "something else than strings"),
        (b'{"prompts": [1], "responses": ["r"]}', "neither text nor messages"),
        (b'{"prompts": [[]], "responses": ["r"]}', "neither text nor messages"),
        (b'{"prompts": [[{"role": "user"}]], "responses": ["r"]}', "neither text nor messages"),
    ],
)
def test_a_bad_request_is_told_so(sums: str, body: bytes, said: str) -> None:
    status, reply = ask(sums, body)
    assert status == 400 and said in reply["error"]


def test_sizes_are_bounded(sums: str) -> None:
    assert ask(sums, Content_Length="10001") == (413, "Content Too Large")
    chunk = b"%x\r\n" % 9_999 + b" " * 9_999 + b"\r\n"
    status, _ = ask(sums, 2 * chunk + b"0\r\n\r\n", Transfer_Encoding="chunked")
    assert status == 413
    for length in ("", "-1", "x", "9" * 5000, "\N{SUPERSCRIPT TWO}"):
        assert ask(sums, Content_Length=length)[0] == 400, length[:20]


def test_unknown_paths(sums: str) -> None:
    for method, path in (("POST", "/score"), ("GET", "/"), ("GET", "/../etc/hosts")):
        status, reply = ask(sums, method=method, path=path)
        assert status == 404 and "GET /health or POST /" in reply["error"]


def test_a_failure_of_the_model_is_told_and_survived(sums: str) -> None:
    message = failure_of(lambda: impatient(sums, retries=0).score(["p"], ["fail"]))
    assert "status 500" in message and "RuntimeError: out; of memory" in message
    assert RemoteScorer(sums).score(["p"], ["rr"]) == [2.0]


def failure_of(call: Callable[[], object]) -> str:
    with pytest.raises(RewardServerError) as caught:
        call()
    return str(caught.value)


def test_scores_that_are_not_finite_are_null(sums: str) -> None:
    body = b'{"prompts": ["p", "p"], "responses": ["rr", "inf"]}'
    assert ask(sums, body) == (200, {"scores": [2.0, None]})


def test_the_command_serves_until_it_is_told_to_stop(reward_dir: Path) -> None:
    command = [sys.executable, "-m", "tre_lightning.tasks.alignment.server"]
    command += ["--model", str(reward_dir), "--port", "0", "--device", "cpu"]
    child = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline().strip()
        assert line.startswith(f"serving {reward_dir} on http://127.0.0.1:")
        scores = RemoteScorer(line.split()[-1]).score(PROMPTS, RESPONSES)
        local = RewardModelScorer(str(reward_dir)).score(PROMPTS, RESPONSES)
        assert scores == pytest.approx(local, rel=1e-5)
        child.send_signal(signal.SIGTERM)
        printed, errors = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, errors
    assert printed == "" and "Traceback" not in errors


def test_mistakes_of_the_command_are_one_line(
    reward_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["--model", str(tmp_path)], "--model="),
            (["--model", str(reward_dir), "--port", port], "cannot be listened on"),
            (["--model", str(reward_dir), "--port", "99999"], "cannot be listened on"),
        ):
            assert said in mistake(flags, capsys)


def mistake(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses the flags."""
    with pytest.raises(SystemExit) as caught:
        main(flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1
    return message


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = reward_server.find_spec
    monkeypatch.setattr(
        reward_server, "find_spec", lambda name: None if name == missing else found(name)
    )
    assert "pip install 'tre-lightning[serve]'" in mistake(["--model", "no"], capsys)


def test_scores_are_asked_for_where_an_event_loop_runs() -> None:
    async def in_a_notebook() -> list[float]:
        return RemoteScorer(url).score(["p"], ["rr"])

    with rewarding(Sums()) as url:
        assert asyncio.run(in_a_notebook()) == [2.0]
