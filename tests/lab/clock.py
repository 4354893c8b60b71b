"""Run in a host: sets its clock by another's, as `clock.py HOST PORT`, and prints by how many milliseconds it was ahead
of that, and how sure that is; with a third word, `look`, it sets nothing.

Asks again and again, and believes the answer that came the soonest: half of its round trip is the most that it can
be wrong by.
"""

import socket
import sys
import time

# How often is asked at least, and for how many seconds; a round trip of so many nanoseconds is soon enough.
QUESTIONS, LONG, SOON = 40, 5, 2_000_000
# Where none is: for how many seconds at most, and what will do then.
LONGEST, LATE = 40, 5_000_000
# Seconds that an answer is waited for: who answers may just have moved.
PATIENCE = 1


def ask(port, number):
    """(round trip, how far the clock here is ahead), in nanoseconds; nothing if no answer comes."""
    sent = time.time_ns()
    try:
        port.send(b"%d" % number)
        while True:
            answered, there = port.recv(64).split()
            if int(answered) == number:
                break
    except OSError:
        return None
    back = time.time_ns()
    return back - sent, (sent + back) // 2 - int(there)


def best(port):
    """The answer that came the soonest."""
    answers, number, begun = [], 0, time.monotonic()
    while (taken := time.monotonic() - begun) < LONGEST:
        if number >= QUESTIONS and answers and min(answers)[0] <= (SOON if taken < LONG else LATE):
            break
        number += 1
        answer = ask(port, number)
        if answer:
            answers.append(answer)
    if not answers:
        raise SystemExit(f"no answer from {sys.argv[1]} port {sys.argv[2]} within {LONGEST} s")
    return min(answers)


def main():
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port.settimeout(PATIENCE)
    port.connect((sys.argv[1], int(sys.argv[2])))
    trip, ahead = best(port)
    if sys.argv[3:] != ["look"]:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() - ahead)
    print(f"{ahead / 1e6:.3f} {trip / 2e6:.3f}")


main()
