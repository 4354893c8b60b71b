"""Which scenario is run with what, how long it may take, and what is left of it afterwards: nothing.

What belongs here: arguments, the limit of time, the temporary directory, the sum. What does not: scenarios.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import containers
import crossing
import guests
import peers
import qemu
import refusals
from telling import Failed, Skipped, say, sum_up

# Emulation is slow; a scenario that takes longer than so many seconds is ended.
WITHIN = int(os.environ.get("DECAMP_LAB_WITHIN") or 5400)
SCENARIOS = {"guests": guests, "peers": peers, "refusals": refusals, "crossing": crossing, "containers": containers}
USAGE = f"""\
Usage: tests/lab/run [SCENARIO [ARGUMENT...]]

Runs a scenario in emulated machines under Debian's kernels; without one, each in turn, with what it does by itself.
As root, on Debian, with what tests/setup --bench installs; what is missing is said ("skipped: ..."), and is no error.
Exit code 0 only if nothing failed.

  guests
      Two hosts under different kernels ({" and ".join(guests.KERNELS)}), which see each other over a network with
      delay and loss, a guest under an unmodified kernel of Debian's that moves between them with its disk while
      stress-ng, a writer to that disk and a stream from an observer outside keep it busy, and verify what they do.
  peers [--json]
      The same guest under decamp and under QEMU's own microvm in turns, on two such hosts: boot, move and downtime beside
      each other, with the link slower than what either encrypts. --json: rows as tests/bench has them, last.
  refusals
      Two hosts, one of them without AVX2: a guest that sees it is refused, one that is held to the baseline of both
      moves, with a disk that both see; and a bridge whose VLANs are others is refused until they are the same.
  crossing
      A container with Redis in it moves to and fro between the two hosts and their kernels, under a client that
      remembers every write that was acknowledged.
  containers [--lib] [CASE...]
      Cases of container/tests/moves, or with --lib of the container backend's own tests, whose names CASE is part of,
      under another kernel ({containers.PACKAGE}). One case takes minutes.

Environment
  DECAMP_LAB_DIR      where kernels are kept ({guests.DIR})
  DECAMP_LAB_WITHIN   the most that a scenario may take, in seconds ({WITHIN})
  DECAMP_LAB_KEEP     if set, the temporary directory with all that was said stays
  guests:
  DECAMP_LAB_KERNELS  packages of the two hosts' kernels, PACKAGE or PACKAGE@SUITE; the guest has the first
  DECAMP_LAB_MOVES    how often the guest moves ({guests.MOVES})
  DECAMP_LAB_DELAY, DECAMP_LAB_LOSS
                      of each packet between the hosts, on each way ({guests.DELAY}, {guests.LOSS})
  peers:
  DECAMP_LAB_PAIRS    how often each guest is booted, and moved there and back ({peers.PAIRS})
  DECAMP_LAB_RATE     what the link carries in MB/s (default: {peers.CAP} times what the slower side encrypts)
  DECAMP_LAB_BUSY, DECAMP_LAB_BALLAST
                      MiB that the guest writes all the time, and has beside that ({peers.BUSY}, {peers.BALLAST})
  DECAMP_LAB_CHANNELS of QEMU's multifd ({qemu.CHANNELS}: one stream)
  DECAMP_LAB_MICROVM  QEMU's machine ({qemu.MACHINE})
  crossing:
  DECAMP_LAB_CROSSINGS
                      how often the container moves ({crossing.MOVES})
  guests, peers, refusals and crossing:
  DECAMP_LOG          what the agents say in their logs (info)
  DECAMP_QEMU         the QEMU in which hosts are emulated (what tests/setup --bench unpacked)
  DECAMP_BIN          the decamp to run (default: what was built here)
  containers:
  DECAMP_LAB_KERNEL   package of the kernel ({containers.PACKAGE})
  DECAMP_LAB_PATIENT  if set, the machine's clock goes by its own work, and it has one processor: for a machine here
                      that has other things to do

Example: tests/lab/run containers changes_move_by_page_hash counter_goes_on
"""


def run(name, words):
    """Runs one scenario; whether it did not fail."""
    scratch = Path(tempfile.mkdtemp(prefix="decamp-lab-"))
    signal.alarm(WITHIN)
    try:
        check_needs(SCENARIOS[name].NEEDS)
        SCENARIOS[name].run(scratch, words)
    except Skipped as lacks:
        print(f"skipped: {lacks}\ntest lab::{name} ... skipped: {lacks}", flush=True)
        return True
    except Failed as error:
        say(f"failed: {error}")
        print(f"test lab::{name} ... FAILED", flush=True)
        return False
    finally:
        signal.alarm(0)
        sum_up()
        if os.environ.get("DECAMP_LAB_KEEP"):
            say(f"kept: {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"test lab::{name} ... ok", flush=True)
    return True


def check_needs(names):
    """Says what of it this machine lacks."""
    lacking = [name for name in names if not (os.path.exists(name) if name[0] == "/" else shutil.which(name))]
    if os.geteuid():
        lacking.append("root")
    if lacking:
        raise Skipped(f"{', '.join(lacking)} (tests/setup --bench installs what can be installed)")


def too_long(*_):
    raise Failed(f"not done within {WITHIN} s (DECAMP_LAB_WITHIN)")


def main():
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if words and words[0] not in SCENARIOS:
        print(USAGE, end="", file=sys.stderr)
        return 2
    # So that what is set up is torn down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    signal.signal(signal.SIGALRM, too_long)
    names = words[:1] or SCENARIOS
    return 0 if all([run(name, words[1:]) for name in names]) else 1


sys.exit(main())
