//! What CRIU's images say of files that are not found by their name: they are deleted, or in `/proc` of a
//! process that has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::Fault;
use crate::error::{ContainerError, Result};
use crate::segments::message::{Image, Message};

/// Marks at the head of these images (CRIU's `magic.h`).
pub(crate) const REMAPS_MARKS: &[u32] = &[0x5456_4319, 0x5913_3954];
pub(crate) const FILES_MARKS: &[u32] = &[0x5456_4319, 0x5630_3138];
const OLD_FILES_MARKS: &[u32] = &[0x5456_4319, 0x5036_3636];
pub(crate) const GHOST_MARKS: &[u32] = &[0x5456_4319, 0x5258_3605];

pub(crate) const REMAPS: &str = "remap-fpath.img";
pub(crate) const FILES: &str = "files.img";
/// Where CRIU had the same in former times.
const OLD_FILES: &str = "reg-files.img";
/// Bytes of a list of files at most: one is some hundred.
pub(super) const FILES_MOST: u64 = 256 << 20;
/// Bytes of what an image says of a deleted file, beside its contents.
const GHOST_MOST: u32 = 64 << 10;

/// Fields of CRIU's `remap_file_path_entry`.
const ORIGINAL: u32 = 1;
const REMAP: u32 = 2;
const HOW: u32 = 3;
/// How: by a hard link that CRIU made at the dump and removes at the restore, by the contents, by a process.
const LINKED: u64 = 0;
const GHOST: u64 = 1;
const PROCFS: u64 = 2;
/// The bit by which it said that contents are there before there was that field.
const OLD_GHOST: u64 = 0x8000_0000;

/// Of `file_entry`, `reg_file_entry` and `ghost_file_entry`.
const KIND: u32 = 1;
const REGULAR: u32 = 3;
const IS_REGULAR: u64 = 1;
const NUMBER: u32 = 1;
const NAME: u32 = 6;
const ON: u32 = 7;
const MODE: u32 = 3;

/// A deleted file in the images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GhostImage {
    pub(crate) path: Vec<u8>,
    /// The number of the mount that it is on.
    pub(crate) mount: u32,
    pub(crate) mode: u32,
}

/// All deleted files that CRIU would make again from the images in this directory.
///
/// # Errors
/// When they ask for a file to be found in a way that decamp never has CRIU note, or contradict themselves.
pub(crate) fn ghosts(images: &Path) -> Result<Vec<GhostImage>> {
    let Some(remaps) = read(images, REMAPS, REMAPS_MARKS)? else { return Ok(Vec::new()) };
    let bad = |what: Fault| ContainerError::malformed(images.join(REMAPS), what);
    let wanted = wanted(&remaps).map_err(bad)?;
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut named = BTreeMap::new();
    for (name, marks) in [(FILES, FILES_MARKS), (OLD_FILES, OLD_FILES_MARKS)] {
        let Some(files) = read(images, name, marks)? else { continue };
        enter(&files, name == FILES, &wanted, &mut named)
            .map_err(|what| ContainerError::malformed(images.join(name), what))?;
    }
    let ghost = |(original, remap): (&u32, &u32)| {
        let (path, mount) =
            named.remove(original).ok_or_else(|| bad("has a file that is nowhere".to_owned()))?;
        Ok(GhostImage { path, mount, mode: mode(images, *remap)? })
    };
    wanted.iter().map(ghost).collect()
}

/// Which files CRIU makes again, and from which of its images.
fn wanted(remaps: &[Message]) -> std::result::Result<BTreeMap<u32, u32>, Fault> {
    let mut wanted = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for remap in remaps {
        let number = |tag| remap.number(tag).map(|number| u64::from(number as u32));
        let (Some(original), Some(from)) = (number(ORIGINAL), number(REMAP)) else {
            return Err("says nothing of a file".to_owned());
        };
        let (how, from) = match number(HOW) {
            Some(how) => (how, from),
            None if from & OLD_GHOST != 0 => (GHOST, from & !OLD_GHOST),
            None => (LINKED, from),
        };
        if !seen.insert(original) {
            return Err("has two ways to one file".to_owned());
        }
        match how {
            GHOST => {
                wanted.insert(original as u32, from as u32);
            }
            PROCFS => {}
            LINKED => {
                return Err("has a file behind a link of CRIU's, which it would remove".to_owned());
            }
            _ => return Err("has a file in a way that is not known".to_owned()),
        }
    }
    Ok(wanted)
}

/// Enters the path and the mount of each wanted file.
fn enter(
    files: &[Message],
    are_entries: bool,
    wanted: &BTreeMap<u32, u32>,
    into: &mut BTreeMap<u32, (Vec<u8>, u32)>,
) -> std::result::Result<(), Fault> {
    for file in files {
        let mut inner;
        let regular = match are_entries {
            true if file.number(KIND).map(|kind| u64::from(kind as u32)) != Some(IS_REGULAR) => {
                continue;
            }
            // CRIU would put several together.
            true => {
                inner = file.each(REGULAR);
                match (inner.next(), inner.next()) {
                    (Some(Some(regular)), None) => regular,
                    _ => return Err("has not one file in one entry".to_owned()),
                }
            }
            false => file.clone(),
        };
        let number = regular.number(NUMBER).unwrap_or(0) as u32;
        if !wanted.contains_key(&number) {
            continue;
        }
        let path = regular.bytes(NAME).unwrap_or_default().to_vec();
        // Signed numbers are folded; one that is not there is none of a mount.
        let folded = regular.number(ON).unwrap_or(1) as u32;
        let mount = (folded >> 1) ^ (folded & 1).wrapping_neg();
        if into.insert(number, (path, mount)).is_some() {
            return Err("has a deleted file twice".to_owned());
        }
    }
    Ok(())
}

/// Owner's rights and kind of a deleted file.
fn mode(images: &Path, number: u32) -> Result<u32> {
    let path = images.join(format!("ghost-file-{number:x}.img"));
    let failed = || format!("read {}", path.display());
    let mut file = File::open(&path).map_err(ContainerError::io(failed()))?;
    let mut word = || -> Result<u32> {
        let mut bytes = [0; 4];
        file.read_exact(&mut bytes).map_err(ContainerError::io(failed()))?;
        Ok(u32::from_le_bytes(bytes))
    };
    let bad = || ContainerError::malformed(&path, "is no image of a deleted file");
    for mark in GHOST_MARKS {
        if word()? != *mark {
            return Err(bad());
        }
    }
    let length = word()?;
    if length > GHOST_MOST {
        return Err(bad());
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes).map_err(ContainerError::io(failed()))?;
    let mode = Message::parse(&bytes).and_then(|message| message.number(MODE));
    mode.map(|mode| mode as u32).ok_or_else(bad)
}

/// The messages of an image; nothing where there is none.
pub(super) fn read(images: &Path, name: &str, marks: &[u32]) -> Result<Option<Vec<Message>>> {
    match fs::metadata(images.join(name)) {
        // CRIU makes it for what may come.
        Ok(metadata) if metadata.len() == 0 => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    let Image { messages, .. } = super::read(&images.join(name), FILES_MOST, marks)?;
    Ok(Some(messages))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn remap(original: u64, from: u64, how: Option<u64>) -> Message {
        let mut remap = Message::default();
        remap.set_number(ORIGINAL, original);
        remap.set_number(REMAP, from);
        if let Some(how) = how {
            remap.set_number(HOW, how);
        }
        remap
    }

    pub(crate) fn file(number: u64, path: &str, mount: u64) -> Message {
        let mut regular = Message::default();
        regular.set_number(NUMBER, number);
        regular.set_bytes(NAME, path.into());
        regular.set_number(ON, mount << 1);
        let mut file = Message::default();
        file.set_number(KIND, IS_REGULAR);
        file.set_number(2, number);
        file.set_bytes(REGULAR, regular.to_bytes());
        file
    }

    pub(crate) fn write(directory: &Path, name: &str, marks: &[u32], messages: &[Message]) {
        let mut bytes: Vec<u8> = marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        for message in messages.iter().map(Message::to_bytes) {
            bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&message);
        }
        fs::write(directory.join(name), bytes).expect("written");
    }

    /// The image of a deleted file's contents.
    pub(crate) fn contents(directory: &Path, number: u32, mode: u32) {
        let mut ghost = Message::default();
        ghost.set_number(MODE, mode.into());
        let name = format!("ghost-file-{number:x}.img");
        write(directory, &name, GHOST_MARKS, &[ghost]);
        let mut bytes = fs::read(directory.join(&name)).expect("read");
        bytes.extend_from_slice(b"\xff\xff\xff\xffcontents");
        fs::write(directory.join(&name), bytes).expect("written");
    }

    #[test]
    fn deleted_files_are_found_with_their_paths() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path();
        assert_eq!(ghosts(at).expect("none"), []);
        fs::write(at.join(REMAPS), "").expect("written");
        assert_eq!(ghosts(at).expect("none"), []);
        let remaps =
            [remap(7, 26, Some(GHOST)), remap(8, OLD_GHOST | 2, None), remap(9, 3, Some(PROCFS))];
        write(at, REMAPS, REMAPS_MARKS, &remaps);
        assert!(ghosts(at).is_err(), "no such files");
        write(at, FILES, FILES_MARKS, &[file(6, "/a", 1), file(7, "/b", 40), file(8, "/c", 41)]);
        assert!(ghosts(at).is_err(), "no contents");
        contents(at, 26, libc::S_IFDIR | 0o700);
        contents(at, 2, libc::S_IFREG);
        let ghost = |path: &str, mount, mode| GhostImage { path: path.into(), mount, mode };
        let found = [ghost("/b", 40, libc::S_IFDIR | 0o700), ghost("/c", 41, libc::S_IFREG)];
        assert_eq!(ghosts(at).expect("two"), found);
        // CRIU might take either.
        write(at, FILES, FILES_MARKS, &[file(7, "/b", 40), file(8, "/c", 41), file(7, "/x", 40)]);
        assert!(ghosts(at).is_err(), "twice");
        let mut both = file(7, "/b", 40);
        both.add_bytes(REGULAR, file(7, "/x", 40).bytes(REGULAR).expect("one").to_vec());
        write(at, FILES, FILES_MARKS, &[both, file(8, "/c", 41)]);
        assert!(ghosts(at).is_err(), "two in one");
        fs::remove_file(at.join(FILES)).expect("removed");
        let old: Vec<_> = [file(7, "/b", 40), file(8, "/c", 41)]
            .iter()
            .map(|file| file.each(REGULAR).next().flatten().expect("one"))
            .collect();
        write(at, OLD_FILES, OLD_FILES_MARKS, &old);
        assert_eq!(ghosts(at).expect("two"), found);
    }

    #[test]
    fn nothing_is_found_by_what_criu_would_remove() {
        assert_eq!(wanted(&[remap(1, 2, Some(PROCFS))]), Ok(BTreeMap::new()));
        assert_eq!(wanted(&[remap(1, 2, Some(GHOST))]), Ok([(1, 2)].into()));
        for forged in [
            remap(1, 2, Some(LINKED)),
            remap(1, 2, Some(1 << 32)),
            remap(1, 2, None),
            remap(1, 2, Some(3)),
            Message::default(),
        ] {
            assert!(wanted(std::slice::from_ref(&forged)).is_err(), "{forged:?}");
        }
        assert!(wanted(&[remap(1, 2, Some(GHOST)), remap(1, 3, Some(GHOST))]).is_err());
    }

    #[test]
    fn a_file_that_names_no_mount_is_on_none() {
        let mut file = file(7, "/b", 40).each(REGULAR).next().flatten().expect("one");
        let wanted = [(7, 1)].into();
        for (told, mount) in [(Some(80), 40), (Some(1), u32::MAX), (None, u32::MAX)] {
            file.remove(ON);
            if let Some(told) = told {
                file.set_number(ON, told);
            }
            let mut found = BTreeMap::new();
            enter(std::slice::from_ref(&file), false, &wanted, &mut found).expect("one");
            assert_eq!(found[&7].1, mount, "{told:?}");
        }
    }
}
