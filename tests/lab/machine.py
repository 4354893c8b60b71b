"""An emulated machine: a kernel, the outside's files below it, and orders that it carries out.

The machine sees this machine's files, which it cannot change, keeps what it writes in its own memory, and shares one
directory with the outside, /exchange. Orders are scripts there; a port of the machine tells which to run, and how
they ended.

What belongs here: the machine and the way in and out. What does not: what it is for.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import tsc
from initramfs import Initramfs
from telling import Failed

HERE = Path(__file__).resolve().parent
# Seconds in which a machine must have booted, and in which it has to go.
BOOT, GO = 300, 20
# Where tests/setup puts a newer one than Debian's.
QEMU = os.environ.get("DECAMP_QEMU") or "/opt/decamp-qemu/bin/qemu-system-x86_64"
# What of this machine's it takes.
NEEDS = [QEMU, "setpriv", "busybox", "dpkg-deb", "apt-get", "xz"]
MODULES = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"]


def _time():
    """What a kernel is told of the time stamp counter: it is this machine's, of every emulated processor."""
    return f"tsc=reliable tsc_early_khz={tsc.khz()}"


class Order:
    """A script that runs in a machine."""

    def __init__(self, machine, name, base):
        self.machine, self.name, self.base = machine, name, base
        self.code = None

    def output(self):
        return Path(f"{self.base}.out").read_text(errors="replace")

    def errors(self):
        return Path(f"{self.base}.err").read_text(errors="replace")

    def wait(self, within):
        """Its exit code. An order that is not done within so many seconds, or whose machine ends, is an error."""
        with self.machine.changed:
            self.machine.changed.wait_for(lambda: self.code is not None or self.machine.gone, within)
        if self.code is None:
            why = "the machine ended" if self.machine.gone else f"not done within {within} s"
            raise Failed(f"{self.machine.name}: {self._text()}: {why}\n{self._said()}")
        return self.code

    def show(self, within):
        """Its exit code; what it prints is printed here meanwhile."""
        deadline = time.monotonic() + within
        with open(f"{self.base}.out", encoding="utf-8", errors="replace") as output:
            while True:
                with self.machine.changed:
                    self.machine.changed.wait_for(lambda: self.code is not None or self.machine.gone, 0.5)
                    done = self.code is not None or self.machine.gone
                # Also what was printed last.
                shutil.copyfileobj(output, sys.stdout)
                sys.stdout.flush()
                if done or time.monotonic() > deadline:
                    return self.wait(0)

    def check(self, within):
        """What it printed; an error if it failed."""
        if self.wait(within):
            raise Failed(f"{self.machine.name}: {self._text()}: exit code {self.code}\n{self._said()}")
        return self.output()

    def _text(self):
        text = Path(self.base).read_text()
        return text if len(text) < 200 else f"{text[:200]}..."

    def _said(self):
        return (self.output() + self.errors())[-4000:]


class Machine:
    """A machine that runs until `stop`, or until this process ends. Its files are in `dir`: `console`, what its kernel
    says, `qemu`, what QEMU says, and `exchange`.

    It has one processor. QEMU (7.2 to 11.1) remembers an interrupt that a hypervisor injects beyond its delivery, and
    delivers it once more when another processor has it leave what it does before anything else happens: virtual machines
    lose their timers then, and the hypervisor's own kernel its stack. Of one processor nobody else asks that."""

    def __init__(self, name, kernel, scratch, *, memory="4G", cpu="max", patient=False, devices=()):
        self.name, self.kernel = name, kernel
        self.dir = scratch / name
        self.exchange = self.dir / "exchange"
        self.exchange.mkdir(parents=True)
        self.changed = threading.Condition()
        self.gone = False
        self.release = None
        self._orders = {}
        self._prepare()
        accel = "tcg,thread=single" if patient else "tcg,thread=multi"
        command = ["setpriv", "--pdeathsig", "KILL", "--", QEMU, "-name", name, "-accel", accel]
        command += ["-icount", "shift=1"] if patient else []
        command += ["-smp", "1"]
        command += ["-cpu", cpu, "-m", memory, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-serial", f"file:{self.dir}/console", "-kernel", kernel.image, "-initrd", self.dir / "initramfs"]
        command += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check {'' if patient else _time()}"]
        command += ["-fsdev", "local,id=files,path=/,security_model=none,readonly=on,multidevs=remap"]
        command += ["-device", "virtio-9p-pci,fsdev=files,mount_tag=files"]
        command += ["-fsdev", f"local,id=exchange,path={self.exchange},security_model=none,multidevs=remap"]
        command += ["-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange"]
        command += ["-chardev", f"socket,id=orders,path={self.dir}/orders,server=on,wait=off"]
        command += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=orders,name=orders"]
        command += devices
        self._errors = open(self.dir / "qemu", "w+", encoding="utf-8")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors)
        self._port = self._connect()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_ready(self):
        """Waits until it takes orders."""
        with self.changed:
            self.changed.wait_for(lambda: self.release or self.gone, BOOT)
        if not self.release:
            raise Failed(f"{self.name} did not boot within {BOOT} s:\n{self._last_words()}")

    def order(self, script):
        """Begins to run a script of bash."""
        name = f"order-{len(self._orders) + 1}"
        base = self.exchange / name
        base.write_text(script)
        for kind in ("out", "err"):
            Path(f"{base}.{kind}").touch()
        order = self._orders[name] = Order(self, name, base)
        try:
            self._port.sendall(f"{name}\n".encode())
        except OSError as error:
            raise Failed(f"{self.name} takes no orders ({error}):\n{self._last_words()}") from error
        return order

    def run(self, script, within=60):
        """What a script prints; an error if it fails."""
        return self.order(script).check(within)

    def stop(self):
        """Powers it off without a warning."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GO)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._port.close()
        self._errors.close()

    def _prepare(self):
        archive = Initramfs()
        archive.busybox()
        archive.modules(self.kernel, MODULES)
        archive.copy(HERE / "machine.init", "init", 0o755)
        for place in ("proc", "sys", "dev", "files", "own", "root"):
            archive.directory(place)
        archive.write(self.dir / "initramfs")
        (self.exchange / "rc").write_text((HERE / "machine.rc").read_text())
        (self.exchange / "modules").write_text(str(self.kernel.modules))
        (self.exchange / "scratch").write_text(str(self.dir.parent))
        (self.exchange / "name").write_text(self.name)

    def _connect(self):
        port, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + GO
        while True:
            try:
                port.connect(str(self.dir / "orders"))
                return port
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"QEMU does not start for {self.name}:\n{self._last_words()}") from None
                time.sleep(0.02)

    def _listen(self):
        with self._port.makefile(encoding="utf-8", errors="replace") as lines:
            try:
                for line in lines:
                    self._heard(line.split())
            except OSError:
                pass
        with self.changed:
            self.gone = True
            self.changed.notify_all()

    def _heard(self, words):
        with self.changed:
            match words:
                case ["ready", release]:
                    self.release = release
                case ["ended", name, code] if name in self._orders:
                    self._orders[name].code = int(code)
            self.changed.notify_all()

    def _last_words(self):
        console = self.dir / "console"
        said = console.read_text(errors="replace") if console.exists() else ""
        self._errors.flush()
        return Path(self._errors.name).read_text(errors="replace") + said[-4000:]
