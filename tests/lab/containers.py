"""The scenario `containers`: tests of moving containers, in a machine under another kernel.

Debian 12's own, 6.1, keeps soft-dirty bits and scans no page tables; and the machine has cgroup v2.

What belongs here: which tests, and how they are run. What does not: tests.
"""

import json
import os
import shlex
import subprocess

from kernel import ROOT, Kernel
from machine import NEEDS as MACHINE_NEEDS
from machine import Machine
from telling import Failed, part, say

NEEDS = [*MACHINE_NEEDS, "cargo"]
PACKAGE = os.environ.get("DECAMP_LAB_KERNEL") or "linux-image-amd64"
PATIENT = bool(os.environ.get("DECAMP_LAB_PATIENT"))
# What is run if nothing is named: both trackers that this kernel has, and a container that goes on.
CASES = ["counter_goes_on", "changes_move_by_page_hash", "changes_move_by_soft_dirty"]
# The kernel would call for these by itself if it knew where they are.
MODULES = "fuse raw_diag udp_diag tcp_diag unix_diag netlink_diag nf_conntrack_netlink"
# Seconds; what a scenario may take at most is main.py's.
FOREVER = 24 * 3600


def run(scratch, words):
    target, name = ["--test", "moves"], "moves"
    if words[:1] == ["--lib"]:
        target, name, words = ["--lib"], "decamp_container", words[1:]
    with part("the tests are built"):
        program = _build(target, name)
    kernel = Kernel.fetch(PACKAGE)
    machine = Machine("lab", kernel, scratch, memory="8G", patient=PATIENT)
    try:
        with part("machine boots"):
            machine.wait_ready()
            say(f"under Linux {machine.release}")
        with part("tests"):
            command = shlex.join([program, *(words or CASES)])
            script = f"for module in {MODULES}; do modprobe $module; done\ncd {shlex.quote(str(ROOT / 'container'))}\n"
            code = machine.order(f"{script}{command} 2>&1\n").show(FOREVER)
    finally:
        machine.stop()
    if code:
        raise Failed(f"The tests ended with {code}")


def _build(target, name):
    command = ["cargo", "test", "-p", "decamp-container", *target, "--no-run", "--message-format=json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        built = json.loads(line)
        if built.get("target", {}).get("name") == name and built.get("executable"):
            return built["executable"]
    raise Failed("The tests could not be built")
