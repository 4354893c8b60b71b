"""stress-ng of Debian's in the guest: it verifies its own memory, arithmetic and timers while the guest moves.

What belongs here: getting it, starting and ending it, and what counts as its being content. What does not: the guest.
"""

import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

from kernel import DIR, ROOT
from telling import Failed, Skipped, say

PACKAGE = "stress-ng"
# What it does in the guest. Emulated processors are slow: each kind has only a part of one.
LOAD = {
    "vm": "--vm 1 --vm-bytes 32M --vm-hang 1 --vm-method all",
    "cpu": "--cpu 1 --cpu-load 20 --cpu-method all",
    "timer": "--timer 1 --timer-freq 100",
    "nanosleep": "--nanosleep 1 --nanosleep-threads 1",
}
# It goes on until it is told to end, and gives way to who answers questions.
COMMON = "--verify --metrics-brief --timeout 0 --temp-path /tmp"
LOG, CODE, PID = "/tmp/stress.log", "/tmp/stress.code", "/tmp/stress.pid"
# Seconds that it runs at least, so that each kind gets through something on a slow machine, and has for its end.
LEAST, END = 300, 45
SUCCESS = re.compile(r"\] successful run completed")
METRIC = re.compile(r"metrc: \[\d+\] (\S+) +(\d+) ")
# As it sees them, bytes; how long memory is spoiled, and what else it may take, in seconds.
SPOILED, SPOIL, MAY = 4 << 20, 10, 30


def complaints(code, said, kinds):
    """What speaks against a run of stress-ng that exited with `code` and `said` so much; nothing if all is well."""
    found = [line for line in said if re.search(r"stress-ng: (fail|error):|memory errors|failures reached", line)]
    if code != 0:
        found.append(f"its exit code is {code}")
    if not any(SUCCESS.search(line) for line in said):
        found.append("it does not say that it was successful")
    metrics = dict(match.groups() for match in map(METRIC.search, said) if match)
    found += [f"{kind} did nothing" for kind in kinds if not int(metrics.get(kind, 0))]
    return found


class StressNg:
    """The program, and the libraries that it needs."""

    def __init__(self):
        self._parts = DIR / "stress-ng.parts"
        self._program = self._unpack(PACKAGE) / "usr/bin/stress-ng"
        self._libraries = self._find_libraries()

    def put_into(self, archive):
        """Where the guest's loader finds them."""
        archive.copy(self._program, "usr/bin/stress-ng", 0o755)
        for name, path in self._libraries.items():
            # The loader has a path of its own, the others are looked for in this directory.
            archive.copy(path, name.lstrip("/") if "/" in name else f"lib/x86_64-linux-gnu/{name}", 0o755)

    def prove_that_it_tells(self):
        """Has it verify memory on this machine twice: once untouched, and once spoiled beneath it. An error unless
        `complaints` is silent about the one and speaks of the other."""
        for spoiled in (False, True):
            code, said = self._verify_here(spoiled)
            found = complaints(code, said, ["vm"])
            if bool(found) != spoiled:
                state = "spoiled memory" if spoiled else "memory that nobody touched"
                raise Failed(f"stress-ng with {state}: {found or 'nothing is found'}\n" + "\n".join(said))
        say(f"  stress-ng finds spoiled memory: {next(line for line in found if 'detected' in line)}")

    def _verify_here(self, spoiled):
        command = [self._program, *COMMON.split(), "--vm", "1", "--vm-bytes", str(SPOILED), "--vm-keep"]
        # Each pass fills all of it, and looks at it afterwards.
        command += ["--vm-method", "flip"]
        with subprocess.Popen(
            command, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            deadline = time.monotonic() + (SPOIL if spoiled else 2)
            while run.poll() is None and time.monotonic() < deadline:
                if spoiled:
                    _spoil(run.pid)
                time.sleep(0.01)
            run.terminate()
            try:
                output = run.communicate(timeout=MAY)[0]
            except subprocess.TimeoutExpired:
                run.kill()
                raise Failed(f"stress-ng does not end within {MAY} s") from None
        return run.returncode, output.splitlines()

    def _environment(self):
        places = {str(path.parent) for path in self._parts.rglob("lib*.so.*") if ".new/" not in str(path)}
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(sorted(places)), "LC_ALL": "C"}

    def _find_libraries(self):
        """Paths of all that it loads, by name. Packages that this machine lacks are unpacked until nothing is
        missing."""
        packages, seen = [PACKAGE], set()
        while True:
            found, missing = self._ask_loader()
            if not missing:
                return found
            if not packages:
                raise Skipped(f"{', '.join(missing)} for stress-ng")
            needed = _lacking(packages.pop(0), seen)
            packages += needed
            for package in needed:
                self._unpack(package)

    def _ask_loader(self):
        command = ["ldd", self._program]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        found, missing = {}, []
        for line in done.stdout.splitlines():
            match line.split():
                case [name, "=>", "not", "found"]:
                    missing.append(name)
                case [name, "=>", path, _]:
                    found[name] = Path(path)
                case [path, _] if path.startswith("/"):
                    found[path] = Path(path)
        if not found:
            raise Failed(f"ldd {self._program}: {done.stderr.strip() or done.stdout.strip()}")
        return found, missing

    def _unpack(self, package):
        tree = self._parts / package
        if not tree.exists():
            say(f"fetching {package}")
            self._parts.mkdir(parents=True, exist_ok=True)
            new = tree.with_name(f"{package}.new")
            shutil.rmtree(new, ignore_errors=True)
            command = [ROOT / "tests/setup", "--unpack", package, new]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Skipped(f"no {package} ({done.stderr.strip() or done.stdout.strip()})")
            new.rename(tree)
        return tree


def _lacking(package, seen):
    """What a package depends on and this machine has not installed."""
    asked = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False)
    needed = [line.split()[1] for line in asked.stdout.splitlines() if line.strip().startswith("Depends: ")]
    lacking = []
    for name in needed:
        if name in seen or name.startswith("<"):
            continue
        seen.add(name)
        status = ["dpkg-query", "-W", "-f", "${Status}", name]
        there = subprocess.run(status, capture_output=True, text=True, check=False).stdout
        if not there.endswith(" installed"):
            lacking.append(name)
    return lacking


def _spoil(process):
    """Changes a byte of what a process's descendants verify."""
    mine = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *$")
    for descendant in _descendants(process):
        try:
            for line in Path(f"/proc/{descendant}/maps").read_text().splitlines():
                match = mine.match(line)
                if match and int(match[2], 16) - int(match[1], 16) == SPOILED:
                    with open(f"/proc/{descendant}/mem", "r+b", buffering=0) as memory:
                        memory.seek(int(match[1], 16) + random.randrange(SPOILED))
                        memory.write(b"\xa5")
        except OSError:
            pass  # It has ended in between.


def _descendants(process):
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [one for child in children for one in (int(child), *_descendants(int(child)))]


def begin(guest, host):
    """Starts it in a guest; when that was, for `end`."""
    command = f"exec /usr/bin/stress-ng {COMMON} {' '.join(LOAD.values())}"
    words = f"sh -c 'renice -n 10 -p $$ && {command}'"
    script = f"{words} </dev/null >{LOG} 2>&1 & echo $! >{PID}; wait $!; echo $? >{CODE}"
    guest.shell(host, f"({script}) </dev/null >/dev/null 2>&1 & sleep 2; test ! -e {CODE} || {{ cat {LOG}; false; }}")
    return time.monotonic()


def check_runs(guest, host):
    """An error if it has ended by itself, as it does when it finds something."""
    guest.shell(host, f"test ! -e {CODE} || {{ cat {LOG}; false; }}")


def end(guest, host, begun):
    """Ends it, when it has run for long enough since `begun`; an error if it complains of anything. What it did, in
    words."""
    time.sleep(max(0, begun + LEAST - time.monotonic()))
    wait = f"for _ in $(seq {END * 2}); do test -e {CODE} && break; sleep 0.5; done"
    lines = guest.shell(host, f"kill -TERM $(cat {PID}); {wait}; cat {CODE} {LOG}")
    code = int(lines[0]) if lines and lines[0].isdigit() else None
    found = complaints(code, lines[1:], LOAD)
    if found:
        raise Failed(f"stress-ng in {guest.name} complains: {'; '.join(found)}\n" + "\n".join(lines))
    metrics = [match for match in map(METRIC.search, lines) if match and match[1] in LOAD]
    return ", ".join(f"{match[1]} {int(match[2]):,}" for match in metrics)
