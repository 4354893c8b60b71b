//! Ways in for fuzzers: sections of a container, and CRIU's images within them, as a peer sends them. They are taken
//! apart as before a restore; nothing is written to disk, and CRIU is not asked. What was read and is written again
//! says the same.

use decamp_shared::workload::Section;

use crate::dump::{ContainerState, STATE};
use crate::forked::{self, FORKED, SPARE};
use crate::images::{self, HIDDEN, HiddenPages, PAGE_LIMIT, PE_LAZY, Pagemap};
use crate::packed::{self, PACKED};
use crate::segments::message::{Image, MM_MAGIC, Message, PSTREE_MAGIC};
use crate::segments::{self, SEGMENTS};
use crate::spec::ContainerSpec;
use crate::tmpfs::{self, Entry, TREES, Tree};

/// What the first byte of an input says that the rest is.
mod what {
    pub(super) const HIDDEN: u8 = 0;
    pub(super) const FORKED: u8 = 1;
    pub(super) const SPARE: u8 = 2;
    pub(super) const SEGMENTS: u8 = 3;
    pub(super) const TREES: u8 = 4;
    pub(super) const STATE: u8 = 5;
    pub(super) const PACKED: u8 = 6;
    pub(super) const PAGEMAP: u8 = 7;
    pub(super) const IMAGE: u8 = 8;
    pub(super) const SPEC: u8 = 9;
    pub(super) const KINDS: u8 = 10;
}

/// The state of a container that has nothing.
const STATE_SEED: &[u8] =
    br#"{"output":"pipe:[1]","output_owner":[0,0],"mounts":[],"settings":[],"terminal":true}"#;

/// A section from a peer: the first byte says of what, the second its version, the rest is it.
pub fn section(bytes: &[u8]) {
    let [of, version, bytes @ ..] = bytes else { return };
    let section = |kind: &str| Section {
        kind: kind.to_owned(),
        version: u32::from(*version),
        bytes: bytes.to_vec(),
    };
    match of % what::KINDS {
        what::HIDDEN => {
            let _ = hidden(&section(HIDDEN));
        }
        what::FORKED => {
            let _ = forked(&section(FORKED));
        }
        what::SPARE => {
            if let Ok(spare) = forked::read_spare(&section(SPARE)) {
                assert_eq!(forked::spare_section(spare), section(SPARE));
            }
        }
        what::SEGMENTS => {
            if let Ok(moved) = segments::read_section(&section(SEGMENTS)) {
                let written = segments::section(&moved).expect("what was read");
                assert_eq!(segments::read_section(&written).ok(), Some(moved));
            }
        }
        what::TREES => trees(&section(TREES)),
        what::STATE => {
            if let Ok(state) = ContainerState::from_section(&section(STATE)) {
                let written = state.to_section().expect("what was read");
                let again = ContainerState::from_section(&written).expect("what was written");
                assert_eq!(again.to_section().ok(), Some(written), "it is not what it was");
            }
        }
        what::PACKED => {
            // Refused or taken: by its name at the latest.
            let _ = packed::unpack(vec![section(PACKED)], |name, bytes| {
                if images::is_image_name(name) {
                    image(bytes)
                }
                Ok(())
            });
        }
        what::PAGEMAP => pagemap(bytes),
        what::IMAGE => image(bytes),
        _ => {
            let _ = serde_json::from_slice(bytes).map(|json| ContainerSpec::from_json(&json));
        }
    }
}

/// Inputs of [`section`] to begin with.
pub fn section_seeds() -> Vec<Vec<u8>> {
    let of = |kind: u8, version: u8, bytes: &[u8]| [&[kind, version], bytes].concat();
    let pages = |range: std::ops::Range<u64>| std::iter::once(range).collect::<Vec<_>>();
    let both = HiddenPages::from([(1, pages(0..50)), (2, pages(10..90))]);
    let hidden = images::write_hidden(&both).bytes;
    let alias = forked::Alias { pages: 10..20, of: 1 };
    let aliases = forked::Aliases::from([(2, vec![alias])]);
    let aliases = forked::section(&aliases).map(|section| section.bytes).unwrap_or_default();
    let long = [&(hidden.len() as u16).to_le_bytes()[..], &hidden, &aliases].concat();
    let mut map = Pagemap::of_pages(1, 64);
    let _ = map.add_hidden(&pages(70..80), PE_LAZY);
    let map = map.to_bytes();
    let named = ("pagemap-1.img".to_owned(), map.clone());
    let packs = packed::pack(vec![named]).map(|(packs, _)| packs).unwrap_or_default();
    let entry = |name: &[u8], mode| Entry { name: name.to_vec(), mode, ..Entry::default() };
    let entries = vec![entry(b"", 0o40755), Entry { size: 9, ..entry(b"a", 0o100644) }];
    let tree = tmpfs::section(&[Tree {
        number: 1,
        mounted: "/dev/shm".into(),
        entries,
        ..Tree::default()
    }]);
    let tree = tree.map(|section| section.bytes).unwrap_or_default();
    let mut all = vec![
        of(what::HIDDEN, 1, &hidden),
        of(what::FORKED, 1, &long),
        of(what::SPARE, 1, &7u64.to_le_bytes()),
        of(
            what::SEGMENTS,
            1,
            br#"[{"space":1000000,"inode":77},{"space":1000001,"inode":78,"system_v":true}]"#,
        ),
        of(what::TREES, 1, &tree),
        of(what::STATE, 1, STATE_SEED),
        of(what::SPEC, 1, br#"{"bundle":"/srv/a","runtime":"runc","tty":true}"#),
        of(what::PAGEMAP, 1, &map),
        of(what::IMAGE, 1, &map),
    ];
    all.extend(packs.iter().map(|pack| of(what::PACKED, pack.version as u8, &pack.bytes)));
    all
}

fn hidden(section: &Section) -> Option<HiddenPages> {
    let pages = images::read_hidden(section).ok()?;
    // Processes may come in any order.
    let again = images::read_hidden(&images::write_hidden(&pages));
    assert_eq!(again.as_ref().ok(), Some(&pages), "it is not what it was");
    Some(pages)
}

/// Aliases are of hidden pages: those come first, after their length.
fn forked(section: &Section) -> Option<()> {
    let (length, rest) =
        section.bytes.split_first_chunk().map(|(head, rest)| (u16::from_le_bytes(*head), rest))?;
    let (first, second) = rest.split_at_checked(length.into())?;
    let part = |kind: &str, bytes: &[u8]| Section {
        kind: kind.to_owned(),
        bytes: bytes.to_vec(),
        ..section.clone()
    };
    let pages = hidden(&part(HIDDEN, first))?;
    let section = part(FORKED, second);
    let aliases = forked::read_section(&section, &pages).ok()?;
    if let Some(written) = forked::section(&aliases) {
        assert_eq!(forked::read_section(&written, &pages).ok(), Some(aliases.clone()));
    }
    for (inner, ranges) in &pages {
        let aliases = aliases.get(inner).map_or(&[][..], Vec::as_slice);
        let count = |ranges: &[std::ops::Range<u64>]| {
            ranges.iter().map(|range| range.end - range.start).sum::<u64>()
        };
        let owners = forked::owners(*inner, ranges, aliases);
        let owned: Vec<_> = owners.into_iter().map(|owner| owner.pages).collect();
        assert_eq!(count(&owned), count(ranges), "a page has no owner, or two");
    }
    Some(())
}

fn trees(section: &Section) {
    let Ok(trees) = tmpfs::read_section(section) else { return };
    if let Some(written) = tmpfs::section(&trees) {
        assert_eq!(tmpfs::read_section(&written).ok(), Some(trees));
    }
}

/// A pagemap into which hidden pages are entered, everywhere and here and there.
fn pagemap(bytes: &[u8]) {
    let Ok(map) = Pagemap::parse(bytes) else { return };
    assert_eq!(Pagemap::parse(&map.to_bytes()).as_ref(), Ok(&map));
    let everywhere = std::iter::once(0..PAGE_LIMIT).collect::<Vec<_>>();
    let here_and_there: Vec<_> = (0..40).map(|at| at * 3..at * 3 + 2).collect();
    for hidden in [everywhere, here_and_there] {
        let mut map = map.clone();
        if map.add_hidden(&hidden, PE_LAZY).is_err() {
            continue;
        }
        let late = map.entries.iter().filter(|entry| entry.flags == Some(PE_LAZY));
        let late: Vec<_> = late.map(|entry| entry.range().expect("a range of ours")).collect();
        assert!(late.windows(2).all(|two| two[0].end <= two[1].start), "out of order");
        let within = |page: u64| hidden.iter().any(|range| range.contains(&page));
        assert!(late.iter().all(|range| within(range.start) && within(range.end - 1)));
    }
}

/// An image of CRIU's of any kind that is read in parts.
fn image(bytes: &[u8]) {
    pagemap(bytes);
    for kind in [MM_MAGIC, PSTREE_MAGIC] {
        if let Some(image) = Image::parse(bytes, kind) {
            assert!(Image::parse(&image.to_bytes(), kind).is_some(), "it is no image any more");
        }
    }
    if let Some(message) = Message::parse(bytes) {
        assert_eq!(Message::parse(&message.to_bytes()), Some(message.clone()));
        for tag in 1..8 {
            let _ = (message.number(tag), message.numbers(tag), message.bytes(tag));
            message.each(tag).for_each(drop);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_fuzzers_begin_with_comes_back() {
        for mut seed in section_seeds() {
            section(&seed);
            for at in 0..seed.len() {
                let was = std::mem::replace(&mut seed[at], 0xff);
                section(&seed);
                seed[at] = was;
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_peer_sends_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            section(&bytes);
        }
    }
}
