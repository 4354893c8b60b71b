"""Run in a host: `checksum.py FILE` prints a checksum of a file's content and the bytes of its nonzero pieces.

Zeros count only by where they are, whether the file has a hole there or not.
"""

import hashlib
import os
import sys

PIECE = 1 << 16


def pieces(file):
    """(offset, bytes) of all that may not be zero."""
    at, size = 0, os.fstat(file).st_size
    while at < size:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
        except OSError:
            return  # The rest is a hole.
        hole = os.lseek(file, at, os.SEEK_HOLE)
        at -= at % PIECE
        while at < hole:
            yield at, os.pread(file, PIECE, at)
            at += PIECE


def main():
    file = os.open(sys.argv[1], os.O_RDONLY)
    found, zeros, data = hashlib.sha256(b"%d" % os.fstat(file).st_size), bytes(PIECE), 0
    for at, piece in pieces(file):
        if piece != zeros[: len(piece)]:
            found.update(b"%d:%d:" % (at, len(piece)))
            found.update(piece)
            data += len(piece)
    print(found.hexdigest(), data)


main()
