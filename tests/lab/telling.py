"""What the lab says while it works, and why it stops.

What belongs here: words on standard output and how long each part took. What does not: doing anything.
"""

import contextlib
import sys
import time


class Failed(Exception):
    """Something is not as it must be. The text says what was tried, on what, and what came of it."""


class Skipped(Exception):
    """This machine lacks something. The text says what."""


_parts = []


def say(text):
    """One line, at once."""
    print(f"lab: {text}", flush=True)


@contextlib.contextmanager
def part(name):
    """Says what is begun, and afterwards what it took; kept for `sum_up`."""
    began = time.monotonic()
    say(f"{name} ...")
    try:
        yield
    finally:
        took = time.monotonic() - began
        _parts.append((name, took))
        say(f"{name}: {took:.1f} s")


def sum_up():
    """What each part took, the slowest first."""
    if not _parts:
        return
    width = max(len(name) for name, _ in _parts)
    say("what each part took:")
    for name, took in sorted(_parts, key=lambda one: -one[1]):
        print(f"  {name:<{width}} {took:7.1f} s")
    sys.stdout.flush()
