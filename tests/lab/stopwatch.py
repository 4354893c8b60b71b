"""Run in a host: how long a command takes, as `stopwatch.py COMMAND...`, or how long it takes until a file holds a
text, as `stopwatch.py --until FILE TEXT COMMAND...`; the command goes on then if it has not ended.

Prints one line of JSON: `ms`, and what the command printed (`output`) if its end was waited for.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

# Seconds between two looks at the file, and the most that anything may take.
LOOK, WITHIN = 0.005, 240


def until(file, text, command):
    """Milliseconds until `text` is in `file`."""
    path = Path(file)
    path.unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    while time.monotonic() < began + WITHIN:
        if path.exists() and text.encode() in path.read_bytes():
            return (time.monotonic() - began) * 1000
        if process.poll():
            raise SystemExit(f"{command[0]} ended with {process.returncode}")
        time.sleep(LOOK)
    raise SystemExit(f"No {text!r} in {file} within {WITHIN} s")


def main():
    words = sys.argv[1:]
    if words[0] == "--until":
        print(json.dumps({"ms": until(words[1], words[2], words[3:])}))
        return
    began = time.monotonic()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=WITHIN)
    took = (time.monotonic() - began) * 1000
    print(json.dumps({"ms": took, "output": done.stdout}))
    sys.exit(done.returncode)


main()
