//! The disk of a VM: a raw file or a block device of the host, its size, its lock, and which of its pages were
//! written. Nothing here knows virtio, and nothing decides when a disk is taken or let go.
//!
//! | file | what lives there |
//! |---|---|
//! | `content` | reading, writing, discarding, with every bound checked |
//! | `keeping` | storing what comes into one, as it comes |
//! | `lock` | whose a disk is |
//! | `next` | the file that a disk goes over to while its guest runs |
//! | `written` | pages that were written since they were looked for last |

mod content;
pub(crate) mod keeping;
pub(crate) mod lock;
mod next;
mod written;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use decamp_shared::sparse::Data;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::error::{Result, VmError};
use crate::files::{Files, open_disk};
use crate::spec::DiskSpec;
use crate::sys;
use lock::Locked;
use next::Next;
use written::Written;

/// Bytes of a sector, which all sizes are multiples of (Virtual I/O Device 1.2, section 5.2).
pub(crate) const SECTOR: u64 = 512;
/// The largest disk, in bytes: what fits into an `off_t`, with room.
pub(crate) const MOST: u64 = 1 << 60;

/// A disk of one VM. Closed until it is opened, and whenever it belongs to somebody else.
pub(crate) struct Disk {
    /// Number among the VM's disks.
    number: usize,
    /// Where it lies.
    path: RwLock<PathBuf>,
    readonly: bool,
    files: Files,
    open: RwLock<Option<Arc<Locked>>>,
    /// As the guest sees it; 0 as long as nobody knows.
    bytes: AtomicU64,
    written: Written,
    /// What it goes over to, while that is being filled.
    next: Mutex<Option<Next>>,
    /// Why something that was written may not be there: Linux says so once for each open file, and then no more.
    lost: OnceLock<Lost>,
}

/// The first failure to store what was written.
#[derive(Clone, Debug, thiserror::Error)]
#[error("What was written may not be there: storing it failed once ({0})")]
struct Lost(Arc<io::Error>);

impl Disk {
    /// Disk `number` of a VM, closed, opened by its path.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn new(number: usize, spec: &DiskSpec) -> Self {
        Self::opened_by(Files::Own, number, spec)
    }

    /// Disk `number` of a VM, closed, which `files` open.
    pub(crate) fn opened_by(files: Files, number: usize, spec: &DiskSpec) -> Self {
        Self {
            number,
            path: RwLock::new(spec.path.clone()),
            readonly: spec.readonly,
            files,
            open: RwLock::default(),
            bytes: AtomicU64::new(0),
            written: Written::default(),
            next: Mutex::default(),
            lost: OnceLock::new(),
        }
    }

    /// Its name: the same on every host.
    pub(crate) fn label(&self) -> String {
        label(self.number)
    }

    /// The space that its pages are.
    pub(crate) fn space(&self) -> SpaceId {
        space(self.number)
    }

    /// Where it lies on this host.
    pub(crate) fn path(&self) -> PathBuf {
        self.path.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the guest may not write it.
    pub(crate) fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Bytes that the guest sees.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// The guest sees so many bytes, whatever the file has.
    pub(crate) fn set_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::SeqCst);
    }

    /// One past its last page; what is behind its end in the last one is zeros.
    pub(crate) fn page_limit(&self) -> u64 {
        self.bytes().div_ceil(PAGE_SIZE as u64)
    }

    /// Opens it and takes its lock, waiting for that as long as `patience`. Before anything else is done to it;
    /// its size is the file's, unless it is known already. One that has become longer meanwhile serves its guest
    /// as well as before, who sees no more of it: that is no reason to leave a guest standing.
    ///
    /// # Errors
    /// When it is missing, is no disk, is locked, or is shorter than the guest knows it.
    pub(crate) fn open(&self, patience: Duration) -> Result<()> {
        let file = self.open_file()?;
        let file = self.lock(file, &self.path(), patience)?;
        let found = size_of(&file, &self.path())?;
        match self.bytes() {
            0 => self.set_bytes(found),
            known if known <= found => read_anew(&file, &self.path()),
            known => return Err(resized(&self.path(), known, found)),
        }
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(file));
        Ok(())
    }

    /// The same of a file that was just made for it, in which there is nothing, and that its pages come into.
    ///
    /// # Errors
    /// When it is missing, no empty file, or locked.
    pub(crate) fn open_to_fill(&self, page_limit: u64) -> Result<()> {
        let file = self.open_file()?;
        let failed = |error| self.failed("size", error);
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() || found.len() != 0 {
            let reason = "pages come into what is empty alone".to_owned();
            return Err(VmError::Disk { path: self.path(), reason });
        }
        let file = self.lock(file, &self.path(), Duration::ZERO)?;
        let bytes = page_limit.checked_mul(PAGE_SIZE as u64).filter(|bytes| *bytes <= MOST);
        let bytes = bytes.ok_or_else(|| {
            VmError::State(format!("A disk of {page_limit} pages is larger than any can be"))
        })?;
        file.set_len(bytes).map_err(failed)?;
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(file));
        Ok(())
    }

    /// All pages came: the file is as long as the disk, and stored.
    ///
    /// # Errors
    /// When it is not open, has not as many pages, or cannot be stored, now or at any time before.
    pub(crate) fn filled(&self) -> Result<()> {
        let file = self.file().map_err(|error| self.failed("end", error))?;
        let found = size_of(&file, &self.path())?;
        if found.div_ceil(PAGE_SIZE as u64) != self.page_limit() {
            return Err(resized(&self.path(), self.bytes(), found));
        }
        file.set_len(self.bytes()).map_err(|error| self.failed("size", error))?;
        self.store_by(|| file.sync_all()).map_err(|error| self.failed("store", error))
    }

    /// Stores with `sync` what was written. Whoever was told once that this fails, and tries again, is told nothing
    /// by the kernel: so the first failure stays, whoever met it, and through closing and opening.
    fn store_by(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match sync() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => drop(self.lost.set(Lost(Arc::new(error)))),
            Ok(()) => {}
        }
        self.lost.get().map_or(Ok(()), |lost| Err(io::Error::other(lost.clone())))
    }

    /// Closes it and gives its lock up.
    pub(crate) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether it is open here, and so this VM's.
    pub(crate) fn is_open(&self) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// That it is as large as the guest knows it.
    ///
    /// # Errors
    /// With both sizes, when it is not; when it cannot be looked at.
    pub(crate) fn check_size(&self) -> Result<()> {
        let file = self.file().map_err(|error| self.failed("look at", error))?;
        match (self.bytes(), size_of(&file, &self.path())?) {
            (known, found) if known == found => Ok(()),
            (known, found) => Err(resized(&self.path(), known, found)),
        }
    }

    /// The same of one that is not open here.
    ///
    /// # Errors
    /// As [`Disk::check_size`].
    pub(crate) fn check_file(&self) -> Result<()> {
        let opened = self.files.disk(self.number, &self.path(), false);
        let file = opened.map_err(|error| self.failed("open", error))?;
        match (self.bytes(), size_of(&file, &self.path())?) {
            (known, found) if known == found => Ok(()),
            (known, found) => Err(resized(&self.path(), known, found)),
        }
    }

    /// A descriptor of its own for another process: reads, and writes if `writable`.
    ///
    /// # Errors
    /// When it is not open, or the kernel refuses.
    pub(crate) fn descriptor(&self, writable: bool) -> Result<OwnedFd> {
        // A description of its own: the lock stays with the one here.
        let opened = self.file().and_then(|file| self.files.again(file.as_fd(), writable));
        opened.map_err(|error| self.failed("open once more", error))
    }

    /// From now on it is noted which pages are written.
    pub(crate) fn track(&self) {
        self.written.start(self.page_limit());
    }

    /// Nothing is noted any more.
    pub(crate) fn stop_tracking(&self) {
        self.written.stop();
    }

    /// Adds the pages that were written since the last call to `set`, and forgets them; with `all`, every page
    /// that holds anything, too.
    ///
    /// # Errors
    /// When the file does not say where it holds anything.
    pub(crate) fn harvest(&self, all: bool, set: &mut PageSet) -> Result<()> {
        self.written.take(self.space(), set);
        if !all {
            return Ok(());
        }
        // After what was noted is forgotten: what is written from now on is noted again.
        let failed = |error| self.failed("find what is written of", error);
        let descriptor = self.descriptor(false)?;
        let whole = PageRange::new(self.space(), 0, self.page_limit());
        for data in Data::of(&descriptor).pages() {
            match data {
                Ok(data) => {
                    let end = data.end.min(whole.count);
                    let count = end.saturating_sub(data.start);
                    set.insert(PageRange::new(self.space(), data.start, count));
                }
                // Block devices do not know.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    set.insert(whole);
                    return Ok(());
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn open_file(&self) -> Result<File> {
        let opened = self.files.disk(self.number, &self.path(), !self.is_readonly());
        opened.map_err(|error| self.failed("open", error))
    }

    /// Takes the lock of `file`, which is it, or is to be it, and stands at `path`; waits as long as `patience`.
    fn lock(&self, file: File, path: &Path, patience: Duration) -> Result<Locked> {
        lock::take(file, path, self.is_readonly(), patience)?
            .map_err(|file| lock::locked(path, self.files.holder(&file)))
    }

    /// The file, if it is open.
    fn file(&self) -> io::Result<Arc<Locked>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| io::Error::other("the disk is not open here"))
    }

    fn failed(&self, what: &str, error: io::Error) -> VmError {
        VmError::refused(format!("{what} {}", shown(&self.label(), &self.path())), error)
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Disk");
        shown
            .field("number", &self.number)
            .field("path", &self.path())
            .field("bytes", &self.bytes());
        shown.field("is_open", &self.is_open()).finish_non_exhaustive()
    }
}

/// The name of disk `number` of any VM.
pub(crate) fn label(number: usize) -> String {
    format!("disk{number}")
}

/// The space of disk `number` of any VM: guest memory is the first.
pub(crate) fn space(number: usize) -> SpaceId {
    SpaceId(u32::try_from(number + 1).unwrap_or(u32::MAX))
}

/// A disk, for people.
pub(crate) fn shown(label: &str, path: &Path) -> String {
    format!("{label} {}", path.display())
}

/// Bytes of the file or device that stands at `path`, if it can be a disk.
///
/// # Errors
/// When it cannot be looked at, is neither, or has no whole sectors.
pub(crate) fn size_at(path: &Path) -> Result<u64> {
    let failed = |error| VmError::refused(format!("open disk {}", path.display()), error);
    size_of(&open_disk(path, false).map_err(failed)?, path)
}

fn size_of(file: &File, path: &Path) -> Result<u64> {
    let failed = |error| VmError::refused(format!("look at disk {}", path.display()), error);
    let wrong = |reason: String| Err(VmError::Disk { path: path.to_owned(), reason });
    let found = file.metadata().map_err(failed)?;
    let bytes = if found.is_file() {
        found.len()
    } else if found.file_type().is_block_device() {
        sys::device_bytes(file).map_err(failed)?
    } else {
        return wrong("it is neither a file nor a block device".to_owned());
    };
    match bytes {
        0 => wrong("it is empty".to_owned()),
        bytes if bytes % SECTOR != 0 => {
            wrong(format!("its size of {bytes} bytes is not a multiple of {SECTOR}"))
        }
        bytes if bytes > MOST => wrong(format!("its size of {bytes} bytes is beyond any disk's")),
        bytes => Ok(bytes),
    }
}

/// What another host wrote is read from where it was stored, not from what was seen here before.
fn read_anew(file: &File, path: &Path) {
    if let Err(error) = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
        tracing::debug!("{} may be read from memory: {error}", path.display());
    }
}

fn resized(path: &Path, known: u64, found: u64) -> VmError {
    VmError::Disk {
        path: PathBuf::from(path),
        reason: format!("the guest knows it with {known} bytes, and it has {found} now"),
    }
}

#[cfg(test)]
mod tests;
