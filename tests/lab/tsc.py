"""The frequency of this machine's time stamp counter, which emulated machines see as theirs.

What belongs here: that number. A busy machine's guests measure it wrong by a factor, and keep wrong time then.
"""

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
READ = bytes.fromhex("0f31 48c1e220 4809d0 c3".replace(" ", ""))
# Seconds between two readings, and how often is read, for the reading that nothing came in between of.
APART, TRIES = 0.25, 50


def khz():
    """In kHz, to a few parts in a million."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(READ)
    place = ctypes.c_char.from_buffer(code)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))

    def both():
        """(nanoseconds, counter), as near together as can be."""
        found = []
        for _ in range(TRIES):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            counter = read()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            found.append((after - before, (before + after) // 2, counter))
        return min(found)[1:]

    began, first = both()
    time.sleep(APART)
    ended, last = both()
    return round((last - first) * 1_000_000 / (ended - began))
