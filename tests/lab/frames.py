"""Run in a host until it is told to end (SIGTERM): how long the longest frames were that came out of an interface and
that were sent to it, as `frames.py INTERFACE`; two numbers."""

import signal
import socket
import sys

ALL, OUTGOING = 0x0003, 4


def main():
    longest = [0, 0]

    def end(*_):
        print(*longest, flush=True)
        sys.exit(0)

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) as port:
        port.bind((sys.argv[1], ALL))
        signal.signal(signal.SIGTERM, end)
        print("ready", flush=True)
        while True:
            # As long as it is, whatever of it is read.
            length, _, _, place = port.recvmsg_into([bytearray(1)], 0, socket.MSG_TRUNC)
            way = int(place[2] == OUTGOING)
            longest[way] = max(longest[way], length)


main()
