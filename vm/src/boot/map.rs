//! The memory map that a guest is told: which of its addresses are memory, and which of those it must leave
//! alone.

use super::ONE_MIB;
use crate::acpi;
use crate::memory::Memory;

/// End of conventional memory: from here to 1 MiB no kernel looks for memory.
pub(super) const CONVENTIONAL_END: u64 = 0x9_fc00;
const ADAPTERS: u64 = 0xa_0000;

/// What a range is, in the numbers that E820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Use {
    /// Memory.
    Ram = 1,
    /// To be left alone.
    Reserved = 2,
    /// Where the ACPI tables are.
    Acpi = 3,
}

/// A range of addresses and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) bytes: u64,
    pub(super) used: Use,
}

/// The map of `memory`, ascending.
pub(super) fn of(memory: &Memory) -> Vec<Range> {
    let range = |start, end: u64, used| Range { start, bytes: end.saturating_sub(start), used };
    let mut map = vec![
        range(0, CONVENTIONAL_END, Use::Ram),
        range(CONVENTIONAL_END, ADAPTERS, Use::Reserved),
        range(acpi::TABLES, acpi::TABLES_END, Use::Acpi),
    ];
    map.extend(memory.ranges().into_iter().map(|(start, bytes)| {
        // The first range begins at 0, and what is below 1 MiB stands above.
        range(start.max(ONE_MIB), start + bytes, Use::Ram)
    }));
    map
}
