//! One move of Redis in a container, by us or by runc, watched by a client that checks every key:
//! what the scenarios of containers are made of. What is made of the numbers is theirs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::Bench;
use crate::decamp::{Decamp, Moved};
use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, Hosts, SOURCE, copy, done};
use crate::load::OtherWork;
use crate::memory::{Sampler, Usage};
use crate::redis::{ADDRESS, Client, RATE};
use crate::runc::Runc;

pub(crate) const NAME: &str = "bench";
/// The program that makes a tree of processes, in the container.
const TREE: &str = "/bin/process-tree";
/// Memory of each child, in MiB.
const CHILD_MIB: u32 = 2;
/// How long the client works on before and after the move.
pub(crate) const WATCH: Duration = Duration::from_secs(1);

/// What the container holds besides a Redis that is asked all the time.
#[derive(Default)]
pub(crate) struct Burden {
    /// MiB of random values.
    pub(crate) fill_mib: u32,
    /// Processes that do nothing, each with its own [`CHILD_MIB`].
    pub(crate) children: u32,
    /// MiB of memory that two more processes share, and do nothing with.
    pub(crate) shared_mib: u32,
}

/// One move, by either side.
pub(crate) struct Sample {
    /// From the command to its end, as seen from outside.
    pub(crate) total: Duration,
    /// The client's longest wait for a reply over the whole move.
    pub(crate) gap: Duration,
    /// The same just before, when nothing moved.
    pub(crate) quiet: Duration,
    /// What the tool says of itself, in milliseconds: total time and downtime. runc says nothing.
    pub(crate) said: (f64, f64),
    /// The container's memory in bytes: all pages that the first round found.
    pub(crate) memory: u64,
    /// Bytes that the destination had more than before, at the most; of ours only.
    pub(crate) peak: u64,
}

impl Burden {
    /// Makes the bundle for it in `directory`.
    pub(crate) fn bundle(&self, bench: &Bench, directory: &Path) -> Result<()> {
        done(Command::new(bench.root.join("tests/fixtures/redis-bundle")).arg(directory))?;
        let mut before = Vec::new();
        if self.shared_mib > 0 {
            before.extend([TREE.to_owned(), "shared".to_owned(), self.shared_mib.to_string()]);
        }
        if self.children > 0 {
            before.extend([TREE.to_owned(), self.children.to_string(), CHILD_MIB.to_string()]);
        }
        if before.is_empty() {
            return Ok(());
        }
        copy(&bench.process_tree(), &directory.join("rootfs").join(TREE.trim_start_matches('/')))?;
        change_config(directory, |config| {
            let redis = config["process"]["args"].as_array().cloned().unwrap_or_default();
            config["process"]["args"] = before.into_iter().map(Value::from).chain(redis).collect();
        })
    }
}

/// Changes the configuration of a bundle.
pub(crate) fn change_config(directory: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let path = directory.join("config.json");
    let what = format!("change {}", path.display());
    let text = fs::read_to_string(&path).map_err(BenchError::io(&what))?;
    let mut config: Value = serde_json::from_str(&text)
        .map_err(|_| BenchError::wrong(format!("{} is no JSON", path.display())))?;
    change(&mut config);
    fs::write(&path, config.to_string()).map_err(BenchError::io(what))
}

/// Starts Redis at the source, and its client, which asks `rate` times a second, or with 0 without a
/// pause.
pub(crate) fn begin(bench: &Bench, hosts: &Hosts, burden: &Burden, rate: u32) -> Result<Client> {
    burden.bundle(bench, &hosts.srv(SOURCE).join("redis"))?;
    let net = format!("bridge=br0,ip={ADDRESS}/16");
    let here = Decamp::at(hosts, SOURCE)?;
    here.verb(&["run", "container", NAME, "--bundle", "/srv/redis", "--net", &net])?;
    Client::start(&bench.redis_client(), burden.fill_mib, rate)
}

/// Moves it to the destination.
pub(crate) fn moved(bench: &Bench, hosts: &Hosts, scenario: &str) -> Result<Moved> {
    let moved = Decamp::at(hosts, SOURCE)?.migrate(NAME, DESTINATION)?;
    if moved.report["encrypted"] != false {
        return Err(BenchError::wrong(format!(
            "The move says encrypted: {}",
            moved.report["encrypted"]
        )));
    }
    bench.keep_report(scenario, &moved.report);
    Ok(moved)
}

/// Ends it at the destination, and takes away what is left of it on both hosts.
pub(crate) fn forget(hosts: &Hosts) -> Result<()> {
    let (here, there) = (Decamp::at(hosts, SOURCE)?, Decamp::at(hosts, DESTINATION)?);
    there.verb(&["stop", NAME])?;
    there.verb(&["rm", NAME, "--yes"])?;
    here.verb(&["rm", NAME, "--yes"])?;
    hosts.clear_srv(SOURCE)?;
    hosts.clear_srv(DESTINATION)
}

/// One move by us.
pub(crate) fn ours(
    bench: &Bench,
    hosts: &Hosts,
    scenario: &str,
    burden: &Burden,
    usage: Option<&mut Usage>,
    other: &mut OtherWork,
) -> Result<Sample> {
    let mut client = begin(bench, hosts, burden, RATE)?;
    let quiet = quiet(&mut client)?;
    let sampler = usage.is_some().then(|| Sampler::start(hosts.init(SOURCE)?)).transpose()?;
    let peak = hosts.peak(DESTINATION)?;
    let before = hosts.mark()?;
    let moved = moved(bench, hosts, scenario)?;
    other.add(&before, &hosts.mark()?);
    if let (Some(usage), Some(sampler)) = (usage, sampler) {
        *usage = sampler.most()?;
    }
    let said = (moved.reported("total_ms"), moved.reported("downtime_ms"));
    let mut sample = finish(client, moved.wall, quiet, said)?;
    sample.peak = peak.above()?;
    let first_round = moved.report["rounds"][0]["dirty_pages"].as_u64();
    sample.memory = first_round.unwrap_or(0) * 4096;
    forget(hosts)?;
    Ok(sample)
}

/// One move by runc.
pub(crate) fn theirs(
    bench: &Bench,
    hosts: &Hosts,
    burden: &Burden,
    peer: fn(&mut Runc, &Hosts) -> Result<Duration>,
    other: &mut OtherWork,
) -> Result<Sample> {
    let mut runc = Runc::start(hosts, bench, burden)?;
    let mut client = Client::start(&bench.redis_client(), burden.fill_mib, RATE)?;
    let quiet = quiet(&mut client)?;
    let before = hosts.mark()?;
    let total = peer(&mut runc, hosts)?;
    other.add(&before, &hosts.mark()?);
    let sample = finish(client, total, quiet, (0.0, 0.0))?;
    runc.clear(hosts)?;
    Ok(sample)
}

/// The client's longest wait while nothing moves. From here on its gaps count anew.
pub(crate) fn quiet(client: &mut Client) -> Result<Duration> {
    client.gap()?;
    sleep(WATCH);
    client.gap()
}

/// Lets the client work on for a while, and has it verify everything.
pub(crate) fn finish(
    mut client: Client,
    total: Duration,
    quiet: Duration,
    said: (f64, f64),
) -> Result<Sample> {
    sleep(WATCH);
    let gap = client.gap()?;
    client.stop()?;
    Ok(Sample { total, gap, quiet, said, memory: 0, peak: 0 })
}
