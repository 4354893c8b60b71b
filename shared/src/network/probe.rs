//! Asking on a bridge whether somebody is behind it: by ARP and neighbour solicitation that say nothing of who asks,
//! so that nobody's tables change.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{NetworkError, Result};
use super::frames::{Neighbour, arp_probe, solicitation, speaker};
use super::link::Link;
use super::mac::Mac;
use crate::sys::packet_socket;

const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
/// A question that is lost is asked again after this.
const AGAIN: Duration = Duration::from_millis(250);
/// No frame is longer that matters here.
const LONGEST: usize = 2048;

/// What came of asking.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answers {
    /// The first that answered.
    pub(super) found: Option<Neighbour>,
    /// Who else has an address that was asked for.
    pub(super) others: BTreeSet<Neighbour>,
}

/// Asks for each of `asked` by way of `bridge`, until one answers or the time is over.
pub(super) fn ask(bridge: &Link, asked: &[Neighbour], within: Duration) -> Result<Answers> {
    let mut answers = Answers::default();
    let mac = bridge.mac.unwrap_or(Mac([0; 6]));
    let ours = bridge.addresses();
    // Nobody answers himself: what this very host has on the bridge is there.
    let is_here = |one: &&Neighbour| one.mac == mac && ours.contains(&one.address);
    answers.found = asked.iter().find(is_here).copied();
    if answers.found.is_some() {
        return Ok(answers);
    }
    let failed = || NetworkError::refused(format!("ask for neighbours on bridge {}", bridge.name));
    let open = |protocol| packet_socket(bridge.index, protocol).map(File::from);
    let mut sockets = [open(ARP).map_err(failed())?, open(IPV6).map_err(failed())?];
    let deadline = Instant::now() + within;
    while answers.found.is_none() && Instant::now() < deadline {
        for one in asked {
            let frame = match one.address {
                IpAddr::V4(address) => arp_probe(mac, address),
                IpAddr::V6(address) => solicitation(mac, address),
            };
            sockets[0].write_all(&frame).map_err(failed())?;
        }
        let until = deadline.min(Instant::now() + AGAIN);
        listen(&mut sockets, asked, until, &mut answers).map_err(failed())?;
    }
    Ok(answers)
}

fn listen(
    sockets: &mut [File; 2],
    asked: &[Neighbour],
    until: Instant,
    answers: &mut Answers,
) -> io::Result<()> {
    let mut frame = [0; LONGEST];
    while answers.found.is_none() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let ready = {
            let mut polled =
                [0, 1].map(|at: usize| PollFd::new(sockets[at].as_fd(), PollFlags::POLLIN));
            let time = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            match poll(&mut polled, time) {
                Err(nix::errno::Errno::EINTR) => continue,
                count => count?,
            };
            polled.map(|one| one.any().unwrap_or_default())
        };
        for (socket, _) in sockets.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            let length = socket.read(&mut frame)?;
            let Some(heard) = speaker(&frame[..length]) else { continue };
            if asked.contains(&heard) {
                answers.found = Some(heard);
            } else if asked.iter().any(|one| one.address == heard.address) {
                answers.others.insert(heard);
            }
        }
    }
    Ok(())
}
