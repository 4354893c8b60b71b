"""The guest's disk: what it may cost on the wire, and whether both hosts' images are the same when nobody writes.

What belongs here: what must hold of a disk that moved. What does not: when it moves, and who writes to it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from telling import Failed, say

HERE = Path(__file__).resolve().parent
IMAGE, SIZE = "/srv/disk.img", "1G"
# MiB of the witness's file on it, which no compressor makes smaller.
FILE = 300
# Bytes on the wire may be so many times what is used of the disk and what was rewritten during the move.
WIRE = 1.3
# The copy may take so many times the room of what it was made from.
SPARSE = 1.05


def check_wire(report, used, rewritten, fresh):
    """What the disk took of a move, in words; an error if that was too much, or on its first way, when all of it has to
    travel, too little."""
    wire = report["disk_bytes"]
    ratio = wire / (used + rewritten)
    words = f"disk {mib(wire)} on the wire for {mib(used)} used and {mib(rewritten)} rewritten ({ratio:.2f})"
    if used < FILE << 20:
        raise Failed(f"The disk is not used as it should be: {words}")
    if not (FILE << 20 if fresh else 1) <= wire <= WIRE * (used + rewritten):
        raise Failed(f"Not what a disk should take: {words}")
    return words


def compare(source, destination):
    """Compares the image that a move left at its source with the one that the guest has now, and does nothing to."""
    ask = f"python3 {HERE}/checksum.py {IMAGE}; stat -c %b {IMAGE}"
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda host: host.run(ask, 300).split(), (source, destination)))
    (left, left_data, left_room), (came, _, came_room) = (
        (checksum, int(data), int(blocks) * 512) for checksum, data, blocks in said
    )
    for host, (checksum, data, blocks) in zip((source, destination), said):
        say(f"  {host.name}: {checksum}, {mib(int(data))} of data in {mib(int(blocks) * 512)}")
    if left != came:
        raise Failed(f"The images at {source.name} and {destination.name} differ")
    if left_data < FILE << 20 or came_room > SPARSE * left_room:
        raise Failed(f"The images at {source.name} and {destination.name} do not hold what they should")


def mib(count):
    return f"{count / (1 << 20):.0f} MiB"
