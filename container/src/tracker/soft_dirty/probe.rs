//! Whether soft-dirty bits can be relied on here, tried on pages of our own: that the kernel has a file by a
//! name says nothing.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use super::{FEATURES, clear, merging};
use crate::entries::{Entries, Entry};
use crate::error::{ContainerError, Result};
use crate::sys;
use crate::sys::own_pages::OwnPages;
use crate::sys::userfault;
use crate::tracker::zeros::Zeros;

/// What is done to each of our pages once the bits are cleared.
const UNTOUCHED: usize = 0;
const WRITTEN: usize = 1;
const CLOSED_BEFORE: usize = 2;
const PAGES: usize = 3;

/// Whether the tracker works here.
///
/// # Errors
/// Why it does not.
pub(in crate::tracker) fn probe() -> std::result::Result<(), String> {
    static OUTCOME: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    if merging::so_far().is_none() {
        return Err(format!(
            "KSM merges pages and forgets that they were written ({}/run)",
            merging::DIRECTORY
        ));
    }
    OUTCOME.get_or_init(try_all).clone()
}

fn try_all() -> std::result::Result<(), String> {
    match Seen::on_ourselves() {
        Ok(seen) => seen.verdict()?,
        Err(error) => return Err(format!("soft-dirty bits could not be tried: {}", told(&error))),
    }
    Zeros::open().map_err(|error| told(&error))?;
    let uffd = sys::userfaultfd().map_err(|error| format!("no userfaultfd: {error}"))?;
    userfault::agree(uffd.as_fd(), FEATURES)
        .map_err(|error| format!("no write protection by userfaultfd (Linux 5.7): {error}"))?;
    let pid = std::process::id() as i32;
    sys::compare_memory(pid, pid)
        .map(drop)
        .map_err(|error| format!("the kernel does not compare memories (kcmp): {error}"))
}

fn told(error: &ContainerError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Our pages at three times: written, cleared, and after what was done to each.
struct Seen {
    before: Vec<Entry>,
    cleared: Vec<Entry>,
    after: Vec<Entry>,
}

impl Seen {
    /// Nobody else tracks this process, so nobody misses the bits that are cleared.
    fn on_ourselves() -> Result<Self> {
        let pid = std::process::id() as i32;
        let cannot = |what: &'static str| ContainerError::io(what);
        let mut pages = OwnPages::map(PAGES).map_err(cannot("map memory"))?;
        (0..PAGES).for_each(|page| pages.write(page, 1));
        let mut entries = Entries::open(pid)?;
        let addresses = pages.addresses();
        let mut look = || -> Result<Vec<Entry>> {
            let mut found = Vec::new();
            entries.existing(&addresses, |_, entry| found.push(entry))?;
            Ok(found)
        };
        let before = look()?;
        clear(pid)?;
        let cleared = look()?;
        pages.write(WRITTEN, 2);
        pages.close_and_open().map_err(cannot("protect memory"))?;
        pages.write(CLOSED_BEFORE, 2);
        let after = look()?;
        Ok(Self { before, cleared, after })
    }

    fn verdict(&self) -> std::result::Result<(), String> {
        let bits = |entries: &[Entry]| -> Vec<bool> {
            entries.iter().map(|entry| entry.is_soft_dirty()).collect()
        };
        let no = |reason: &str| Err(reason.to_owned());
        if bits(&self.before) != [true; PAGES] || bits(&self.cleared) != [false; PAGES] {
            return no("the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)");
        }
        let after = bits(&self.after);
        if after.len() != PAGES || after[UNTOUCHED] || !after[WRITTEN] {
            return no("the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)");
        }
        if !after[CLOSED_BEFORE] {
            return no("writes to memory that was closed and opened again are not told of");
        }
        if self.after.iter().any(|entry| entry.frame().is_none()) {
            return no("the kernel does not say where pages lie: that takes CAP_SYS_ADMIN");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const DIRTY: u64 = 1 << 63 | 1 << 55;
    const CLEAN: u64 = 1 << 63;

    fn entries(words: [u64; PAGES]) -> Vec<Entry> {
        words.map(Entry::from_word).to_vec()
    }

    fn seen() -> Seen {
        Seen {
            before: entries([DIRTY | 7, DIRTY | 8, DIRTY | 9]),
            cleared: entries([CLEAN | 7, CLEAN | 8, CLEAN | 9]),
            after: entries([CLEAN | 7, DIRTY | 8, DIRTY | 9]),
        }
    }

    #[test]
    fn what_must_be_seen_of_our_pages_is_judged() {
        assert_eq!(seen().verdict(), Ok(()));
        let says = |change: fn(&mut Seen), reason: &str| {
            let mut seen = seen();
            change(&mut seen);
            let verdict = seen.verdict().expect_err(reason);
            assert!(verdict.contains(reason), "{verdict}");
        };
        let bits = "CONFIG_MEM_SOFT_DIRTY";
        says(|seen| seen.before[UNTOUCHED] = Entry::from_word(CLEAN | 7), bits);
        says(|seen| seen.cleared[WRITTEN] = Entry::from_word(DIRTY | 8), bits);
        says(|seen| seen.after[WRITTEN] = Entry::from_word(CLEAN | 8), bits);
        says(|seen| seen.after[UNTOUCHED] = Entry::from_word(DIRTY | 7), bits);
        says(|seen| seen.after.truncate(PAGES - 1), bits);
        says(|seen| seen.after[CLOSED_BEFORE] = Entry::from_word(CLEAN | 9), "opened again");
        says(|seen| seen.after[UNTOUCHED] = Entry::from_word(CLEAN), "CAP_SYS_ADMIN");
    }

    #[test]
    fn the_probe_says_what_the_kernel_was_built_with() {
        // A process that nobody tracks has the flag on every mapping, where there is such a thing.
        let smaps = fs::read_to_string("/proc/self/smaps").expect("our mappings");
        let built_in =
            smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" sd"));
        // Where another test has cleared them, it could not be tried. Who is not root may know no frames.
        let outcome = probe();
        let said = outcome.as_ref().err().map_or("", String::as_str);
        assert!(
            built_in || said.contains("CONFIG_MEM_SOFT_DIRTY") || said.contains("KSM"),
            "{said}"
        );
        assert!(!said.contains("CONFIG_MEM_SOFT_DIRTY") || !built_in, "{said}");
        let root = nix::unistd::geteuid().is_root();
        assert!(!built_in || !root || said.is_empty() || said.contains("KSM"), "{said}");
    }
}
