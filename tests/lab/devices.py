"""What an unmodified Linux makes of the guest's devices: which features it took, and whether they do what they promise.

What belongs here: one device after the other, as seen from both ends. What does not: when the guest moves.
"""

import shlex
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from disk import IMAGE, mib
from guest import ADDRESS, ECHO_PORT, HERE, VSOCK_PORT
from telling import Failed, say

# By their numbers (Virtual I/O Device 1.2, section 5): a name, and the features without which Linux would not do what is
# asked of it here, by their bits.
VERSION_1 = {"version 1": 32}
DEVICES = {
    1: ("net", {"csum": 0, "guest csum": 1, "mac": 5, "guest tso4": 7, "guest tso6": 8, "host tso4": 11, "host tso6": 12,
                "mrg rxbuf": 15, "status": 16, "ctrl vq": 17, "guest announce": 21}),
    2: ("block", {"flush": 9, "config wce": 11, "discard": 13, "write zeroes": 14}),
    3: ("console", {}),
    4: ("entropy", {}),
    5: ("balloon", {"reporting": 5}),
    19: ("vsock", {}),
}
# MiB that are written and given back again, and what of it must have been seen to be taken and given back: on the disk,
# and in memory, of which only what is whole after that is reported, 2 MiB at once.
MUCH, SEEN = 32, 24
MUCH_MEMORY, SEEN_MEMORY = 96, 48
# Seconds within which a page that is free is reported (the kernel waits two), and a console says what it was told.
WITHIN = 120
# Bytes that are sent to the guest, and come back, and the longest frame without offloads.
STREAM, FRAME = 4 << 20, 1514


def check(guest, host):
    """All of it, on the host where the guest is."""
    _check_features(guest, host)
    _check_discard(guest, host)
    _check_reporting(guest, host)
    _check_offloads(guest, host)
    _check_console(guest, host)
    _check_vsock(guest, host)
    say(f"  vector registers that are watched: {guest.registers(host)}")


def _check_features(guest, host):
    said = guest.shell(host, "cd /sys/bus/virtio/devices; for one in *; do cat $one/device $one/features; done")
    found = {int(device, 16): features for device, features in zip(said[::2], said[1::2])}
    for number, (name, features) in DEVICES.items():
        if number not in found:
            raise Failed(f"The guest has no driver for its {name} device: {said}")
        lacks = [one for one, bit in (features | VERSION_1).items() if found[number][bit] != "1"]
        if lacks:
            raise Failed(f"The guest's {name} driver did not take {', '.join(lacks)}: {found[number]}")
    if "virtio_rng" not in (chosen := guest.shell(host, "cat /sys/class/misc/hw_random/rng_current")[0]):
        raise Failed(f"The guest has its randomness from {chosen}")
    if len(guest.shell(host, "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | od -An -tx1")[0].split()) != 16:
        raise Failed("The guest's entropy device gives nothing")


def _check_discard(guest, host):
    """What a file system discards goes from the image. Zeros are written as any other content is."""
    before = host.used(IMAGE)
    guest.shell(host, f"dd if=/dev/zero of=/mnt/much bs=1M count={MUCH} 2>/dev/null; sync")
    with_it = host.used(IMAGE)
    said = guest.shell(host, "rm /mnt/much; sync; fstrim -v /mnt")
    after = host.used(IMAGE)
    say(f"  discard: the image takes {mib(before)}, with a file more {mib(with_it)}, without it {mib(after)}")
    if with_it - before < SEEN << 20 or with_it - after < SEEN << 20:
        raise Failed(f"What the guest discarded is still in the image: {said}")


def _check_reporting(guest, host):
    """Memory that the guest has no use for goes back to the host."""
    # Its file on the disk would be remembered again.
    guest.rest(host)
    guest.shell(host, f"dd if=/dev/zero of=/tmp/much bs=1M count={MUCH_MEMORY} 2>/dev/null")
    with_it = _guest_memory(host)
    # What it remembers of its disk, too, so that it needs none of that for it at once.
    guest.shell(host, "rm /tmp/much; echo 3 >/proc/sys/vm/drop_caches")
    deadline = time.monotonic() + WITHIN
    while (after := _guest_memory(host)) > with_it - (SEEN_MEMORY << 20):
        if time.monotonic() > deadline:
            raise Failed(f"Free pages are not reported: of {mib(with_it)} the guest keeps {mib(after)}")
        time.sleep(1)
    guest.go(host)
    say(f"  free page reporting: the guest takes {mib(with_it)}, and {mib(after)} once it gave back what it needs no more")


def _guest_memory(host):
    """Bytes that the guest's memory takes."""
    script = (
        'for fd in /proc/[0-9]*/fd/*; do case $(readlink "$fd") in\n'
        '/memfd:decamp-guest*) stat -L -c %b "$fd" ;;\nesac; done 2>/dev/null | sort -n | tail -n 1'
    )
    return int(host.run(script)) * 512


def _check_offloads(guest, host):
    """A stream travels in frames that are longer than any on a cable, both ways."""
    (tap,) = host.run("ls /sys/class/net/br0/brif | grep -v workloads").split()
    counting = f"setsid python3 {HERE}/frames.py {tap} >/run/frames 2>&1 </dev/null & echo $!"
    pid = host.run(f"{counting}\nuntil grep -q ready /run/frames; do sleep 0.1; done").strip()
    with socket.create_connection((ADDRESS, ECHO_PORT), WITHIN) as stream, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(stream.sendall, bytes(STREAM))
        _take(stream)
        sending.result()
    said = host.run(f"kill {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done; cat /run/frames").split()
    from_guest, to_guest = map(int, said[1:])
    say(f"  offloads: frames of up to {from_guest} bytes from the guest, and up to {to_guest} to it")
    if min(from_guest, to_guest) <= FRAME:
        raise Failed("No frame was longer than on a cable: no offload does anything")


def _take(stream):
    left = STREAM
    while left > 0:
        came = len(stream.recv(1 << 16))
        if not came:
            raise Failed(f"The guest's stream ended {left} bytes too early")
        left -= came


def _check_console(guest, host):
    """What is printed at the virtio console is in the log, and what is typed comes to whoever printed last there."""
    word = f"{time.monotonic_ns():x}"
    script = (
        f"sleep 1; echo hvc: ask {word} >/dev/hvc0; read -r line </dev/hvc0; echo hvc: has $line >/dev/hvc0; "
        f"sleep 1; echo guest: is back from {word} >/dev/console"
    )
    guest.shell(host, f"({script}) >/dev/null 2>&1 </dev/null &")
    _wait_log(guest, host, f"hvc: ask {word}")
    host.run(f"echo typed-{word} | decamp console {shlex.quote(guest.name)} --for 2s")
    for text in (f"hvc: has typed-{word}", f"guest: is back from {word}"):
        _wait_log(guest, host, text)
    say("  console: printed and typed at hvc0")


def _wait_log(guest, host, text):
    log = f"decamp logs {shlex.quote(guest.name)}"
    host.run(f"timeout {WITHIN} bash -c {shlex.quote(f'until {log} | grep -q {shlex.quote(text)}; do sleep 0.3; done')}", WITHIN + 20)


def _check_vsock(guest, host):
    """A program of the host reaches one of the guest's."""
    place = f"/var/lib/decamp/workloads/{guest.name}/vsock.sock"
    said = host.run(shlex.join(["python3", f"{HERE}/vsock.py", place, str(VSOCK_PORT)]))
    say(f"  vsock: {said.strip()}")
