//! The local protocol between an agent and a keeper: protobuf frames over a UNIX socket, and
//! descriptors beside them. Tags are never reused: a keeper outlives upgrades of its agent.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use prost::Message;

use crate::pages::set::CHUNK_PAGES;
use crate::pages::{PageSet, SpaceId};
use crate::sys;
use crate::workload::SpaceInfo;

/// No frame is longer: a bitmap of 1 TiB of memory is 32 MiB.
const FRAME_CAP: usize = 64 << 20;

/// What every keeper answers to a question that it does not know, for it is older than that.
pub(super) const OLDER: &str = "This keeper is older than that";

/// What an agent asks of a keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Ask {
    Unspecified = 0,
    Phase = 1,
    Facts = 2,
    Spaces = 3,
    MakeSpaces = 4,
    Memory = 5,
    Track = 6,
    Harvest = 7,
    Throttle = 8,
    Pause = 9,
    Save = 10,
    Resume = 11,
    Fence = 12,
    Load = 13,
    Activate = 14,
    Release = 15,
    Discard = 16,
    Stop = 17,
    Liveness = 18,
    Configure = 19,
    Ways = 20,
    LetGo = 21,
    Carry = 22,
    /// Without a file: whether it is known.
    Mirror = 23,
    Hold = 24,
    Switch = 25,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Request {
    #[prost(enumeration = "Ask", tag = "1")]
    pub ask: i32,
    #[prost(message, repeated, tag = "2")]
    pub spaces: Vec<SpaceInfo>,
    #[prost(uint32, tag = "3")]
    pub space: u32,
    #[prost(uint32, tag = "4")]
    pub percent: u32,
    #[prost(uint64, tag = "5")]
    pub token: u64,
    #[prost(uint64, tag = "6")]
    pub grace_ms: u64,
    #[prost(string, tag = "7")]
    pub json: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Reply {
    /// Empty when it worked; else what was tried, and why it did not, outermost first.
    #[prost(string, repeated, tag = "1")]
    pub error: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    pub spaces: Vec<SpaceInfo>,
    #[prost(message, repeated, tag = "3")]
    pub dirty: Vec<DirtyChunk>,
    #[prost(string, tag = "4")]
    pub json: String,
    /// With a harvest of a workload that stands still and whose memory may come and go: whether
    /// `exists` is said, and all pages that there are.
    #[prost(bool, tag = "5")]
    pub bounded: bool,
    #[prost(message, repeated, tag = "6")]
    pub exists: Vec<DirtyChunk>,
    /// With a harvest: the longest that any part of the workload stood still for the tracking.
    #[prost(uint64, tag = "7")]
    pub stall_us: u64,
    /// With a harvest: how much longer restoring will take than it takes any workload of the kind, in any
    /// case, and where there is time for it.
    #[prost(uint64, tag = "8")]
    pub restoring_us: u64,
    #[prost(uint64, tag = "9")]
    pub wished_us: u64,
}

/// Bits of a page set: bit 0 of the first byte is page `first`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DirtyChunk {
    #[prost(uint32, tag = "1")]
    pub space: u32,
    #[prost(uint64, tag = "2")]
    pub first: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub words: Vec<u8>,
}

/// State sections as they lie in the memfd that travels with `Save` and `Load`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Sections {
    #[prost(message, repeated, tag = "1")]
    pub sections: Vec<crate::workload::Section>,
}

/// Sends one frame, with a descriptor beside it.
pub(super) fn send<M: Message>(
    stream: &mut UnixStream,
    message: &M,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    if bytes.len() > FRAME_CAP {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "Frame is too long to send"));
    }
    let header = (bytes.len() as u32).to_le_bytes();
    sys::send_with_descriptor(stream.as_fd(), &header, descriptor)?;
    stream.write_all(&bytes)
}

/// Receives one frame and the descriptor beside it; `None` at a clean end. What has begun to come is all there
/// `within` that time, if one is given: a limit of the stream is one of each piece, and a peer that means ill sends
/// many.
pub(super) fn receive<M: Message + Default>(
    stream: &mut UnixStream,
    within: Option<Duration>,
) -> io::Result<Option<(M, Option<OwnedFd>)>> {
    let mut header = [0; 4];
    let (got, descriptor) = sys::receive_with_descriptor(stream.as_fd(), &mut header)?;
    if got == 0 {
        return Ok(None);
    }
    let limit = stream.read_timeout()?;
    let until = within.map(|within| Instant::now() + within);
    let mut rest = Due { stream, until };
    rest.read_exact(&mut header[got..])?;
    let length = u32::from_le_bytes(header) as usize;
    if length > FRAME_CAP {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "Frame is longer than any may be"));
    }
    let mut bytes = vec![0; length];
    rest.read_exact(&mut bytes)?;
    stream.set_read_timeout(limit)?;
    let message =
        M::decode(&bytes[..]).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, descriptor)))
}

/// What comes from a stream `until` then.
struct Due<'a> {
    stream: &'a mut UnixStream,
    until: Option<Instant>,
}

impl Read for Due<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(bytes)
    }
}

pub(super) fn pack_pages(set: &PageSet) -> Vec<DirtyChunk> {
    set.chunks()
        .map(|(space, first, words)| DirtyChunk {
            space: space.0,
            first,
            words: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        })
        .collect()
}

/// Adds `chunks` to `set`; false when one of them is not what [`pack_pages`] makes. Only whole chunks of a set are: a
/// few bits each, anywhere, would take hundreds of times as much memory here as they take to say.
pub(super) fn unpack_pages(chunks: &[DirtyChunk], set: &mut PageSet) -> bool {
    for chunk in chunks {
        let is_whole =
            chunk.first % CHUNK_PAGES == 0 && chunk.words.len() as u64 == CHUNK_PAGES / 8;
        if !is_whole || chunk.first >= 1 << 52 {
            return false;
        }
        let words: Vec<u64> = chunk
            .words
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
            .collect();
        set.insert_bitmap(SpaceId(chunk.space), chunk.first, &words);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PageRange;

    #[test]
    fn a_frame_that_comes_in_drops_is_not_waited_for() {
        let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
        let each = Duration::from_secs(60);
        ours.set_read_timeout(Some(each)).expect("set");
        theirs.write_all(&4u32.to_le_bytes()).expect("sent");
        let within = Some(Duration::from_millis(50));
        let late = receive::<Reply>(&mut ours, within).expect_err("it does not come");
        assert!(
            matches!(late.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock),
            "{late}"
        );
        let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
        ours.set_read_timeout(Some(each)).expect("set");
        send(&mut theirs, &Reply::default(), None).expect("sent");
        let (reply, _) = receive::<Reply>(&mut ours, within).expect("comes").expect("a frame");
        assert_eq!(reply, Reply::default());
        assert_eq!(ours.read_timeout().expect("told"), Some(each), "as before");
    }

    #[test]
    fn pages_come_in_whole_chunks_alone() {
        let mut pages = PageSet::new();
        pages.insert(PageRange::new(SpaceId(3), 7, CHUNK_PAGES));
        let chunks = pack_pages(&pages);
        let mut found = PageSet::new();
        assert!(unpack_pages(&chunks, &mut found) && found == pages);
        let sparse = |first| DirtyChunk { space: 3, first, words: 1u64.to_le_bytes().to_vec() };
        assert!(!unpack_pages(&[sparse(0)], &mut found));
        let odd = DirtyChunk { first: 64, ..chunks[0].clone() };
        assert!(!unpack_pages(&[odd], &mut found));
        let far = DirtyChunk { first: 1 << 52, ..chunks[0].clone() };
        assert!(!unpack_pages(&[far], &mut found) && found == pages);
    }
}
