"""The scenario `peers`: the same Linux guest under decamp and under QEMU's own microvm, in turns on the same two hosts,
over the same link, both encrypted: how long it takes to boot, to move, and how long its heartbeat stays away.

The link is slower than what either can encrypt here: emulated cryptography is slow, and would be what is compared.
Both guests' busy memory is incompressible, and small enough for either to get to a stop.

What belongs here: what is done in which order, and what is compared. What does not: how a guest is run or watched.
"""

import json
import os
import shlex
import time
from contextlib import closing

from decamp import Decamp
from guest import CMDLINE, HERE, Guest, find_decamp
from guests import CPUS, KERNELS, boot_hosts
from guests import NEEDS as GUESTS_NEEDS
from heartbeat import EVERY, Heartbeat
from kernel import Kernel
from qemu import PROGRAM, Qemu
from rows import Row, as_json, show
from telling import Failed, part, say

NEEDS = [*GUESTS_NEEDS, PROGRAM, "tc"]
PAIRS = int(os.environ.get("DECAMP_LAB_PAIRS") or 5)
# Of the link, in MB/s; none: what the slower of the two encrypts, times CAP.
RATE, CAP = float(os.environ.get("DECAMP_LAB_RATE") or 0), 0.5
# The guest's memory, and in MiB what of it is written all the time, and what is used and stays as it is. The first is
# what a slow link carries within the stop that both aim at, too: neither has to slow its guest down before.
MEMORY = "512M"
BUSY = float(os.environ.get("DECAMP_LAB_BUSY") or 0.5)
BALLAST = int(os.environ.get("DECAMP_LAB_BALLAST") or 64)
# Seconds that a guest is left alone before it moves.
SETTLE = 3
# QEMU's guest does not always come up in an emulated host, or stand still at the end of a move: so often one is tried.
TRIES = 3
# What the link holds back before it drops: a switch's worth.
QUEUE = "burst 128kb latency 20ms"
IN_USER_SPACE, UP = "guest: in user space", "@witness"
# The most that the medians of ratios may be; printed, not asserted.
TARGETS = {"downtime": 1.0, "total": 0.9, "boot": 1.2}



class Sample:
    """What one guest showed, from its boot to its end."""

    def __init__(self, boot, quiet):
        # Milliseconds; of each move (from the command on, longest gap, what the side said).
        self.boot, self.quiet, self.moves = boot, quiet, []


def run(scratch, words):
    """Does all of it."""
    if words not in ([], ["--json"]):
        raise Failed(f"peers takes --json and nothing else: {' '.join(words)}")
    hosts = []
    try:
        rows = _run(scratch, hosts)
    finally:
        for host in hosts:
            host.stop()
    show(rows)
    if words:
        print(as_json(rows), flush=True)


def _run(scratch, hosts):
    decamp = find_decamp()
    with part("kernels and the guest's files"):
        kernels = [Kernel.fetch(package) for package in KERNELS]
        guest = Guest("g", kernels[0], scratch)
    boot_hosts(kernels, scratch, hosts, decamp)
    cmdline = f"{CMDLINE} lab.memory={BUSY * 1024:.0f} lab.content=varied"
    sides = [side(guest, memory=MEMORY, cpus=CPUS, cmdline=cmdline) for side in (Decamp, Qemu)]
    for host in hosts:
        for side in sides:
            side.set_up(host)
    rate = RATE or _find_rate(sides, hosts)
    say(f"the link is held to {rate:.1f} MB/s")
    for host in hosts:
        host.run(f"modprobe sch_tbf; tc qdisc replace dev uplink root tbf rate {rate * 8:.2f}mbit {QUEUE}")
    pairs = []
    with part(f"{PAIRS} pairs"):
        for number in range(PAIRS):
            pairs.append([_insist(side, hosts, f"{number + 1}: {side.name}", rate) for side in sides])
    return _rows(sides, pairs, rate)


def _find_rate(sides, hosts):
    """What the link may carry in MB/s, after a move of each side's without a limit, and uncompressed."""
    rates = []
    for host in hosts:
        host.run("tc qdisc replace dev uplink root pfifo limit 1000")
    with part("what each side encrypts"):
        for side in sides:
            said = [said for *_, said in _insist(side, hosts, f"{side.name}, unlimited", None).moves]
            rates.append(min(map(side.rate, said)))
            say(f"{side.name} sends {rates[-1]:.1f} MB/s encrypted")
    return min(rates) * CAP


def _insist(side, hosts, title, rate):
    """A sample of what comes to one; where QEMU's guest does not, another is taken. decamp's must."""
    for left in reversed(range(TRIES if isinstance(side, Qemu) else 1)):
        try:
            return _sample(side, hosts, title, rate)
        except Failed as error:
            if not left:
                raise
            say(f"  {title}: not counted, once more: {str(error).splitlines()[0][:200]}")
        for host in hosts:
            side.end(host)


def _sample(side, hosts, title, rate):
    """Boots the guest, moves it there and back, and ends it."""
    source, destination = hosts
    words = ["--until", side.log, IN_USER_SPACE, *side.command()]
    boot = json.loads(source.run(shlex.join(["python3", f"{HERE}/stopwatch.py", *words]), 300))["ms"]
    source.run(f"until grep -q {UP} {side.log}; do sleep 0.2; done", 120)
    side.guest.shell(source, f"dd if=/dev/urandom of=/tmp/ballast bs=1M count={BALLAST}")
    with closing(Heartbeat()) as heartbeat:
        time.sleep(SETTLE)
        sample = Sample(boot, heartbeat.gap())
        say(f"  {title}: in user space after {boot:.0f} ms; longest gap while it stays {sample.quiet:.0f} ms")
        for here, there in ((source, destination), (destination, source)):
            side.wait_incoming(there)
            time.sleep(SETTLE)
            heartbeat.gap()
            total, said = side.migrate(here, there, rate)
            # Until it is there.
            time.sleep(1)
            gap = heartbeat.gap()
            side.guest.look(there)
            sample.moves.append((total, gap, said))
            say(f"  {title}: {here.name} to {there.name}: {total:.0f} ms, gap {gap:.0f} ms; {side.tell(said)}")
    side.quit(source)
    return sample


def _rows(sides, pairs, rate):
    link = f"{rate:.1f} MB/s, TLS, {MEMORY} with {BALLAST} MiB of noise in use and {BUSY:g} MiB written all the time"
    quiet = [max(sample.quiet for sample in side) for side in zip(*pairs)]
    notes = {
        "downtime": f"longest gap in a heartbeat of {1 / EVERY:.0f} a second; {quiet[0]:.0f} and {quiet[1]:.0f} ms without a move; {link}",
        "total": f"from the command on; QEMU's at the destination waits already; {link}",
        "boot": f"from the start of the program on, to user space; {CPUS} processors",
    }
    moves = [(ours, theirs) for pair in pairs for ours, theirs in zip(*(sample.moves for sample in pair))]
    taken = {
        "downtime": [(ours[1], theirs[1]) for ours, theirs in moves],
        "total": [(ours[0], theirs[0]) for ours, theirs in moves],
        "boot": [(ours.boot, theirs.boot) for ours, theirs in pairs],
    }
    peer = sides[1].describe()
    return [
        Row("lab-peers", metric, "ms", peer, taken[metric], TARGETS[metric], notes[metric]) for metric in notes
    ]
