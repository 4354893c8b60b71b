//! The mounts: CRIU works in a mount namespace of its own, in which a file of ours lies over
//! `/proc/PID/pagemap` of each process with hidden memory.
//!
//! Such a file is served from here ([`files`]): a scan of it, or a read, is done on the process's real page
//! tables, and what is hidden reads as pages that do not exist. CRIU itself is as free as it would be, and so
//! may suspend the filters of the processes that it dumps. Another file of ours, over `/proc/PID/stat` of the
//! first process, tells when it has ([`late`](super::late)). The namespace, and all that is mounted in it, ends
//! with the thread and the CRIU that are in it; no other process ever sees it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use decamp_shared::pages::PAGE_SIZE;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::files::{LONGEST_READ, REQUEST_ROOM, ROOT, Reply, Request, What};
use super::filter::Supervisor;
use super::late::{Late, Outcome, Wanted};
use super::{Hidden, HiddenRanges, is_set, overlaps, scan, try_on_a_thread};
use crate::entries::WORD;
use crate::error::{ContainerError, Result};
use crate::pagemap::{PAGE_IS_PRESENT, scans};
use crate::sys::{self, PAGEMAP_SCAN, PageRegion, PmScanArg};

/// Where the files are before they are mounted over others: a directory that every kernel has, and that
/// nobody in the namespace needs.
const DIRECTORY: &str = "/proc/fs";
/// What of the first process's is mounted over, and the name of the file there.
const STAT: &str = "stat";

/// Serves the files that one CRIU sees for as long as it lives.
pub(crate) struct Mounts {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    answered: Arc<AtomicU64>,
    late: Option<(Supervisor, Outcome)>,
}

impl Mounts {
    /// Puts the calling thread into a mount namespace of its own (it never leaves it: use a thread that does
    /// nothing but start CRIU), in which `hidden` is hidden. Where segments are, or limits are to be answered,
    /// CRIU gets the filter that is `wanted`.
    ///
    /// Once `called_off` is written to, scans and reads fail, and CRIU gives up at the next one.
    pub(crate) fn enter(
        hidden: Hidden,
        wanted: Option<Wanted>,
        called_off: Arc<EventFd>,
    ) -> Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(ContainerError::errno("make an event"))?;
        let stop = Arc::new(stop);
        let answered = Arc::new(AtomicU64::new(0));
        let Hidden { ranges, segments } = hidden;
        let mut over: Vec<(String, String)> = ranges
            .keys()
            .map(|pid| (format!("{DIRECTORY}/{pid}"), format!("/proc/{pid}/pagemap")))
            .collect();
        let (mut late, mut filtered) = (None, None);
        if let Some(wanted) = wanted {
            let hidden = Hidden { ranges: HiddenRanges::default(), segments };
            let (supervisor, listeners) = Supervisor::ready(hidden, called_off.clone())?;
            let outcome = Outcome::default();
            let stat = format!("/proc/{}/{STAT}", wanted.init);
            late = Some((Late::new(wanted, listeners, outcome.clone()), stat.clone()));
            filtered = Some((supervisor, outcome));
            over.push((format!("{DIRECTORY}/{STAT}"), stat));
        }
        let mut server = Server {
            hidden: ranges.into_iter().collect(),
            late,
            opened: BTreeMap::new(),
            handles: 0,
            called_off,
            answered: answered.clone(),
        };
        let (sender, receiver) = std::sync::mpsc::channel::<OwnedFd>();
        let stopped = stop.clone();
        // Started first: outside of the namespace, where it opens the real page tables.
        let thread = std::thread::Builder::new()
            .name("page-tables".to_owned())
            .spawn(move || {
                if let Ok(device) = receiver.recv() {
                    server.serve(&device, &stopped);
                }
            })
            .map_err(ContainerError::io("start a thread"))?;
        // Without a device the sender goes, and with it the thread.
        let begun = mount_files().map(move |device| drop(sender.send(device)));
        let mounts = Self { stop, thread: Some(thread), answered, late: filtered };
        begun?;
        for (ours, over) in over {
            mount(Some(ours.as_str()), over.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(ContainerError::errno(format!("mount a file of our own on {over}")))?;
        }
        Ok(mounts)
    }

    /// How many scans and reads were answered, and calls that the filter sent.
    pub(crate) fn answered(&self) -> u64 {
        let sent = self.late.as_ref().map_or(0, |(supervisor, _)| supervisor.answered());
        self.answered.load(Ordering::Relaxed) + sent
    }

    /// What came of the filter, where one was wanted.
    pub(crate) fn filter(&self) -> Option<&Outcome> {
        self.late.as_ref().map(|(_, outcome)| outcome)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread into a mount namespace of its own, and mounts files there that whoever has the
/// descriptor returned has to serve.
fn mount_files() -> Result<OwnedFd> {
    alone()?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(ContainerError::io("open /dev/fuse"))?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("decamp"), DIRECTORY, Some("fuse"), flags, Some(options.as_str()))
        .map_err(ContainerError::errno("mount files of our own (FUSE)"))?;
    Ok(device.into())
}

/// Puts the calling thread into a mount namespace of its own, for good: what it mounts over files in /proc from
/// here on is seen by nobody but those that it starts.
pub(crate) fn alone() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(ContainerError::errno("make a mount namespace"))?;
    mount(None::<&str>, "/proc", None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(ContainerError::errno("make the mount on /proc private"))
}

/// Whether this process may do all that the mounts take. Tried on ourselves, on a thread that ends.
pub(crate) fn probe() -> std::result::Result<(), String> {
    try_on_a_thread(|| {
        let called_off = EventFd::new().map_err(ContainerError::errno("make an event"))?;
        let us = std::process::id() as i32;
        let page = PAGE_SIZE as u64;
        let ranges = HiddenRanges::from([(us, std::iter::once(page..2 * page).collect())]);
        let hidden = Hidden { ranges, ..Hidden::default() };
        let mounts = Mounts::enter(hidden, None, Arc::new(called_off))?;
        let path = format!("/proc/{us}/pagemap");
        let pagemap = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
        let asked = if scans() {
            let mut argument = PmScanArg {
                start: page,
                end: 2 * page,
                category_anyof_mask: PAGE_IS_PRESENT,
                return_mask: PAGE_IS_PRESENT,
                ..PmScanArg::default()
            };
            let mut regions = [PageRegion::default()];
            sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions).map(|_| ())
        } else {
            pagemap.read_exact_at(&mut [0; WORD as usize], WORD)
        };
        asked.map_err(ContainerError::io(format!("ask {path}, which is ours")))?;
        match mounts.answered() {
            0 => Err(ContainerError::State(format!("What is mounted on {path} is not seen"))),
            _ => Ok(()),
        }
    })
}

/// What a file is.
#[derive(Clone, Copy)]
enum Kind {
    /// Page tables, by their place among those hidden.
    PageTables(usize),
    Stat,
}

/// What the files hold.
struct Server {
    /// By node, from the first one after the directory's.
    hidden: Vec<(i32, Vec<Range<u64>>)>,
    /// The file that CRIU opens when it may be under a filter, and where the real one is. Its node is the next.
    late: Option<(Late, String)>,
    /// Real files by handle.
    opened: BTreeMap<u64, (Kind, File)>,
    handles: u64,
    called_off: Arc<EventFd>,
    answered: Arc<AtomicU64>,
}

impl Server {
    fn serve(&mut self, device: &OwnedFd, stop: &EventFd) {
        let mut room = vec![0; REQUEST_ROOM];
        loop {
            let mut events = [
                PollFd::new(device.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut events, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(error) => return tracing::error!(%error, "Cannot wait for CRIU's questions"),
                Ok(_) if events[1].any() == Some(true) => return,
                Ok(_) => {}
            }
            let length = match nix::unistd::read(device, &mut room) {
                // The asker was killed before it was heard.
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
                // Nothing is mounted any more.
                Err(_) => return,
                Ok(length) => length,
            };
            let Some(request) = Request::parse(&room[..length]) else {
                return tracing::error!(length, "The kernel asked what makes no sense");
            };
            if request.what == What::Note {
                continue;
            }
            let reply = self.reply(&request.what).unwrap_or_else(|error| {
                tracing::debug!(%error, ?request, "Cannot answer CRIU");
                Reply::Failed(error.raw_os_error().unwrap_or(libc::EIO))
            });
            if let Err(error) = nix::unistd::write(device, &request.answer(&reply)) {
                tracing::debug!(%error, "CRIU did not wait for the answer");
            }
        }
    }

    fn reply(&mut self, what: &What<'_>) -> io::Result<Reply> {
        let fail = |number| Err(io::Error::from_raw_os_error(number));
        Ok(match *what {
            What::Begin(flags) => Reply::Begun(flags),
            What::Find(name) => match self.place(name) {
                Some(place) => Reply::Found(ROOT + 1 + place as u64),
                None => return fail(libc::ENOENT),
            },
            What::Describe(node) => Reply::Described(node),
            What::Open { node, caller } => {
                let place = (node.wrapping_sub(ROOT + 1)) as usize;
                let (kind, path) = match (self.hidden.get(place), &mut self.late) {
                    (Some((pid, _)), _) => {
                        (Kind::PageTables(place), format!("/proc/{pid}/pagemap"))
                    }
                    (None, Some((late, path))) if place == self.hidden.len() => {
                        late.is_opened_by(caller)?;
                        (Kind::Stat, path.clone())
                    }
                    _ => return fail(libc::EISDIR),
                };
                self.handles += 1;
                self.opened.insert(self.handles, (kind, File::open(path)?));
                Reply::Opened(self.handles)
            }
            What::Close(handle) => {
                self.opened.remove(&handle);
                Reply::Agreed
            }
            What::Read { handle, offset, count } => Reply::Bytes(match self.opened.get(&handle) {
                Some((Kind::Stat, stat)) => {
                    if let Some((late, _)) = &mut self.late {
                        late.is_read()?;
                    }
                    let mut bytes = vec![0; count];
                    let got = stat.read_at(&mut bytes, offset)?;
                    bytes.truncate(got);
                    bytes
                }
                _ => {
                    let (pagemap, hidden) = self.asked(handle)?;
                    read(pagemap, hidden, offset, count)?
                }
            }),
            What::Ask { handle, caller, number, bytes } => {
                let (true, Ok(argument)) = (u64::from(number) == PAGEMAP_SCAN, bytes.try_into())
                else {
                    return fail(libc::ENOTTY);
                };
                let (pagemap, hidden) = self.asked(handle)?;
                let argument = PmScanArg::from_bytes(argument);
                let answer = scan(pagemap.as_fd(), hidden, &argument)?;
                sys::write_regions(caller, argument.vec, &answer.regions)?;
                let mut bytes = bytes.to_vec();
                bytes[PmScanArg::WALK_END as usize..][..8]
                    .copy_from_slice(&answer.walk_end.to_ne_bytes());
                Reply::Told(answer.regions.len() as i32, bytes)
            }
            What::Agree => Reply::Agreed,
            What::Note | What::Other => return fail(libc::ENOSYS),
        })
    }

    /// The place of the file of this name.
    fn place(&self, name: &[u8]) -> Option<usize> {
        let name = std::str::from_utf8(name).ok()?;
        match self.late {
            Some(_) if name == STAT => Some(self.hidden.len()),
            _ => self.hidden.iter().position(|(pid, _)| name.parse() == Ok(*pid)),
        }
    }

    /// The real page tables behind a handle, and what of them is hidden.
    fn asked(&self, handle: u64) -> io::Result<(&File, &[Range<u64>])> {
        if is_set(&self.called_off) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        let Some((Kind::PageTables(place), pagemap)) = self.opened.get(&handle) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        self.answered.fetch_add(1, Ordering::Relaxed);
        Ok((pagemap, &self.hidden[*place].1))
    }
}

/// Reads words as if `hidden` (ascending, disjoint) were empty: less than asked only at the end of the address
/// space.
fn read(pagemap: &File, hidden: &[Range<u64>], offset: u64, count: usize) -> io::Result<Vec<u8>> {
    let page = PAGE_SIZE as u64;
    let first = offset / WORD;
    let address = |word: u64| word.checked_mul(page);
    let asked = address(first).zip(first.checked_add(count as u64 / WORD).and_then(address));
    let whole = offset.is_multiple_of(WORD) && (count as u64).is_multiple_of(WORD);
    let Some((start, end)) = asked.filter(|_| whole && count <= LONGEST_READ) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let asked = start..end;
    let mut words = vec![0; count];
    // Of what is hidden the kernel need not be asked.
    if hidden.iter().any(|range| range.start <= start && end <= range.end) {
        return Ok(words);
    }
    let got = pagemap.read_at(&mut words, offset)?;
    words.truncate(got);
    for range in hidden.iter().filter(|range| overlaps(range, &asked)) {
        let place = |address: u64| ((address / page - first) * WORD) as usize;
        let (from, to) = (place(range.start.max(start)), place(range.end.min(end)));
        words[from.min(got)..to.min(got)].fill(0);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A page map whose word for page N is N + 1.
    fn pagemap(pages: u64) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        let words: Vec<u8> = (1..=pages).flat_map(u64::to_ne_bytes).collect();
        io::Write::write_all(&mut file, &words).expect("written");
        file
    }

    proptest! {
        #[test]
        fn all_words_are_the_kernels_but_the_hidden(
            mut cuts in prop::collection::vec(0u64..300, 0..12),
            first in 0u64..250,
            count in 1u64..100,
        ) {
            cuts.sort_unstable();
            cuts.dedup();
            let hidden: Vec<Range<u64>> =
                cuts.chunks_exact(2).map(|pair| pair[0] * 4096..pair[1] * 4096).collect();
            let got = read(&pagemap(300), &hidden, first * WORD, (count * WORD) as usize);
            let got = got.expect("reads");
            let wholly = hidden.iter().any(|range| {
                range.start <= first * 4096 && (first + count) * 4096 <= range.end
            });
            let there = if wholly { count } else { count.min(300 - first) };
            prop_assert_eq!(got.len() as u64, there * WORD);
            for (page, word) in (first..).zip(got.as_chunks::<8>().0) {
                let is_hidden = hidden.iter().any(|range| range.contains(&(page * 4096)));
                prop_assert_eq!(u64::from_ne_bytes(*word), if is_hidden { 0 } else { page + 1 });
            }
        }
    }

    #[test]
    fn only_whole_words_are_page_tables() {
        let file = pagemap(8);
        assert_eq!(read(&file, &[], 8, 16).expect("two words").len(), 16);
        for (offset, count) in [(4, 8), (8, 12), (u64::MAX - 7, 8), (0, LONGEST_READ + 8)] {
            assert!(read(&file, &[], offset, count).is_err(), "{offset}, {count}");
        }
    }

    #[test]
    fn what_cannot_be_hidden_fails_and_leaves_nothing() {
        let ranges = HiddenRanges::from([(i32::MAX, Vec::new())]);
        let hidden = Hidden { ranges, ..Hidden::default() };
        let wanted = Wanted { init: i32::MAX, limits: true };
        for (hidden, wanted) in [(hidden, None), (Hidden::default(), Some(wanted))] {
            let tried = std::thread::spawn(move || {
                let event = Arc::new(EventFd::new().expect("an event"));
                Mounts::enter(hidden, wanted, event).map(drop)
            });
            assert!(tried.join().expect("no panic").is_err());
        }
        let mounted = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounted.contains(&format!(" {DIRECTORY} ")), "{mounted}");
    }

    #[test]
    fn questions_for_our_own_pages_are_answered_there_and_nowhere_else() {
        let buffer = vec![1u8; 1 << 20];
        let page = PAGE_SIZE as u64;
        let start = (buffer.as_ptr() as u64).next_multiple_of(page);
        let (middle, end) = (start + 64 * page, start + 128 * page);
        let us = std::process::id() as i32;
        let ranges = HiddenRanges::from([(us, std::iter::once(start..middle).collect())]);
        let hidden = Hidden { ranges, ..Hidden::default() };
        let words = move |pagemap: &File| {
            let mut words = vec![0xee; 128 * WORD as usize];
            pagemap.read_exact_at(&mut words, start / page * WORD).map(|()| words)
        };
        let asked = std::thread::spawn(move || {
            let called_off = Arc::new(EventFd::new().expect("an event"));
            let mounts = match Mounts::enter(hidden, None, called_off.clone()) {
                Ok(mounts) => mounts,
                Err(error) => {
                    eprintln!("skipped: {error}: needs root and FUSE");
                    return None;
                }
            };
            let pagemap = File::open(format!("/proc/{us}/pagemap")).expect("ours");
            let read = words(&pagemap).expect("answered");
            assert!(mounts.answered() > 0);
            let mut argument = PmScanArg {
                start,
                end,
                category_anyof_mask: PAGE_IS_PRESENT,
                return_mask: PAGE_IS_PRESENT,
                ..PmScanArg::default()
            };
            let mut regions = vec![PageRegion::default(); 600];
            let mut scan = || {
                sys::pagemap_scan(pagemap.as_fd(), &mut argument, &mut regions)
                    .map(|found| (regions[..found].to_vec(), argument.walk_end))
            };
            let scanned = scans().then(|| scan().expect("answered"));
            called_off.write(1).expect("called off");
            let error = words(&pagemap).expect_err("nobody wants it any more");
            assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
            Some((read, scanned))
        });
        let Some((read, scanned)) = asked.join().expect("no panic") else { return };
        let real = words(&File::open("/proc/self/pagemap").expect("pagemap")).expect("read");
        drop(buffer);
        let ours = (start..end).step_by(PAGE_SIZE).zip(read.as_chunks::<8>().0);
        for ((address, word), real) in ours.zip(real.as_chunks::<8>().0) {
            assert_eq!(u64::from_ne_bytes(*word) != 0, address >= middle, "{address:#x}");
            assert_ne!(u64::from_ne_bytes(*real), 0, "{address:#x} is hidden from everybody");
        }
        let Some((regions, walk_end)) = scanned else { return };
        assert_eq!(walk_end, end);
        assert_eq!(regions.first().map(|region| region.start), Some(middle));
        let found: u64 = regions.iter().map(|region| region.end - region.start).sum();
        assert_eq!(found, end - middle);
    }
}
