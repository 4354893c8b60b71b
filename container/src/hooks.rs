//! What runtimes and CRIU are given of decamp when they checkpoint a container by themselves: the look at
//! its processes before anything stops, and its network held still meanwhile. And what of a container a
//! runtime's hook needs to know. Nothing here is a move, and nothing is kept between two calls: what was
//! done to a network is read from it.
//!
//! A container is its first process here. What holds its network still:
//!
//! - a veth on a bridge is taken off by disabling its port, as a move does it: at once, without a rule
//!   that could be left behind, and gone with the interface;
//! - anything else gets a table of the packet filter in the container's own namespace, which goes with
//!   that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};

use decamp_shared::network::announce::of_addresses;
use decamp_shared::network::{Announcer, Neighbour, index_of, packet_socket};

use crate::error::{ContainerError, Result};
use crate::interfaces::{self, Port};
use crate::network::Network;
use crate::nft;
use crate::runtime::{Runtime, RuntimeKind};
use crate::{obstacles, sys};

/// The table that holds packets back.
const TABLE: &str = "decamp_checkpoint";
/// Packets with this mark are CRIU's own, by which it restores connections (soccr/soccr.h).
const CRIU_MARK: &str = "0xc114";

/// The first process of the container `id` of `runtime` (`runc` or `crun`), by what the runtime has
/// written down; nothing when it has no such container in its usual place.
#[must_use]
pub fn first_process(runtime: &str, id: &str) -> Option<i32> {
    let runtime = Runtime::looked_at(RuntimeKind::from_word(runtime)?, id);
    runtime.known(&runtime.state().ok()?).ok().map(|known| known.init)
}

/// The standard error of process `pid`, the very one that it has: what is written there stands among
/// what the process itself writes. Nothing when it has none, or may not be looked at.
#[must_use]
pub fn standard_error_of(pid: i32) -> Option<OwnedFd> {
    const STANDARD_ERROR: i32 = 2;
    let process = sys::pidfd_open(pid).ok()?;
    sys::pidfd_getfd(process.as_fd(), STANDARD_ERROR).ok()
}

/// Every reason why the tree of processes below `init` cannot be dumped, for a person. Nothing is
/// touched.
#[must_use]
pub fn obstacles(init: i32) -> Vec<String> {
    let pids = descendants(init);
    if pids.is_empty() {
        return vec![format!("There is no process {init} any more")];
    }
    let mut found = match obstacles::of_processes(&pids, init) {
        Ok(found) => found,
        Err(error) => vec![error.to_string()],
    };
    if shares_our_network(init) {
        found.extend(connections_in_the_open(&pids, init));
    }
    found
}

/// Takes the container off the network, nothing in, nothing out. Twice is as good as once. One that is
/// in the host's network is left alone.
///
/// # Errors
/// When it cannot be; then it is on the network as before.
pub fn hold_network(init: i32) -> Result<()> {
    if shares_our_network(init) {
        return Ok(());
    }
    let network = network_of(init)?;
    let found = interfaces::ports(&network)?;
    let disabled = |port: &Port| port.outside().is_some_and(|outside| outside.disable().is_ok());
    let held = found.iter().filter(|port| disabled(port)).count();
    if held == found.len() {
        return Ok(());
    }
    let filtered = network.inside(|| {
        nft::carry_out(&format!(
            "add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n\
             chain in {{ type filter hook input priority 0; policy drop; meta mark {CRIU_MARK} accept; }}\n\
             chain out {{ type filter hook output priority 0; policy drop; meta mark {CRIU_MARK} accept; }}\n\
             }}\n"
        ))
    });
    if filtered.is_err() {
        let _ = release_network(init);
    }
    filtered
}

/// Puts the container back on the network, if it was taken off, and tells the network once where it is.
///
/// # Errors
/// When a part of it cannot be; the rest is.
pub fn release_network(init: i32) -> Result<()> {
    if shares_our_network(init) {
        return Ok(());
    }
    let network = network_of(init)?;
    let found = interfaces::ports(&network)?;
    let mut ended = Ok(());
    for port in found.iter().filter(|port| port.disabled) {
        let Some(outside) = port.outside() else { continue };
        ended = ended.and(outside.enable().map_err(ContainerError::from));
    }
    let there = format!("list table inet {TABLE}\n");
    let removed = network.inside(|| match nft::carry_out(&there) {
        Ok(()) => nft::carry_out(&format!("delete table inet {TABLE}\n")),
        Err(_) => Ok(()),
    });
    for announcer in announcers(&network, &found) {
        announcer.once();
    }
    ended.and(removed)
}

/// Tells the network again and again where the container is now, for a little more than a second.
///
/// # Errors
/// When it has gone.
pub fn announce(init: i32) -> Result<()> {
    if shares_our_network(init) {
        return Ok(());
    }
    let network = network_of(init)?;
    let announcers = announcers(&network, &interfaces::ports(&network)?);
    std::thread::scope(|scope| {
        for announcer in &announcers {
            scope.spawn(|| announcer.repeat());
        }
    });
    Ok(())
}

/// One for each address that may be announced; what cannot be is left out.
fn announcers(network: &Network, ports: &[Port]) -> Vec<Announcer> {
    let open = |port: &Port| -> Result<Option<Announcer>> {
        let Some(mac) = port.mac else { return Ok(None) };
        let socket = packet_socket(index_of(&port.inside)?, 0);
        let socket = socket.map_err(ContainerError::io("open a packet socket"))?;
        let own =
            port.addresses.iter().map(|address| Neighbour { address: (*address).into(), mac });
        Ok(Some(Announcer::new(socket, 0, of_addresses(&own.collect::<Vec<_>>()))))
    };
    let all = network.inside(|| Ok(ports.iter().filter_map(|port| open(port).ok()?).collect()));
    all.unwrap_or_default()
}

fn network_of(init: i32) -> Result<Network> {
    let path = format!("/proc/{init}/ns/net");
    let file = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
    Network::found(file.into(), None)
}

fn shares_our_network(init: i32) -> bool {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    of(&init.to_string()).is_some_and(|theirs| Some(theirs) == of("self"))
}

/// `init` and all below it; nothing when it has gone.
fn descendants(init: i32) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut there = false;
    for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        there |= pid == init;
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = if there { vec![init] } else { Vec::new() };
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        // Taken out, so that numbers that were given anew meanwhile cannot make a ring.
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Connections whose packets nothing could hold back, because the container is in the host's network.
fn connections_in_the_open(pids: &[i32], init: i32) -> Vec<String> {
    let mut open = BTreeSet::new();
    for list in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{init}/net/{list}")).unwrap_or_default();
        open.extend(text.lines().filter_map(established));
    }
    let has_one = |pid: &i32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        links
            .filter_map(|link| {
                let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
                inode.parse::<u64>().ok()
            })
            .any(|inode| open.contains(&inode))
    };
    let text = |pid: &i32| {
        format!(
            "Process {pid} has open TCP connections in the host's own network, whose packets nothing would \
             hold back meanwhile: give the container a network of its own, or an annotation \
             org.criu.config, with which its runtime leaves decamp's hook out"
        )
    };
    pids.iter().filter(|pid| has_one(pid)).map(text).collect()
}

/// The inode of the socket in a line of `/proc/PID/net/tcp`, when its connection stands.
fn established(line: &str) -> Option<u64> {
    const ESTABLISHED: &str = "01";
    let fields: Vec<_> = line.split_whitespace().collect();
    (*fields.get(3)? == ESTABLISHED).then(|| fields.get(9)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_is_its_root_and_all_below() {
        // In a session of its own, as a container is: else whoever runs the tests leads it.
        let mut child = Command::new("setsid")
            .args(["sh", "-c", "sleep 30 & echo; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut line = [0; 1];
        let mut output = child.stdout.take().expect("its output");
        std::io::Read::read_exact(&mut output, &mut line).expect("a line");
        let found = descendants(child.id() as i32);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(obstacles(child.id() as i32), Vec::<String>::new());
        for pid in found.iter().rev() {
            let pid = nix::unistd::Pid::from_raw(*pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("killed");
        }
        child.wait().expect("ended");
        assert_eq!(descendants(child.id() as i32), Vec::<i32>::new());
    }

    #[test]
    fn what_is_said_to_anothers_standard_error_is_not_written_over() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut child = Command::new("sh")
            .args(["-c", "echo one >&2; read word; echo three >&2"])
            .stdin(Stdio::piped())
            .stderr(file.reopen().expect("a second descriptor"))
            .spawn()
            .expect("started");
        let text = || fs::read_to_string(file.path()).expect("read");
        while text() != "one\n" {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let error = standard_error_of(child.id() as i32).expect("it has one");
        File::from(error).write_all(b"two\n").expect("written");
        drop(child.stdin.take());
        child.wait().expect("ended");
        assert_eq!(text(), "one\ntwo\nthree\n");
    }

    #[test]
    fn connections_in_the_hosts_network_are_in_the_way() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
        let pid = std::process::id() as i32;
        assert_eq!(connections_in_the_open(&[pid], pid), Vec::<String>::new());
        let address = listener.local_addr().expect("an address");
        let _client = std::net::TcpStream::connect(address).expect("connects");
        assert_eq!(connections_in_the_open(&[pid], pid).len(), 1);
        for line in ["", "sl local", "0: a b 0A x x x x x 7", "0: a b 01 x x x x x y"] {
            assert_eq!(established(line), None, "{line}");
        }
    }

    #[test]
    fn the_hosts_own_network_is_left_alone() {
        let pid = std::process::id() as i32;
        hold_network(pid).expect("nothing is done");
        release_network(pid).expect("nothing is done");
        assert_eq!(first_process("kata", "x"), None);
        assert_eq!(first_process("runc", "no-such-container-anywhere"), None);
    }
}
