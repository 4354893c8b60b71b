"""The scenario `crossing`: a container with Redis in it moves to and fro between two hosts under different kernels, with
control groups of version 2 and a root on overlayfs, under a client that remembers every write that was acknowledged.

What belongs here: what is done in which order, and what must hold. What does not: virtual machines.
"""

import json
import os
import shlex
import subprocess
import time
from functools import partial

import containers
import guests
from guest import find_decamp
from host import CRIU
from kernel import ROOT, Kernel
from telling import Failed, part, say

NEEDS = [*guests.NEEDS, "redis-server", "runc"]
MOVES = int(os.environ.get("DECAMP_LAB_CROSSINGS") or 4)
ADDRESS, PORT = "10.77.1.7", 6379
# What the client fills before the moves, in MiB, and what it does a second.
FILL, RATE = 16, 100
# What its control group allows, written into the bundle.
TASKS = 100
LIMIT = f"""
import json
with open("/srv/redis/config.json", "r+") as file:
    config = json.load(file)
    config["linux"].setdefault("resources", {{}})["pids"] = {{"limit": {TASKS}}}
    file.seek(0)
    json.dump(config, file)
    file.truncate()
"""
# Seconds for a move, and for an answer of the client's.
MOVE, ANSWER = 300, 120


class Client:
    """tests/support/redis_client.rs, outside of both hosts."""

    def __init__(self, scratch):
        program = scratch / "redis-client"
        command = ["rustc", "--edition", "2024", "-O", "-o", program, ROOT / "tests/support/redis_client.rs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"The client cannot be built:\n{done.stderr}")
        command = ["timeout", str(guests.MOVE * (MOVES + 2)), program, f"{ADDRESS}:{PORT}"]
        command += ["--fill-mib", str(FILL), "--rate", str(RATE), "--timeout", str(ANSWER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def report(self):
        """What happened since this was asked last; an error if anything was wrong."""
        report = self._ask("report")
        if report.get("errors") != 0:
            raise Failed(f"The client: {report}")
        return report

    def is_served(self):
        """Waits until Redis answers; the first report with an answer."""
        deadline = time.monotonic() + ANSWER
        while not (report := self.report())["ops"]:
            if time.monotonic() > deadline:
                raise Failed("The client gets no answers")
            time.sleep(0.2)
        return report

    def verdict(self):
        """What it finds after it has asked for every key again."""
        verdict = self._ask("stop")
        if self._process.wait(ANSWER):
            raise Failed(f"The client's verdict: {verdict}")
        return verdict

    def close(self):
        self._process.kill()
        self._process.wait()

    def _ask(self, question):
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"The client ended with {self._process.wait(ANSWER)}")
        return json.loads(line)


def run(scratch, words):
    """Does all of it."""
    if words:
        raise Failed(f"crossing takes no arguments: {' '.join(words)}")
    hosts = []
    try:
        _run(scratch, hosts)
    finally:
        for host in hosts:
            host.stop()


def start(host):
    """Runs the container, and waits until Redis in it listens."""
    with part("the container starts"):
        host.run(f"{ROOT}/tests/fixtures/redis-bundle /srv/redis", 120)
        host.run(f"python3 -c {shlex.quote(LIMIT)}")
        host.decamp("run", "container", "redis", "--bundle", "/srv/redis", "--net", f"bridge=br0,ip={ADDRESS}/24")
        host.run(f"until (exec 3<>/dev/tcp/{ADDRESS}/{PORT}) 2>/dev/null; do sleep 0.2; done", 120)


def limit(host):
    """The most tasks that its control group may have, as its kernel has it."""
    return int(host.run("cat /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$(pgrep -x redis-server)/cgroup)/pids.max"))


def move(source, destination, client):
    """Moves the container once; the report."""
    client.is_served()
    report = source.migrate("redis", destination.name, within=MOVE)
    seen = client.is_served()
    # Also where it was not started, and not only once it is home again.
    if limit(destination) != TASKS:
        raise Failed(f"Its control group at {destination.name} allows {limit(destination)} tasks, and not {TASKS}")
    say(
        f"  {source.machine.release} to {destination.machine.release}: down {report['downtime_ms']:.0f} ms of "
        f"{report['total_ms']:.0f} ms, tracker {report['tracker']}; the client's longest silence "
        f"{seen['longest_gap_ms']:.0f} ms; {seen['ops']} operations"
    )
    return report


def _run(scratch, hosts):
    decamp = find_decamp()
    with part("kernels"):
        kernels = [Kernel.fetch(package) for package in guests.KERNELS]
    guests.boot_hosts(kernels, scratch, hosts, decamp, modules=containers.MODULES)
    with part("CRIU looks at both kernels"):
        guests.at_once([partial(host.run, f"{CRIU} check || true", 120) for host in hosts])
    start(hosts[0])
    with part("the client fills it"):
        client = Client(scratch)
    try:
        with part(f"{MOVES} moves"):
            for number in range(MOVES):
                move(hosts[number % 2], hosts[(number + 1) % 2], client)
        here = hosts[MOVES % 2]
        say(f"  {client.verdict()}")
    finally:
        client.close()
    here.decamp("stop", "redis")
    for host in hosts:
        left = host.run("pgrep -x redis-server; ls /run/netns 2>/dev/null; true").split()
        if left:
            raise Failed(f"{host.name} has something left: {left}")
