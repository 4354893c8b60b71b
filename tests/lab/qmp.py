"""Run in a host: gives orders to a QEMU, as `qmp.py SOCKET ORDERS`, where ORDERS is a JSON array of [command, arguments].

After a `migrate` it waits until QEMU says that it has completed. Prints one line of JSON: `ms`, from the last order to
its end, and `said`, what QEMU answered to it; of a migration, what it says of that.
"""

import json
import socket
import sys
import time

# Seconds.
WITHIN = 300
ADDED_UP = 10


class Monitor:
    def __init__(self, path):
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.settimeout(WITHIN)
        self._stream.connect(path)
        self._lines = self._stream.makefile("r", encoding="utf-8")
        self._line()
        self.ask("qmp_capabilities", {})

    def ask(self, command, arguments):
        self._stream.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            line = self._line()
            if "error" in line:
                raise SystemExit(f"{command}: {line['error']['desc']}")
            if "return" in line:
                return line["return"]

    def completed(self):
        """Waits for the end of a migration; what is said of it."""
        while True:
            line = self._line()
            status = line.get("data", {}).get("status") if line.get("event") == "MIGRATION" else None
            if status in ("failed", "cancelled"):
                raise SystemExit(f"The migration {status}: {self.ask('query-migrate', {})}")
            if status == "completed":
                return

    def _line(self):
        line = self._lines.readline()
        if not line:
            raise SystemExit("QEMU is gone")
        return json.loads(line)


def main():
    monitor = Monitor(sys.argv[1])
    for command, arguments in json.loads(sys.argv[2]):
        began = time.monotonic()
        said = monitor.ask(command, arguments)
        if command == "migrate":
            monitor.completed()
        took = (time.monotonic() - began) * 1000
        if command == "migrate":
            # It says that it has completed before it has added up what that took.
            deadline = time.monotonic() + ADDED_UP
            while not (said := monitor.ask("query-migrate", {})).get("total-time"):
                if time.monotonic() > deadline:
                    raise SystemExit(f"The migration has completed, and took no time: {said}")
                time.sleep(0.05)
    print(json.dumps({"ms": took, "said": said}))


main()
