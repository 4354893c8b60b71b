"""A kernel of Debian's with its modules: fetched once, unpacked, and looked into.

What belongs here: packages and what is in them. What does not: machines that boot them.
"""

import lzma
import os
import shutil
import struct
import subprocess
from pathlib import Path

from telling import Failed, Skipped, say

ROOT = Path(__file__).resolve().parent.parent.parent
DIR = Path(os.environ.get("DECAMP_LAB_DIR") or "/var/cache/decamp-lab")

# The head of a bzImage (Documentation/arch/x86/boot.rst): 512-byte sectors of real-mode code less one, the magic,
# the version, and from 2.08 on where in the protected-mode code the compressed kernel lies.
SETUP_SECTS, HEADER_MAGIC, VERSION, PAYLOAD = 0x1F1, 0x202, 0x206, 0x248
ZSTD, XZ, ELF = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x7fELF"


class Kernel:
    """An unpacked kernel package."""

    def __init__(self, tree):
        self.tree = tree
        self.release = next((tree / "lib/modules").iterdir()).name
        self.image = tree / f"boot/vmlinuz-{self.release}"
        self.modules = tree / "lib/modules" / self.release
        self._depends = self._read_depends()

    @classmethod
    def fetch(cls, package):
        """The kernel of a Debian package, PACKAGE or PACKAGE@SUITE; kept in DECAMP_LAB_DIR, and taken from there
        without a question to anybody."""
        tree = DIR / package
        if not (tree / "ready").exists():
            say(f"fetching {package}")
            _unpack(package, tree)
        return cls(tree)

    def vmlinux(self):
        """The kernel as an uncompressed ELF file, for those that boot nothing else."""
        path = self.tree / "boot" / f"vmlinux-{self.release}"
        if not path.exists():
            unpacked = _decompress(self.image.read_bytes(), self.image)
            new = path.with_suffix(".new")
            new.write_bytes(unpacked)
            new.rename(path)
        return path

    def with_needed(self, names):
        """Files of the modules in `names` and of all that they need, in the order in which they can be loaded,
        below `modules`. What is built into the kernel has none."""
        found = []

        def add(path):
            for needed in self._depends[path]:
                add(needed)
            if path not in found:
                found.append(path)

        built_in = {_module_name(line) for line in self._lines("modules.builtin")}
        by_name = {_module_name(path): path for path in self._depends}
        for name in names:
            if name in by_name:
                add(by_name[name])
            elif name not in built_in:
                raise Failed(f"Linux {self.release} of {self.tree} has no module {name}")
        return found

    def _lines(self, name):
        return (self.modules / name).read_text().splitlines()

    def _read_depends(self):
        depends = {}
        for line in self._lines("modules.dep"):
            path, needed = line.split(":", 1)
            depends[path] = needed.split()
        return depends


def _module_name(path):
    """As modprobe knows it."""
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def _unpack(package, tree):
    """Has a package unpacked at `tree`, with its modules plain files that depmod has looked through."""
    new = tree.with_name(tree.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    DIR.mkdir(parents=True, exist_ok=True)
    command = [ROOT / "tests/setup", "--unpack", package, new]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"no kernel {package} ({done.stderr.strip() or done.stdout.strip()})")
    if not (new / "lib").exists():
        (new / "lib").symlink_to("usr/lib")
    modules = next((new / "lib/modules").iterdir())
    # Emulated processors take long for this.
    packed = list(modules.rglob("*.ko.xz"))
    if packed:
        each = ["xargs", "-0", "-P", str(os.cpu_count()), "-n", "64", "xz", "-d"]
        subprocess.run(each, input="\0".join(map(str, packed)), text=True, check=True)
    subprocess.run(["busybox", "depmod", "-b", new, modules.name], check=True)
    (new / "ready").touch()
    shutil.rmtree(tree, ignore_errors=True)
    new.rename(tree)


def _decompress(image, name):
    """The ELF kernel within a bzImage."""
    if image[HEADER_MAGIC : HEADER_MAGIC + 4] != b"HdrS" or struct.unpack_from("<H", image, VERSION)[0] < 0x208:
        raise Failed(f"{name} is no bzImage of boot protocol 2.08 or later")
    start = (image[SETUP_SECTS] + 1) * 512
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    # The last four bytes are the length of what is compressed.
    payload = image[start + offset : start + offset + length - 4]
    if payload.startswith(XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(ZSTD):
        done = subprocess.run(["zstd", "-d", "-c"], input=payload, capture_output=True, check=False)
        kernel = done.stdout
    else:
        raise Failed(f"{name} is compressed in a way that is not known here ({payload[:6].hex()})")
    if not kernel.startswith(ELF):
        raise Failed(f"What is compressed in {name} is no ELF file")
    return kernel
