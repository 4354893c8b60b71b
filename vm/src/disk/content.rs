//! What a guest does to the content of a disk. Each bound is checked here again, whoever asks: nothing is read or
//! written beyond what the guest knows of the disk, also when the file has become longer or shorter.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::Disk;
use super::lock::Locked;
use crate::sys;

/// Zeros that are written at once where the file system makes no holes.
pub(super) const ZEROS: usize = 256 << 10;

impl Disk {
    /// Fills `into` with what is at `at`.
    ///
    /// # Errors
    /// When that is not all on the disk, or the host cannot read it.
    pub(crate) fn read<B: BitmapSlice>(
        &self,
        at: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        self.check(at, length_of(into))?;
        let file = self.file()?;
        each_part(at, into, |at, slices| match sys::read_slices_at(&file, slices, at) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            read => read,
        })
    }

    /// Writes `from` to `at`.
    ///
    /// # Errors
    /// When that is not all on the disk, or the host cannot write it.
    pub(crate) fn write<B: BitmapSlice>(
        &self,
        at: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        let file = self.writable(at, length_of(from))?;
        let wrote =
            each_part(at, from, |at, slices| match sys::write_slices_at(&file, slices, at) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                written => written,
            });
        // Also what failed: some of it may have come through.
        self.written.note(at, length_of(from));
        wrote
    }

    /// Has everything that was written stored.
    ///
    /// # Errors
    /// When the host cannot, or could not at any time before: what was lost then is not written again.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let file = self.file()?;
        self.store_by(|| file.sync_data())
    }

    /// The guest has no use for `length` bytes at `at` any more. What is read there then are zeros, or what was
    /// there before where the host makes no holes.
    ///
    /// # Errors
    /// When that is not all on the disk, or the host fails.
    pub(crate) fn discard(&self, at: u64, length: u64) -> io::Result<()> {
        let file = self.writable(at, length)?;
        let punched = punch(&file, at, length);
        self.written.note(at, length);
        match punched {
            Err(error) if !is_unsupported(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Zeros are to be read in `length` bytes at `at`; `unmap`: the host need not keep room for them. Ends early, and
    /// says false, when `stop` says so: then it has to be done again from its beginning.
    ///
    /// # Errors
    /// When that is not all on the disk, or the host fails.
    pub(crate) fn write_zeros(
        &self,
        at: u64,
        length: u64,
        unmap: bool,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<bool> {
        let file = self.writable(at, length)?;
        let tried = if unmap { punch(&file, at, length) } else { zero_range(&file, at, length) };
        let wrote = match tried {
            Err(error) if is_unsupported(&error) => fill_with_zeros(&file, at, length, stop),
            other => other.map(|()| true),
        };
        self.written.note(at, length);
        wrote
    }

    fn check(&self, at: u64, length: u64) -> io::Result<()> {
        match at.checked_add(length) {
            Some(end) if end <= self.bytes() => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    /// The file, if `length` bytes at `at` are there to be written: a file that was cut does not grow again.
    fn writable(&self, at: u64, length: u64) -> io::Result<std::sync::Arc<Locked>> {
        self.check(at, length)?;
        if self.is_readonly() {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let file = self.file()?;
        if file_bytes(&file)?.is_some_and(|bytes| bytes < at + length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(file)
    }
}

/// Bytes of `file` as this host knows them, nothing of a device. No times are asked for and no server: on a network
/// file system each write would wait for all before it to be stored (statx(2)).
fn file_bytes(file: &File) -> io::Result<Option<u64>> {
    let wanted = StatxFlags::TYPE | StatxFlags::SIZE;
    let found = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted)?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    Ok(kind.is_file().then_some(found.stx_size))
}

fn length_of<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).fold(0, u64::saturating_add)
}

/// Hands `slices` to `act`, which says how many bytes it took of them, until all are taken.
fn each_part<B: BitmapSlice>(
    mut at: u64,
    slices: &[VolatileSlice<'_, B>],
    mut act: impl FnMut(u64, &[VolatileSlice<'_, B>]) -> io::Result<usize>,
) -> io::Result<()> {
    let mut left = slices.to_vec();
    left.retain(|slice| !slice.is_empty());
    while !left.is_empty() {
        let mut taken = match act(at, &left) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            taken => taken?,
        };
        at += taken as u64;
        let whole = left.iter().take_while(|slice| {
            let fits = slice.len() <= taken;
            taken -= if fits { slice.len() } else { 0 };
            fits
        });
        let whole = whole.count();
        left.drain(..whole);
        if let Some(first) = left.first_mut().filter(|_| taken > 0) {
            *first = first.offset(taken).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn punch(file: &File, at: u64, length: u64) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, hole, at, length)
}

fn zero_range(file: &File, at: u64, length: u64) -> io::Result<()> {
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, zero, at, length)
}

fn allocate(file: &File, how: FallocateFlags, at: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let offset = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
    Ok(fallocate(file.as_fd(), how, offset(at)?, offset(length)?)?)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}

pub(super) fn fill_with_zeros(
    file: &File,
    at: u64,
    length: u64,
    stop: &dyn Fn() -> bool,
) -> io::Result<bool> {
    let zeros = vec![0; ZEROS.min(usize::try_from(length).unwrap_or(ZEROS))];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..part as usize], at + done)?;
        done += part;
        if done < length && stop() {
            return Ok(false);
        }
    }
    Ok(true)
}
