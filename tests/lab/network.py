"""The network of the lab: bridges between emulated machines, in a network namespace of this process's own, and an
observer on the workloads' segment, who is outside of every machine.

    link      10.77.0.0/24   between the hosts: what moves goes over it
    segment   10.77.1.0/24   the hosts' bridge br0: workloads, and the observer

What belongs here: cables, addresses, time for the machines. What does not: what goes over them.
"""

import ctypes
import os
import socket
import subprocess
import threading
import time

from telling import Failed

LINK, SEGMENT = "link", "segment"
OBSERVER = "10.77.1.254"
TIME_PORT = 7079
CLONE_NEWNET = 0x4000_0000


class Network:
    """The bridges. They go with this process."""

    def __init__(self):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            raise Failed(f"Cannot make a network namespace: {os.strerror(ctypes.get_errno())}")
        _ip("link", "set", "lo", "up")
        for bridge in (LINK, SEGMENT):
            plain = ["stp_state", "0", "forward_delay", "0", "mcast_snooping", "0"]
            _ip("link", "add", "name", bridge, "type", "bridge", *plain)
            _ip("link", "set", "dev", bridge, "up")
        _ip("address", "add", f"{OBSERVER}/24", "dev", SEGMENT)
        self._ports = 0
        threading.Thread(target=_tell_time, daemon=True).start()

    def card(self, bridge, mac):
        """What QEMU is told of a card with a cable to a bridge."""
        self._ports += 1
        port = f"port{self._ports}"
        _ip("tuntap", "add", port, "mode", "tap")
        _ip("link", "set", port, "master", bridge, "up")
        device = f"virtio-net-pci,netdev={port},mac={mac},romfile="
        return ["-netdev", f"tap,id={port},ifname={port},script=no,downscript=no", "-device", device]


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _tell_time():
    """Answers each datagram with itself and the time here in nanoseconds: what machines set their clocks by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.bind((OBSERVER, TIME_PORT))
        while True:
            question, sender = port.recvfrom(64)
            port.sendto(b"%s %d" % (question, time.time_ns()), sender)
