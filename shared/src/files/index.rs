//! The index of a pass: every entry's path and metadata, and what is gone. It travels before any
//! content and is checked as a whole before anything is touched. No I/O here.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::error::{FileError, Result};

/// Entries, and removed paths, of one pass at most.
pub(super) const ENTRIES_MOST: usize = 4 << 20;
/// Bytes of a path below the root at most (the kernel's PATH_MAX without its NUL).
pub(super) const PATH_MOST: usize = 4095;
/// Bytes of one name at most.
const NAME_MOST: usize = 255;
/// Bytes of one extended attribute's value at most (the kernel's limit).
pub(super) const XATTR_MOST: usize = 64 << 10;
/// Bytes of all extended attributes of an entry at most: an entry must fit a frame.
pub(super) const XATTRS_MOST: usize = 128 << 10;
/// Bytes of a whole index at most.
const INDEX_MOST: u64 = 1 << 30;

/// A pass over one tree.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Begin {
    /// Number of the tree in the manifest.
    #[prost(uint32, tag = "1")]
    pub(super) tree: u32,
    /// False: the whole tree. True: what changed since the pass before.
    #[prost(bool, tag = "2")]
    pub(super) changes: bool,
}

/// A piece of an index. Entries are numbered from 0 in the order in which they come.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct IndexPart {
    #[prost(message, repeated, tag = "1")]
    pub(super) entries: Vec<Entry>,
    /// Paths that stood there in the pass before and do not any more.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) removed: Vec<Vec<u8>>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Type {
    /// Never valid on the wire.
    Unspecified = 0,
    /// A regular file.
    File = 1,
    /// A directory.
    Directory = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A named pipe.
    Fifo = 4,
    /// A character device.
    CharacterDevice = 5,
    /// A block device.
    BlockDevice = 6,
}

/// One file, directory, link or node.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Entry {
    /// Path below the root; empty for the root itself.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) path: Vec<u8>,
    #[prost(enumeration = "Type", tag = "2")]
    pub(super) kind: i32,
    /// Permission bits with set-user-ID, set-group-ID and sticky.
    #[prost(uint32, tag = "3")]
    pub(super) mode: u32,
    #[prost(uint32, tag = "4")]
    pub(super) uid: u32,
    #[prost(uint32, tag = "5")]
    pub(super) gid: u32,
    /// Seconds of the modification time since 1970.
    #[prost(sint64, tag = "6")]
    pub(super) mtime: i64,
    /// Nanoseconds of it.
    #[prost(uint32, tag = "7")]
    pub(super) mtime_ns: u32,
    /// Bytes of a regular file.
    #[prost(uint64, tag = "8")]
    pub(super) size: u64,
    /// What a symbolic link says.
    #[prost(bytes = "vec", tag = "9")]
    pub(super) target: Vec<u8>,
    /// 0, or one more than the number of the entry that this is another hard link to.
    #[prost(uint32, tag = "10")]
    pub(super) link: u32,
    #[prost(uint32, tag = "11")]
    pub(super) major: u32,
    #[prost(uint32, tag = "12")]
    pub(super) minor: u32,
    #[prost(message, repeated, tag = "13")]
    pub(super) xattrs: Vec<Xattr>,
}

/// An extended attribute, POSIX ACLs and file capabilities included.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Xattr {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

impl Entry {
    /// The entry that this one is another name of.
    pub(super) fn leader(&self) -> Option<usize> {
        (self.link as usize).checked_sub(1)
    }

    /// Whether it is a regular file whose content travels under this very entry.
    pub(super) fn has_content(&self) -> bool {
        self.kind() == Type::File && self.link == 0
    }

    /// Why no honest sender sends it, looked at alone.
    fn fault(&self) -> Option<String> {
        let kind = self.kind();
        let device = matches!(kind, Type::CharacterDevice | Type::BlockDevice);
        let text = match () {
            () if !self.path.is_empty() && path_fault(&self.path).is_some() => {
                return path_fault(&self.path).map(str::to_owned);
            }
            () if kind == Type::Unspecified => format!("an entry of unknown type {}", self.kind),
            () if self.mode > 0o7777 => format!("mode {:o}", self.mode),
            () if self.mtime_ns >= 1_000_000_000 => format!("{} ns of a second", self.mtime_ns),
            () if self.size > i64::MAX as u64 => format!("a size of {} bytes", self.size),
            () if self.size != 0 && kind != Type::File => "a size for what is no file".to_owned(),
            () if self.link != 0 && kind != Type::File => "a hard link that is no file".to_owned(),
            () if (kind == Type::Symlink) != (1..=PATH_MOST).contains(&self.target.len())
                || self.target.contains(&0) =>
            {
                "a link target that cannot be".to_owned()
            }
            () if !device && (self.major, self.minor) != (0, 0) => {
                "device numbers for what is no device".to_owned()
            }
            () => return self.xattr_fault(),
        };
        Some(text)
    }

    fn xattr_fault(&self) -> Option<String> {
        let mut total = 0;
        for (at, xattr) in self.xattrs.iter().enumerate() {
            total += xattr.name.len() + xattr.value.len();
            let twice = self.xattrs[..at].iter().any(|other| other.name == xattr.name);
            if !travels(&xattr.name) || xattr.value.len() > XATTR_MOST || twice {
                let name = String::from_utf8_lossy(&xattr.name).into_owned();
                return Some(format!("an extended attribute {name:?} that may not travel"));
            }
        }
        (total > XATTRS_MOST).then(|| format!("{total} bytes of extended attributes"))
    }
}

/// Whether an extended attribute of this name travels. The rest is the kernel's own, or means
/// something on one host only.
pub(super) fn travels(name: &[u8]) -> bool {
    let of = |space: &[u8]| name.len() > space.len() && name.starts_with(space);
    let carried = of(b"user.") || of(b"trusted.") || of(b"security.");
    let acl = name == b"system.posix_acl_access" || name == b"system.posix_acl_default";
    let bound_to_host = name == b"security.evm" || name == b"security.ima";
    (acl || carried) && !bound_to_host && name.len() <= NAME_MOST && !name.contains(&0)
}

/// Why `path` is no path below a root.
pub(super) fn path_fault(path: &[u8]) -> Option<&'static str> {
    match path {
        [b'/', ..] => return Some("an absolute path"),
        [] => return Some("an empty path"),
        _ if path.len() > PATH_MOST => return Some("a path that is too long"),
        _ if path.contains(&0) => return Some("a path with a NUL byte"),
        _ => {}
    }
    path.split(|byte| *byte == b'/').find_map(|name| match name {
        b".." => Some("a path that leads upwards"),
        b"" | b"." => Some("a path that is not in its plain form"),
        _ if name.len() > NAME_MOST => Some("a name that is too long"),
        _ => None,
    })
}

/// The directory of `path` and its last name. The root's own path is empty, and so is its parent's.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// Bytes of a path as the standard library's.
pub(super) fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// An index that has been checked: paths are plain and unique, parents stand before children,
/// links point backwards at files.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// By number.
    pub(super) entries: Vec<Entry>,
    /// What is to be removed.
    pub(super) removed: Vec<Vec<u8>>,
    /// Numbers of the entries, ordered by path.
    by_path: Vec<u32>,
    /// How many names a file with several has in this index, by the number of the first.
    names: HashMap<usize, u64>,
}

impl Index {
    /// The entry at `path`.
    pub(super) fn find(&self, path: &[u8]) -> Option<usize> {
        self.by_path
            .binary_search_by(|number| self.entries[*number as usize].path.as_slice().cmp(path))
            .ok()
            .map(|at| self.by_path[at] as usize)
    }

    /// How many names the file of entry `number` has.
    pub(super) fn names(&self, number: usize) -> u64 {
        let first = self.entries[number].leader().unwrap_or(number);
        self.names.get(&first).copied().unwrap_or(1)
    }
}

/// An index that is arriving.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    index: Index,
    bytes: u64,
}

impl Gathering {
    /// Adds a piece that took `bytes` on the wire. `root` names the tree in errors.
    pub(super) fn add(&mut self, part: IndexPart, bytes: usize, root: &Path) -> Result<()> {
        self.bytes += bytes as u64;
        for entry in &part.entries {
            if let Some(fault) = entry.fault() {
                return Err(FileError::hostile(shown(root, &entry.path), fault));
            }
        }
        self.index.entries.extend(part.entries);
        self.index.removed.extend(part.removed);
        let count = self.index.entries.len().max(self.index.removed.len());
        if count > ENTRIES_MOST || self.bytes > INDEX_MOST {
            return Err(FileError::protocol("an index larger than any tree's"));
        }
        Ok(())
    }

    /// Checks how the entries stand to each other. `changes`: entries may be the children of directories that stand already.
    /// `root` names the tree in errors.
    pub(super) fn checked(self, changes: bool, root: &Path) -> Result<Index> {
        let mut index = self.index;
        let hostile = |path: &[u8], what: &str| FileError::hostile(shown(root, path), what);
        let entries = &index.entries;
        index.by_path = (0..entries.len() as u32).collect();
        index
            .by_path
            .sort_unstable_by(|a, b| entries[*a as usize].path.cmp(&entries[*b as usize].path));
        for pair in index.by_path.windows(2) {
            let [first, second] = [pair[0], pair[1]].map(|number| &entries[number as usize].path);
            if first == second {
                return Err(hostile(first, "a path twice"));
            }
        }
        for path in &index.removed {
            match path_fault(path) {
                Some(fault) => return Err(hostile(path, fault)),
                None if !changes => return Err(hostile(path, "a removal in a first pass")),
                None if index.find(path).is_some() => {
                    return Err(hostile(path, "an entry that it also removes"));
                }
                None => {}
            }
        }
        index.check_shape(changes, root)?;
        index.check_links(root)?;
        Ok(index)
    }
}

impl Index {
    /// Every entry below the root stands in a directory that came before it.
    fn check_shape(&self, changes: bool, root: &Path) -> Result<()> {
        let hostile = |path: &[u8], what: &str| Err(FileError::hostile(shown(root, path), what));
        if !changes && self.entries.first().is_none_or(|first| !first.path.is_empty()) {
            return hostile(b"", "an index without the root at its beginning");
        }
        for (number, entry) in self.entries.iter().enumerate() {
            if entry.path.is_empty() {
                match entry.kind() {
                    Type::Directory | Type::File => continue,
                    _ => return hostile(b"", "a root that is neither file nor directory"),
                }
            }
            match self.find(split(&entry.path).0) {
                Some(parent) if self.entries[parent].kind() != Type::Directory => {
                    return hostile(&entry.path, "an entry below something that is no directory");
                }
                Some(parent) if parent > number => {
                    return hostile(&entry.path, "an entry before its directory");
                }
                Some(_) => {}
                None if changes => {}
                None => return hostile(&entry.path, "an entry without its directory"),
            }
        }
        Ok(())
    }

    fn check_links(&mut self, root: &Path) -> Result<()> {
        let mut names = HashMap::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let Some(leader) = entry.leader() else { continue };
            let plain = leader < number
                && self.entries[leader].has_content()
                && self.entries[leader].size == entry.size;
            if !plain {
                let path = shown(root, &entry.path);
                return Err(FileError::hostile(path, "a hard link to what is no earlier file"));
            }
            *names.entry(leader).or_insert(1) += 1;
        }
        self.names = names;
        Ok(())
    }
}

/// An index in one piece, for fuzzers: taken or refused.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn try_index(bytes: &[u8], changes: bool, root: &Path) {
    use prost::Message;
    let Ok(part) = IndexPart::decode(bytes) else { return };
    let mut gathering = Gathering::default();
    if gathering.add(part, bytes.len(), root).is_err() {
        return;
    }
    let Ok(index) = gathering.checked(changes, root) else { return };
    for (number, entry) in index.entries.iter().enumerate() {
        assert_eq!(index.find(&entry.path), Some(number), "it is not found");
        assert!(index.names(number) > 0 && entry.leader().is_none_or(|leader| leader < number));
        assert!(shown(root, &entry.path).starts_with(root), "it leaves its tree");
    }
    if let Some(bitmap) = Bitmap::from_wire(bytes, index.entries.len()) {
        assert_eq!(bitmap.bytes(), bytes);
    }
}

/// What [`try_index`] takes.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn index_seed() -> Vec<u8> {
    use prost::Message;
    let entry = |path: &[u8], kind: Type| Entry {
        path: path.to_vec(),
        kind: kind.into(),
        mode: 0o755,
        ..Entry::default()
    };
    let xattr = Xattr { name: b"user.a".to_vec(), value: vec![1] };
    let entries = vec![
        entry(b"", Type::Directory),
        Entry { size: 3, xattrs: vec![xattr], ..entry(b"a", Type::File) },
        Entry { size: 3, link: 2, ..entry(b"b", Type::File) },
        Entry { target: b"a".to_vec(), ..entry(b"c", Type::Symlink) },
    ];
    IndexPart { entries, removed: Vec::new() }.encode_to_vec()
}

/// An entry's full path, for messages.
pub(super) fn shown(root: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() { root.to_owned() } else { root.join(as_path(path)) }
}

/// One bit for each entry, lowest bit first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap(Vec<u8>);

impl Bitmap {
    /// No bit set of `entries`.
    pub(super) fn empty(entries: usize) -> Self {
        Self(vec![0; entries.div_ceil(8)])
    }

    /// From the wire: exactly the bytes that `entries` need, and no bit beyond them.
    pub(super) fn from_wire(bytes: &[u8], entries: usize) -> Option<Self> {
        let surplus = (bytes.len() * 8).checked_sub(entries)?;
        let stray =
            bytes.last().is_some_and(|last| surplus < 8 && last.leading_zeros() < surplus as u32);
        (surplus < 8 && !stray).then(|| Self(bytes.to_vec()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn set(&mut self, number: usize) {
        self.0[number / 8] |= 1 << (number % 8);
    }

    pub(super) fn clear(&mut self, number: usize) {
        self.0[number / 8] &= !(1 << (number % 8));
    }

    pub(super) fn has(&self, number: usize) -> bool {
        self.0.get(number / 8).is_some_and(|byte| byte & (1 << (number % 8)) != 0)
    }
}
