//! What of a virtual machine travels besides its memory, and how it is written down.
//!
//! Kinds of section: `vcpu/N`, `vm` (interrupt chips, timer, clock), `serial` and `power`. Each has a
//! version of its own; each is written by [`fields`] and holds structures of KVM's fixed ABI as the
//! bytes that KVM gave, checked for their exact length on arrival.

pub(crate) mod clock;
pub(crate) mod fields;
pub(crate) mod msrs;
pub(crate) mod power;
pub(crate) mod serial;
pub(crate) mod vcpu;
pub(crate) mod vm;

use decamp_shared::workload::Section;

use crate::error::{Result, VmError};

/// The payload of `section`, if it has the version that this build reads.
pub(crate) fn payload(section: &Section, version: u32) -> Result<&[u8]> {
    if section.version == version {
        Ok(&section.bytes)
    } else {
        Err(VmError::section(
            &section.kind,
            format!("it has version {}, this build reads version {version}", section.version),
        ))
    }
}

/// What the tests of every section share.
#[cfg(test)]
pub(crate) mod tests_support {
    use super::Section;

    /// Every kind of damage that a section must not survive: cut off anywhere near a boundary or in
    /// the middle, bytes added, another version.
    pub(crate) fn refuses_damage(section: &Section, accepts: impl Fn(&Section) -> bool) {
        let with = |bytes: Vec<u8>| Section { bytes, ..section.clone() };
        let length = section.bytes.len();
        for cut in
            (0..length).step_by((length / 97).max(1)).chain(length.saturating_sub(40)..length)
        {
            assert!(!accepts(&with(section.bytes[..cut].to_vec())), "cut at {cut} of {length}");
        }
        assert!(!accepts(&with([section.bytes.clone(), vec![0]].concat())), "one byte more");
        let unknown = [section.bytes.clone(), vec![0xff, 0x7f, 1, 0, 0, 0, 9]].concat();
        assert!(!accepts(&with(unknown)), "an unknown field more");
        let other = Section { version: section.version + 1, ..section.clone() };
        assert!(!accepts(&other), "another version");
    }
}
