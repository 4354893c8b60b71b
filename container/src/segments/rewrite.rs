//! The surgery on CRIU's images that has it take segments of shared memory from us, instead of making
//! memory files of its own and copying pages into them.
//!
//! A memory file is turned into a regular file that is "external": CRIU opens such a one through a
//! descriptor that it inherited, anew for each descriptor and mapping, with the flags that it had (its
//! `files-reg.c`). Tags are those of CRIU's .proto files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::message::{Image, MM_MAGIC, Message};
use crate::error::{ContainerError, Result};
use crate::huge;

const FILES_MAGIC: u32 = 0x5630_3138;
const FDINFO_MAGIC: u32 = 0x5621_3732;
const MEMFD_INODE_MAGIC: u32 = 0x4845_3499;
/// Kinds of open files.
const REGULAR: u64 = 1;
const MEMORY_FILE: u64 = 18;
/// The mark of a mapping of a memory file.
const OF_MEMORY_FILE: u64 = 1 << 14;

/// What CRIU wrote down of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inode {
    pub(super) name: Vec<u8>,
    pub(super) owner: (u32, u32),
    /// In bytes.
    pub(super) size: u64,
    pub(super) seals: i32,
    pub(super) mode: Option<u32>,
    /// Bytes of its pages, if they are huge.
    pub(super) page: Option<u64>,
}

/// The memory files in `images` whose numbers are in `wanted`, by that number, with CRIU's own number of
/// each.
fn inodes(images: &Path, wanted: &BTreeMap<u32, String>) -> Result<BTreeMap<u64, (u32, Inode)>> {
    let path = images.join("memfd.img");
    let bad = |what: &str| ContainerError::malformed(&path, what);
    let Some(image) = Image::read(&path, MEMFD_INODE_MAGIC)? else { return Ok(BTreeMap::new()) };
    let (mut found, mut numbers) = (BTreeMap::new(), BTreeSet::new());
    for message in &image.messages {
        let number = |tag| message.number(tag).and_then(|number| u32::try_from(number).ok());
        let cut = || bad("has a memory file of which something is missing");
        let inode = number(5).ok_or_else(cut)?;
        if !wanted.contains_key(&inode) {
            continue;
        }
        if !numbers.insert(inode) {
            return Err(bad("has a memory file twice"));
        }
        let facts = Inode {
            name: message.bytes(1).ok_or_else(cut)?.to_vec(),
            owner: (number(2).ok_or_else(cut)?, number(3).ok_or_else(cut)?),
            size: message.number(4).ok_or_else(cut)?,
            seals: number(6).ok_or_else(cut)? as i32,
            mode: number(9),
            page: number(8).filter(|flags| *flags != 0).map(huge::page_in),
        };
        found.insert(message.number(7).ok_or_else(cut)?, (inode, facts));
    }
    Ok(found)
}

/// Has CRIU open the memory files whose numbers are in `wanted` through what it inherited under the key
/// beside the number. Gives what there is to know of those that are used: of one that is not, nobody has
/// a descriptor or a mapping any more.
pub(super) fn enter(images: &Path, wanted: &BTreeMap<u32, String>) -> Result<BTreeMap<u32, Inode>> {
    let inodes = inodes(images, wanted)?;
    if inodes.is_empty() {
        return Ok(BTreeMap::new());
    }
    let key = |number: &u64| inodes.get(number).and_then(|(inode, _)| wanted.get(inode));
    let files = turn_files(&images.join("files.img"), |number| key(&number).cloned())?;
    let list = || format!("list {}", images.display());
    for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
        let entry = entry.map_err(ContainerError::io(list()))?;
        let name = entry.file_name();
        let is_of = |kind: &str| {
            let number =
                name.to_str().and_then(|name| name.strip_prefix(kind)?.strip_suffix(".img"));
            number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        if is_of("mm-") {
            turn_mappings(&entry.path(), &files)?;
        } else if is_of("fdinfo-") {
            turn_descriptors(&entry.path(), &files)?;
        }
    }
    Ok(inodes.into_values().collect())
}

/// Turns memory files that have a key into external ones. Gives the numbers of those open files.
fn turn_files(path: &Path, key: impl Fn(u64) -> Option<String>) -> Result<BTreeSet<u64>> {
    let bad = || ContainerError::malformed(path, "has an open memory file that makes no sense");
    let mut turned = BTreeSet::new();
    change(path, FILES_MAGIC, |message| {
        if message.number(1) != Some(MEMORY_FILE) {
            return Ok(());
        }
        let old = message.bytes(20).and_then(Message::parse).ok_or_else(bad)?;
        let Some(key) = key(old.number(5).ok_or_else(bad)?) else { return Ok(()) };
        let number = |tag| old.number(tag).ok_or_else(bad);
        let mut new = Message::default();
        // Its number, flags, position, and who is told of its signals.
        new.set_number(1, number(1)?);
        new.set_number(2, number(2)?);
        new.set_number(3, number(3)?);
        new.set_bytes(5, old.bytes(4).ok_or_else(bad)?.to_vec());
        new.set_bytes(6, key.into_bytes());
        new.set_number(9, 1);
        message.set_number(1, REGULAR);
        message.remove(20);
        message.set_bytes(3, new.to_bytes());
        turned.insert(number(1)?);
        Ok(())
    })?;
    Ok(turned)
}

/// Mappings of these open files are not of memory files any more.
fn turn_mappings(path: &Path, files: &BTreeSet<u64>) -> Result<()> {
    let bad = || ContainerError::malformed(path, "has a mapping that makes no sense");
    change(path, MM_MAGIC, |message| {
        let fine = message.change_each(14, |mapping| {
            if let (Some(status), Some(file)) = (mapping.number(7), mapping.number(4))
                && status & OF_MEMORY_FILE != 0
                && files.contains(&file)
            {
                mapping.set_number(7, status & !OF_MEMORY_FILE);
            }
        });
        if fine { Ok(()) } else { Err(bad()) }
    })
}

/// Neither are descriptors of them.
fn turn_descriptors(path: &Path, files: &BTreeSet<u64>) -> Result<()> {
    change(path, FDINFO_MAGIC, |message| {
        let ours = message.number(1).is_some_and(|file| files.contains(&file));
        if ours && message.number(3) == Some(MEMORY_FILE) {
            message.set_number(3, REGULAR);
        }
        Ok(())
    })
}

fn change(path: &Path, kind: u32, mut each: impl FnMut(&mut Message) -> Result<()>) -> Result<()> {
    let Some(mut image) = Image::read(path, kind)? else {
        return Err(ContainerError::malformed(path, "is missing"));
    };
    let before = image.messages.clone();
    image.messages.iter_mut().try_for_each(&mut each)?;
    if image.messages == before { Ok(()) } else { image.write(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(u32, u64)], inner: &[(u32, &[u8])]) -> Message {
        let mut made = Message::default();
        fields.iter().for_each(|(tag, number)| made.set_number(*tag, *number));
        inner.iter().for_each(|(tag, bytes)| made.set_bytes(*tag, bytes.to_vec()));
        made
    }

    fn image(directory: &Path, name: &str, kind: u32, messages: Vec<Message>) {
        Image::of(kind, messages).write(&directory.join(name)).expect("written");
    }

    /// Two memory files, open and mapped: 501 is wanted, 502 is not.
    fn images(directory: &Path) {
        let inode = |shmid, number, name: &[u8]| {
            let numbers =
                [(2, 7), (3, 8), (4, 8192), (5, shmid), (6, 1), (7, number), (9, 0o100777)];
            message(&numbers, &[(1, name)])
        };
        image(
            directory,
            "memfd.img",
            MEMFD_INODE_MAGIC,
            vec![inode(501, 1, b"x"), inode(502, 2, b"y")],
        );
        let file = |id, number| {
            let memfd = message(&[(1, id), (2, 2), (3, 12), (5, number)], &[(4, b"\x08\x01")]);
            message(&[(1, MEMORY_FILE), (2, id)], &[(20, &memfd.to_bytes())])
        };
        image(directory, "files.img", FILES_MAGIC, vec![file(31, 1), file(32, 2)]);
        let info = |id| message(&[(1, id), (2, 0), (3, MEMORY_FILE), (4, 5)], &[]);
        image(directory, "fdinfo-2.img", FDINFO_MAGIC, vec![info(31), info(32)]);
        let mapping =
            |id| message(&[(1, 4096), (4, id), (7, OF_MEMORY_FILE | 0x81)], &[]).to_bytes();
        let mut mm = message(&[(1, 1)], &[(14, &mapping(31))]);
        mm.set_number(99, 5);
        image(directory, "mm-1.img", MM_MAGIC, vec![mm]);
        let mm = message(&[(1, 1)], &[(14, &mapping(32))]);
        image(directory, "mm-2.img", MM_MAGIC, vec![mm]);
    }

    #[test]
    fn what_is_wanted_becomes_external_and_the_rest_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        images(directory.path());
        let read = |name: &str, kind| {
            let image = Image::read(&directory.path().join(name), kind).expect("read");
            image.expect("there").messages
        };
        let before = (read("mm-2.img", MM_MAGIC), read("files.img", FILES_MAGIC));
        let wanted = BTreeMap::from([(501, "/key".to_owned()), (900, "/other".to_owned())]);
        let found = enter(directory.path(), &wanted).expect("entered");
        let facts = Inode {
            name: b"x".to_vec(),
            owner: (7, 8),
            size: 8192,
            seals: 1,
            mode: Some(0o100777),
            page: None,
        };
        assert_eq!(found, BTreeMap::from([(501, facts)]));
        let files = read("files.img", FILES_MAGIC);
        assert_eq!(files[1], before.1[1]);
        assert_eq!((files[0].number(1), files[0].bytes(20)), (Some(REGULAR), None));
        let file = files[0].bytes(3).and_then(Message::parse).expect("a regular file");
        let numbers: Vec<_> = [1, 2, 3, 9].iter().map(|tag| file.number(*tag)).collect();
        assert_eq!(numbers, [Some(31), Some(2), Some(12), Some(1)]);
        assert_eq!((file.bytes(5), file.bytes(6)), (Some(&b"\x08\x01"[..]), Some(&b"/key"[..])));
        let kinds = |messages: Vec<Message>| -> Vec<_> {
            messages.iter().map(|message| message.number(3)).collect()
        };
        let infos = kinds(read("fdinfo-2.img", FDINFO_MAGIC));
        assert_eq!(infos, [Some(REGULAR), Some(MEMORY_FILE)]);
        let mm = read("mm-1.img", MM_MAGIC);
        let mapping = mm[0].bytes(14).and_then(Message::parse).expect("a mapping");
        assert_eq!((mapping.number(7), mm[0].number(99)), (Some(0x81), Some(5)));
        assert_eq!(read("mm-2.img", MM_MAGIC), before.0);
    }

    #[test]
    fn images_that_lie_are_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        images(directory.path());
        let wanted = BTreeMap::from([(501, "/key".to_owned())]);
        let path = directory.path().join("memfd.img");
        let twice = |image: Image| {
            Image::of(
                MEMFD_INODE_MAGIC,
                [image.messages[0].clone(), image.messages[0].clone()].into(),
            )
        };
        let image = Image::read(&path, MEMFD_INODE_MAGIC).expect("read").expect("there");
        twice(image).write(&path).expect("written");
        assert!(enter(directory.path(), &wanted).is_err());
        images(directory.path());
        let files = directory.path().join("files.img");
        let bytes = fs::read(&files).expect("read");
        fs::write(&files, &bytes[..bytes.len() - 1]).expect("cut");
        assert!(enter(directory.path(), &wanted).is_err());
        fs::remove_file(&files).expect("removed");
        assert!(enter(directory.path(), &wanted).is_err());
    }
}
