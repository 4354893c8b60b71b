"""A host of the lab: an emulated machine with KVM, an address on both networks, certificates and an agent.

What belongs here: making a host, and what one asks of it. What does not: what moves between hosts.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

from machine import Machine
from network import LINK, OBSERVER, SEGMENT, TIME_PORT
from telling import Failed

HERE = Path(__file__).resolve().parent
PORT = 7420
NAMES = ["alpha", "beta"]
# Where tests/setup puts a newer one than Debian's.
CRIU = Path(os.environ.get("DECAMP_CRIU") or "/opt/decamp-criu/bin/criu")


def issue_certificates(decamp, pki):
    """An authority and a certificate for each host."""
    subprocess.run([decamp, "pki", "init", pki], check=True, capture_output=True)
    for name in NAMES:
        subprocess.run([decamp, "pki", "issue", pki, name, "--address", address(name)], check=True, capture_output=True)


def address(name):
    """On the link."""
    return f"10.77.0.{NAMES.index(name) + 1}"


class Host:
    """A host that is booting. `set_up` waits for that."""

    def __init__(self, name, kernel, scratch, network, decamp, *, memory="4G", cpu="max", devices=()):
        self.name, self._decamp, self.pki = name, decamp, scratch / "pki"
        self._number = NAMES.index(name) + 1
        cards = network.card(LINK, f"02:77:00:00:00:{self._number:02x}")
        cards += network.card(SEGMENT, f"02:77:01:00:00:{self._number:02x}")
        self._config = scratch / f"{name}.toml"
        self._config.write_text(self._agent_toml())
        self.machine = Machine(name, kernel, scratch, memory=memory, cpu=cpu, devices=[*cards, *devices])

    def set_up(self, *, delay, loss, modules):
        """Waits until it has booted and makes a host of it, with its clock set."""
        self.machine.wait_ready()
        given = {
            "link": f"{address(self.name)}/24",
            "segment": f"10.77.1.{self._number}/24",
            "delay": delay,
            "loss": loss,
            "more": modules,
            "log": os.environ.get("DECAMP_LOG") or "info",
            "decamp": self._decamp,
            "config": self._config,
            "lab": HERE,
        }
        words = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in given.items())
        self.run(f"{words}source {HERE}/host.setup", 120)
        self.set_clock()

    def run(self, script, within=60):
        """What a script prints; an error if it fails."""
        return self.machine.run(script, within)

    def decamp(self, *words, within=60):
        """What `decamp` prints; an error if it fails."""
        return self.run(shlex.join(["decamp", *map(str, words)]), within)

    def set_clock(self):
        """Sets its clock by the lab's; by how many milliseconds it was off, and how sure that is."""
        return self._clock(OBSERVER, TIME_PORT)

    def compare_clock(self, address, port):
        """By how many milliseconds its clock is ahead of somebody else's, and how sure that is."""
        return self._clock(address, port, "look")

    def used(self, path):
        """Bytes that a file takes."""
        return int(self.run(f"stat -c %b {shlex.quote(path)}")) * 512

    def migrate(self, workload, to, *options, within):
        """Moves a workload away; the report, with when it was asked for in `asked_ns`, by this host's clock. A move
        that does not complete is an error."""
        code, report, said = self.try_to_migrate(workload, to, *options, within=within)
        if code or report.get("outcome") != "completed":
            raise Failed(f"{workload} from {self.name} to {to}: exit code {code}\n{said}\n{self.agent_log()}")
        return report

    def try_to_migrate(self, workload, to, *options, within):
        """Has a workload moved away; the exit code, the report, and all that was said."""
        command = shlex.join(["decamp", "migrate", workload, "--to", to, "--json", *options])
        order = self.machine.order(f"date +%s%N; {command}")
        try:
            code = order.wait(within)
        except Failed as error:
            raise Failed(f"{error}\n{self._words()}") from None
        asked, _, text = order.output().partition("\n")
        try:
            report = json.loads(text) | {"asked_ns": int(asked)}
        except ValueError:
            report = {}
        return code, report, text + order.errors()

    def _words(self):
        """What agent and keepers said, and where programs stand, of a host that may not answer any more."""
        script = "decamp ls; tail -n 30 /var/lib/decamp/workloads/*/*.log; ps -eo pid,stat,wchan:24,args"
        try:
            return self.agent_log() + self.run(script, 60)
        except Failed as error:
            return f"{self.agent_log()}{error}"

    def agent_log(self):
        """The end of what its agent said."""
        return (self.machine.exchange / "agent.log").read_text(errors="replace")[-3000:]

    def stop(self):
        self.machine.stop()

    def _clock(self, *words):
        said = self.run(shlex.join(["python3", f"{HERE}/clock.py", *map(str, words)])).split()
        return tuple(map(float, said))

    def _agent_toml(self):
        peers = "".join(f'{name} = "{address(name)}:{PORT}"\n' for name in NAMES if name != self.name)
        pki = self.pki
        return (
            f'name = "{self.name}"\nlisten = "{address(self.name)}:{PORT}"\n'
            f'ca = "{pki}/ca.pem"\ncertificate = "{pki}/{self.name}.pem"\nkey = "{pki}/{self.name}.key"\n'
            f'criu = "{CRIU}"\n'
            f"[hosts]\n{peers}"
        )
