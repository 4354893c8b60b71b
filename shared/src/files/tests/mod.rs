//! Tests of the file streams over socket pairs, and what they share.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::workload::{FileRole, FileTree, PlacedTree};

mod hostile;
mod places;
mod random;
mod scale;
mod swaps;
mod tars;
mod trees;

/// Everything of a tree that must be the same on both sides, read without the code under test.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Picture(BTreeMap<PathBuf, Seen>);

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    content: Vec<u8>,
    device: u64,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first of the names of this file.
    first_name: PathBuf,
}

impl Picture {
    pub(super) fn of(root: &Path) -> Self {
        let mut seen = BTreeMap::new();
        let mut inodes = BTreeMap::new();
        look(root, Path::new(""), &mut seen, &mut inodes);
        Self(seen)
    }
}

/// Asserts that two trees are the same, and names only what differs when they are not.
#[track_caller]
pub(super) fn assert_same(one: &Path, other: &Path, when: &str) {
    let (one, other) = (Picture::of(one).0, Picture::of(other).0);
    let paths: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let differ: Vec<_> = paths
        .into_iter()
        .filter(|path| one.get(*path) != other.get(*path))
        .map(|path| {
            format!("{}: {:?}\n against {:?}", path.display(), one.get(path), other.get(path))
        })
        .collect();
    assert!(differ.is_empty(), "{when}, {} differ:\n{}", differ.len(), differ.join("\n"));
}

fn look(
    root: &Path,
    below: &Path,
    seen: &mut BTreeMap<PathBuf, Seen>,
    inodes: &mut BTreeMap<u64, PathBuf>,
) {
    let path = if below.as_os_str().is_empty() { root.to_owned() } else { root.join(below) };
    let meta = fs::symlink_metadata(&path).expect("an entry");
    let kind = meta.file_type();
    if kind.is_socket() {
        return;
    }
    let (kind, content) = match () {
        () if kind.is_dir() => ("directory", Vec::new()),
        () if kind.is_symlink() => {
            ("symlink", fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec())
        }
        () if kind.is_fifo() => ("fifo", Vec::new()),
        () if kind.is_char_device() => ("character device", Vec::new()),
        () if kind.is_block_device() => ("block device", Vec::new()),
        () => ("file", fs::read(&path).expect("a file")),
    };
    let first_name = match kind {
        "file" => inodes.entry(meta.ino()).or_insert_with(|| below.to_owned()).clone(),
        _ => PathBuf::new(),
    };
    let device = if kind.ends_with("device") { meta.rdev() } else { 0 };
    let entry = Seen {
        kind,
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        content,
        device,
        xattrs: xattrs(&path),
        first_name,
    };
    seen.insert(below.to_owned(), entry);
    if kind == "directory" {
        let mut names: Vec<_> = fs::read_dir(&path)
            .expect("a directory")
            .map(|e| e.expect("an entry").file_name())
            .collect();
        names.sort();
        for name in names {
            look(root, &below.join(name), seen, inodes);
        }
    }
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("a value");
            value.truncate(length);
            (std::ffi::OsStr::from_bytes(name).to_owned(), value)
        })
        .collect()
}

/// A directory tree of a live workload at `path`, as tree 1.
pub(super) fn bundle(path: &Path) -> FileTree {
    FileTree {
        id: 1,
        role: FileRole::Bundle.into(),
        path: path.to_str().expect("a plain path").to_owned(),
        bytes: 0,
        live: true,
        ..FileTree::default()
    }
}

/// A kernel at `path`, as tree 1.
pub(super) fn kernel(path: &Path) -> FileTree {
    FileTree { role: FileRole::Kernel.into(), live: false, ..bundle(path) }
}

pub(super) fn incoming(tree: &FileTree, path: &Path, keep_equal: bool) -> Incoming {
    Incoming { tree: PlacedTree { tree: tree.clone(), path: path.to_owned() }, keep_equal }
}

/// What came of one stream.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) sent: Result<()>,
    pub(super) received: Result<()>,
    pub(super) counters: Arc<FileCounters>,
}

impl Outcome {
    #[track_caller]
    pub(super) fn well(self) -> Arc<FileCounters> {
        self.received.expect("received");
        self.sent.expect("sent");
        self.counters
    }
}

/// Runs `send` against a receiver of `trees`.
pub(super) fn stream(
    trees: Vec<Incoming>,
    landing: &Landing,
    send: impl FnOnce(&mut TreeSender<UnixStream>) -> Result<()>,
) -> Outcome {
    let (here, there) = UnixStream::pair().expect("a socket pair");
    let counters = Arc::new(FileCounters::default());
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(there, trees, landing));
        let mut sender = TreeSender::new(here, counters.clone());
        let sent = match send(&mut sender) {
            Ok(()) => sender.finish(),
            Err(error) => {
                drop(sender);
                Err(error)
            }
        };
        let received = receiving.join().expect("no panic");
        Outcome { sent, received, counters: counters.clone() }
    })
}

pub(super) fn sent_bytes(counters: &FileCounters) -> u64 {
    counters.sent_bytes.load(Ordering::Relaxed)
}

/// Lets every stamp in a tree become older than the grain of the clock.
pub(super) fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(40));
}

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    use rand::SeedableRng;
    let mut bytes = vec![0; length];
    rand::RngCore::fill_bytes(&mut rand::rngs::StdRng::seed_from_u64(seed), &mut bytes);
    bytes
}

pub(super) fn read_all(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    fs::File::open(path).expect("a file").read_to_end(&mut bytes).expect("its content");
    bytes
}

/// Whether the tests run as root; says why one is skipped otherwise.
pub(super) fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: needs root");
    }
    root
}
