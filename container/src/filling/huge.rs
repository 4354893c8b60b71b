//! Huge pages of a task whose memory is being filled. CRIU leaves their mappings empty and unregistered: they are
//! registered here, once all of them are where they were and before anything runs. Whole huge pages are installed,
//! of whatever ordinary pages have come, and a fault where nothing is missing gets one of zeros: the kernel
//! installs no page of zeros there by itself.
//!
//! Where the kernel has promised no pages (`MAP_NORESERVE`) there may be none when they are wanted. Such mappings
//! are filled at once, so that a restore can still be given up for it.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::space::{AGAIN, NO_MEMORY, Outcome, Space};
use crate::error::{ContainerError, Result};
use crate::placing::HugeMapping;
use crate::sys::userfault::{self, Mode};

/// Where a task has huge pages that may be missing: addresses, and bytes of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Huge(Vec<(Range<u64>, u64)>);

impl Huge {
    /// The huge page that an address is in.
    fn page_at(&self, address: u64) -> Option<Range<u64>> {
        let (_, page) = self.0.iter().find(|(range, _)| range.contains(&address))?;
        let start = address / page * page;
        Some(start..start + page)
    }

    /// The task unmapped addresses.
    pub(super) fn unmapped(&mut self, addresses: &Range<u64>) {
        self.cut(addresses);
    }

    /// The task moved memory, in place of what was there.
    pub(super) fn moved(&mut self, from: u64, to: u64, length: u64) {
        let (Some(from_end), Some(to_end)) = (from.checked_add(length), to.checked_add(length))
        else {
            return;
        };
        let moved = self.cut(&(from..from_end));
        self.cut(&(to..to_end));
        self.0.extend(
            moved
                .into_iter()
                .map(|(range, page)| (range.start - from + to..range.end - from + to, page)),
        );
    }

    /// Takes out what lies in `addresses`, and gives it.
    fn cut(&mut self, addresses: &Range<u64>) -> Vec<(Range<u64>, u64)> {
        let mut cut = Vec::new();
        for (range, page) in std::mem::take(&mut self.0) {
            let (from, to) = (range.start.max(addresses.start), range.end.min(addresses.end));
            if from >= to {
                self.0.push((range, page));
                continue;
            }
            let rest = [range.start..from, to..range.end];
            self.0
                .extend(rest.into_iter().filter(|part| !part.is_empty()).map(|part| (part, page)));
            cut.push((from..to, page));
        }
        cut
    }
}

impl Space {
    /// The same with mappings of huge pages, to be registered.
    pub(super) fn with_huge(mut self, mappings: Vec<HugeMapping>) -> Self {
        self.huge_mappings = mappings;
        self
    }

    /// Has faults in its huge pages told, now that they are where they were and nothing runs; those that nobody
    /// has promised are filled.
    pub(super) fn register(&mut self) -> Result<()> {
        let mappings = std::mem::take(&mut self.huge_mappings);
        for HugeMapping { addresses, page, promised } in &mappings {
            let failed = |what| {
                ContainerError::io(format!("{what} the huge pages at {:#x}", addresses.start))
            };
            userfault::register(self.descriptor().as_fd(), addresses, Mode::Missing)
                .map_err(failed("have faults told in"))?;
            self.huge.0.push((addresses.clone(), *page));
            if !promised {
                self.fill(addresses)?;
                // What it never had is as ever: for who wants it and gets none there is a signal.
                userfault::unregister(self.descriptor().as_fd(), addresses)
                    .map_err(failed("let go of"))?;
                self.huge.unmapped(addresses);
            }
        }
        // They are few and long: soon done.
        if let Some(first) = mappings.first() {
            self.start_at(first.addresses.start);
        }
        Ok(())
    }

    /// Installs all that is missing in `addresses`, while nothing runs.
    fn fill(&mut self, addresses: &Range<u64>) -> Result<()> {
        while let Some(span) = self.missing_in(addresses).filter(|_| !self.is_gone()) {
            let at = span.addresses.start;
            match self.install_huge(at)? {
                Some(Installed::Not(error)) if error.raw_os_error() == Some(libc::ENOMEM) => {
                    return Err(ContainerError::State(format!(
                        "There is no huge page left for what lies at {at:#x} in a process, which mapped it \
                         without having them kept (MAP_NORESERVE): raise vm.nr_hugepages here"
                    )));
                }
                Some(Installed::Not(error)) => {
                    return Err(ContainerError::io(format!("install a huge page at {at:#x}"))(
                        error,
                    ));
                }
                Some(Installed::Done) => {}
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Installs the huge page that `address` is in; nothing when it is in none.
    pub(super) fn give_huge(&mut self, address: u64) -> Result<Option<Outcome>> {
        let Some(installed) = self.install_huge(address)? else { return Ok(None) };
        let Installed::Not(error) = installed else { return Ok(Some(Outcome::Fine)) };
        match error.raw_os_error() {
            Some(libc::EAGAIN) => thread::sleep(AGAIN),
            // Of a child that was forked meanwhile, to which none are promised: it waits for one, and nobody else.
            Some(libc::ENOMEM) => {}
            _ => {
                return Err(ContainerError::io(format!("install a huge page at {address:#x}"))(
                    error,
                ));
            }
        }
        Ok(Some(Outcome::Changing))
    }

    /// How long it is until a huge page is tried for again, after there was none.
    pub(super) fn rest(&self) -> Option<Duration> {
        let rest = self.rests_until?.checked_duration_since(Instant::now())?;
        (!rest.is_zero() && !self.is_gone()).then_some(rest)
    }

    /// Whether whoever waits for this address waits for a huge page that is not tried for just now.
    pub(super) fn rests_at(&self, address: u64) -> bool {
        self.rest().is_some() && self.huge.page_at(address).is_some()
    }

    fn install_huge(&mut self, address: u64) -> Result<Option<Installed>> {
        let Some(page) = self.huge.page_at(address) else { return Ok(None) };
        if self.rest().is_some() {
            return Ok(Some(Installed::Not(io::Error::from_raw_os_error(libc::ENOMEM))));
        }
        let bytes = self.gather(&page)?;
        self.rests_until = None;
        let (_, error) = userfault::copy(self.descriptor().as_fd(), page.start, &bytes);
        match error.as_ref().and_then(io::Error::raw_os_error) {
            // Since nothing is seen that is missing it comes by us alone: what was there before is none of it.
            Some(libc::EEXIST) if !self.is_forked() && self.missing_in(&page).is_some() => {
                return Err(ContainerError::State(format!(
                    "There is a huge page at {:#x} in a restored process before what it holds has come: \
                     say restore = \"eager\" under [containers] here, and report this",
                    page.start
                )));
            }
            // We gave it, or its mapping is gone.
            None | Some(libc::EEXIST | libc::ENOENT) => {
                self.has_come(&page);
                // Whoever saw the page come by other means still sleeps.
                let _ = userfault::wake(self.descriptor().as_fd(), &page);
            }
            Some(libc::ESRCH | libc::ENOSPC) => self.is_no_more(),
            Some(number) => {
                if number == libc::ENOMEM {
                    self.rests_until = Some(Instant::now() + NO_MEMORY);
                }
                return Ok(Some(Installed::Not(error.unwrap_or_else(io::Error::last_os_error))));
            }
        }
        Ok(Some(Installed::Done))
    }

    /// What `page` consists of: what is missing of it, and zeros.
    fn gather(&self, page: &Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (page.end - page.start) as usize];
        let mut at = page.start;
        while let Some(span) = self.missing_in(&(at..page.end)) {
            let start = (span.addresses.start - page.start) as usize;
            let end = (span.addresses.end - page.start) as usize;
            self.read(&span, &mut bytes[start..end])?;
            at = span.addresses.end;
        }
        Ok(bytes)
    }
}

/// Whether a huge page is in its place.
enum Installed {
    Done,
    Not(io::Error),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::super::space::PAGE;
    use super::*;
    use crate::forked::Alias;

    #[test]
    fn huge_pages_are_followed_where_a_task_moves_them() {
        const MIB: u64 = 1 << 20;
        let mut huge = Huge(vec![(4 * MIB..16 * MIB, 2 * MIB)]);
        assert_eq!(huge.page_at(7 * MIB + 5), Some(6 * MIB..8 * MIB));
        assert_eq!((huge.page_at(4 * MIB - 1), huge.page_at(16 * MIB)), (None, None));
        huge.moved(6 * MIB, 100 * MIB, 4 * MIB);
        assert_eq!((huge.page_at(6 * MIB), huge.page_at(9 * MIB)), (None, None));
        assert_eq!(huge.page_at(103 * MIB), Some(102 * MIB..104 * MIB));
        // Ordinary memory comes where some of it was.
        huge.moved(1000 * MIB, 102 * MIB, 2 * MIB);
        assert_eq!(huge.page_at(103 * MIB), None);
        huge.unmapped(&(0..5 * MIB));
        huge.unmapped(&(10 * MIB..200 * MIB));
        assert_eq!(huge, Huge(vec![(5 * MIB..6 * MIB, 2 * MIB)]));
        huge.moved(u64::MAX - 5, 0, 100);
        assert_eq!(huge.0.len(), 1);
    }
    /// A child that has to wait for a huge page keeps nobody from what is no huge one.
    #[test]
    fn who_waits_for_a_huge_page_rests() {
        const MIB: u64 = 1 << 20;
        let alias = Alias { pages: 4 * MIB / PAGE..8 * MIB / PAGE, of: 1 };
        let nobody = File::open("/dev/null").expect("a file").into();
        let mut space = Space::new(nobody, Arc::default(), &[alias]);
        space.huge = Huge(vec![(4 * MIB..6 * MIB, 2 * MIB)]);
        assert!(space.takes() && space.rest().is_none());
        let begun = Instant::now();
        // Longer than this takes on however busy a machine.
        let long = NO_MEMORY * 10_000;
        space.rests_until = Some(begun + long);
        assert!(space.lacks() && !space.takes());
        assert!(space.rest().is_some_and(|rest| rest <= long));
        // Its descriptor is none: nothing was asked of it, and nobody slept.
        let outcome = space.give_huge(5 * MIB).expect("it is not tried");
        assert!(matches!(outcome, Some(Outcome::Changing)));
        assert!(space.give_huge(7 * MIB).expect("no huge page").is_none());
        assert!(space.rests_at(4 * MIB) && !space.rests_at(7 * MIB));
        space.rests_until = Some(begun);
        assert!(space.takes() && !space.rests_at(4 * MIB));
        assert!(space.give_huge(5 * MIB).is_err(), "it is tried again");
        space.rests_until = Some(begun + long);
        space.is_no_more();
        assert!(space.rest().is_none());
    }
}
