"""A router with one fault, and which scenario of the protocol tests must see it."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
from pdkit.faults.messages import without

NEVER = 1e9


@dataclass(frozen=True)
class Breakage:
    """What a router does wrong.

    request         of (path, JSON body): the body that the servers get
    answer          of (path, status, JSON body): the status and the body that the client gets
    event           of (path, JSON event of a stream): the events that the client gets
    at_most         more requests at a time are answered with 503
    swaps           answers to different requests, of one path and status, that are ready at a time, change places
    reads_on        goes on reading a stream whose client has left
    loses_one_in    every so many requests one gets 502
    forgets_after   the first request after so many idle seconds gets 502
    answers         paths that it answers itself, with 200
    """

    request: object = lambda path, body: body
    answer: object = lambda path, status, body: (status, body)
    event: object = lambda path, event: [event]
    at_most: int = int(NEVER)
    swaps: bool = False
    reads_on: bool = False
    loses_one_in: int = int(NEVER)
    forgets_after: float = NEVER
    answers: tuple[str, ...] = ()


def _of_choices(change):
    """An answer hook that changes each choice of a body."""

    def answer(path, status, body):
        for choice in body.get("choices", ()):
            change(choice)
        return status, body

    return answer


def _without(*names):
    return lambda path, body: without(body, names)


def _longer(path, body):
    return body | {"max_tokens": body["max_tokens"] + 1} if body.get("max_tokens") else body


def _hot(path, body):
    return body | {"temperature": 20.0} if "temperature" in body else body


def _ignoring_eos(path, body):
    if "input_ids" in body:
        body["sampling_params"]["ignore_eos"] = True
    return body


def _with_a_prompt(path, body):
    return body if body.get("prompt") and body["prompt"] != [""] else body | {"prompt": "1"}


def _as_much_as_fits(path, body):
    return body | {"max_tokens": 4} if body.get("max_tokens", 0) > 1000 else body


def _with_a_cache_of_its_own(path, body):
    return body | {"extra_key": str(time.monotonic_ns())}


def _one_more_token(path, status, body):
    if body.get("usage"):
        body["usage"]["completion_tokens"] += 1
    return status, body


def _without_input_logprobs(path, status, body):
    if "meta_info" in body:
        body["meta_info"]["input_token_logprobs"] = []
    return status, body


def _with_another_logprob(path, status, body):
    if said := body.get("meta_info", {}).get("output_token_logprobs"):
        said[-1][0] -= 1e-3
    return status, body


def _choices_turned(path, status, body):
    turned = body.get("choices", [])[::-1]
    return status, body | {"choices": [choice | {"index": index} for index, choice in enumerate(turned)]}


def _silently(path, status, body):
    return (200, {"choices": []}) if status >= 400 else (status, body)


def _as_server_errors(path, status, body):
    return (500 if 400 <= status < 500 else status), body


def _without_the_last_text(path, event):
    reasons = [choice.get("finish_reason") for choice in event.get("choices", ())]
    if any(reasons) and "text" in event["choices"][0]:
        event["choices"][0]["text"] = ""
    return [event]


def _ending_twice(path, event):
    ending = [choice | {"text": ""} for choice in event.get("choices", ()) if choice.get("finish_reason")]
    return [event, event | {"choices": ending}] if ending else [event]


def _with_ids_of_its_own(path, event):
    return [event | {"id": "cmpl-1"}]


# Scenario, fault, what the failure says.
BREAKAGES = (
    ("test_streamed_equals_whole", Breakage(event=_without_the_last_text), "!="),
    ("test_streamed_equals_whole", Breakage(event=_ending_twice), "a stream ends once"),
    (
        "test_chat_equals_completion_of_its_template",
        Breakage(answer=_of_choices(lambda choice: "message" in choice and choice["message"].update(content="no"))),
        "'no' !=",
    ),
    ("test_usage_counts", Breakage(answer=_one_more_token), "!="),
    ("test_stop_strings", Breakage(request=_without("stop")), "stop .* in"),
    ("test_stop_tokens", Breakage(request=_without("stop_token_ids")), "stop"),
    ("test_first_token_is_the_last", Breakage(request=_longer), "max_tokens"),
    ("test_first_token_is_the_end_of_text", Breakage(request=_ignoring_eos), "length"),
    (
        "test_logprobs_of_completions_and_chat",
        Breakage(answer=_of_choices(lambda choice: choice.get("logprobs") and choice["logprobs"]["tokens"].pop())),
        r"\[11, 12, 12\]",
    ),
    ("test_input_logprobs_are_merged", Breakage(answer=_without_input_logprobs), r"\(0, 6\)"),
    ("test_several_samples", Breakage(request=_without("n")), r"\[0\] != \[0, 1, 2\]"),
    ("test_batch_of_mixed_lengths", Breakage(answer=_choices_turned), "!="),
    ("test_json_schema", Breakage(request=_without("response_format")), "BadRequestError not raised"),
    ("test_greedy_is_deterministic", Breakage(request=_hot), "!="),
    ("test_too_long", Breakage(request=_as_much_as_fits), "200 not found"),
    ("test_malformed_bodies", Breakage(answer=_as_server_errors), "500 not found"),
    ("test_empty_prompt", Breakage(request=_with_a_prompt), "200 not found"),
    ("test_empty_prompt", Breakage(answer=_silently), "200 not found"),
    ("test_empty_text", Breakage(answer=_as_server_errors), "500 not found"),
    ("test_stream_that_is_left", Breakage(reads_on=True), "decode still holds a request"),
    ("test_abort_by_id", Breakage(event=_with_ids_of_its_own), "not aborted"),
    ("test_whole_answer_that_is_not_waited_for", Breakage(), "still holds a request"),
    ("test_32_at_once", Breakage(swaps=True), "!="),
    ("test_32_at_once", Breakage(answer=_with_another_logprob), "logprobs of"),
    ("test_128_at_once", Breakage(at_most=64), "503"),
    ("test_one_prefix_from_many_clients", Breakage(request=_with_a_cache_of_its_own), "shared prefix again"),
    ("test_sustained_load", Breakage(loses_one_in=10), "502"),
    ("test_sustained_load", Breakage(swaps=True), "!="),
    ("test_first_request_after_idle", Breakage(forgets_after=1.0), "502"),
    ("test_flush_cache_while_serving", Breakage(answers=("/flush_cache",)), "was not flushed"),
    ("test_health_and_readiness", Breakage(), "says that it is ready"),
)


class BrokenRouter(ThreadingHTTPServer):
    """In front of the load balancer at `target`, broken by `breakage`; serves within `with`."""

    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def __init__(self, target, breakage):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.breakage = target, breakage
        self.lock, self.seen, self.in_flight, self.last = threading.Lock(), 0, 0, time.monotonic()
        self.waiting, self.closed = [], False
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def handle_error(self, request, client_address):
        """Clients that left and servers that do not answer are what tests are about: nothing to print."""

    def __exit__(self, *_):
        self.closed = True
        self.shutdown()
        self.server_close()
        self._thread.join()

    def enter(self):
        """The status of a request that is not let in, or None."""
        with self.lock:
            self.seen += 1
            self.in_flight += 1
            idle, self.last = time.monotonic() - self.last, time.monotonic()
            if self.in_flight > self.breakage.at_most:
                return 503
            return 502 if idle > self.breakage.forgets_after or self.seen % self.breakage.loses_one_in == 0 else None

    def leave(self):
        with self.lock:
            self.in_flight -= 1
            self.last = time.monotonic()

    def swap(self, kind, request, answer):
        """The answer to another request of that kind that is ready at about the same time, where there is one."""
        mine = {"kind": kind, "request": request, "answer": answer, "met": threading.Event()}
        with self.lock:
            if self.in_flight == 1:  # there is no other to wait for
                return answer
            others = (each for each in self.waiting if each["kind"] == kind and each["request"] != request)
            other = next(others, None)
            self.waiting.remove(other) if other else self.waiting.append(mine)
        if other:
            answer, other["answer"] = other["answer"], answer
            other["met"].set()
            return answer
        if not mine["met"].wait(1):
            with self.lock:
                if mine in self.waiting:
                    self.waiting.remove(mine)
        return mine["answer"]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send(200, b"")

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path in self.server.breakage.answers:
            return self._send(200, b"")
        refused = self.server.enter()
        try:
            if refused:
                return self._send(refused, b'{"error": "no server"}')
            self._forward(data)
        finally:
            self.server.leave()

    def _forward(self, data):
        breakage = self.server.breakage
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            data = json.dumps(breakage.request(self.path, json.loads(data))).encode()
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        url = f"{self.server.target}{self.path}"
        with requests.post(url, data=data, headers=headers, stream=True, timeout=120) as response:
            if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                return self._stream(response)
            status, content = response.status_code, response.content
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            status, body = breakage.answer(self.path, status, json.loads(content))
            content = json.dumps(body).encode()
        if breakage.swaps:
            content = self.server.swap((self.path, status), data, content)
        self._send(status, content)

    def _stream(self, response):
        self.send_response(response.status_code)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                events = self.server.breakage.event(self.path, json.loads(line.removeprefix(b"data: ")))
                lines = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
            else:
                lines = line + b"\n\n" if line else b""
            try:
                self.wfile.write(lines)
            except OSError:
                if self.server.closed or not self.server.breakage.reads_on:
                    return

    def _send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
