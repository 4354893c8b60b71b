"""QEMU's own machine for the lab's guest, inside a host, and QEMU's own migration: the peer.

`-M microvm` is QEMU's machine for a quick boot, and it migrates. It has what decamp's has: virtio over MMIO, found by
ACPI, and a serial port. Both ends of a migration use certificates of the hosts'.

What belongs here: how QEMU is started and told what to do. What does not: what is measured of it.
"""

import copy
import json
import os
import shlex
import subprocess

from guest import HERE
from host import address

PROGRAM = "qemu-system-x86_64"
PLACE = "/run/qemu"
TAP = "peer"
PORT = 4444
# Milliseconds that a stop may be predicted to take; decamp aims at as many.
DOWNTIME = 300
# What was seen to boot this guest and to migrate it here. More can be left out (`pit=off,pic=off,rtc=off`).
MACHINE = os.environ.get("DECAMP_LAB_MICROVM") or "microvm,acpi=on"
# Seconds that a migration may take.
WITHIN = 300
# Channels of multifd; none: one stream of all.
CHANNELS = int(os.environ.get("DECAMP_LAB_CHANNELS") or 0)


class Qemu:
    """The guest under QEMU."""

    name = "QEMU"

    def __init__(self, guest, *, memory, cpus, cmdline):
        self.guest, self._memory, self._cpus, self._cmdline = copy.copy(guest), memory, cpus, cmdline
        self.guest.console, self.log = f"{PLACE}/console", f"{PLACE}/console.log"

    def describe(self):
        """What it is and how it is used, for the result."""
        done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
        multifd = f", multifd with {CHANNELS} channels" if CHANNELS else ""
        return f"QEMU {done.stdout.split()[3]} (microvm on KVM{multifd}, TLS)"

    def set_up(self, host):
        """Makes what QEMU needs on a host, once."""
        pki, guest = host.pki, self.guest
        host.run(
            f"mkdir -p {PLACE}/pki && cd {PLACE}/pki && ln -s {pki}/ca.pem ca-cert.pem\n"
            f"for end in server client; do ln -s {pki}/{host.name}.pem $end-cert.pem\n"
            f"ln -s {pki}/{host.name}.key $end-key.pem; done\n"
            f"cp {guest.kernel.image} {PLACE}/kernel && cp {guest.initrd} {PLACE}/initrd\n"
            f"ip tuntap add {TAP} mode tap && ip link set {TAP} master br0 up"
        )

    def command(self, *more):
        """The words by which it starts."""
        words = [PROGRAM, "-accel", "kvm", "-M", MACHINE, "-cpu", "host", "-smp", self._cpus, "-m", self._memory]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-kernel", f"{PLACE}/kernel", "-initrd", f"{PLACE}/initrd", "-append", self._cmdline]
        words += ["-chardev", f"socket,id=console,path={self.guest.console},server=on,wait=off,logfile={self.log}"]
        words += ["-serial", "chardev:console", "-qmp", f"unix:{PLACE}/qmp,server=on,wait=off"]
        words += ["-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no"]
        words += ["-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]
        words += ["-device", "virtio-balloon-device,free-page-reporting=on"]
        for end in ("client", "server"):
            words += ["-object", f"tls-creds-x509,id={end},dir={PLACE}/pki,endpoint={end},verify-peer=on"]
        return list(map(str, [*words, *more]))

    def wait_incoming(self, host):
        """Starts the machine that the guest is to come to."""
        words = self.command("-incoming", "defer")
        host.run(
            f"setsid {shlex.join(words)} >{PLACE}/said 2>&1 </dev/null &\n"
            f"until [[ -S {PLACE}/qmp ]]; do kill -0 $! || {{ cat {PLACE}/said >&2; exit 1; }}; sleep 0.05; done"
        )
        self._ask(host, self._settings({"tls-creds": "server"}), ("migrate-incoming", {"uri": f"tcp:{address(host.name)}:{PORT}"}))

    def migrate(self, source, destination, rate):
        """Moves it, and ends the machine that it left; milliseconds from the command on, and what QEMU says."""
        own = {"tls-creds": "client", "tls-hostname": destination.name}
        settings = self._settings({**own, "max-bandwidth": int((rate or 1e5) * 1e6), "downtime-limit": DOWNTIME})
        uri = f"tcp:{address(destination.name)}:{PORT}"
        done = self._ask(source, settings, ("migrate", {"uri": uri}), within=WITHIN)
        self.quit(source)
        return done["ms"], done["said"]

    @staticmethod
    def rate(said):
        """What was sent of memory in MB/s."""
        return said["ram"]["transferred"] / said["total-time"] / 1e3

    @staticmethod
    def tell(said):
        """What QEMU says of a migration, in a line."""
        ram = said["ram"]
        return (
            f"says {said['downtime']} of {said['total-time']} ms, set-up {said['setup-time']}; "
            f"{ram['transferred'] / 1e6:.1f} MB in {ram['dirty-sync-count']} rounds"
        )

    def end(self, host):
        """Ends it on `host`, whatever it does."""
        host.run(f"pkill -KILL -f '{PLACE}/qm[p],' || true; rm -f {PLACE}/qmp {self.guest.console}")

    def quit(self, host):
        self._ask(host, [("quit", {})])
        host.run(f"while [[ -S {PLACE}/qmp ]]; do sleep 0.05; done")

    def _settings(self, own):
        # As decamp does with a guest that writes faster than the link.
        on = ["events", "auto-converge"] + (["multifd"] if CHANNELS else [])
        capabilities = [{"capability": name, "state": True} for name in on]
        parameters = {**own, **({"multifd-channels": CHANNELS} if CHANNELS else {})}
        return [
            ("migrate-set-capabilities", {"capabilities": capabilities}),
            ("migrate-set-parameters", parameters),
        ]

    def _ask(self, host, settings, *orders, within=60):
        words = ["python3", f"{HERE}/qmp.py", f"{PLACE}/qmp", json.dumps([*settings, *orders])]
        return json.loads(host.run(shlex.join(words), within))
