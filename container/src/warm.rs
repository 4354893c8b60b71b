//! What the stop runs is in memory before it begins: CRIU and its libraries, and this program. None of it ran
//! while memory was copied, which takes the longer the more there is, and a host that gives back what lies
//! idle has it read from a disk when a container stands still.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::error::Result;
use crate::swrk::Swrk;

/// So often it is asked for. What is there already costs next to nothing.
const EVERY: Duration = Duration::from_millis(500);
/// CRIU has been started, and has all of its libraries, within so many looks.
const LOOKS: u32 = 40;
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Files of CRIU's, and bytes of one of them, that are cared for.
const FILES: usize = 64;
const LONGEST: u64 = 64 << 20;

/// Keeps it there until it is dropped.
pub(crate) struct Warm {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Warm {
    /// Begins, for the CRIU at this path. Where it cannot be done the stop may be longer, and nothing is lost.
    pub(crate) fn keep(criu: &Path) -> Self {
        let (end, ended) = channel::<()>();
        let criu = criu.to_owned();
        let work = move || {
            let mut files = own().into_iter().collect::<Vec<_>>();
            match files_of(&criu, || {
                ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout)
            }) {
                Ok(found) => files.extend(found),
                Err(error) => tracing::debug!(%error, "Cannot tell which files CRIU needs"),
            }
            tracing::debug!(files = files.len(), "Keeping in memory what a stop runs");
            loop {
                files.iter().for_each(call_in);
                if ended.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("warm".to_owned()).spawn(work);
        Self { end: Some(end), thread: thread.ok() }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// This very program.
fn own() -> Option<File> {
    File::open("/proc/self/exe").ok()
}

/// The files that a CRIU maps which waits for its request: it is started for that, and ends.
fn files_of(criu: &Path, mut go_on: impl FnMut() -> bool) -> Result<Vec<File>> {
    let waiting = Swrk::start(criu, &[])?;
    let mut paths = BTreeSet::new();
    for _ in 0..LOOKS {
        if !go_on() {
            break;
        }
        let maps = fs::read_to_string(format!("/proc/{}/maps", waiting.pid())).unwrap_or_default();
        let found = mapped(&maps);
        // Those that come last came before the look before this one.
        if found.len() > 1 && found == paths {
            break;
        }
        paths = found;
    }
    let open = |path: &PathBuf| {
        let file = File::open(path).ok()?;
        let facts = file.metadata().ok()?;
        (facts.is_file() && facts.size() <= LONGEST).then_some(file)
    };
    Ok(paths.iter().filter_map(open).take(FILES).collect())
}

/// Files in the text of maps.
fn mapped(maps: &str) -> BTreeSet<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    paths.filter(|path| path.starts_with('/')).map(PathBuf::from).collect()
}

/// Has the kernel read what of a file is not in memory.
fn call_in(file: &File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_that_a_program_maps_are_found() {
        let maps = "\
1000-2000 r-xp 00000000 08:02 17    /usr/sbin/criu
2000-3000 rw-p 00000000 00:00 0 
3000-4000 r-xp 00001000 08:02 18    /lib/libc.so.6
4000-5000 r--p 00000000 08:02 18    /lib/libc.so.6
7000-8000 r-xp 00000000 00:00 0     [vdso]
";
        let found = mapped(maps);
        let paths: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
        assert_eq!(paths, ["/lib/libc.so.6", "/usr/sbin/criu"]);
        assert!(own().is_some());
    }

    #[test]
    fn it_ends_with_its_owner_though_there_is_no_criu() {
        drop(Warm::keep(Path::new("/nonexistent/criu")));
        // One that ends at once, and one that maps the same for ever.
        for program in ["/bin/true", "/bin/sleep"] {
            let found = files_of(Path::new(program), || {
                thread::sleep(Duration::from_millis(1));
                true
            });
            assert!(found.is_ok(), "{program}: {found:?}");
        }
    }
}
