//! Shared memory of a container that the page engine moves: anonymous memory that processes share, memory
//! files (`memfd`), System V segments, and large files on a tmpfs ([`crate::tmpfs`]). Each such segment is a
//! space of its own, whoever maps it.
//!
//! At the source CRIU is told that it is empty ([`hide`]); the agent knows what it has sent and compares
//! that with what is there ([`sent`]), for nobody's page tables tell of all writes: not of those through a
//! descriptor, and not of those of a process that came and went. At the destination the pages are written
//! into a memory file that the restored processes map themselves ([`landing`], [`rewrite`]): nothing of it
//! is copied again. System V segments CRIU makes itself, and copies what has come into them ([`system_v`]).
//!
//! Left to CRIU are System V segments of huge pages, or that nobody has attached, and what is small, or executed,
//! or mapped privately by somebody.

pub(crate) mod found;
mod hashes;
pub(crate) mod hide;
pub(crate) mod landing;
pub(crate) mod message;
mod rewrite;
mod seen;
pub(crate) mod sent;
pub(crate) mod system_v;

use decamp_shared::pages::SpaceId;
use decamp_shared::workload::Section;
use serde::{Deserialize, Serialize};

use crate::error::{ContainerError, Result};

/// Spaces from this number on are segments; below are processes (the kernel's PID_MAX_LIMIT).
pub(crate) const FIRST_SPACE: u32 = 1 << 22;
/// Of one container so many segments are moved by the page engine at most: each is a descriptor that
/// CRIU inherits.
pub(crate) const SEGMENTS_CAP: usize = 256;
/// The section that tells which segment of CRIU's is which space.
pub(crate) const SEGMENTS: &str = "container/segments";
const VERSION: u32 = 1;

/// Whether a space is a segment of shared memory.
pub(crate) fn is_segment(space: SpaceId) -> bool {
    space.0 >= FIRST_SPACE
}

/// A segment that CRIU was told is empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Moved {
    /// The space that its pages are in.
    pub(crate) space: u32,
    /// What CRIU calls it: the number of its file at the source.
    pub(crate) inode: u32,
    /// Whether that is the number of a System V segment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) system_v: bool,
}

/// The segments that CRIU was told are empty, as a section.
pub(crate) fn section(moved: &[Moved]) -> Result<Section> {
    let bytes = serde_json::to_vec(moved).map_err(|error| {
        ContainerError::section(SEGMENTS, format!("cannot be written: {error}"))
    })?;
    Ok(Section { kind: SEGMENTS.to_owned(), version: VERSION, bytes })
}

/// Reads what [`section`] wrote.
pub(crate) fn read_section(section: &Section) -> Result<Vec<Moved>> {
    let bad = |what: String| ContainerError::section(SEGMENTS, what);
    if section.version != VERSION {
        return Err(bad("has a version that this build does not know".to_owned()));
    }
    let moved: Vec<Moved> = serde_json::from_slice(&section.bytes)
        .map_err(|error| bad(format!("makes no sense: {error}")))?;
    let twice = |one: &Moved, other: &Moved| one.space == other.space || one.inode == other.inode;
    let doubled = moved
        .iter()
        .enumerate()
        .any(|(index, one)| moved.iter().skip(index + 1).any(|other| twice(one, other)));
    if moved.len() > SEGMENTS_CAP || doubled {
        return Err(bad("names a segment twice, or too many".to_owned()));
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_comes_back_and_lies_do_not() {
        let moved = vec![
            Moved { space: FIRST_SPACE, inode: 77, system_v: false },
            Moved { space: FIRST_SPACE + 3, inode: 78, system_v: true },
        ];
        let written = section(&moved).expect("JSON");
        assert_eq!(read_section(&written).expect("the same"), moved);
        for other in [
            Moved { space: FIRST_SPACE, inode: 79, system_v: false },
            Moved { space: 1, inode: 77, system_v: true },
        ] {
            let doubled = [&moved[..], &[other]].concat();
            assert!(read_section(&section(&doubled).expect("JSON")).is_err());
        }
        assert!(read_section(&Section { version: 2, ..written.clone() }).is_err());
        assert!(read_section(&Section { bytes: b"[{}]".to_vec(), ..written }).is_err());
    }
}
