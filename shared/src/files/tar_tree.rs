//! A tree that stands still as an ordinary tar archive, as any tar reads it: how a checkpoint carries a
//! workload's files. Its length is known before its first byte. The other way is in `tar_landing`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::FileCounters;
use super::beneath::Root;
use super::error::{Doing, FileError, Result};
use super::index::{Entry, Type};
use super::pack::Packing;
use super::scan::{Gathering, guard_device};
use super::sender::hash;

/// Bytes of a tar block.
pub(super) const BLOCK: u64 = 512;
/// Two blocks of zeros end a tar.
const END: u64 = 2 * BLOCK;
/// Bytes of a name, or of a link's target, in the head of an entry; longer ones stand in a record before.
const NAME: usize = 100;
/// Prefix of an extended attribute in such a record.
pub(super) const XATTR: &str = "SCHILY.xattr.";

/// Devices that any container is given by its runtime, by major and minor number, and the mark that
/// overlay file systems leave for what was removed. Others would open a door to the host.
const HARMLESS: [(u32, u32); 9] =
    [(0, 0), (1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];

/// A tree that nobody writes, and what a tar of it consists of.
#[derive(Debug)]
pub struct TarTree {
    pub(super) root: Root,
    pub(super) entries: Vec<Entry>,
    bytes: u64,
}

impl TarTree {
    /// Looks at the directory `path`; with `without`, a path below it, all but that.
    ///
    /// # Errors
    /// When it cannot be read, or holds what cannot travel in a checkpoint.
    pub fn scan(path: &Path, without: Option<&[u8]>) -> Result<Self> {
        let root = Root::open(path)?;
        let mut gathering = Gathering::default();
        let left_out = |path: &[u8]| {
            let rest = without.and_then(|without| path.strip_prefix(without));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        root.walk(|visit| {
            guard_device(visit)?;
            if !left_out(visit.path) {
                gathering.add(visit)?;
            }
            Ok(())
        })?;
        let entries = gathering.scan.entries;
        let mut bytes = END;
        for entry in &entries {
            if let Some(what) = device_fault(entry) {
                return Err(FileError::Unsendable { path: root.shown(&entry.path), what });
            }
            let leader = entry.leader().map(|leader| &entries[leader]);
            let head = head(entry, leader).doing("describe", &root.shown(&entry.path))?;
            bytes += head.len() as u64 + content_of(entry).next_multiple_of(BLOCK);
        }
        Ok(Self { root, entries, bytes })
    }

    /// Bytes of the tar.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the tar.
    ///
    /// # Errors
    /// When a file cannot be read, or was changed meanwhile, or `to` takes no more.
    pub fn write(&self, to: &mut dyn Write) -> Result<()> {
        let counters = FileCounters::default();
        let packing =
            Packing { root: &self.root, entries: &self.entries, paused: true, counters: &counters };
        for entry in &self.entries {
            let path = self.root.shown(&entry.path);
            let leader = entry.leader().map(|leader| &self.entries[leader]);
            let head = head(entry, leader).doing("describe", &path)?;
            to.write_all(&head).doing("pack", &path)?;
            if entry.has_content() {
                packing.copy(entry, to)?;
                let padding = entry.size.next_multiple_of(BLOCK) - entry.size;
                to.write_all(&[0; BLOCK as usize][..padding as usize]).doing("pack", &path)?;
            }
        }
        to.write_all(&[0; END as usize]).doing("pack", &self.root.shown(b""))
    }
}

/// SHA-256 of a file of this host's own.
///
/// # Errors
/// When it cannot be read.
pub fn file_sum(path: &Path) -> Result<[u8; 32]> {
    let file = File::open(path).doing("open", path)?;
    hash(file, path)
}

/// Why a device node may not be in a checkpoint, if it is one.
pub(super) fn device_fault(entry: &Entry) -> Option<String> {
    let device = match entry.kind() {
        Type::BlockDevice => true,
        Type::CharacterDevice => !HARMLESS.contains(&(entry.major, entry.minor)),
        _ => false,
    };
    device.then(|| {
        format!(
            "a device node ({}:{}) that is none of those that every container has",
            entry.major, entry.minor
        )
    })
}

fn content_of(entry: &Entry) -> u64 {
    if entry.has_content() { entry.size } else { 0 }
}

/// The blocks that stand before an entry's content.
fn head(entry: &Entry, leader: Option<&Entry>) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    let kind = match (entry.kind(), leader) {
        (_, Some(_)) => tar::EntryType::Link,
        (Type::Directory, _) => tar::EntryType::Directory,
        (Type::Symlink, _) => tar::EntryType::Symlink,
        (Type::Fifo, _) => tar::EntryType::Fifo,
        (Type::CharacterDevice, _) => tar::EntryType::Char,
        (Type::BlockDevice, _) => tar::EntryType::Block,
        _ => tar::EntryType::Regular,
    };
    header.set_entry_type(kind);
    header.set_mode(entry.mode);
    header.set_uid(entry.uid.into());
    header.set_gid(entry.gid.into());
    header.set_size(content_of(entry));
    header.set_mtime(u64::try_from(entry.mtime).unwrap_or(0));
    if matches!(kind, tar::EntryType::Char | tar::EntryType::Block) {
        header.set_device_major(entry.major)?;
        header.set_device_minor(entry.minor)?;
    }
    let mut records: Vec<(String, Vec<u8>)> = Vec::new();
    let mut field = |key: &str, value: &[u8], into: &mut [u8; NAME]| match value.len() <= NAME {
        true => into[..value.len()].copy_from_slice(value),
        false => records.push((key.to_owned(), value.to_vec())),
    };
    let ustar = header.as_ustar_mut().ok_or_else(|| io::Error::other("no ustar header"))?;
    field("path", &name_of(entry), &mut ustar.name);
    let target = leader.map_or_else(|| entry.target.clone(), name_of);
    field("linkpath", &target, &mut ustar.linkname);
    if entry.mtime < 0 || entry.mtime_ns != 0 {
        records.push(("mtime".to_owned(), time_text(entry.mtime, entry.mtime_ns).into_bytes()));
    }
    for xattr in &entry.xattrs {
        let name = std::str::from_utf8(&xattr.name).ok().filter(|name| !name.contains('='));
        let name = name.ok_or_else(|| {
            io::Error::other("the name of an extended attribute cannot be written in a tar")
        })?;
        records.push((format!("{XATTR}{name}"), xattr.value.clone()));
    }
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    if !records.is_empty() {
        let records = records.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        builder.append_pax_extensions(records)?;
    }
    let mut blocks = std::mem::take(builder.get_mut());
    blocks.extend_from_slice(header.as_bytes());
    Ok(blocks)
}

/// As tar names it: the root is `./`, a directory has a slash at its end.
fn name_of(entry: &Entry) -> Vec<u8> {
    let mut name = entry.path.clone();
    if entry.kind() == Type::Directory {
        if name.is_empty() {
            name.push(b'.');
        }
        name.push(b'/');
    }
    name
}

/// Seconds since 1970 with their fraction, which counts upwards from the second below.
pub(super) fn time_text(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (seconds, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        (-1, _) => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        _ => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanoseconds),
    }
}

/// What [`time_text`] wrote, or another tar: with any number of digits.
pub(super) fn read_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = whole.starts_with('-');
    let seconds: i64 = whole.parse().ok()?;
    if fraction.len() > 18 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: u32 = format!("{fraction:0<9}")[..9].parse().ok()?;
    match (negative, nanoseconds) {
        (_, 0) => Some((seconds, 0)),
        (false, _) => Some((seconds, nanoseconds)),
        (true, _) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
    }
}
