"""A TCP relay: a server behind it can appear late, and leave, without being touched."""

import contextlib
import socket
import socketserver
import threading


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class _Handler(socketserver.BaseRequestHandler):
    server: "Relay"

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as upstream:
            threading.Thread(target=_copy, args=(self.request, upstream), daemon=True).start()
            _copy(upstream, self.request)


class Relay(socketserver.ThreadingTCPServer):
    """Within `with`, connections to `address` go on to `target`; outside of it nobody listens there.

    Both are (host, port).
    """

    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def __init__(self, address: tuple[str, int], target: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.target = target
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
