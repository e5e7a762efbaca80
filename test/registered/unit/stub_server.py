"""A JSON server on a free port of 127.0.0.1, for tests of what talks to one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JsonHandler(BaseHTTPRequestHandler):
    """Answers as the server's `reply` says. Base of handlers, which define `do_GET` and `do_POST` with these."""

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(self.body())

    def reply(self, body):
        answer = self.server.reply(self.path, body)
        if answer is None:
            self.close_connection = True
        else:
            self.answer(*answer)

    def body(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")

    def answer(self, status, body=b""):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class StubServer(ThreadingHTTPServer):
    """Serves until `test` ends. `handler`: a JsonHandler class, which finds this object as `self.server`.

    Without one, `reply` of (path, JSON body; None of a GET) gives (status, body) of each answer, or None for none: what is
    given, or the method of a class below this one.
    """

    request_queue_size = 64

    def __init__(self, test, handler=JsonHandler, reply=None):
        if reply:
            self.reply = reply
        super().__init__(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        for cleanup in (thread.join, self.server_close, self.shutdown):
            test.addCleanup(cleanup)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"
