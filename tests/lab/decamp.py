"""The lab's guest under decamp, as it is compared with others.

What belongs here: what decamp is told. What does not: what is measured of it.
"""

import copy
import json
import shlex

from guest import HERE
from telling import Failed

FILES = "/srv/decamp"


class Decamp:
    """The guest under decamp, with its kernel and initial file system in its host's own memory."""

    name = "decamp"

    def __init__(self, guest, *, memory, cpus, cmdline):
        self.guest, self._image, self._archive = copy.copy(guest), guest.kernel.image, guest.initrd
        self.guest.initrd = f"{FILES}/initrd"
        self.log = f"/var/lib/decamp/workloads/{guest.name}/console.log"
        self._given = {"memory": memory, "cpus": cpus, "disk": None, "net": True, "cmdline": cmdline}
        self._hosts = []

    def set_up(self, host):
        """Makes what it needs on a host, once. The next hosts get the guest's files as it comes."""
        if not self._hosts:
            host.run(f"mkdir -p {FILES} && cp {self._image} {FILES}/kernel && cp {self._archive} {FILES}/initrd")
        self._hosts.append(host)

    def command(self):
        """The words by which it starts."""
        return list(map(str, ["decamp", "run", "vm", *self.guest.arguments(f"{FILES}/kernel", **self._given)]))

    def wait_incoming(self, host):
        """Agents see to that themselves, in the move."""

    def migrate(self, source, destination, rate):
        """Moves it; milliseconds from the command on, and the report. Without a rate nothing is compressed."""
        words = ["decamp", "migrate", self.guest.name, "--to", destination.name, "--json"]
        words += [] if rate else ["--compress", "none"]
        done = json.loads(source.run(shlex.join(["python3", f"{HERE}/stopwatch.py", *words]), 300))
        report = json.loads(done["output"])
        if report.get("outcome") != "completed":
            raise Failed(f"{self.guest.name} from {source.name} to {destination.name}: {report}")
        return done["ms"], report

    @staticmethod
    def rate(report):
        """What was sent of memory in MB/s in the first round."""
        first = report["rounds"][0]
        return first["wire_bytes"] / first["ms"] / 1e3

    @staticmethod
    def tell(report):
        """The report in a line."""
        stop = ", ".join(f"{name[:-3]} {took:.0f}" for name, took in report["downtime"].items())
        rounds = ", ".join(f"{one['wire_bytes'] / 1e6:.1f} MB in {one['ms']:.0f}" for one in report["rounds"])
        return (
            f"says {report['downtime_ms']:.0f} of {report['total_ms']:.0f} ms ({stop}); rounds: {rounds}; "
            f"files {report.get('file_bytes', 0) / 1e6:.1f} MB"
        )

    def quit(self, host):
        """Ends it on `host`, and takes away what any host has of it."""
        host.decamp("stop", self.guest.name)
        for one in self._hosts:
            one.run(f"! decamp ls --all | grep -qw {self.guest.name} || decamp rm {self.guest.name}")
