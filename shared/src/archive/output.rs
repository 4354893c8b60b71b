//! The file that an archive is written to: under a temporary name beside its own, and under its own only
//! when all of it is on the disk. It never replaces anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use super::error::{ArchiveError, Result};

/// A file that is being written. Dropped, it is gone.
#[derive(Debug)]
pub(super) struct Output {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    naming: Naming,
    stands: bool,
}

/// How a file system gives a file a name that must be free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// At once.
    Rename,
    /// With a second name first, as on NFS and 9p, which know no other way.
    Link,
}

impl Naming {
    /// What works where `from` stands, tried on itself under the name `to`, which it keeps.
    fn that_works(from: &Path, to: &Path) -> rustix::io::Result<Self> {
        match Self::Rename.give(from, to) {
            Ok(()) => Ok(Self::Rename),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                Self::Link.give(from, to).map(|()| Self::Link)
            }
            Err(error) => Err(error),
        }
    }

    fn give(self, from: &Path, to: &Path) -> rustix::io::Result<()> {
        match self {
            Self::Rename => renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE),
            Self::Link => {
                linkat(CWD, from, CWD, to, AtFlags::empty())?;
                if let Err(error) = rustix::fs::unlink(from) {
                    tracing::warn!(path = %from.display(), %error, "Cannot remove a temporary name");
                }
                Ok(())
            }
        }
    }
}

impl Output {
    /// Begins the file that is to be `path`.
    ///
    /// # Errors
    /// When something stands there, or nothing can be written there.
    pub(super) fn begin(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(ArchiveError::OutputTaken(path.to_owned()));
        }
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let beside = || path.with_file_name(format!(".{name}.{:016x}", rand::random::<u64>()));
        let (first, temporary) = (beside(), beside());
        // It holds all that the workload has in its memory.
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&first)
            .map_err(failed("write", path))?;
        let path = path.to_owned();
        let mut output =
            Self { path, temporary: first, file, naming: Naming::Rename, stands: true };
        // Now, and not when the workload has stood still for all of it.
        output.naming = Naming::that_works(&output.temporary, &temporary).map_err(|error| {
            failed("name a file without replacing another as", &output.path)(error.into())
        })?;
        output.temporary = temporary;
        Ok(output)
    }

    /// What is written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// All is written: brings it to the disk, and gives it its name. Gives its bytes.
    ///
    /// # Errors
    /// When that fails, or something took the name meanwhile; the file is gone then.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.file.sync_all().map_err(failed("bring to the disk", &self.path))?;
        let bytes = self.file.metadata().map_err(failed("look at", &self.path))?.len();
        match self.naming.give(&self.temporary, &self.path) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                return Err(ArchiveError::OutputTaken(self.path.clone()));
            }
            Err(error) => return Err(failed("name", &self.path)(error.into())),
        }
        self.stands = false;
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        if let Err(error) = synced {
            // Whether its name is there after a crash cannot be said: then it is not there now.
            let _ = std::fs::remove_file(&self.path);
            return Err(failed("bring to the disk", directory)(error));
        }
        Ok(bytes)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.stands
            && let Err(error) = std::fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "Cannot remove a half written checkpoint");
        }
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> ArchiveError + use<'a> {
    move |source| ArchiveError::Io { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).expect("a directory");
        let name = |entry: io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
        entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn either_way_it_gets_its_name_and_takes_nobodys() {
        for naming in [Naming::Rename, Naming::Link] {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("web.tar.zst");
            let begin = || {
                let mut output = Output::begin(&path).expect("begins");
                assert_eq!(output.naming, Naming::Rename, "as any local file system");
                output.naming = naming;
                output
            };
            let (first, second) = (begin(), begin());
            assert_eq!(names(directory.path()).len(), 2);
            first.finish().expect("gets its name");
            let taken = second.finish().expect_err("has it already");
            assert!(matches!(taken, ArchiveError::OutputTaken(_)), "{taken}");
            assert_eq!(names(directory.path()), ["web.tar.zst"]);
            assert!(Output::begin(&path).is_err());
            assert_eq!(names(directory.path()), ["web.tar.zst"]);
        }
    }
}
