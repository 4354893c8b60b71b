"""The lab's guest: an unmodified kernel of Debian's, an initial file system with the witness in it, and questions to
the witness over the guest's console.

What belongs here: the guest's files and what it says. What does not: where it runs.
"""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

from initramfs import Initramfs
from telling import Failed

HERE = Path(__file__).resolve().parent
MODULES = ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_console"]
MODULES += ["vmw_vsock_virtio_transport", "button", "evdev"]
# ext4 asks the kernel for its checksum, by no dependency.
MODULES += ["crc32c_generic", "ext4"]
ADDRESS = "10.77.1.9"
# As witness.rs has it.
ECHO_PORT, TIME_PORT, VSOCK_PORT = 7777, 7778, 7779
CMDLINE = f"console=ttyS0 quiet panic=-1 lab.address={ADDRESS}/24 lab.memory=32768"
# What a kernel says when time, a processor or a device is not as it must be; and what only sounds like it.
TROUBLE = re.compile(
    r"warning|bug:|oops|call trace|stall|lockup|hung|unstable|skew|jump|backwards|mce:|i/o error|timed out|timekeeping",
    re.IGNORECASE,
)
# Emulated processors do not promise a constant counter; Linux then does not trust it on AMD's with several of them.
HARMLESS = re.compile(
    r"due to TSCs unsynchronized|jump-optimization|jump label|hung_task|stall.*timeout is|lockup.*permanently enabled"
    r"|Installing|loops_per_jiffy"
)


def trouble(log):
    """Lines of a kernel's log that should not be there."""
    return [line for line in log if TROUBLE.search(line) and not HARMLESS.search(line)]


class Guest:
    """A guest by name; where it runs is told to each question."""

    def __init__(self, name, kernel, scratch, *, stress=None, on_disk=16):
        self.name, self.kernel, self._stress = name, kernel, stress
        # MiB that its witness keeps on its disk.
        self._on_disk = on_disk
        # What `migrate` is told of its disk.
        self.storage = []
        self.console = f"/var/lib/decamp/workloads/{name}/console.sock"
        self.initrd = scratch / f"{name}.initramfs"
        self._write_initramfs(scratch)

    def arguments(self, image, *, memory, cpus, disk, net, cmdline=CMDLINE):
        """What follows `decamp run vm`."""
        words = [self.name, "--kernel", image, "--initrd", self.initrd]
        words += ["--cmdline", f"{cmdline} lab.disk={self._on_disk}"]
        words += ["--memory", memory, "--cpus", cpus]
        if disk:
            words += ["--disk", disk]
            self.storage = ["--storage", f"{disk}=copy"]
        if net:
            words += ["--net", "bridge=br0"]
        return words

    def wait_up(self, host, within, boots=1):
        """Waits until its witness answers after so many boots; what it said of them."""
        log = f"decamp logs {shlex.quote(self.name)}"
        script = f"until (($({log} | grep -c ^@witness) >= {boots})); do decamp ls | grep -qw {self.name} || exit; sleep 0.3; done; {log}"
        order = host.machine.order(f"timeout {within} bash -c {shlex.quote(script)} || {{ {log}; decamp ls; exit 1; }}")
        return [line for line in order.check(within + 20).splitlines() if line.startswith("guest:")]

    def wait_filled(self, host, within):
        """Waits until its witness has its file on the disk."""
        deadline = time.monotonic() + within
        while not self.look(host)["file"]:
            if time.monotonic() > deadline:
                raise Failed(f"The witness in {self.name} does not fill its disk within {within} s")
            time.sleep(1)

    def look(self, host):
        """What the witness says: its state; an error where it saw anything that must not be."""
        state = json.loads(self._ask(host, "state")[0])
        if state.get("wrong") != [] or state.get("steps") != 0:
            raise Failed(f"The witness in {self.name} on {host.name} saw: {state}")
        return state

    def clock(self, host):
        """By how many milliseconds its clock is ahead of its host's, and how sure that is. Asked over the network."""
        behind, sure = host.compare_clock(ADDRESS, TIME_PORT)
        return -behind, sure

    def written(self, host, began, ended):
        """Bytes that its witness wrote to the disk between two moments, in nanoseconds."""
        return int(self._ask(host, f"written {began} {ended}")[0])

    def rest(self, host):
        """Nothing is written to its disk any more, and all that was is there."""
        self._tell(host, "rest", "at rest")
        self.shell(host, "sync")

    def verify_disk(self, host):
        """Has the witness read all of its file from the disk."""
        self._tell(host, "verify", "verified")

    def go(self, host):
        """The disk is written to again."""
        self._tell(host, "go", "on")

    def cpuid(self, host, leaf):
        """What CPUID tells it: EAX, EBX, ECX and EDX of a leaf."""
        return [int(word) for word in self._ask(host, f"cpuid {leaf}")[0].split()]

    def registers(self, host):
        """Which of its processors' vector registers its witness watches."""
        return self._ask(host, "registers")[0]

    def kernel_log(self, host):
        """All that its kernel has said."""
        return self._ask(host, "sh dmesg")

    def shell(self, host, command):
        """What a command prints that is run in it."""
        return self._ask(host, f"sh {command}")

    def _tell(self, host, what, done):
        answer = self._ask(host, what)
        if answer != [done]:
            raise Failed(f"The witness in {self.name} on {host.name}, told to {what}: {answer}")

    def _ask(self, host, *questions):
        words = ["python3", f"{HERE}/console.py", self.console, *questions]
        return host.run(shlex.join(words), 120).splitlines()

    def _write_initramfs(self, scratch):
        witness = scratch / "witness"
        # One static program, so that the guest needs no libraries.
        command = ["rustc", "--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]
        command += ["-o", witness, HERE / "witness.rs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"The witness cannot be built:\n{done.stderr}")
        archive = Initramfs()
        archive.busybox()
        archive.modules(self.kernel, MODULES)
        archive.copy(HERE / "guest.init", "init", 0o755)
        archive.copy(witness, "witness", 0o755)
        if self._stress:
            self._stress.put_into(archive)
        for place in ("proc", "sys", "dev", "mnt", "tmp"):
            archive.directory(place)
        archive.write(self.initrd)


def find_decamp():
    """The binary to run in the hosts: DECAMP_BIN, or what was built here last; built if there is none."""
    root = HERE.parent.parent
    named = os.environ.get("DECAMP_BIN")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or root / "target")
    for path in [Path(named)] if named else [target / "release/decamp", target / "debug/decamp"]:
        if os.access(path, os.X_OK):
            return path.resolve()
    if named:
        raise Failed(f"There is no decamp at {named}")
    subprocess.run(["cargo", "build", "--locked", "--release"], cwd=root, check=True)
    return (target / "release/decamp").resolve()
