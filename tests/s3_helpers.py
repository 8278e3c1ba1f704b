"""A real S3 server on loopback, and a proxy before it that counts and makes faults.

Nothing here needs pytest, so benchmarks can use it too.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

import pytest
from ray_helpers import wait_until

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
"""Headers that belong to one connection; the proxy writes its own."""


def s3_environment(address: str) -> dict[str, str]:
    """What a client needs in its environment to find the server at ``address``."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class S3Server:
    """An S3 server (moto) in a process of its own, with a bucket; ends with its ``with`` block.

    ``log`` gets a line of every request, with its time.
    """

    def __init__(self, bucket: str = "buffers", log: str = os.devnull):
        self.bucket, self._log = bucket, log

    def __enter__(self) -> Self:
        self.address = f"http://127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])",
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until("an answer of the S3 server", self._answers, seconds=60)
            put = urllib.request.Request(f"{self.address}/{self.bucket}", method="PUT")
            assert urllib.request.urlopen(put, timeout=20).status == 200
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=20)

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the S3 server ended"
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.address}/moto-api/", timeout=5).status == 200
        return False


@dataclass
class Fault:
    """What the proxy does in the place of passing a request on.

    ``answer`` answers ``status`` without asking the server; ``hang`` never answers; ``cut_request``
    ends the connection after ``after`` bytes of the request's body, which the server never sees;
    ``cut_answer`` passes the request on and ends the connection after ``after`` bytes of the
    answer's body; ``lose_answer`` passes the request on and ends the connection without an answer.
    """

    kind: Literal["answer", "hang", "cut_request", "cut_answer", "lose_answer"]
    status: int = 503
    after: int = 0
    methods: Collection[str] = ()  # empty: all
    times: float = float("inf")  # requests that it befalls
    seconds: float = float("inf")  # from its injection on
    path: str = ""  # part of the request's path and query
    hits: int = 0

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def befalls(self, method: str, path: str) -> bool:
        return (
            self.hits < self.times
            and time.monotonic() < self._end
            and (not self.methods or method in self.methods)
            and self.path in path
        )


class FaultProxy:
    """Passes HTTP requests on to ``upstream``, counts them, and makes the faults injected.

    ``requests``, ``received`` and ``sent`` count requests, bytes of requests' bodies and bytes of
    answers' bodies by method.
    """

    def __init__(self, upstream: str):
        self.upstream = upstream.removeprefix("http://")
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._healed = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._timer: threading.Timer | None = None
        self.reset_counts()

    def __enter__(self) -> Self:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self.go_away()

    # --- counts -----------------------------------------------------------------------------

    def reset_counts(self) -> None:
        self.requests: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def count(self, method: str, received: int, sent: int) -> None:
        with self._lock:
            self.requests[method] += 1
            self.received[method] += received
            self.sent[method] += sent

    # --- faults -----------------------------------------------------------------------------

    def inject(self, kind: Any, **options: Any) -> Fault:
        """Makes a ``Fault(kind, **options)`` from now on."""
        fault = Fault(kind, **options)
        with self._lock:
            self._healed.clear()
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Passes everything on again; requests that hang are ended, a proxy away is back."""
        with self._lock:
            self._faults.clear()
            self._healed.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        self.come_back()

    def go_away(self, seconds: float | None = None) -> None:
        """Refuses connections and ends those that are open, for a while or until ``heal``."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if seconds is not None:
            self._timer = threading.Timer(seconds, self.come_back)
            self._timer.daemon = True
            self._timer.start()

    def come_back(self) -> None:
        """Takes connections again, at the same address."""
        if self._server is None:
            self._server = _Server(self)
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            fault = next((f for f in self._faults if f.befalls(method, path)), None)
            if fault is not None:
                fault.hits += 1
        return fault

    def wait_for_heal(self) -> None:
        self._healed.wait()

    def track(self, connection: socket.socket, *, is_open: bool) -> None:
        with self._lock:
            (self._connections.add if is_open else self._connections.discard)(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy):
        self.proxy = proxy
        super().__init__(("127.0.0.1", proxy.port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that either side ended is what a fault proxy is for."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one of its own to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=120)
        self.proxy.track(self.connection, is_open=True)

    def finish(self) -> None:
        self.proxy.track(self.connection, is_open=False)
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def pass_on(self) -> None:
        fault = self.proxy.fault_for(self.command, self.path)
        if fault is not None and fault.kind == "cut_request":
            self._cut(received=len(self.rfile.read(min(fault.after, self._length()))))
            return
        body = self._body()
        if fault is not None and fault.kind == "hang":
            self.proxy.count(self.command, len(body), 0)
            self.proxy.wait_for_heal()
            self.close_connection = True
        elif fault is not None and fault.kind == "answer":
            self._answer(fault.status, [], len(body), b"")
        else:
            status, headers, content = self._ask(body)
            if fault is not None and fault.kind == "lose_answer":
                self._cut(received=len(body))
            else:
                cut = fault.after if fault is not None else None
                self._answer(status, headers, len(body), content, cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _length(self) -> int:
        return int(self.headers.get("Content-Length", 0))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(self._length())
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's answer."""
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP | {"expect"}:
                self.upstream.putheader(name, value)
        if body or self.command in {"PUT", "POST"}:
            self.upstream.putheader("Content-Length", str(len(body)))
        self.upstream.endheaders(body or None)
        with self.upstream.getresponse() as response:
            content = response.read()
            headers = response.getheaders()
            if self.command != "HEAD":
                headers = [h for h in headers if h[0].lower() not in HOP_BY_HOP]
            return response.status, headers, content

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        received: int,
        content: bytes,
        cut: int | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "connection":
                self.send_header(name, value)
        if self.command != "HEAD" and status not in {204, 304}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.proxy.count(self.command, received, len(content[:cut]))
        self.wfile.write(content[:cut])
        self.wfile.flush()
        if cut is not None:
            self._hang_up()

    def _cut(self, received: int) -> None:
        self.proxy.count(self.command, received, 0)
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def s3_of_the_environment() -> Iterator[FaultProxy]:
    """An S3 server behind a proxy, which this process and its children take for S3."""
    with (
        S3Server() as server,
        FaultProxy(server.address) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in s3_environment(proxy.address).items():
            patch.setenv(key, value)
        yield proxy
