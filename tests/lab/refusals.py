"""The scenario `refusals`: what a host cannot take is refused before anything is touched, with the reason, and the
guest runs on; and what the reasons ask for makes the same move possible.

What belongs here: destinations that lack something, and the ways around that. What does not: guests under load.
"""

import guests
from guest import Guest, find_decamp, trouble
from kernel import Kernel
from telling import Failed, part, say

NEEDS = guests.NEEDS
MODELS = ("max", "max,-avx2")
# AVX2's: leaf, register and bit of CPUID.
AVX2_LEAF, EBX, AVX2_BIT = 7, 1, 5
REFUSED = 3
BASELINE = "/srv/fleet.json"
SHARED, DISK = "/srv/shared", "/srv/shared/disk.img"
VLAN = 10
MOVE = 300


def run(scratch, words):
    """Does all of it."""
    if words:
        raise Failed(f"refusals takes no arguments: {' '.join(words)}")
    hosts = []
    try:
        _run(scratch, hosts)
    finally:
        for host in hosts:
            host.stop()


def boot_guest(guest, host, *words):
    with part(f"{guest.name} boots"):
        given = guest.arguments(guest.kernel.image, memory="256M", cpus=1, disk=None, net=True)
        host.decamp("run", "vm", *given, *words)
        guest.wait_up(host, 300)


def known_of(guest, host):
    """What a host knows of a guest: its name, kind and state, also of one that has left."""
    lines = (line.split() for line in host.decamp("ls", "--all").splitlines())
    return [words[:3] for words in lines if words[:1] == [guest.name]]


def is_refused(guest, source, destination, *reasons):
    """Moves a guest, and is refused with those words; nothing has come of it, here or there."""
    before, known = guest.look(source), known_of(guest, destination)
    code, report, said = source.try_to_migrate(guest.name, destination.name, within=MOVE)
    if code != REFUSED or report.get("outcome") != "refused":
        raise Failed(f"{guest.name} to {destination.name}: not refused, but {code}\n{said}\n{source.agent_log()}")
    texts = [refusal["text"] for refusal in report["refusals"]]
    for text in texts:
        say(f"  {text}")
    missing = [reason for reason in reasons if not any(reason in text for text in texts)]
    if missing:
        raise Failed(f"{guest.name} to {destination.name}: refused, but not for {missing}")
    if report["wire_bytes"] or report["downtime_ms"] is not None:
        raise Failed(f"{guest.name} to {destination.name}: refused, but not untouched: {report}")
    if known_of(guest, destination) != known:
        raise Failed(f"{guest.name} was refused, and {destination.name} has something of it")
    after = guest.look(source)
    if after["beats"] <= before["beats"]:
        raise Failed(f"{guest.name} does not run on: {before}, then {after}")


def moves(guest, source, destination):
    """Moves a guest, and looks at it there."""
    report = source.migrate(guest.name, destination.name, within=MOVE)
    guest.look(destination)
    say(f"  {guest.name} to {destination.name}: down {report['downtime_ms']:.0f} of {report['total_ms']:.0f} ms")
    return report


def sees_avx2(guest, host):
    """Whether a guest is told of AVX2."""
    return bool(guest.cpuid(host, AVX2_LEAF)[EBX] >> AVX2_BIT & 1)


def without_avx2(kernel, scratch, alpha, beta):
    """A guest that sees AVX2 is refused by a host without."""
    guest = Guest("wide", kernel, scratch)
    boot_guest(guest, alpha)
    if not sees_avx2(guest, alpha):
        raise Failed("A guest on a host with AVX2 does not see it")
    with part("a host without AVX2 refuses a guest that sees it"):
        is_refused(guest, alpha, beta, "avx2")
    alpha.decamp("stop", guest.name)


def start_held(guest, alpha, beta):
    """Starts a guest that is held to what both hosts have, with a disk on what both see."""
    for host in (alpha, beta):
        options = "trans=virtio,version=9p2000.L,msize=512000,cache=none"
        host.run(f"mkdir -p {SHARED} && mount -t 9p -o {options} shared {SHARED}")
    alpha.run(f"truncate -s 64M {DISK}")
    with part("the baseline of both hosts"):
        alpha.decamp("cpu", "baseline", beta.name, "--output", BASELINE)
    boot_guest(guest, alpha, "--cpu-baseline", BASELINE, "--disk", f"{DISK},shared")
    guest.wait_filled(alpha, 120)
    if sees_avx2(guest, alpha):
        raise Failed("A guest that is held to a baseline without AVX2 sees it")


def held_to_baseline(guest, alpha, beta):
    """It moves there and back, sees the same at both, and its disk does not travel."""
    leaves = [0, 1, 7, 0x80000001, 0x80000008]
    seen = [guest.cpuid(alpha, leaf) for leaf in leaves]
    # The second register of leaf 1 says on which processor it was asked.
    seen[1][EBX] &= 0xFF_FFFF
    for source, destination in ((alpha, beta), (beta, alpha)):
        report = moves(guest, source, destination)
        if report["disk_bytes"]:
            raise Failed(f"Of a shared disk {report['disk_bytes']} bytes were sent")
        guest.verify_disk(destination)
        now = [guest.cpuid(destination, leaf) for leaf in leaves]
        now[1][EBX] &= 0xFF_FFFF
        if now != seen:
            raise Failed(f"CPUID at {destination.name} is {now}, and was {seen}")


def between_vlans(guest, alpha, beta):
    """A bridge whose uplink is not in the guest's VLAN, or that knows of none, is refused."""
    filter_ = f"ip link set br0 type bridge vlan_filtering 1 vlan_default_pvid {VLAN}"
    with part("a bridge that does not tell VLANs apart is refused"):
        alpha.run(filter_)
        is_refused(guest, alpha, beta, "does not tell VLANs apart")
    with part("an uplink that is not in the VLAN is refused"):
        beta.run(f"{filter_} && bridge vlan del vid {VLAN} dev workloads")
        is_refused(guest, alpha, beta, "VLAN")
    with part("with its uplink in the VLAN it is not"):
        beta.run(f"bridge vlan add vid {VLAN} dev workloads pvid untagged")
        moves(guest, alpha, beta)
        # It can be reached there.
        guest.clock(alpha)


def _run(scratch, hosts):
    decamp = find_decamp()
    with part("kernels"):
        kernels = [Kernel.fetch(package) for package in guests.KERNELS]
    shared = scratch / "shared"
    shared.mkdir()
    devices = ["-fsdev", f"local,id=shared,path={shared},security_model=none,multidevs=remap"]
    devices += ["-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared"]
    guests.boot_hosts(kernels, scratch, hosts, decamp, models=MODELS, devices=devices)
    alpha, beta = hosts
    without_avx2(kernels[0], scratch, alpha, beta)
    guest = Guest("held", kernels[0], scratch)
    start_held(guest, alpha, beta)
    with part("held to the baseline, with a shared disk, it moves"):
        held_to_baseline(guest, alpha, beta)
    between_vlans(guest, alpha, beta)
    log = guest.kernel_log(beta)
    if trouble(log):
        raise Failed("The guest's kernel complains:\n" + "\n".join(trouble(log)))
