//! File systems in memory (tmpfs) that a container has for itself, such as `/dev/shm`: large files on them
//! are copied while it runs, as segments of shared memory are, for processes map them.
//!
//! Whatever else is on a tmpfs with such a file goes along in the stop, in a section: names, owners, small
//! files ([`list`]). At the destination pages are written into files on a tmpfs that is mounted beforehand;
//! in the stop these files get their names, and the rest is made ([`land`]). CRIU takes the mount as given
//! from outside. A tmpfs without large files, or with what is not known here, is left to CRIU, which packs
//! it into its images.

pub(crate) mod held;
pub(crate) mod land;
pub(crate) mod list;

use decamp_shared::workload::Section;
use prost::Message;

use crate::error::{ContainerError, Result};

/// The section that tells what is on them.
pub(crate) const TREES: &str = "container/tmpfs";
const VERSION: u32 = 1;
/// Of one container so many of them are moved like this at most.
const TREES_CAP: usize = 64;
/// Files, directories and so on in one of them at most.
pub(crate) const ENTRIES_CAP: usize = 1 << 16;

/// What is on one tmpfs.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Tree {
    /// Its number among those of the container, as it is in the labels of its files' spaces.
    #[prost(uint32, tag = "1")]
    pub(crate) number: u32,
    /// Where it is mounted in the container.
    #[prost(string, tag = "2")]
    pub(crate) mounted: String,
    /// The name that it was mounted under.
    #[prost(string, tag = "3")]
    pub(crate) source: String,
    /// The options of the file system, as mountinfo has them.
    #[prost(string, tag = "4")]
    pub(crate) options: String,
    /// The root first, and each directory before what is in it.
    #[prost(message, repeated, tag = "5")]
    pub(crate) entries: Vec<Entry>,
}

/// A file, directory, symbolic link or named pipe.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Entry {
    /// Which of the entries its directory is; the root is in itself.
    #[prost(uint32, tag = "1")]
    pub(crate) parent: u32,
    /// Empty for the root.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) name: Vec<u8>,
    /// With the kind, as `stat` has it.
    #[prost(uint32, tag = "3")]
    pub(crate) mode: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) owner: u32,
    #[prost(uint32, tag = "5")]
    pub(crate) group: u32,
    /// When it was last written to: seconds, and nanoseconds more.
    #[prost(sint64, tag = "6")]
    pub(crate) written: i64,
    #[prost(uint32, tag = "7")]
    pub(crate) written_more: u32,
    /// Bytes of a file.
    #[prost(uint64, tag = "8")]
    pub(crate) size: u64,
    /// The space that a file's contents have come in.
    #[prost(uint32, optional, tag = "9")]
    pub(crate) space: Option<u32>,
    /// An earlier entry that is the same file under another name.
    #[prost(uint32, optional, tag = "10")]
    pub(crate) same_as: Option<u32>,
    /// Where a symbolic link leads.
    #[prost(bytes = "vec", tag = "11")]
    pub(crate) target: Vec<u8>,
    /// The contents of a file that has no space. What lies between is holes.
    #[prost(message, repeated, tag = "12")]
    pub(crate) data: Vec<Data>,
    #[prost(message, repeated, tag = "13")]
    pub(crate) attributes: Vec<Attribute>,
}

/// A stretch of a file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Data {
    #[prost(uint64, tag = "1")]
    pub(crate) offset: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) bytes: Vec<u8>,
}

/// An extended attribute.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Attribute {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Trees {
    #[prost(message, repeated, tag = "1")]
    trees: Vec<Tree>,
}

impl Tree {
    /// How CRIU is told of it at the dump.
    pub(crate) fn at_dump(&self) -> String {
        format!("mnt[{}]:{}", self.mounted, key(self.number))
    }
}

/// What CRIU calls the mount of a tree.
pub(crate) fn key(number: u32) -> String {
    format!("decamp-tmpfs-{number}")
}

/// Whether an extended attribute travels.
fn travels(name: &[u8]) -> bool {
    let prefixes: [&[u8]; 3] = [b"user.", b"trusted.", b"system.posix_acl_"];
    name == b"security.capability" || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Trees as a section; none when there are none.
pub(crate) fn section(trees: &[Tree]) -> Option<Section> {
    let bytes = Trees { trees: trees.to_vec() }.encode_to_vec();
    (!trees.is_empty()).then(|| Section { kind: TREES.to_owned(), version: VERSION, bytes })
}

/// Reads what [`section`] wrote.
pub(crate) fn read_section(section: &Section) -> Result<Vec<Tree>> {
    let bad = |what: &str| ContainerError::section(TREES, what);
    if section.version != VERSION {
        return Err(bad("has a version that this build does not know"));
    }
    let trees = Trees::decode(&section.bytes[..]).map_err(|_| bad("makes no sense"))?.trees;
    let twice =
        |(at, tree): (usize, &Tree)| trees[..at].iter().any(|one| one.number == tree.number);
    if trees.len() > TREES_CAP || trees.iter().enumerate().any(twice) {
        return Err(bad("names a tmpfs twice, or too many"));
    }
    if trees.iter().any(|tree| tree.entries.len() > ENTRIES_CAP) {
        return Err(bad("has more files on one tmpfs than are moved"));
    }
    Ok(trees)
}
