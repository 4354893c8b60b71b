//! Archives written and read back, cut, spoiled, and made by somebody who means harm.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::header::{Described, FORMAT, HEADER, SUMS, VERSION, hex};
use super::memory::{SpaceParts, parcels, place_pages, without_zeros};
use super::output::Output;
use super::parcel::{SECTIONS, SectionList};
use super::write::ArchiveWriter;
use super::{Archive, ArchiveError, Foreign, Header, PartInfo};
use crate::pages::{PAGE_SIZE, PageRange, PageReader, PageSet, PageWriter, SpaceId};
use crate::workload::{Kind, Result as WorkloadResult, SpaceInfo};

type Parts = Vec<(String, Vec<u8>)>;

fn header(parts: &[(String, Vec<u8>)]) -> Header {
    let info = |(name, bytes): &(String, Vec<u8>)| PartInfo {
        name: name.clone(),
        size: bytes.len() as u64,
    };
    Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        decamp: "0.0.0".to_owned(),
        host: "alpha".to_owned(),
        created_ms: 1,
        workload: Described {
            name: "web".to_owned(),
            uuid: "u".to_owned(),
            kind: Kind::Vm,
            memory_bytes: 4096,
            spaces: Vec::new(),
            files: Vec::new(),
            networks: Vec::new(),
            spec: json!({}),
            needs: json!({}),
        },
        parts: parts.iter().map(info).collect(),
    }
}

fn written(parts: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = ArchiveWriter::begin(Vec::new(), &header(parts)).expect("begun");
    for (name, bytes) in parts {
        let size = bytes.len() as u64;
        archive
            .part(name, size, |to| {
                to.write_all(bytes).expect("written");
                Ok(())
            })
            .expect("a part");
    }
    archive.finish().expect("finished")
}

/// Both passes; gives what the second one gave.
fn read(bytes: &[u8]) -> Result<Parts, ArchiveError> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("archive");
    std::fs::write(&path, bytes).expect("written");
    let mut archive = Archive::open(&path)?;
    archive.verify(&mut |_, _| Ok(()))?;
    let mut found = Vec::new();
    archive.unpack(&mut |part, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).expect("verified");
        found.push((part.name.clone(), bytes));
        Ok(())
    })?;
    Ok(found)
}

#[track_caller]
fn refused(bytes: &[u8], says: &str) {
    match read(bytes) {
        Err(error @ ArchiveError::Refused { .. }) => {
            assert!(error.to_string().contains(says), "{error}");
        }
        other => panic!("it was not refused for {says:?}: {other:?}"),
    }
}

fn some_parts() -> Parts {
    vec![
        ("a".to_owned(), b"first".to_vec()),
        ("memory/0.pages".to_owned(), (0..9000u32).flat_map(u32::to_le_bytes).collect()),
        ("empty".to_owned(), Vec::new()),
        ("z/last".to_owned(), vec![7; 512]),
    ]
}

/// A tar through zstd, of entries that no [`ArchiveWriter`] writes.
struct Liar(tar::Builder<Vec<u8>>);

impl Liar {
    fn new(header: &[u8]) -> Self {
        Self(tar::Builder::new(Vec::new())).with(HEADER, tar::EntryType::Regular, header)
    }

    /// One whose header promises these parts.
    fn promising(parts: &[(String, Vec<u8>)]) -> Self {
        Self::new(&serde_json::to_vec(&header(parts)).expect("JSON"))
    }

    fn with(mut self, name: &str, kind: tar::EntryType, bytes: &[u8]) -> Self {
        let mut head = tar::Header::new_ustar();
        head.as_ustar_mut().expect("ustar").name[..name.len()].copy_from_slice(name.as_bytes());
        head.set_entry_type(kind);
        head.set_size(bytes.len() as u64);
        head.set_cksum();
        self.0.append(&head, bytes).expect("written");
        self
    }

    fn file(self, name: &str, bytes: &[u8]) -> Self {
        self.with(name, tar::EntryType::Regular, bytes)
    }

    fn zstd(self) -> Vec<u8> {
        zstd::encode_all(&*self.0.into_inner().expect("ended"), 1).expect("compressed")
    }

    /// With sums that are right for the parts given.
    fn summed(self, parts: &[(String, Vec<u8>)]) -> Vec<u8> {
        use sha2::{Digest, Sha256};
        let sum = |name: &str, bytes: &[u8]| json!({"name": name, "sum": hex(&Sha256::digest(bytes).into())});
        let head = serde_json::to_vec(&header(parts)).expect("JSON");
        let mut sums = vec![sum(HEADER, &head)];
        sums.extend(parts.iter().map(|(name, bytes)| sum(name, bytes)));
        let sums = json!({ "sha256": sums }).to_string();
        self.file(SUMS, sums.as_bytes()).zstd()
    }
}

#[test]
fn what_was_written_is_read() {
    let parts = some_parts();
    assert_eq!(read(&written(&parts)).expect("our own"), parts);
    // The tests' own liar tells the truth when it wants to.
    let mut honest = Liar::promising(&parts);
    for (name, bytes) in &parts {
        honest = honest.file(name, bytes);
    }
    assert_eq!(read(&honest.summed(&parts)).expect("honest"), parts);
}

#[test]
fn any_tar_reads_it() {
    let parts = some_parts();
    let bytes = zstd::decode_all(&*written(&parts)).expect("zstd");
    let mut tar = tar::Archive::new(&*bytes);
    let names: Vec<_> = tar
        .entries()
        .expect("a tar")
        .map(|entry| entry.expect("an entry").path().expect("a path").into_owned())
        .collect();
    // Each directory but ours stands before what is in it.
    let wanted = [HEADER, "a", "memory/", "memory/0.pages", "empty", "z/", "z/last", SUMS];
    assert_eq!(names, wanted.map(PathBuf::from));
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    let whole = written(&some_parts());
    for length in (0..whole.len()).step_by(7).chain(whole.len() - 12..whole.len()) {
        let cut = read(&whole[..length]);
        assert!(matches!(cut, Err(ArchiveError::Refused { .. })), "{length}: {cut:?}");
    }
    refused(&[], "it is empty");
    refused(&whole[..whole.len() - 1], "cut short");
}

#[test]
fn a_flipped_bit_anywhere_is_noticed() {
    let parts = some_parts();
    let whole = written(&parts);
    for at in (0..whole.len()).step_by(5) {
        let mut spoiled = whole.clone();
        spoiled[at] ^= 1 << (at % 8);
        // Some bits say only how much memory decompression may take.
        match read(&spoiled) {
            Err(ArchiveError::Refused { .. }) => {}
            Ok(same) => assert_eq!(same, parts, "byte {at}"),
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
}

#[test]
fn a_flipped_byte_in_each_part_is_named() {
    let parts = some_parts();
    for damaged in 0..parts.len() {
        if parts[damaged].1.is_empty() {
            continue;
        }
        // Beneath the compression's own sum: a disk that was wrong before it was compressed.
        let mut liar = Liar::promising(&parts);
        for (at, (name, bytes)) in parts.iter().enumerate() {
            let mut bytes = bytes.clone();
            if at == damaged {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x40;
            }
            liar = liar.file(name, &bytes);
        }
        let says = format!("part {} is damaged", parts[damaged].0);
        refused(&liar.summed(&parts), &says);
    }
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    refused(b"hello, I am a text file and quite long", "not compressed by zstd");
    refused(&zstd::encode_all(&b"hello"[..], 1).expect("zstd"), "it is damaged");
    let other = Liar(tar::Builder::new(Vec::new())).file("config.dump", b"{}").zstd();
    refused(&other, "does not begin with decamp/header.json");
    refused(&Liar::new(b"no JSON").zstd(), "its header cannot be read");
    refused(&Liar::new(b"{\"format\": \"other\"}").zstd(), "does not say that it is a checkpoint");
    let newer = json!({"format": FORMAT, "version": VERSION + 1, "new": true}).to_string();
    refused(&Liar::new(newer.as_bytes()).zstd(), "version 2 of the format");
    let directory = tempfile::tempdir().expect("a directory");
    let error = Archive::open(directory.path()).expect_err("a directory");
    assert!(error.to_string().contains("it is no file"), "{error}");
    assert!(Archive::open(Path::new("/nowhere/at/all")).is_err());
}

#[test]
fn a_pipe_does_not_hold_us_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    assert!(Archive::open(&path).is_err());
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in ["../x", "/etc/passwd", "a/../../x", "./a", "a//b", "", "a b", &"x".repeat(101)] {
        let parts = vec![(name.to_owned(), b"x".to_vec())];
        refused(&Liar::promising(&parts).file("a", b"x").zstd(), "it has a part of the name");
        // Or promises one thing and brings the other.
        let good = vec![("good".to_owned(), b"x".to_vec())];
        if name.len() <= 100 {
            let liar = Liar::promising(&good).file(name, b"x");
            refused(&liar.summed(&good), "where good should be");
        }
    }
}

#[test]
fn parts_that_are_no_files_are_refused() {
    let parts = vec![("a".to_owned(), Vec::new())];
    for kind in [
        tar::EntryType::Symlink,
        tar::EntryType::Link,
        tar::EntryType::Char,
        tar::EntryType::Block,
        tar::EntryType::Fifo,
        tar::EntryType::Directory,
        tar::EntryType::GNUSparse,
    ] {
        refused(&Liar::promising(&parts).with("a", kind, b"").summed(&parts), "is no file");
    }
}

#[test]
fn other_parts_than_promised_are_refused() {
    let parts = vec![("a".to_owned(), b"12345".to_vec()), ("b".to_owned(), b"6".to_vec())];
    let promise = || Liar::promising(&parts);
    let twice = vec![parts[0].clone(), parts[0].clone()];
    refused(&Liar::promising(&twice).file("a", b"12345").zstd(), "it has part a twice");
    let reserved = vec![(SUMS.to_owned(), b"x".to_vec())];
    refused(&Liar::promising(&reserved).zstd(), "twice");
    refused(&promise().file("b", b"6").file("a", b"12345").summed(&parts), "where a should be");
    refused(&promise().file("a", b"1234").file("b", b"6").summed(&parts), "has 4 bytes");
    refused(&promise().file("a", b"123456").file("b", b"6").summed(&parts), "has 6 bytes");
    refused(&promise().file("a", b"12345").zstd(), "ends before part b");
    refused(&promise().file("a", b"12345").file("b", b"6").zstd(), "ends before part decamp/sums");
    let whole = || promise().file("a", b"12345").file("b", b"6");
    refused(&whole().file(SUMS, b"{\"sha256\": []}").zstd(), "its sums are not those");
    refused(&whole().file(SUMS, b"[").zstd(), "its sums cannot be read");
    let more = Liar(tar::Builder::new(zstd::decode_all(&*whole().summed(&parts)).expect("zstd")));
    assert!(read(&more.file("c", b"x").zstd()).is_err(), "something after the end");
}

#[test]
fn a_size_beyond_the_data_is_refused() {
    let parts = vec![("a".to_owned(), vec![1; 2048])];
    let mut tar = zstd::decode_all(&*Liar::promising(&parts).file("a", &[1; 2048]).summed(&parts))
        .expect("zstd");
    tar.truncate(tar.len() / 2);
    refused(&zstd::encode_all(&*tar, 1).expect("zstd"), "cut short");
    // Far more than any file can hold.
    let mut much = header(&parts);
    much.parts[0].size = u64::MAX;
    let much = Liar::new(&serde_json::to_vec(&much).expect("JSON"));
    refused(&much.file("a", &[1; 2048]).zstd(), "it promises");
}

#[test]
fn what_grows_without_end_is_held_to_its_promise() {
    // 4 GiB of zeros are a few hundred KiB of zstd.
    let parts = vec![("a".to_owned(), vec![0; 1])];
    let head = zstd::decode_all(&*Liar::promising(&parts).zstd()).expect("zstd");
    let mut bomb = zstd::Encoder::new(Vec::new(), 1).expect("zstd");
    bomb.write_all(&head[..head.len() - 1024]).expect("written");
    let mut entry = tar::Header::new_ustar();
    entry.set_path("a").expect("a name");
    entry.set_entry_type(tar::EntryType::Regular);
    entry.set_size(4 << 30);
    entry.set_cksum();
    bomb.write_all(entry.as_bytes()).expect("written");
    std::io::copy(&mut std::io::repeat(0).take(64 << 20), &mut bomb).expect("written");
    refused(&bomb.finish().expect("ended"), "has 4294967296 bytes");
}

#[test]
fn a_file_that_changes_between_the_passes_is_noticed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("archive");
    std::fs::write(&path, written(&some_parts())).expect("written");
    let mut archive = Archive::open(&path).expect("our own");
    archive.verify(&mut |_, _| Ok(())).expect("whole");
    let mut other = some_parts();
    other[0].1 = b"fIrst".to_vec();
    std::fs::write(&path, written(&other)).expect("written");
    let error = archive.unpack(&mut |_, _| Ok(())).expect_err("another file");
    assert!(error.to_string().contains("was changed while"), "{error}");
}

#[test]
fn a_part_is_as_long_as_it_was_promised() {
    let parts = vec![("a".to_owned(), vec![0; 10])];
    for length in [9, 11] {
        let mut archive = ArchiveWriter::begin(Vec::new(), &header(&parts)).expect("begun");
        let filled = archive.part("a", 10, |to| {
            to.write_all(&vec![0; length])
                .map_err(|error| ArchiveError::part("a", error.to_string()))
        });
        assert!(matches!(filled, Err(ArchiveError::Part { .. })), "{length}");
    }
}

#[test]
fn a_file_is_there_whole_or_not_at_all_and_replaces_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("web.tar.zst");
    let files = || std::fs::read_dir(directory.path()).expect("a directory").count();
    let output = Output::begin(&path).expect("begun");
    output.file().write_all(b"half").expect("written");
    assert!(!path.exists());
    drop(output);
    assert_eq!(files(), 0);
    let output = Output::begin(&path).expect("begun");
    output.file().write_all(b"whole").expect("written");
    assert_eq!(output.finish().expect("finished"), 5);
    assert_eq!(files(), 1);
    assert!(matches!(Output::begin(&path), Err(ArchiveError::OutputTaken(_))));
    // Somebody takes the name meanwhile.
    std::fs::remove_file(&path).expect("removed");
    let output = Output::begin(&path).expect("begun");
    std::fs::write(&path, "theirs").expect("written");
    assert!(matches!(output.finish(), Err(ArchiveError::OutputTaken(_))));
    assert_eq!(std::fs::read(&path).expect("there"), b"theirs");
    assert_eq!(files(), 1);
    assert!(Output::begin(&directory.path().join("none/web")).is_err());
}

/// A space of some pages; page N is full of N, and every fourth one is zeros.
struct Numbers;

impl PageReader for Numbers {
    fn read(&self, range: PageRange, into: &mut [u8]) -> WorkloadResult<()> {
        for (page, bytes) in (range.first..).zip(into.chunks_exact_mut(PAGE_SIZE)) {
            bytes.fill(if page % 4 == 0 { 0 } else { page as u8 | 1 });
        }
        Ok(())
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

/// Remembers the pages that it is given.
#[derive(Default)]
struct Placed(std::sync::Mutex<std::collections::BTreeMap<u64, Vec<u8>>>);

impl PageWriter for Placed {
    fn write(&self, range: PageRange, bytes: &[u8]) -> WorkloadResult<()> {
        let pages = (range.first..).zip(bytes.chunks_exact(PAGE_SIZE).map(<[u8]>::to_vec));
        self.0.lock().expect("not poisoned").extend(pages);
        Ok(())
    }

    fn zero(&self, _range: PageRange) -> WorkloadResult<()> {
        unreachable!("no page is cleared")
    }
}

fn space(page_limit: u64) -> SpaceParts {
    SpaceParts::new(SpaceInfo { id: 5, page_limit, label: String::new(), process: 0 })
}

fn filled(parcel: super::Parcel) -> (PartInfo, Vec<u8>) {
    let mut bytes = Vec::new();
    (parcel.fill)(&mut bytes).expect("filled");
    assert_eq!(bytes.len() as u64, parcel.info.size);
    (parcel.info, bytes)
}

#[test]
fn maps_that_lie_are_refused() {
    let map = |pairs: &[(u64, u64)]| -> Vec<u8> {
        pairs.iter().flat_map(|(a, b)| [a.to_le_bytes(), b.to_le_bytes()]).flatten().collect()
    };
    let part = |name: &str, size| PartInfo { name: name.to_owned(), size };
    let read = |bytes: Vec<u8>| {
        let part = part("memory/5.map", bytes.len() as u64);
        space(100).read_map(&part, &mut &*bytes)
    };
    assert!(read(map(&[(0, 1), (1, 2), (99, 1)])).is_ok());
    for bad in [
        map(&[(0, 0)]),
        map(&[(5, 1), (4, 1)]),
        map(&[(5, 2), (6, 1)]),
        map(&[(99, 2)]),
        map(&[(u64::MAX, 2)]),
        vec![0; 15],
    ] {
        assert!(read(bad.clone()).is_err(), "{bad:?}");
    }
    let long = part("memory/5.map", 3 << 30);
    assert!(space(100).read_map(&long, &mut std::io::repeat(0)).is_err());
    let mut parts = space(100);
    let pages = part("memory/5.pages", 4096);
    assert!(parts.pages_of(&pages).is_err(), "no map yet");
    parts.read_map(&part("memory/5.map", 16), &mut &*map(&[(3, 2)])).expect("a map");
    assert!(parts.pages_of(&pages).is_err(), "one page where the map says two");
}

#[test]
fn lists_of_sections_are_checked() {
    let read = |text: &str| {
        let part = PartInfo { name: SECTIONS.to_owned(), size: text.len() as u64 };
        SectionList::read(&part, &mut text.as_bytes())
    };
    let one = r#"{"part": "a", "kind": "k", "version": 1}"#;
    let list = read(&format!(r#"{{"sections": [{one}]}}"#)).expect("a list");
    assert_eq!(list.section_of("a").expect("a section").kind, "k");
    assert_eq!(list.section_of("b"), None);
    assert!(read(&format!(r#"{{"sections": [{one}, {one}]}}"#)).is_err());
    assert!(read("[]").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_parts_come_back(contents in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 0..1500), 0..8)) {
        let parts: Parts = contents.into_iter().enumerate()
            .map(|(number, bytes)| (format!("dir/part-{number}"), bytes)).collect();
        prop_assert_eq!(read(&written(&parts)).expect("our own"), parts);
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
        frame.extend_from_slice(&bytes);
        prop_assert!(read(&frame).is_err());
        prop_assert!(read(&zstd::encode_all(&*bytes, 1).expect("zstd")).is_err());
    }

    #[test]
    fn pages_come_back_and_zeros_do_not_travel(ranges in prop::collection::vec((0u64..2000, 1u64..600), 0..6)) {
        let ours = |&(first, count): &(u64, u64)| PageRange::new(SpaceId(5), first, count);
        let mut pages: PageSet = ranges.iter().map(ours).collect();
        pages.insert(PageRange::new(SpaceId(6), 1, 1));
        let all = pages.clone();
        let pages = without_zeros(&Numbers, &pages).expect("readable");
        let [map, contents] = parcels(SpaceId(5), &pages, std::sync::Arc::new(Numbers)).map(filled);
        let mut parts = space(1 << 20);
        prop_assert!(parts.is_map(&map.0) && parts.is_pages(&contents.0));
        parts.read_map(&map.0, &mut &*map.1).expect("our own");
        let placed = Placed::default();
        let ranges = parts.pages_of(&contents.0).expect("our own").to_vec();
        place_pages(ranges.into_iter(), &mut &*contents.1, &placed, "pages").expect("placed");
        let placed = placed.0.into_inner().expect("not poisoned");
        for page in 0..3000 {
            let wanted = all.contains(SpaceId(5), page) && page % 4 != 0;
            prop_assert_eq!(placed.contains_key(&page), wanted);
            if wanted { prop_assert!(placed[&page].iter().all(|byte| *byte == page as u8 | 1)); }
        }
    }
}

/// A plain tar of these entries.
fn tar_of(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let liar = Liar(tar::Builder::new(Vec::new()));
    let add = |liar: Liar, (name, kind, bytes): &(&str, tar::EntryType, &[u8])| {
        liar.with(name, *kind, bytes)
    };
    entries.iter().fold(liar, add).0.into_inner().expect("finished")
}

/// What is in an archive of another program's: its names, and what was kept.
fn surveyed(bytes: &[u8], most: u64) -> Result<Parts, ArchiveError> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("archive");
    std::fs::write(&path, bytes).expect("written");
    if !Foreign::is_at(&path)? {
        return Archive::open(&path).map(|_| Parts::new());
    }
    let found = Foreign::survey(&path, most, &|name| name.ends_with(".dump"))?;
    let kept: Parts =
        found.all_kept().map(|(name, kept)| (name.to_owned(), kept.to_vec())).collect();
    let mut archive = found.into_archive(header(&[]).workload)?;
    archive.verify(&mut |_, _| Ok(()))?;
    let mut names = Vec::new();
    archive.unpack(&mut |part, _| {
        names.push((part.name.clone(), Vec::new()));
        Ok(())
    })?;
    Ok([names, kept].concat())
}

#[test]
fn what_others_wrote_is_read_compressed_or_not() {
    use tar::EntryType::{Directory, Regular};
    let tar = tar_of(&[
        ("checkpoint/", Directory, b""),
        ("checkpoint/core-1.img", Regular, b"core"),
        ("config.dump", Regular, b"{}"),
    ]);
    let zstd = zstd::encode_all(&tar[..], 1).expect("compressed");
    for bytes in [&tar, &zstd] {
        let found = surveyed(bytes, 100).expect("honest");
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["checkpoint/core-1.img", "config.dump", "config.dump"]);
        assert_eq!(found[2].1, b"{}");
        for length in 1..bytes.len() {
            assert!(surveyed(&bytes[..length], 100).is_err(), "cut at {length}");
        }
    }
}

#[test]
fn what_others_wrote_may_lie() {
    use tar::EntryType::{Block, GNULongName, Link, Regular, Symlink, XHeader};
    let refused = |entries: &[(&str, tar::EntryType, &[u8])], says: &str| {
        let error = surveyed(&tar_of(entries), 100).map(drop).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(&[("../x", Regular, b"")], "a part of the name");
    refused(&[("/etc/x", Regular, b"")], "a part of the name");
    refused(&[("a/./x", Regular, b"")], "a part of the name");
    refused(&[("x", Regular, b""), ("x", Regular, b"")], "twice");
    refused(&[("x.dump", Regular, b""), ("x.dump", Regular, b"")], "twice");
    refused(&[("x", Symlink, b"")], "is no file");
    refused(&[("x", Link, b"")], "is no file");
    refused(&[("x", Block, b"")], "is no file");
    refused(&[("x", GNULongName, b"y")], "is no file");
    refused(&[("x", XHeader, b"9 path=y\n"), ("x", Regular, b"")], "in two places");
    refused(&[("x", Regular, &[0; 60]), ("y", Regular, &[0; 60])], "have room for 100");
    refused(&[("x", XHeader, b"10 size=9\n"), ("x", Regular, b"")], "8 GiB or more");
    refused(&[("x", XHeader, b"no record"), ("x", Regular, b"")], "records that are none");
    let attribute = tar_of(&[("x", XHeader, b"20 a.b=c size=path=\n"), ("x", Regular, b"")]);
    surveyed(&attribute, 100).expect("its value only looks like one");
    let record = [b"61440 a=", &[b'x'; (60 << 10) - 9][..], b"\n"].concat();
    refused(&vec![("x", XHeader, &record[..]); 1_100], "more directories and records");
    let whole = tar_of(&[("x", Regular, b"x")]);
    let more = [&whole[..], b"x"].concat();
    assert!(surveyed(&more, 100).expect_err("more").to_string().contains("after its end"));
    let gzip = [&[0x1f, 0x8b, 8][..], &[0; 600]].concat();
    assert!(surveyed(&gzip, 100).expect_err("gzip").to_string().contains("compressed by gzip"));
}
