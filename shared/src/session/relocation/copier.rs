//! What a relocation copies with: pages that are read from the workload's files and written into the new ones, by one
//! thread, on one host. Which pages, and when, is decided elsewhere.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::files::Landing;
use crate::keeper::ends::DescriptorWriter;
use crate::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, PageWriter, SpaceId, is_zero};
use crate::workload::{PlacedTree, Result, SourceWorkload, WorkloadError};

/// Pages that are read at a time.
const PIECE: u64 = 128;
/// Rights that a file has, without what it makes of whoever runs it.
const RIGHTS: u32 = 0o777;

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Pages that were read.
    pub(super) read: AtomicU64,
    /// Pages that were zero.
    pub(super) zero: AtomicU64,
    /// Pages that were written.
    pub(super) raw: AtomicU64,
}

/// A file that takes the place of another.
struct Fresh {
    old: PathBuf,
    path: PathBuf,
    file: Arc<File>,
    /// As many as the other has.
    bytes: u64,
}

/// Copies between the files of one workload and those that replace them.
pub(super) struct Copier {
    reader: Arc<dyn PageReader>,
    writer: DescriptorWriter,
    files: BTreeMap<SpaceId, Fresh>,
    /// Whoever set it does not want any more of it.
    pub(super) stopped: AtomicBool,
    pub(super) counters: Counters,
}

impl Copier {
    /// Makes the new files, as `landing` remembers, and gives them to `workload`.
    ///
    /// # Errors
    /// When one cannot be made, or is not taken.
    pub(super) fn make(
        workload: &mut dyn SourceWorkload,
        landing: &Landing,
        wanted: &[PlacedTree],
    ) -> Result<Self> {
        let mut files = BTreeMap::new();
        for placed in wanted {
            let fresh = Fresh::make(workload, landing, placed)?;
            files.insert(SpaceId(placed.tree.space), fresh);
        }
        let pages = |fresh: &Fresh| fresh.bytes.div_ceil(PAGE_SIZE as u64);
        let spaces = files.iter().map(|(space, one)| (*space, (one.file.clone(), pages(one))));
        Ok(Self {
            reader: workload.reader()?,
            writer: DescriptorWriter::of(spaces.collect()),
            files,
            stopped: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    /// Copies `pages`. `first`: the new files hold nothing yet, so that zeros need not be written.
    ///
    /// # Errors
    /// When a page cannot be read or written, or it was stopped.
    pub(super) fn copy(&self, pages: &PageSet, first: bool) -> Result<()> {
        let mut bytes = vec![0; PIECE as usize * PAGE_SIZE];
        for range in pages.ranges() {
            for begin in (range.first..range.end()).step_by(PIECE as usize) {
                if self.stopped.load(Ordering::Relaxed) {
                    return Err(WorkloadError::plain("It was called off"));
                }
                let piece = PageRange::new(range.space, begin, PIECE.min(range.end() - begin));
                let bytes = &mut bytes[..piece.bytes()];
                self.reader.read(piece, bytes)?;
                self.put(piece, bytes, first)?;
                self.counters.read.fetch_add(piece.count, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Has all that was written stored. `last`: with all that the files are.
    ///
    /// # Errors
    /// When it cannot be.
    pub(super) fn store(&self, last: bool) -> Result<()> {
        for one in self.files.values() {
            let stored = || {
                // The last page may be a part of one.
                if one.file.metadata()?.len() != one.bytes {
                    one.file.set_len(one.bytes)?;
                }
                if last { one.file.sync_all() } else { one.file.sync_data() }
            };
            stored().map_err(|error| failed("store", &one.path, error))?;
        }
        Ok(())
    }

    /// Gives the new files the owner and the rights of the old ones. Of a block device they say nothing.
    ///
    /// # Errors
    /// When the file systems refuse.
    pub(super) fn take_after(&self) -> Result<()> {
        self.files.values().try_for_each(|one| {
            liken(&one.file, &one.old)
                .map_err(|error| failed("set owner and rights of", &one.path, error))
        })
    }

    /// Pages that are zero, and others, come in runs.
    fn put(&self, range: PageRange, bytes: &[u8], first: bool) -> Result<()> {
        let zeros: Vec<bool> = bytes.chunks(PAGE_SIZE).map(is_zero).collect();
        let mut page = range.first;
        for run in zeros.chunk_by(|one, next| one == next) {
            let count = run.len() as u64;
            let part = PageRange::new(range.space, page, count);
            let from = (page - range.first) as usize * PAGE_SIZE;
            let path =
                || self.files.get(&part.space).map(|one| one.path.clone()).unwrap_or_default();
            if run[0] {
                self.counters.zero.fetch_add(count, Ordering::Relaxed);
                if !first {
                    let zeroed = self.writer.zero(part);
                    zeroed.map_err(|error| failed("write zeros to", &path(), error))?;
                }
            } else {
                self.counters.raw.fetch_add(count, Ordering::Relaxed);
                let written = self.writer.write(part, &bytes[from..from + part.bytes()]);
                written.map_err(|error| failed("write to", &path(), error))?;
            }
            page += count;
        }
        Ok(())
    }
}

impl Fresh {
    fn make(
        workload: &mut dyn SourceWorkload,
        landing: &Landing,
        placed: &PlacedTree,
    ) -> Result<Self> {
        let path = &placed.path;
        landing.land_empty(path, false).map_err(|error| failed("make", path, error))?;
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path);
        let file = opened.map_err(|error| failed("open", path, error))?;
        let again = file.try_clone().map_err(|error| failed("open once more", path, error))?;
        workload.mirror(&placed.tree, path, again.into())?;
        let bytes = file.metadata().map_err(|error| failed("look at", path, error))?.len();
        let old = PathBuf::from(&placed.tree.path);
        Ok(Self { old, path: path.clone(), file: Arc::new(file), bytes })
    }
}

/// Gives `file` the owner and the rights of the file at `old`.
fn liken(file: &File, old: &Path) -> io::Result<()> {
    let old = old.metadata()?;
    if old.is_file() {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
        file.set_permissions(Permissions::from_mode(old.mode() & RIGHTS))?;
    }
    Ok(())
}

fn failed(what: &str, path: &Path, error: impl Into<crate::workload::BoxError>) -> WorkloadError {
    WorkloadError::new(format!("Cannot {what} {}", path.display()), error)
}
