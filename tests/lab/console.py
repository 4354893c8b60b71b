"""Run in a host: a client of a guest's console, as `console.py SOCKET QUESTION...`. Prints the witness's answers."""

import socket
import sys

WITHIN = 100


class Console:
    def __init__(self, path):
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.settimeout(WITHIN)
        self._stream.connect(path)
        self._lines = self._stream.makefile("rb")

    def ask(self, question):
        self._stream.sendall(question.encode() + b"\n")

    def answer(self):
        """The next line that is an answer."""
        for line in self._lines:
            # The kernel may have printed something before it on the line.
            found = line.find(b"@")
            if found >= 0:
                return line[found + 1 :].decode(errors="replace").strip()
        raise SystemExit("the console was closed")


def ask(console, question):
    """Prints the answer to a question."""
    console.ask(question)
    while True:
        kind, _, text = console.answer().partition(" ")
        if kind.startswith("|"):
            print(f"{kind[1:]} {text}".rstrip())
        elif kind != "ended":
            print(text)
            return
        elif text == "0":
            return
        else:
            raise SystemExit(f"{question}: {text}")


def main():
    console = Console(sys.argv[1])
    for question in sys.argv[2:]:
        ask(console, question)


main()
