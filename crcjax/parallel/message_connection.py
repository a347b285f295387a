"""A TCP connection that carries JSON messages, one a line."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_UNTRUSTED_BYTES = 1 << 20  # of a message; the handshake's largest holds a config of some hundred fields


class MessageConnection:
    """One end of a connection. `send` and `receive` may be called from different threads."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._unread = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; does nothing if the connection is lost, which `receive` reports."""
        with suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message of a sender who may be a stranger.

        Returns None if the connection is closed, if the whole message has not arrived within `timeout_s`, if it exceeds
        1 MiB, or if it is not a JSON object.
        """
        message = self._next_message(time.monotonic() + timeout_s, _UNTRUSTED_BYTES)
        self._connection.settimeout(timeout_s)
        return message

    def receive_trusted(self) -> dict[str, Any] | None:
        """The next message of an authenticated sender, however large and late; None once the connection is lost."""
        return self._next_message(None, None)

    def keep_alive(self) -> None:
        """Removes the timeout, and detects within a minute that the other machine lost its power or its network."""
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 8)):
            self._connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        """Closes the connection; a thread that waits in `receive` returns None."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _next_message(self, deadline: float | None, max_bytes: int | None) -> dict[str, Any] | None:
        buffer = bytearray(self._unread)
        line_end = buffer.find(b"\n")
        try:
            while line_end < 0:
                if max_bytes is not None and len(buffer) > max_bytes:
                    return None
                if deadline is not None:
                    # The deadline is the message's, so that a sender of one byte a second gains no time.
                    self._connection.settimeout(max(0.001, deadline - time.monotonic()))
                received = self._connection.recv(1 << 16)
                if not received:
                    return None
                searched = len(buffer)
                buffer += received
                line_end = buffer.find(b"\n", searched)
            self._unread = bytes(buffer[line_end + 1 :])
            message = json.loads(buffer[:line_end])
        # A RecursionError comes of deeply nested JSON.
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None
