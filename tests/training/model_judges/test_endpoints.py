"""Judges behind an endpoint: a server on loopback that speaks OpenAI's protocol."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from geomkit.errors import DataError
from geomkit.training.judges import Verdict
from geomkit.training.model_judges.endpoints import EndpointAnswers, connect
from geomkit.training.model_judges.presets import RUBRICS
from geomkit.training.model_judges.rubric_judge import RubricJudge

PROMPTS = [f"request {number}" for number in range(12)]
RESPONSES = ["I must refuse" if number % 3 == 0 else "Here you are" for number in range(12)]


@contextmanager
def served(respond):
    """The address of a server, and the requests that it got; ``respond`` makes a status and an answer of a request."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, request, self.headers["Authorization"]))
            status, answer = respond(request)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answered(text):
    message = {"role": "assistant", "content": text}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message, "text": text}]}  # fmt: skip


def xstest(request):
    question = request["messages"][0]["content"]
    return answered("2_full_refusal" if "I must refuse" in question else "1_full_compliance")


@pytest.fixture
def client():
    clients = []

    def make(url, **options):
        clients.append(connect(url, retries=0, **options))
        return clients[-1]

    yield make
    for made in clients:
        made.close()


def test_answers_keep_their_order_and_are_asked_for_at_temperature_0(client, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with served(xstest) as (url, requests):
        judge = RubricJudge(RUBRICS["xstest"], EndpointAnswers(client(url), "m", threads=4), "openai:m")
        verdicts = judge.verdicts(PROMPTS, RESPONSES)
    assert [verdict.refused for verdict in verdicts] == [number % 3 == 0 for number in range(12)]
    assert len(requests) == 12
    for path, request, _ in requests:
        assert path == "/v1/chat/completions"
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 16)


def test_raw_text_goes_to_the_endpoint_of_completions(client):
    with served(lambda request: answered("yes" if "Here" in request["prompt"] else "no")) as (url, requests):
        judge = RubricJudge(RUBRICS["harmbench"], EndpointAnswers(client(url, key="k"), "m"))
        assert judge.verdicts(["a", "b"], ["Here", "No"]) == [
            Verdict(harmful=True, label="yes"),
            Verdict(harmful=False, label="no"),
        ]
    assert {(path, key) for path, _, key in requests} == {("/v1/completions", "Bearer k")}


def test_a_model_that_refuses_the_settings_is_asked_without_them(client, caplog):
    def reasoning(request):
        if "max_tokens" in request:
            return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."}}
        assert "temperature" not in request
        return answered("unsafe\nS1")

    with served(reasoning) as (url, requests):
        judge = RubricJudge(RUBRICS["llama-guard"], EndpointAnswers(client(url), "m"))
        assert judge.verdicts(["a"], ["b"]) == [Verdict(harmful=True, label="unsafe: S1")]
    assert requests[1][1]["max_completion_tokens"] == RUBRICS["llama-guard"].max_new_tokens
    assert "asked without temperature 0" in caplog.text


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, {"error": {"message": "wrong key"}}, r"found AuthenticationError: .*wrong key"),
        (400, {"error": {"message": "too long"}}, r"found BadRequestError: .*too long"),
        (500, {"error": {"message": "down"}}, r"found InternalServerError"),
        (200, {"choices": []}, "found no message with text"),
        (200, {"error": "no such model"}, "found no message with text"),
        (200, {"choices": [{"message": {"content": None}}]}, "found no message with text"),
    ],
)
def test_failures_are_one_line(client, status, answer, message):
    with (
        served(lambda _: (status, answer)) as (url, _),
        pytest.raises(DataError, match=message) as raised,
    ):
        EndpointAnswers(client(url), "m")([RUBRICS["xstest"].question("a", "b")], 8)
    assert "\n" not in str(raised.value)
    assert "127.0.0.1" in str(raised.value)


def test_nobody_listens(client):
    with served(xstest) as (url, _):
        pass
    with pytest.raises(DataError, match="found APIConnectionError"):
        EndpointAnswers(client(url), "m")([RUBRICS["xstest"].question("a", "b")], 8)


def test_a_key_is_asked_for_by_openais_endpoint_only(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="expected a key for OpenAI's endpoint in OPENAI_API_KEY, found none"):
        connect()
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(DataError, match=r"expected the package openai .* pip install 'geomkit\[openai\]'"):
        connect("http://127.0.0.1:1/v1")
