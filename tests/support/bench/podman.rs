//! Scenario `container-podman`: Redis run by podman, moved by us into the charge of the next host's podman,
//! and checkpointed and restored by podman itself on one host, in turns.
//!
//! podman has every advantage that it can have: its archive lies in memory and is not compressed, and a
//! reset that its new network namespace sends before CRIU is there is not heard by the client.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use crate::container::{Pairs, compare};
use crate::decamp::Decamp;
use crate::error::{BenchError, Result};
use crate::hosts::{CLIENT, DESTINATION, Hosts, SOURCE, done};
use crate::load::OtherWork;
use crate::redis::{ADDRESS, Client, RATE};
use crate::redis_move::{self, Burden, NAME, Sample};
use crate::row::Row;
use crate::runc::criu;
use crate::shell::Shell;
use crate::{Bench, ms, tell};

const BURDEN: Burden = Burden { fill_mib: 1024, children: 0, shared_mib: 0 };
/// What the downtime is to be at most, beside podman's.
const DOWNTIME: f64 = 0.2;
const MAC: &str = "02:77:01:00:00:20";

/// All rows of the scenario.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let podman = Podman::prepare(bench, &hosts)?;
    let (mut pairs, mut other) = (Pairs::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let ours = podman.ours(bench, &hosts, &mut other)?;
        let theirs = podman.theirs(bench, &hosts, &mut other)?;
        let which = if number == 0 { "warm-up".to_owned() } else { format!("pair {number}") };
        tell(format_args!(
            "container-podman, {which}: ours {:.0} ms, gap {:.0} ms; podman {:.0} ms, gap {:.0} ms",
            ms(ours.total),
            ms(ours.gap),
            ms(theirs.total),
            ms(theirs.gap)
        ));
        if number > 0 {
            pairs.push((ours, theirs));
        }
    }
    let version = done(Command::new("podman").arg("--version"))?;
    let peer = format!("{}, checkpoint -e + restore -i on the same host", version.trim());
    compare("container-podman", &pairs, &other, peer, Some(DOWNTIME))
}

/// Podman on both hosts, with an image of Redis.
struct Podman {
    /// What runs in a container of the image.
    line: String,
}

impl Podman {
    fn prepare(bench: &Bench, hosts: &Hosts) -> Result<Self> {
        for (host, gateway) in [(SOURCE, "10.77.0.1"), (DESTINATION, "10.77.0.2")] {
            BURDEN.bundle(bench, &hosts.srv(host).join("redis"))?;
            let fixture = quoted(&bench.root.join("tests/fixtures/podman").display().to_string());
            Shell::start(hosts, host)?.run(&format!(
                "{fixture} /srv/podman --limit 65536 --network bench br0 10.77.0.0/16 {gateway} 7 \
                     --image redis /srv/redis/rootfs\n\
                 mkdir -p /run/bench\n\
                 echo network-lock nftables >/run/bench/criu.conf"
            ))?;
        }
        let path = hosts.srv(SOURCE).join("redis/config.json");
        let text = fs::read_to_string(&path)
            .map_err(BenchError::io(format!("read {}", path.display())))?;
        let config: Value = serde_json::from_str(&text)
            .map_err(|_| BenchError::wrong(format!("{} is no JSON", path.display())))?;
        let words = config["process"]["args"].as_array().into_iter().flatten();
        let words: Vec<_> = words.filter_map(Value::as_str).map(quoted).collect();
        let directory = quoted(config["process"]["cwd"].as_str().unwrap_or("/"));
        let line = format!("--workdir {directory} localhost/redis {}", words.join(" "));
        Ok(Self { line })
    }

    /// Starts Redis and its client.
    fn start(&self, bench: &Bench, hosts: &Hosts) -> Result<Client> {
        let line = &self.line;
        Shell::start(hosts, SOURCE)?.run(&format!(
            "podman run --detach --network bench:ip={ADDRESS},mac={MAC} --name {NAME} \
             --annotation org.criu.config=/run/bench/criu.conf {line} </dev/null >/dev/null"
        ))?;
        Client::start(&bench.redis_client(), BURDEN.fill_mib, RATE)
    }

    fn ours(&self, bench: &Bench, hosts: &Hosts, other: &mut OtherWork) -> Result<Sample> {
        let mut client = self.start(bench, hosts)?;
        let (here, there) = (Decamp::at(hosts, SOURCE)?, Decamp::at(hosts, DESTINATION)?);
        here.verb(&["adopt", &format!("podman:{NAME}")])?;
        let quiet = redis_move::quiet(&mut client)?;
        let before = hosts.mark()?;
        let moved = redis_move::moved(bench, hosts, "container-podman")?;
        other.add(&before, &hosts.mark()?);
        let said = (moved.reported("total_ms"), moved.reported("downtime_ms"));
        let sample = redis_move::finish(client, moved.wall, quiet, said)?;
        let listed = Shell::start(hosts, DESTINATION)?.run("podman ps --format '{{.Names}}'")?;
        if listed.trim() != NAME {
            return Err(BenchError::wrong(format!("podman at the destination lists {listed:?}")));
        }
        there.verb(&["stop", NAME])?;
        there.verb(&["rm", NAME, "--yes"])?;
        here.verb(&["rm", NAME, "--yes"])?;
        for host in [SOURCE, DESTINATION] {
            let clear =
                format!("podman rm -f -t 0 {NAME} >/dev/null\nrm -rf /var/lib/containers/decamp");
            Shell::start(hosts, host)?.run(&clear)?;
        }
        Ok(sample)
    }

    fn theirs(&self, bench: &Bench, hosts: &Hosts, other: &mut OtherWork) -> Result<Sample> {
        let mut client = self.start(bench, hosts)?;
        let _deaf = Deaf::begin()?;
        let quiet = redis_move::quiet(&mut client)?;
        let mut shell = Shell::start(hosts, SOURCE)?;
        let criu = criu();
        let directory = criu.rsplit_once('/').map_or("/usr/sbin", |(directory, _)| directory);
        let before = hosts.mark()?;
        let started = Instant::now();
        shell.run(&format!(
            "export PATH={directory}:$PATH\n\
             podman container checkpoint --export /run/bench/{NAME}.tar --compress none \
                 --tcp-established --file-locks {NAME} >/dev/null\n\
             podman rm {NAME} >/dev/null\n\
             podman container restore --import /run/bench/{NAME}.tar --tcp-established \
                 --file-locks >/dev/null"
        ))?;
        let total = started.elapsed();
        other.add(&before, &hosts.mark()?);
        let sample = redis_move::finish(client, total, quiet, (0.0, 0.0))?;
        shell.run(&format!("podman rm -f -t 0 {NAME} >/dev/null\nrm -f /run/bench/{NAME}.tar"))?;
        Ok(sample)
    }
}

/// The client hears no resets, as long as this lives.
struct Deaf;

impl Deaf {
    fn begin() -> Result<Self> {
        let rules = "table inet deaf { chain in { type filter hook input priority 0; \
                     tcp flags & rst == rst drop; }; }";
        done(Command::new("ip").args(["netns", "exec", CLIENT, "nft", rules]))?;
        Ok(Self)
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        let words = ["netns", "exec", CLIENT, "nft", "delete table inet deaf"];
        if let Err(error) = done(Command::new("ip").args(words)) {
            eprintln!("bench: {error}");
        }
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
