"""The observer on the workloads' segment: a TCP stream to the guest that never stops, and its longest gap; and who
announces where the guest is.

What belongs here: what can be seen of a guest from outside. What does not: what anybody says of himself.
"""

import socket
import struct
import threading
import time

from guest import ADDRESS, ECHO_PORT
from network import SEGMENT
from telling import Failed

# Seconds between two messages, and in which the stream must be up again after a move.
EVERY, WITHIN = 0.01, 60
MESSAGE = struct.Struct("<Q56x")


class Observer:
    """A stream of numbered messages that the guest sends back."""

    def __init__(self):
        self._stream = socket.create_connection((ADDRESS, ECHO_PORT), timeout=WITHIN)
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream.settimeout(WITHIN)
        self._ended = self._wrong = None
        self._last = time.monotonic()
        self._gap = self._longest = 0.0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def gap(self):
        """The longest time without a message since this was asked last, in milliseconds."""
        with self._lock:
            gap, self._gap = max(self._gap, time.monotonic() - self._last), 0.0
            self._longest = max(self._longest, gap)
        if self._wrong:
            raise Failed(f"The observer's stream: {self._wrong}")
        return gap * 1000

    def longest(self):
        """The longest of all, in milliseconds."""
        self.gap()
        return self._longest * 1000

    def close(self):
        """Ends the stream."""
        self._ended = True
        self._stream.close()

    def _send(self):
        number = 0
        while not self._ended:
            try:
                self._stream.sendall(MESSAGE.pack(number))
            except OSError as error:
                self._is_wrong(f"message {number} could not be sent ({error})")
                return
            number += 1
            time.sleep(EVERY)

    def _receive(self):
        expected, bytes_ = 0, b""
        while not self._ended:
            try:
                came = self._stream.recv(1 << 16)
            except OSError as error:
                self._is_wrong(f"nothing came after message {expected} ({error})")
                return
            if not came:
                self._is_wrong(f"it was closed after message {expected}")
                return
            now = time.monotonic()
            with self._lock:
                self._gap = max(self._gap, now - self._last)
                self._last = now
            bytes_ += came
            while len(bytes_) >= MESSAGE.size:
                (number,) = MESSAGE.unpack_from(bytes_)
                if number != expected:
                    self._is_wrong(f"message {number} came in place of {expected}")
                    return
                expected, bytes_ = expected + 1, bytes_[MESSAGE.size :]

    def _is_wrong(self, text):
        if not self._ended:
            self._wrong = text


class Announcements:
    """What is said on the segment of who is where, unasked: by the host for the guest, and by the guest itself."""

    ARP, RARP = 0x0806, 0x8035
    # Hardware and protocol of both addresses, operation; who says it, and to whom.
    FORMAT = struct.Struct("!HHBBH6s4s6s4s")

    def __init__(self):
        self._address = socket.inet_aton(ADDRESS)
        self._sockets = []
        for kind in (self.ARP, self.RARP):
            port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
            port.bind((SEGMENT, kind))
            port.setblocking(False)
            self._sockets.append(port)

    def take(self):
        """How many of each kind came since this was asked last."""
        found = {"RARP": 0, "ARP": 0, "the guest's own": 0}
        for port in self._sockets:
            while True:
                try:
                    frame = port.recv(2048)
                except BlockingIOError:
                    break
                if kind := self._kind(frame):
                    found[kind] += 1
        return found

    def close(self):
        for port in self._sockets:
            port.close()

    def _kind(self, frame):
        if len(frame) < 14 + self.FORMAT.size:
            return None
        kind = int.from_bytes(frame[12:14])
        *_, operation, _, sender, target_mac, target = self.FORMAT.unpack_from(frame, 14)
        if kind == self.RARP:
            return "RARP" if operation == 3 else None
        if sender != target or sender != self._address:
            return None
        # Linux leaves out whom it tells; decamp says that it tells everybody.
        return "ARP" if target_mac == b"\xff" * 6 else "the guest's own"
