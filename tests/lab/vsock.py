"""Run in a host: reaches the port of a guest's through its socket device, as `vsock.py SOCKET PORT`, and says how long
it took until what was sent came back."""

import os
import socket
import sys
import time

WITHIN = 30
MUCH = 1 << 18


def main():
    place, port = sys.argv[1:]
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(WITHIN)
        stream.connect(place)
        stream.sendall(f"CONNECT {port}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := stream.recv(1)):
                raise SystemExit(f"the guest does not answer at port {port} (after {line})")
            line += byte
        if not line.startswith(b"OK "):
            raise SystemExit(f"not taken in: {line}")
        sent, came = os.urandom(MUCH), b""
        for at in range(0, MUCH, 1 << 12):
            piece = sent[at : at + (1 << 12)]
            stream.sendall(piece)
            came += _take(stream, len(piece))
    if came != sent:
        raise SystemExit("what came back is not what was sent")
    print(f"{MUCH >> 10} KiB came back in {(time.monotonic() - began) * 1000:.0f} ms")


def _take(stream, count):
    taken = b""
    while len(taken) < count:
        if not (more := stream.recv(count - len(taken))):
            raise SystemExit("the guest's end was closed")
        taken += more
    return taken


main()
