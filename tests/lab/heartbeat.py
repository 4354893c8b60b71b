"""A guest's heartbeat as it is seen from outside of both hosts: numbered datagrams that it sends back, and the longest
time without one. Datagrams, for what is lost of a stream comes again late, after a time that is the stream's and not
the move's.

What belongs here: that gap, the same for whoever moves the guest. What does not: what anybody says of himself.
"""

import socket
import subprocess
import threading
import time

from guest import ADDRESS
from network import SEGMENT
from telling import Failed

# As witness.rs has it.
ECHO_PORT = 7778
# Seconds between two beats, and in which a guest must answer at first. In an emulated host a guest that does nothing
# else answers some fifty a second: with many more than this it would be the beats that are watched.
EVERY, WITHIN = 0.05, 30


class Heartbeat:
    """Beats until `close`."""

    def __init__(self):
        # Another guest may have had its address.
        subprocess.run(["ip", "neigh", "flush", "dev", SEGMENT], check=True)
        self._port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._port.connect((ADDRESS, ECHO_PORT))
        self._port.settimeout(1)
        self._changed = threading.Condition()
        self._last, self._gap, self._ended = None, 0.0, False
        for one in (self._send, self._receive):
            threading.Thread(target=one, daemon=True).start()
        with self._changed:
            if not self._changed.wait_for(lambda: self._last, WITHIN):
                raise Failed(f"The guest at {ADDRESS} answers no heartbeat within {WITHIN} s")

    def gap(self):
        """The longest time without an answer since this was asked last, in milliseconds."""
        with self._changed:
            gap, self._gap = max(self._gap, time.monotonic() - self._last), 0.0
        return gap * 1000

    def close(self):
        self._ended = True

    def _send(self):
        number, due = 0, time.monotonic()
        while not self._ended:
            try:
                self._port.send(b"%d" % number)
            except OSError:
                # Nobody is there at the moment: that is the gap.
                pass
            number += 1
            due = max(due + EVERY, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self):
        while not self._ended:
            try:
                self._port.recv(128)
            except OSError:
                continue
            now = time.monotonic()
            with self._changed:
                self._gap = max(self._gap, now - (self._last or now))
                self._last = now
                self._changed.notify_all()
        self._port.close()
