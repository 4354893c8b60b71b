//! The peer of the container benchmark: what an administrator does with the distribution's tools.
//! `runc checkpoint` to a tmpfs, `tar` over one plain TCP connection, `runc restore`, and the
//! network put back by hand.
//!
//! It is given every advantage that it can have: shells stand ready on both hosts, the root file
//! system and the network namespace are at the destination already, and the receiver listens before
//! the clock starts.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Bench;
use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, DESTINATION_ADDRESS, Hosts, SOURCE, await_that, done};
use crate::redis::ADDRESS;
use crate::redis_move::{Burden, change_config};
use crate::shell::Shell;

const PORT: u16 = 47421;
/// The container's network card, the same on both hosts, as migration wants it.
const MAC: &str = "02:77:01:00:00:20";

/// Redis in a container of runc's at the source, and all that is needed at the destination.
pub(crate) struct Runc {
    source: Shell,
    destination: Shell,
}

impl Runc {
    /// What it is and how it is used, for the result.
    pub(crate) fn describe() -> Result<String> {
        let version = |program: &str, line: usize| -> Result<String> {
            let said = done(Command::new(program).arg("--version"))?;
            Ok(said
                .lines()
                .nth(line)
                .unwrap_or_default()
                .replace("version ", "")
                .replace("Version: ", "CRIU "))
        };
        Ok(format!("{} with {}, tar over plain TCP", version("runc", 0)?, version(&criu(), 0)?))
    }

    /// The same for one that stays on its host.
    pub(crate) fn describe_local() -> Result<String> {
        Ok(Self::describe()?.replace(", tar over plain TCP", ", through a tmpfs of the same host"))
    }

    /// Starts the container.
    pub(crate) fn start(hosts: &Hosts, bench: &Bench, burden: &Burden) -> Result<Self> {
        for host in [SOURCE, DESTINATION] {
            make_bundle(hosts, bench, burden, host)?;
        }
        let mut runc = Self {
            source: Shell::start(hosts, SOURCE)?,
            destination: Shell::start(hosts, DESTINATION)?,
        };
        for shell in [&mut runc.source, &mut runc.destination] {
            shell.run(&prepare())?;
        }
        runc.source.run(
            "ip link set peer0 up\n\
             runc run --detach --bundle /srv/peer peer </dev/null >/dev/null 2>&1",
        )?;
        Ok(runc)
    }

    /// Moves it: how long that took.
    pub(crate) fn migrate(&mut self, hosts: &Hosts) -> Result<Duration> {
        self.destination.begin(&receive())?;
        await_listener(hosts)?;
        let started = Instant::now();
        self.source.begin(&send())?;
        // The source first: when it fails the destination waits for ever.
        self.source.end()?;
        self.destination.end()?;
        Ok(started.elapsed())
    }

    /// Checkpoints it and restores it where it was: how long that took.
    pub(crate) fn bounce(&mut self) -> Result<Duration> {
        let started = Instant::now();
        self.source.run(&format!("{}\n{}", checkpoint(), restore()))?;
        Ok(started.elapsed())
    }

    /// Takes everything away on both hosts.
    pub(crate) fn clear(mut self, hosts: &Hosts) -> Result<()> {
        for shell in [&mut self.source, &mut self.destination] {
            shell.run(
                "runc delete --force peer >/dev/null 2>&1 || true\n\
                 ip link delete peer0\nip netns delete peer\nrm -rf /run/bench",
            )?;
        }
        hosts.clear_srv(SOURCE)?;
        hosts.clear_srv(DESTINATION)
    }
}

/// A network namespace whose cable is not plugged in yet, and that resets no connection: before the
/// restore there is nobody but the kernel to answer, and that is what it would do.
fn prepare() -> String {
    format!(
        "mkdir -p /run/bench/images /run/bench/work\n\
         echo network-lock nftables >/run/bench/criu.conf\n\
         ip netns add peer\n\
         ip link add peer0 type veth peer name eth0 address {MAC} netns peer\n\
         ip link set peer0 master br0\n\
         ip -n peer link set lo up\n\
         ip -n peer address add {ADDRESS}/16 dev eth0\n\
         ip -n peer link set eth0 up\n\
         ip netns exec peer nft add table inet guard\n\
         ip netns exec peer \
             nft 'add chain inet guard out {{ type filter hook output priority 0; }}'\n\
         ip netns exec peer nft 'add rule inet guard out tcp flags & rst == rst drop'"
    )
}

fn checkpoint() -> String {
    format!(
        "runc --criu {criu} checkpoint --image-path /run/bench/images --work-path /run/bench/work \
             --tcp-established --file-locks peer || \
             {{ tail -n 5 /run/bench/work/dump.log; false; }}",
        criu = criu()
    )
}

fn restore() -> String {
    format!(
        "runc --criu {criu} restore --detach --image-path /run/bench/images \
             --work-path /run/bench/work --bundle /srv/peer --tcp-established --file-locks \
             peer </dev/null >/dev/null 2>&1 || \
             {{ tail -n 5 /run/bench/work/restore.log; false; }}",
        criu = criu()
    )
}

fn send() -> String {
    format!(
        "{checkpoint}\n\
         ip link set peer0 down\n\
         tar -c -b 512 -f - -C /run/bench/images . >/dev/tcp/{DESTINATION_ADDRESS}/{PORT}",
        checkpoint = checkpoint()
    )
}

/// The cable is plugged in, and the address announced, before the restore: what the container says
/// first is heard.
fn receive() -> String {
    format!(
        "socat -u -b 1048576 TCP-LISTEN:{PORT},reuseaddr STDOUT | \
             tar -x -b 512 -f - -C /run/bench/images\n\
         ip link set peer0 up\n\
         ip netns exec peer busybox arping -q -U -c 1 -w 1 -I eth0 {ADDRESS} >/dev/null 2>&1 &\n\
         {restore}",
        restore = restore()
    )
}

fn make_bundle(hosts: &Hosts, bench: &Bench, burden: &Burden, host: &str) -> Result<()> {
    let bundle = hosts.srv(host).join("peer");
    burden.bundle(bench, &bundle)?;
    let mut found = false;
    change_config(&bundle, |config| {
        config["annotations"] = json!({"org.criu.config": "/run/bench/criu.conf"});
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        let network = namespaces.into_iter().flatten().find(|one| one["type"] == "network");
        found = network.map(|network| network["path"] = json!("/run/netns/peer")).is_some();
    })?;
    match found {
        true => Ok(()),
        false => Err(BenchError::wrong("The Redis bundle has no network namespace")),
    }
}

pub(crate) fn criu() -> String {
    std::env::var("DECAMP_CRIU").unwrap_or_else(|_| "/opt/decamp-criu/bin/criu".to_owned())
}

/// Waits until the receiver listens: the destination's own table of sockets, as its PID 1 sees it.
fn await_listener(hosts: &Hosts) -> Result<()> {
    let table = format!("/proc/{}/net/tcp", hosts.init(DESTINATION)?);
    let listens = format!(":{PORT:04X} 00000000:0000 0A");
    await_that("the receiver to listen", Duration::from_secs(10), || {
        let text = fs::read_to_string(&table).map_err(BenchError::io(format!("read {table}")))?;
        Ok(text.contains(&listens).then_some(()))
    })
}
