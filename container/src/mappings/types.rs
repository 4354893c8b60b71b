//! The kernel's description of its own types (BTF, kernel document `bpf/btf`): where a member lies in a
//! structure, and by which number a function is known.

use std::fs;
use std::io;
use std::ops::Range;

const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Kinds of types.
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;
/// Structures within structures that have no name.
const DEPTH: u32 = 6;

/// All types of the running kernel.
pub(super) struct Types {
    bytes: Vec<u8>,
    strings: Range<usize>,
    /// Where each type begins, by its number less one.
    places: Vec<usize>,
}

impl Types {
    /// Reads them.
    pub(super) fn read() -> io::Result<Self> {
        let malformed = || io::Error::other(format!("{PATH} makes no sense"));
        Self::parse(fs::read(PATH)?).ok_or_else(malformed)
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = |at| word(&bytes, at).map(|word| word as usize);
        let begin = header(4)?;
        let part = |at| {
            let start = begin.checked_add(header(at)?)?;
            let end = start.checked_add(header(at + 4)?)?;
            (end <= bytes.len()).then_some(start..end)
        };
        let (types, strings) = (part(8)?, part(16)?);
        let (mut at, mut places) = (types.start, Vec::new());
        while at < types.end {
            places.push(at);
            at += 12 + tail(word(&bytes, at + 4)?)?;
        }
        (at == types.end).then_some(Self { bytes, strings, places })
    }

    /// The number of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        self.named(FUNC, name)
    }

    /// How many bytes into a structure a member begins, which may be in a part of it that has no name.
    pub(super) fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let bits = self.bits(self.named(STRUCT, structure)?, member, DEPTH)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    fn bits(&self, id: u32, member: &str, depth: u32) -> Option<u32> {
        let at = self.place(id)?;
        let info = word(&self.bytes, at + 4)?;
        if !matches!(kind(info), STRUCT | UNION) || depth == 0 {
            return None;
        }
        // Then the upper byte is the width of a part of a word.
        let mask = if info >> 31 == 1 { 0xff_ffff } else { u32::MAX };
        (0..info & 0xffff).find_map(|index| {
            let at = at + 12 + index as usize * 12;
            let offset = word(&self.bytes, at + 8)? & mask;
            match self.text(word(&self.bytes, at)?)? {
                b"" => {
                    offset.checked_add(self.bits(word(&self.bytes, at + 4)?, member, depth - 1)?)
                }
                name => (name == member.as_bytes()).then_some(offset),
            }
        })
    }

    fn named(&self, wanted: u32, name: &str) -> Option<u32> {
        let found = self.places.iter().position(|at| {
            word(&self.bytes, at + 4).is_some_and(|info| kind(info) == wanted)
                && word(&self.bytes, *at).and_then(|at| self.text(at)) == Some(name.as_bytes())
        });
        found.map(|index| index as u32 + 1)
    }

    fn place(&self, id: u32) -> Option<usize> {
        self.places.get((id as usize).checked_sub(1)?).copied()
    }

    fn text(&self, at: u32) -> Option<&[u8]> {
        let strings = self.bytes.get(self.strings.clone())?;
        strings.get(at as usize..)?.split(|byte| *byte == 0).next()
    }
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Bytes that follow a type's first twelve.
fn tail(info: u32) -> Option<usize> {
    let members = (info & 0xffff) as usize;
    Some(match kind(info) {
        1 | 14 | 17 => 4,
        2 | 7..=12 | 16 | 18 => 0,
        3 => 12,
        STRUCT | UNION | 15 | 19 => members * 12,
        6 | 13 => members * 8,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { long a; union { long b; long c; }; }` and a function `f`.
    fn description() -> Vec<u8> {
        let strings = b"\0s\0a\0b\0c\0f\0long\0";
        let (s, a, b, c, f, long) = (1, 3, 5, 7, 9, 11);
        let words: [u32; 31] = [
            [long, 1 << 24, 8, 64].as_slice(),
            &[0, 5 << 24 | 2, 8, b, 1, 0, c, 1, 0],
            &[s, 4 << 24 | 2, 16, a, 1, 0, 0, 2, 64],
            &[f, 12 << 24, 0],
            // A structure without members, and one more pointer.
            &[0, 4 << 24, 0],
            &[0, 2 << 24, 1],
        ]
        .concat()
        .try_into()
        .expect("as many");
        let types: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        bytes.extend(header.into_iter().flat_map(u32::to_ne_bytes));
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found_in_parts_without_a_name() {
        let types = Types::parse(description()).expect("a description");
        let offset = |member| types.offset("s", member);
        assert_eq!(
            [offset("a"), offset("b"), offset("c"), offset("d")],
            [Some(0), Some(8), Some(8), None]
        );
        assert_eq!((types.function("f"), types.function("s")), (Some(4), None));
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let whole = description();
        for length in 0..whole.len() {
            assert!(Types::parse(whole[..length].to_vec()).is_none(), "{length} bytes");
        }
    }
}
