//! The file that a disk goes over to while its guest runs: given empty, filled by somebody else with what the disk
//! holds, and taken in one step. When that step is due is not decided here.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::lock::Locked;
use super::{Disk, resized, size_of};
use crate::error::{Result, VmError};

/// A file that is to be a disk, locked.
#[derive(Debug)]
pub(super) struct Next {
    file: Arc<Locked>,
    path: PathBuf,
}

impl Disk {
    /// `file`, which stands at `path` and holds nothing, is what it goes over to. It is as long as the disk from here
    /// on, and this VM's: nobody else takes it for a disk.
    ///
    /// # Errors
    /// When the disk is not open, not as large as its guest knows it, only read, or not what its guest wrote; when the file is not empty, locked, or not
    /// open for reading and writing; when it cannot be made as long.
    pub(crate) fn give_next(&self, file: File, path: &Path) -> Result<()> {
        let failed = |what: &str, error: std::io::Error| {
            VmError::refused(format!("{what} {}", path.display()), error)
        };
        let wrong =
            |reason: &str| Err(VmError::Disk { path: path.to_owned(), reason: reason.to_owned() });
        // What was cut off would be zeros in the new file, and the loss nobody's.
        self.check_size()?;
        if self.is_readonly() {
            return wrong("the disk that it is for is only read, so what it holds is not followed");
        }
        if let Some(lost) = self.lost.get() {
            return Err(self.failed("move", std::io::Error::other(lost.clone())));
        }
        let found = file.metadata().map_err(|error| failed("look at", error))?;
        if !found.is_file() || found.len() != 0 {
            return wrong("a disk goes over to an empty file alone");
        }
        let flags =
            fcntl(&file, FcntlArg::F_GETFL).map_err(|error| failed("ask for", error.into()))?;
        if OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return wrong("it is not open for reading and writing");
        }
        let file = self.lock(file, path, Duration::ZERO)?;
        file.set_len(self.bytes()).map_err(|error| failed("size", error))?;
        self.files.give_next(self.number, &file)?;
        let next = Next { file: Arc::new(file), path: path.to_owned() };
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
        Ok(())
    }

    /// It stays with the file that it has.
    pub(crate) fn drop_next(&self) {
        if self.next.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            self.files.drop_next(self.number);
        }
    }

    /// That it can go over, as far as can be seen: all that was written was given to whoever fills the file, and both
    /// files are as long as the disk.
    ///
    /// # Errors
    /// When that is not so.
    pub(crate) fn check_next(&self) -> Result<()> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = super::shown(&self.label(), &self.path());
        let Some(next) = next.as_ref() else {
            return Err(VmError::State(format!("There is no file that {shown} could go over to")));
        };
        if self.written.any() {
            return Err(VmError::State(format!(
                "{shown} was written since anybody looked for the last time"
            )));
        }
        if let Some(lost) = self.lost.get() {
            return Err(self.failed("move", std::io::Error::other(lost.clone())));
        }
        self.check_size()?;
        match (self.bytes(), size_of(&next.file, &next.path)?) {
            (known, found) if known == found => Ok(()),
            (known, found) => Err(resized(&next.path, known, found)),
        }
    }

    /// Goes over, if there is a file. The lock of the old one is given up. Nothing may be under way.
    pub(crate) fn go_over(&self) {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Next { file, path }) = next else { return };
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(file);
        *self.path.write().unwrap_or_else(PoisonError::into_inner) = path;
    }
}
