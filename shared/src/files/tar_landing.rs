//! A tree that comes out of plain tar archives, a checkpoint's or anybody's: first all of it is listed and
//! checked, then it lands. The same checks and the same hands as for a tree that comes over the wire.
//!
//! Whatever a tar says, nothing is made outside of the tree: a name that leads upwards or through a link,
//! a link to what is no earlier file, a device, a path twice, an entry below no directory are refused
//! before the first byte is written.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::beneath::Root;
use super::error::{FileError, Result};
use super::index::{Entry, Gathering, Index, IndexPart, Type, Xattr, as_path, travels};
use super::landing::{Landing, stat_of, taken};
use super::placing::Placing;
use super::tar_tree::{XATTR, device_fault, file_sum, read_time};

/// Bytes of the records before an entry at most: all extended attributes and two paths.
const RECORDS_MOST: u64 = 256 << 10;

/// A tree that was listed from a tar, and is then to stand at its place.
#[derive(Debug)]
pub struct TreeLander {
    index: Index,
    path: PathBuf,
    bytes: u64,
}

impl TreeLander {
    /// Lists a tree that is to stand at `path`. Touches nothing.
    ///
    /// # Errors
    /// [`FileError::Hostile`] when the tar is none, or says what no honest one says.
    pub fn list(path: &Path, from: &mut dyn Read) -> Result<Self> {
        let mut gathering = Gathering::default();
        let mut files: HashMap<Vec<u8>, (u32, u64)> = HashMap::new();
        let (mut count, mut bytes) = (0, 0u64);
        each(from, &mut |raw, _| {
            let mut entry = raw.entry;
            if let Some(target) = raw.link {
                let (leader, size) = files.get(&target).ok_or_else(|| {
                    let what = "a hard link to what is no earlier file";
                    FileError::hostile(path.join(as_path(&entry.path)), what)
                })?;
                (entry.link, entry.size) = (leader + 1, *size);
            } else if entry.has_content() {
                bytes = bytes.saturating_add(entry.size);
                files.insert(entry.path.clone(), (count, entry.size));
            }
            if let Some(what) = device_fault(&entry) {
                return Err(FileError::hostile(path.join(as_path(&entry.path)), what));
            }
            count += 1;
            let xattrs: usize = entry.xattrs.iter().map(|xattr| xattr.value.len()).sum();
            let length = entry.path.len() + entry.target.len() + xattrs + 64;
            gathering.add(IndexPart { entries: vec![entry], removed: Vec::new() }, length, path)
        })?;
        let index = gathering.checked(false, path)?;
        if index.entries.first().is_none_or(|root| root.kind() != Type::Directory) {
            return Err(FileError::hostile(path, "a root that is no directory"));
        }
        Ok(Self { index, path: path.to_owned(), bytes })
    }

    /// Bytes of all its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes the tree from the same tar. When this returns, all of it is on the disk.
    ///
    /// # Errors
    /// When something stands in the way, the disk fails, or the tar is not the one that was listed.
    pub fn land(&self, landing: &Landing, from: &mut dyn Read) -> Result<()> {
        let another =
            || FileError::hostile(&self.path, "another tree than when it was looked at first");
        let root = landing.land_directory(&self.path, false)?;
        let mut placing = Placing::new(&root, &self.index, landing, None);
        placing.make_nodes()?;
        let mut entries = self.index.entries.iter().enumerate();
        each(from, &mut |raw, content| {
            let (number, listed) = entries.next().ok_or_else(another)?;
            let size = if listed.has_content() { listed.size } else { 0 };
            if listed.path != raw.entry.path
                || listed.kind != raw.entry.kind
                || size != raw.entry.size
            {
                return Err(another());
            }
            if listed.has_content() {
                placing.place_file(number, content)?;
            }
            Ok(())
        })?;
        if entries.next().is_some() {
            return Err(another());
        }
        placing.finish(true)
    }
}

/// A single file that comes from a checkpoint.
#[derive(Debug)]
pub struct FileLander {
    path: PathBuf,
    size: u64,
}

impl FileLander {
    /// A file of `size` bytes for `path`.
    pub fn new(path: &Path, size: u64) -> Self {
        Self { path: path.to_owned(), size }
    }

    /// Whether a file with the sum `sum` stands there already.
    ///
    /// # Errors
    /// [`FileError::PathTaken`] when something else does.
    pub fn is_there(&self, sum: &[u8; 32]) -> Result<bool> {
        if self.path.symlink_metadata().is_err() {
            return Ok(false);
        }
        let same = std::fs::metadata(&self.path).is_ok_and(|meta| meta.is_file())
            && file_sum(&self.path)? == *sum;
        if same { Ok(true) } else { Err(taken(&self.path, "another file stands there")) }
    }

    /// Puts the file there, owned by root, for everybody to read.
    ///
    /// # Errors
    /// When something stands there, or the disk fails.
    pub fn land(&self, landing: &Landing, content: &mut dyn Read) -> Result<()> {
        let entry = Entry {
            kind: Type::File.into(),
            mode: 0o644,
            size: self.size,
            mtime: now(),
            ..Entry::default()
        };
        let mut gathering = Gathering::default();
        gathering.add(IndexPart { entries: vec![entry], removed: Vec::new() }, 64, &self.path)?;
        let index = gathering.checked(false, &self.path)?;
        let (parent, name) = {
            let _step = landing.step()?;
            landing.land_parent(&self.path)?
        };
        if stat_of(&parent, &name, &self.path)?.is_some() {
            return Err(taken(&self.path, "something else stands there"));
        }
        let root = Root::file(parent, name, self.path.clone());
        let mut placing = Placing::new(&root, &index, landing, Some(self.path.clone()));
        placing.place_file(0, content)?;
        placing.finish(true)
    }
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs() as i64)
}

/// One entry of a tar.
pub(super) struct Raw {
    pub(super) entry: Entry,
    /// Path of the file that it is another name of.
    pub(super) link: Option<Vec<u8>>,
}

/// Takes an entry, and reads its content if it has any.
pub(super) type Take<'a> = dyn FnMut(Raw, &mut dyn Read) -> Result<()> + 'a;

/// Shows `take` each entry of a tar.
pub(super) fn each(from: &mut dyn Read, take: &mut Take<'_>) -> Result<()> {
    let mut archive = tar::Archive::new(from);
    // Raw: what stands before an entry is read here, and no more of it than makes sense.
    let entries = archive.entries().map_err(|error| spoiled(&error))?.raw(true);
    let mut records = Vec::new();
    for entry in entries {
        let mut entry = entry.map_err(|error| spoiled(&error))?;
        if entry.header().entry_type() == tar::EntryType::XHeader {
            if !records.is_empty() || entry.size() > RECORDS_MOST {
                return Err(hostile("records that belong to no entry, or are too long"));
            }
            entry.read_to_end(&mut records).map_err(|error| spoiled(&error))?;
            continue;
        }
        let raw = read_entry(&entry, &std::mem::take(&mut records))?;
        take(raw, &mut entry)?;
        // What was not read is passed over by whoever asks for the next one.
    }
    if !records.is_empty() {
        return Err(hostile("records that belong to no entry"));
    }
    let rest = archive.into_inner();
    let mut block = [0; 4096];
    loop {
        match rest.read(&mut block).map_err(|error| spoiled(&error))? {
            0 => return Ok(()),
            read if block[..read].iter().all(|byte| *byte == 0) => {}
            _ => return Err(hostile("data after the end of a tar")),
        }
    }
}

fn read_entry<R: Read>(from: &tar::Entry<'_, R>, records: &[u8]) -> Result<Raw> {
    let header = from.header();
    let bad = |error: io::Error| spoiled(&error);
    let kind = match header.entry_type() {
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::Link => Type::File,
        tar::EntryType::Directory => Type::Directory,
        tar::EntryType::Symlink => Type::Symlink,
        tar::EntryType::Fifo => Type::Fifo,
        tar::EntryType::Char => Type::CharacterDevice,
        tar::EntryType::Block => Type::BlockDevice,
        other => {
            return Err(hostile(&format!("an entry of a kind that it does not know ({other:?})")));
        }
    };
    let mut path = header.path_bytes().into_owned();
    let mut target = header.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default();
    let mut entry = Entry {
        kind: kind.into(),
        mode: header.mode().map_err(bad)? & 0o7777,
        uid: number(header.uid().map_err(bad)?)?,
        gid: number(header.gid().map_err(bad)?)?,
        mtime: i64::try_from(header.mtime().map_err(bad)?).unwrap_or(i64::MAX),
        ..Entry::default()
    };
    for (key, value) in read_records(records)? {
        match key.as_str() {
            "path" => path = value,
            "linkpath" => target = value,
            "mtime" => {
                let time = std::str::from_utf8(&value).ok().and_then(read_time);
                (entry.mtime, entry.mtime_ns) =
                    time.ok_or_else(|| hostile("a time that is none"))?;
            }
            "size" | "uid" | "gid" => {
                return Err(hostile("a size or an owner in two places"));
            }
            key => {
                if let Some(name) = key.strip_prefix(XATTR).filter(|name| travels(name.as_bytes()))
                {
                    entry.xattrs.push(Xattr { name: name.as_bytes().to_vec(), value });
                }
            }
        }
    }
    entry.path = plain(path);
    if matches!(kind, Type::CharacterDevice | Type::BlockDevice) {
        entry.major = header.device_major().map_err(bad)?.unwrap_or(0);
        entry.minor = header.device_minor().map_err(bad)?.unwrap_or(0);
    }
    let is_link = header.entry_type() == tar::EntryType::Link;
    match kind {
        Type::File if !is_link => entry.size = from.size(),
        // Others would have their content taken for the next entry.
        _ if from.size() != 0 => return Err(hostile("content for what is no file")),
        Type::Symlink => entry.target = target.clone(),
        _ => {}
    }
    Ok(Raw { entry, link: is_link.then(|| plain(target)) })
}

/// Records of the form `LENGTH KEY=VALUE` and a line feed, LENGTH counting all of it. A value may hold
/// anything, line feeds too, so it is the lengths that count.
fn read_records(mut records: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let bad = || hostile("records that cannot be read");
    let mut found = Vec::new();
    while !records.is_empty() {
        let digits = records.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
        let length =
            std::str::from_utf8(&records[..digits]).ok().and_then(|text| text.parse().ok());
        let length: usize = length.filter(|length| *length > digits + 1).ok_or_else(bad)?;
        let (record, rest) = records.split_at_checked(length).ok_or_else(bad)?;
        let record = record[digits + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let key = std::str::from_utf8(&record[..equals]).map_err(|_| bad())?;
        found.push((key.to_owned(), record[equals + 1..].to_vec()));
        records = rest;
    }
    Ok(found)
}

/// Without the `./` that tars put before names and the slash after those of directories. What is
/// otherwise not plain stays as it is, and is refused as that.
fn plain(mut path: Vec<u8>) -> Vec<u8> {
    if path.ends_with(b"/") && path.len() > 1 {
        path.pop();
    }
    match path.strip_prefix(b"./") {
        _ if path == b"." => Vec::new(),
        Some(rest) => rest.to_vec(),
        None => path,
    }
}

fn number(value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| hostile("an owner that cannot be"))
}

fn hostile(what: &str) -> FileError {
    FileError::hostile("tar", what)
}

fn spoiled(error: &io::Error) -> FileError {
    hostile(&format!("a tar that cannot be unpacked: {error}"))
}
