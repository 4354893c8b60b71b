"""The scenario `guests`: two emulated hosts under different kernels, an unmodified Linux guest that moves between them,
and an observer outside of both.

What belongs here: what is done in which order, and what must hold. What does not: how hosts and guests are made.
"""

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import devices
import disk
import stress
from guest import Guest, find_decamp, trouble
from host import NAMES, Host, issue_certificates
from kernel import DIR, Kernel
from machine import NEEDS as MACHINE_NEEDS
from network import Network
from observer import Announcements, Observer
from telling import Failed, part, say

NEEDS = [*MACHINE_NEEDS, "zstd", "ip", "rustc", "ldd", "/dev/net/tun"]
KERNELS = (os.environ.get("DECAMP_LAB_KERNELS") or "linux-image-amd64 linux-image-amd64@trixie").split()
MOVES = int(os.environ.get("DECAMP_LAB_MOVES") or 10)
DELAY, LOSS = os.environ.get("DECAMP_LAB_DELAY") or "1ms", os.environ.get("DECAMP_LAB_LOSS") or "0.1%"
CPUS, MEMORY = 2, "512M"
# The guest's clock may be off its host's by no more than that after a move than before, in milliseconds; and that must
# be known so well.
CLOCK_WITHIN, SURE_WITHIN = 10.0, 10.0
# Seconds for a move, and for the file on the disk to be there.
MOVE, FILL = 600, 600


def run(scratch, words):
    """Does all of it."""
    if words:
        raise Failed(f"guests takes no arguments: {' '.join(words)}")
    hosts = []
    try:
        _run(scratch, hosts)
    finally:
        for host in hosts:
            host.stop()


def at_once(calls):
    """Makes several calls at the same time; the first error of theirs."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def boot_hosts(kernels, scratch, hosts, decamp, *, models=("max", "max"), devices=(), modules=""):
    """Two hosts with agents, each of its own model of processor, with these devices of QEMU's and modules besides."""
    network = Network()
    issue_certificates(decamp, scratch / "pki")
    with part("hosts boot"):
        for name, kernel, model in zip(NAMES, kernels, models):
            hosts.append(Host(name, kernel, scratch, network, decamp, cpu=model, devices=devices))
        for host in hosts:
            host.machine.wait_ready()
            say(f"{host.name} is under Linux {host.machine.release}")
    with part("hosts get KVM, network and agents"):
        at_once([partial(host.set_up, delay=DELAY, loss=LOSS, modules=modules) for host in hosts])


def start_guest(guest, host):
    """Runs the guest, with its disk, its network and all that is to keep it busy; since when it is that."""
    host.run(f"truncate -s {disk.SIZE} {disk.IMAGE}")
    words = guest.arguments(guest.kernel.image, memory=MEMORY, cpus=CPUS, disk=disk.IMAGE, net=True)
    with part("guest boots"):
        host.decamp("run", "vm", *words, "--vsock")
        said = guest.wait_up(host, 300)
        for line in said:
            say(f"  {line}")
    if f"on {CPUS} processors" not in said[-1]:
        raise Failed(f"The guest does not have {CPUS} processors")
    if "guest: has a disk" not in said:
        raise Failed("The guest cannot use its disk")
    with part("the guest fills its disk"):
        guest.wait_filled(host, FILL)
    with part("what Linux makes of its devices"):
        devices.check(guest, host)
    return stress.begin(guest, host)


def boot_elf(kernel, scratch, host):
    """The same kernel as an ELF file boots too, boots again when its guest resets itself, and switches itself off when its
    power button is pressed; this guest does not move."""
    guest = Guest("elf", kernel, scratch)
    with part("guest boots from an ELF file"):
        host.decamp("run", "vm", *guest.arguments(kernel.vmlinux(), memory="256M", cpus=1, disk=None, net=None))
        guest.wait_up(host, 300)
    with part("guest resets itself"):
        guest.shell(host, "(sleep 0.5; reboot -f) >/dev/null 2>&1 &")
        guest.wait_up(host, 300, boots=2)
    with part("guest is switched off by its power button"):
        said = host.decamp("stop", guest.name)
    if "powered off" not in said:
        raise Failed(f"The guest did not switch itself off: {said}")


def move(guest, source, destination, observer, announcements, *, fresh=False):
    """Moves the guest once, where it never was if `fresh`; the report."""
    at_once([source.set_clock, destination.set_clock])
    before, sure_before = guest.clock(source)
    used = source.used(disk.IMAGE)
    announcements.take()
    report = source.migrate(guest.name, destination.name, *guest.storage, within=MOVE)
    after, sure_after = guest.clock(destination)
    asked, ended = report["asked_ns"], report["asked_ns"] + round(report["total_ms"] * 1e6)
    rewritten = guest.written(destination, asked, ended)
    state = guest.look(destination)
    off, sure = after - before, sure_before + sure_after
    say(
        f"  {source.name} to {destination.name}: down {report['downtime_ms']:.0f} ms of {report['total_ms']:.0f} ms, "
        f"{disk.mib(report['wire_bytes'])}; clock {off:+.1f} ms (sure to {sure:.1f}); "
        f"{state['beats']} beats, the longest {state['longest_ms']} ms; gap in the stream {observer.gap():.0f} ms"
    )
    say(f"    {disk.check_wire(report, used, rewritten, fresh)}")
    announced = announcements.take()
    say(f"    announced: {', '.join(f'{kind} {count} times' for kind, count in announced.items())}")
    if not all(announced.values()):
        raise Failed("Not everybody who should has announced where the guest is now")
    if sure > SURE_WITHIN:
        raise Failed(f"What the guest's clock does cannot be told: it is known to {sure:.1f} ms")
    if abs(off) > CLOCK_WITHIN + sure:
        raise Failed(f"The guest's clock moved by {off:.1f} ms against its hosts' clocks")
    return report


def move_busy(guest, hosts, *watching):
    """Moves the guest to and fro while everything in it is at work."""
    reports = []
    for number in range(MOVES):
        source, destination = hosts[number % 2], hosts[(number + 1) % 2]
        reports.append(move(guest, source, destination, *watching, fresh=not number))
        stress.check_runs(guest, destination)
    for what in ("downtime", "total"):
        times = [report[f"{what}_ms"] for report in reports]
        say(f"{what} of {MOVES} moves: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms")


def move_quiet(guest, source, destination, *watching):
    """Once more, with nobody writing to the disk: the image that is left and the one that came are the same."""
    guest.rest(source)
    with part("a move with the disk at rest"):
        move(guest, source, destination, *watching)
    with part("checksums of both images"):
        disk.compare(source, destination)
    with part("the guest verifies its disk"):
        guest.verify_disk(destination)
        guest.go(destination)


def check_words(guest, host, hosts, scratch):
    """What the guest and its kernel say in the end; what hosts' kernels say is only told."""
    state = guest.look(host)
    say(f"  the guest verified {disk.mib(state['verified'])} of its disk, and wrote {disk.mib(state['written'])}")
    log = guest.kernel_log(host)
    (scratch / "guest.dmesg").write_text("\n".join(log))
    if trouble(log):
        raise Failed("The guest's kernel complains:\n" + "\n".join(trouble(log)))
    for one in hosts:
        for line in trouble(one.run("dmesg").splitlines()):
            say(f"  note: {one.name}'s kernel says: {line}")
    return state


def _run(scratch, hosts):
    decamp = find_decamp()
    with part("kernels, stress-ng and the guest's files"):
        kernels = [Kernel.fetch(package) for package in KERNELS]
        stress_ng = stress.StressNg()
        guest = Guest("g", kernels[0], scratch, stress=stress_ng, on_disk=disk.FILE)
    with part("stress-ng is tried here"):
        stress_ng.prove_that_it_tells()
    boot_hosts(kernels, scratch, hosts, decamp)
    begun = start_guest(guest, hosts[0])
    first = guest.look(hosts[0])
    observer, announcements = Observer(), Announcements()
    with part(f"{MOVES} moves"):
        move_busy(guest, hosts, observer, announcements)
    here, there = hosts[MOVES % 2], hosts[(MOVES + 1) % 2]
    say(f"longest gap in the TCP stream: {observer.longest():.0f} ms")
    with part("stress-ng ends"):
        say(f"  it verified, and is content: {stress.end(guest, here, begun)}")
    move_quiet(guest, here, there, observer, announcements)
    observer.close()
    announcements.close()
    with part("what Linux makes of its devices after the moves"):
        devices.check(guest, there)
    with part("the guest's own words"):
        state = check_words(guest, there, hosts, scratch)
    if any(state[what] <= first[what] for what in ("beats", "passes", "written", "verified")):
        raise Failed(f"The guest does not go on: {first}, then {state}")
    boot_elf(kernels[0], scratch, there)
