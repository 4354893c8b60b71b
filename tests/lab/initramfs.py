"""An initial file system, as the kernel unpacks it: a cpio archive ("newc", Documentation/driver-api/early-userspace)
that is written here, so that it needs neither root nor a directory.

What belongs here: the archive. What does not: what is in it.
"""

import gzip
import shutil
import stat
from pathlib import Path

from telling import Skipped


class Initramfs:
    """Files that become an archive. Directories above a file come by themselves."""

    def __init__(self):
        self._entries = {}

    def file(self, path, content, mode=0o644):
        self._add(path, stat.S_IFREG | mode, content.encode() if isinstance(content, str) else content)

    def copy(self, source, path, mode=0o644):
        self.file(path, Path(source).read_bytes(), mode)

    def link(self, path, target):
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def directory(self, path):
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def busybox(self):
        """A shell and what it calls, at /bin."""
        found = shutil.which("busybox", path="/bin:/usr/bin:/usr/local/bin")
        if not found:
            raise Skipped("busybox (Debian: busybox-static)")
        self.copy(found, "bin/busybox", 0o755)
        self.link("bin/sh", "busybox")

    def modules(self, kernel, names):
        """Modules and what they need, for modprobe; and their names, one a line, in /modules."""
        base = f"lib/modules/{kernel.release}"
        self.copy(kernel.modules / "modules.dep", f"{base}/modules.dep")
        for path in kernel.with_needed(names):
            self.copy(kernel.modules / path, f"{base}/{path}")
        self.file("modules", "".join(f"{name}\n" for name in names))

    def write(self, path):
        """Writes the archive, hardly compressed: emulated processors take long for more."""
        with gzip.open(path, "wb", compresslevel=1) as archive:
            for number, (name, (mode, content)) in enumerate(self._entries.items(), 1):
                archive.write(_entry(number, name, mode, content))
            archive.write(_entry(0, "TRAILER!!!", 0, b""))

    def _add(self, path, mode, content):
        parent = path.rpartition("/")[0]
        if parent and parent not in self._entries:
            self.directory(parent)
        self._entries[path] = (mode, content)


def _entry(number, name, mode, content):
    """A header of 6 + 13 × 8 hexadecimal digits, the name with a zero byte, and the content, each filled up to 4."""
    links, size, name_size = 1, len(content), len(name.encode()) + 1
    fields = (number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _filled(head) + _filled(content)


def _filled(content):
    return content + bytes(-len(content) % 4)
