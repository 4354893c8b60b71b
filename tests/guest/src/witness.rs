//! Count and chain of all rewrites, kept in three places: two pages far apart, each with both
//! numbers at both of its ends, and two CPU registers. After a move all must agree: a stale or torn
//! page does not, and neither does memory of one moment with a CPU of another.

use crate::arena::Arena;
use crate::pattern::link;
use crate::sys::{Page, keep_in_registers, kept_in_registers};

/// How often pages were rewritten, and a checksum over all of it in order.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Witness {
    /// Rewrites.
    pub(crate) count: u64,
    /// The chain.
    pub(crate) chain: u64,
}

impl Witness {
    /// Before the first rewrite.
    pub(crate) fn new(seed: u64) -> Witness {
        Witness { count: 0, chain: seed }
    }

    /// One rewrite more.
    pub(crate) fn advance(&mut self, page: u64, version: u64, sum: u64) {
        self.count += 1;
        self.chain = link(self.chain, page, version, sum);
    }

    /// Writes it to all three places.
    pub(crate) fn keep(&self, arena: &mut Arena) {
        for second in [false, true] {
            self.write(arena.witness(second));
        }
        self.write_registers();
    }

    /// Writes it to the registers.
    pub(crate) fn write_registers(&self) {
        keep_in_registers([self.count, self.chain]);
    }

    /// One that cannot be right: a rewrite too few.
    pub(crate) fn older(&self) -> Witness {
        Witness { count: self.count.wrapping_sub(1), chain: self.chain }
    }

    /// Writes it to one page.
    pub(crate) fn write(&self, page: &mut Page) {
        page[0] = self.count;
        page[1] = self.chain;
        page[510] = self.chain;
        page[511] = self.count;
    }

    /// The place that disagrees and the count found there.
    pub(crate) fn check(&self, arena: &mut Arena) -> Result<(), (&'static str, u64)> {
        let [count, chain] = kept_in_registers();
        if (Witness { count, chain }) != *self {
            return Err(("registers", count));
        }
        for (second, name) in [(false, "first"), (true, "second")] {
            let page = arena.witness(second);
            for (count, chain) in [(page[0], page[1]), (page[511], page[510])] {
                if (Witness { count, chain }) != *self {
                    return Err((name, count));
                }
            }
        }
        Ok(())
    }
}
