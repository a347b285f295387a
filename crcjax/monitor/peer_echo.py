"""Latency and clock offset between the processes of a run, by small UDP packets that each of them echoes.

A process answers packets with its own random token alone, and with no more bytes than it received. The token is in its sample in
the run directory, so that only those who can read the run can ask.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_TOKEN_BYTES = 16
_NONCE_BYTES = 8
_TIME = struct.Struct("!d")
_PACKET_BYTES = _TOKEN_BYTES + _NONCE_BYTES + _TIME.size
# The least of several round trips is that of the network; the others also waited for a busy interpreter.
_TRIES = 3
_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class EchoAddress:
    """Where a process answers: a name or address of its machine, a UDP port, and the token that it answers to."""

    host: str
    port: int
    token: str


@dataclass(frozen=True)
class RoundTrip:
    """The time of a round trip to another process, and by how much its clock is ahead of ours (Mills 1991), in seconds."""

    seconds: float
    clock_offset_s: float


class PeerEcho:
    """Answers the packets of the other processes until it is closed.

    Args:
      host: the name of this machine, by which the others reach it.
      clock: the seconds since 1970.
      port: the UDP port; 0 takes a free one.
    """

    def __init__(self, host: str, clock: Callable[[], float] = time.time, port: int = 0):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", port))
        self._is_closed = False
        self._token, self._clock = secrets.token_bytes(_TOKEN_BYTES), clock
        self.address = EchoAddress(host, self._socket.getsockname()[1], self._token.hex())
        threading.Thread(target=self._answer, daemon=True, name="echo").start()

    def close(self) -> None:
        """Ends the answers."""
        self._is_closed = True
        with suppress(OSError):
            # An empty packet wakes the thread that receives.
            self._socket.sendto(b"", ("127.0.0.1", self.address.port))

    def _answer(self) -> None:
        while True:
            try:
                packet, sender = self._socket.recvfrom(_PACKET_BYTES + 1)
                if self._is_closed:
                    self._socket.close()
                    return
                if len(packet) == _PACKET_BYTES and secrets.compare_digest(packet[:_TOKEN_BYTES], self._token):
                    self._socket.sendto(packet[: -_TIME.size] + _TIME.pack(self._clock()), sender)
            except OSError:
                return


def measure_round_trip(address: EchoAddress, clock: Callable[[], float] = time.time) -> RoundTrip | None:
    """The shortest of three round trips; None if the process does not answer within half a second."""
    token, trips = bytes.fromhex(address.token), []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect((address.host, address.port))
            for _ in range(_TRIES):
                head = token + secrets.token_bytes(_NONCE_BYTES)
                sent_s, began = clock(), time.perf_counter()
                connection.send(head + bytes(_TIME.size))
                packet = connection.recv(_PACKET_BYTES)
                seconds = time.perf_counter() - began
                if packet[: -_TIME.size] == head:
                    (peer_s,) = _TIME.unpack(packet[-_TIME.size :])
                    trips.append(RoundTrip(seconds, peer_s - (sent_s + seconds / 2)))
    except OSError:
        pass
    return min(trips, key=lambda trip: trip.seconds, default=None)
