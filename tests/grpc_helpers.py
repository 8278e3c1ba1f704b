"""A call of gRPC by hand, as anybody can make it who reaches a port: no library, no token."""

import socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
OK, UNIMPLEMENTED, UNAUTHENTICATED = "0", "12", "16"


def grpc_status(port: int, method: str, **headers: str) -> str:
    """The status of a call with an empty message to a port of this machine, OK being "0"."""
    path = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost"}
    sent = path | {"content-type": "application/grpc", "te": "trailers"} | headers
    block = b"".join(_literal(name) + _literal(value, b"") for name, value in sent.items())
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(
            PREFACE
            + _frame(SETTINGS, 0, 0, b"")
            + _frame(HEADERS, END_HEADERS, 1, block)
            + _frame(DATA, END_STREAM, 1, bytes(5))
        )
        return _status(connection)


def _status(connection: socket.socket) -> str:
    """What the trailers say; gRPC writes names and values there as they are."""
    seen, name = b"", b"grpc-status"
    while chunk := connection.recv(65536):
        seen += chunk
        _, found, rest = seen.partition(name)
        if found and rest and len(rest) > rest[0]:
            return rest[1 : 1 + rest[0]].decode()
    raise AssertionError(f"no status in {seen!r}")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _literal(text: str, before: bytes = b"\x00") -> bytes:
    """A name, or without ``before`` a value, that goes into nobody's table."""
    assert len(text) < 127
    return before + bytes([len(text)]) + text.encode()
