//! The network device (Virtual I/O Device 1.2, section 5.1): one pair of queues and a control queue, on a tap device
//! of the host.
//!
//! | file | what lives there |
//! |---|---|
//! | `backend` | where frames come from and go to |
//! | `receive`, `transmit` | the two ways of a frame |
//! | `filter` | which frames the driver wants, and its commands about that |
//! | `known` | what is seen of the guest's addresses and its neighbours |
//! | `state` | the device's own bytes, as they travel |
//!
//! A frame goes straight between the kernel and guest memory. The header in front of it is the guest's, or for the
//! guest, and it is the kernel that reads or writes it: nothing here looks into it.

mod backend;
mod filter;
mod known;
mod receive;
mod state;
#[cfg(test)]
mod tests;
mod transmit;

use std::io::{self, Read};

use decamp_shared::network::Mac;
use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestMemoryBackend;

pub(crate) use self::backend::{Frames, HEADER};
use self::backend::{LARGEST, Piece};
use self::filter::{Filter, LONGEST};
pub(crate) use self::known::Knowledge;
use self::receive::Receiver;
use super::device::{Broken, Device, Io, Served};
use super::poller::Poller;
use crate::error::{Result as VmResult, VmError};
use crate::memory::Map;
use crate::sandbox::Allowed;
use crate::sys::frames::MOST_PIECES;
use crate::sys::tap::SET_OFFLOADS;

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const QUEUES: [u16; 3] = [256, 256, 64];
/// What is watched: the tap device.
const TAP: u32 = 0;
/// Frames and commands that are handled at once. Whoever wants the device, to pause it or to read a register, waits
/// for no more.
const AT_ONCE: usize = 64;
/// The least that an interface can carry (RFC 791), and the most that a header can say.
const MTU: std::ops::RangeInclusive<u16> = 68..=65535;

/// A network interface.
#[derive(Debug)]
pub(crate) struct Net {
    frames: Frames,
    poller: Option<Poller>,
    watched: EpollFlags,
    /// Its address as it was made, which a reset gives back to it.
    first_mac: Mac,
    /// Bytes that a frame carries at most, without its header; what the driver is told.
    mtu: u16,
    /// The same of the host's end.
    mtu_here: u16,
    link: bool,
    /// The driver is to announce itself and has not said yet that it did.
    announce: bool,
    filter: Filter,
    knowledge: Knowledge,
    receiver: Receiver,
    /// Whether the driver has one frame in several chains.
    mergeable: bool,
    /// Bytes of the largest frame, with its header, that comes to this driver.
    largest: usize,
}

impl Net {
    /// An interface with address `mac` on `frames`, each of which carries `mtu` bytes at most. What is seen of the
    /// guest's addresses goes to `knowledge`.
    pub(crate) fn new(frames: Frames, mac: Mac, mtu: u16, knowledge: Knowledge) -> Self {
        knowledge.set_mtu(mtu);
        Self {
            frames,
            poller: None,
            watched: EpollFlags::empty(),
            first_mac: mac,
            mtu,
            mtu_here: mtu,
            link: true,
            announce: false,
            filter: Filter::new(mac),
            knowledge,
            receiver: Receiver::default(),
            mergeable: false,
            largest: LARGEST,
        }
    }

    /// Has the tap device watched for exactly `wanted`.
    fn watch(&mut self, wanted: EpollFlags) -> Result<(), Broken> {
        if wanted == self.watched || !self.link {
            return Ok(());
        }
        let Some(poller) = &self.poller else { return Ok(()) };
        poller.change(self.frames.fd(), wanted, TAP).map_err(|source| Broken::Host {
            what: "The tap device cannot be watched".into(),
            source,
        })?;
        self.watched = wanted;
        Ok(())
    }

    fn watch_also(&mut self, what: EpollFlags, wanted: bool) -> Result<(), Broken> {
        let mut all = self.watched;
        all.set(what, wanted);
        self.watch(all)
    }

    /// The tap device is not there any more: the driver sees that the cable is out, and the guest runs on.
    fn lose_link(&mut self, io: &Io<'_>, why: &io::Error) {
        if !std::mem::take(&mut self.link) {
            return;
        }
        tracing::warn!(
            "The tap device of an interface with address {} is gone: {why}",
            self.filter.mac
        );
        if let Some(poller) = &self.poller
            && let Err(error) = poller.forget(self.frames.fd())
        {
            tracing::debug!("It was not watched any more: {error}");
        }
        io.config_changed();
    }

    fn command(&mut self, head: [u8; 2], data: &[u8]) -> bool {
        const ANNOUNCE: [u8; 2] =
            [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];
        if head == ANNOUNCE {
            self.announce = false;
            return true;
        }
        self.filter.command(head[0], head[1], data)
    }

    fn control(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let mut left = AT_ONCE;
        io.serve(CONTROL, |memory, chain| {
            if left == 0 {
                return Ok(Served::Later);
            }
            left -= 1;
            let wrong = |error: String| Broken::request(CONTROL, error);
            let mut command = Vec::new();
            let reader = chain.clone().reader(memory).map_err(|error| wrong(error.to_string()))?;
            let read = reader.take(LONGEST as u64).read_to_end(&mut command);
            read.map_err(|error| wrong(error.to_string()))?;
            let done = match command.split_first_chunk() {
                Some((head, data)) => self.command(*head, data),
                None => return Err(wrong("it has no command".into())),
            };
            let mut writer = chain.writer(memory).map_err(|error| wrong(error.to_string()))?;
            let said = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            io::Write::write_all(&mut writer, &[said as u8])
                .map_err(|error| wrong(error.to_string()))?;
            Ok(Served::Done(1))
        })?;
        if left == 0 {
            self.again(CONTROL);
        }
        Ok(())
    }

    /// Has `queue` looked at once more, after everybody who waits.
    fn again(&self, queue: usize) {
        if let Some(poller) = &self.poller {
            poller.kick(queue);
        }
    }

    fn takes(&mut self, features: u64) -> io::Result<()> {
        let segments = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        self.mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        self.largest = match features & segments {
            0 => HEADER + 18 + usize::from(self.mtu),
            _ => LARGEST,
        };
        self.frames.set_features(features)
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn version(&self) -> u32 {
        1
    }

    fn allowed(&self) -> Allowed {
        // What a frame is read and written by, any device has.
        Allowed { calls: Vec::new(), requests: vec![SET_OFFLOADS] }
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
        ]
        .into_iter()
        .fold(0, |all, feature| all | 1 << feature)
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        let link = if self.link { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut bytes = self.filter.mac.0.to_vec();
        bytes.extend(((link | announce) as u16).to_le_bytes());
        // One pair of queues; the driver reads this only where it could have more.
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(self.mtu.to_le_bytes());
        bytes
    }

    fn attach(&mut self, poller: &Poller) -> VmResult<()> {
        let watched = poller.watch(self.frames.fd(), self.watched, TAP);
        watched.map_err(|error| VmError::refused("watch a tap device", error))?;
        self.poller = Some(poller.clone());
        Ok(())
    }

    fn start(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        self.takes(io.features).map_err(|source| Broken::Host {
            what: "The tap device does not do what the driver took".into(),
            source,
        })?;
        self.watch(EpollFlags::EPOLLIN)
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        match queue {
            RX => self.receive(io),
            TX => self.transmit(io),
            _ => self.control(io),
        }
    }

    fn on_ready(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        if self.watched.contains(EpollFlags::EPOLLOUT) {
            self.transmit(io)?;
        }
        if self.watched.contains(EpollFlags::EPOLLIN) {
            self.receive(io)
        } else {
            // What nobody asked for comes in any case.
            if self.frames.is_gone() {
                self.lose_link(io, &io::ErrorKind::NotConnected.into());
            }
            Ok(())
        }
    }

    fn settle(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        io.put_back(RX, self.receiver.forget());
        Ok(())
    }

    fn arrived(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        if io.features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
            self.announce = true;
            io.config_changed();
        }
        self.watch(EpollFlags::EPOLLIN)
    }

    fn reset(&mut self) {
        self.filter = Filter::new(self.first_mac);
        self.announce = false;
        self.receiver.forget();
        let quiet = self.watch(EpollFlags::empty());
        let plain = self.takes(0);
        if quiet.is_err() || plain.is_err() {
            tracing::debug!("The tap device stays as the last driver had it: {quiet:?}, {plain:?}");
        }
    }

    fn save(&self) -> Vec<u8> {
        self.save_bytes()
    }

    fn load(&mut self, bytes: &[u8], features: u64) -> Result<(), String> {
        self.load_bytes(bytes)?;
        self.takes(features).map_err(|error| {
            format!("the tap device here does not do what its driver took ({error})")
        })
    }
}

/// The memory of `descriptors` of a chain in `queue`.
fn pieces<'a>(
    memory: &'a Map,
    descriptors: impl Iterator<Item = Descriptor>,
    queue: usize,
    into: &mut Vec<Piece<'a>>,
) -> Result<usize, Broken> {
    let mut length = 0usize;
    for (number, descriptor) in descriptors.enumerate() {
        let (at, count) = (descriptor.addr(), descriptor.len() as usize);
        if number == MOST_PIECES {
            return Err(Broken::request(queue, format!("it has more than {MOST_PIECES} pieces")));
        }
        if count == 0 {
            continue;
        }
        let piece = memory.get_slice(at, count).map_err(|_| {
            Broken::request(queue, format!("{count} bytes at {:#x} are no memory", at.0))
        })?;
        length = length.saturating_add(count);
        into.push(piece);
    }
    Ok(length)
}
