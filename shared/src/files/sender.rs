//! The source's end of a file stream: one full pass over each tree while the workload runs, and a
//! pass over what changed while it stands still.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prost::Message;
use sha2::{Digest, Sha256};

use super::FileCounters;
use super::beneath::Root;
use super::channel::FileChannel;
use super::error::{Doing, FileError, Result};
use super::frame::{CHUNK, FrameKind, Frames, out_of_turn};
use super::index::{Begin, Bitmap, Entry, IndexPart};
use super::pack::Packing;
use super::scan::{Scan, Snapshot};
use crate::workload::FileTree;

/// Bytes of a hash.
pub(super) const SUM: usize = 32;
/// Bytes of content hashed before the hashes leave, so that the other side has something to compare.
const HASHED_MOST: u64 = 16 << 20;

/// Sends file trees over one stream. After an error it is of no more use.
pub struct TreeSender<S> {
    frames: Frames<S>,
    counters: Arc<FileCounters>,
    sent: HashMap<u32, Sent>,
}

/// A tree whose first pass is over.
struct Sent {
    root: Root,
    snapshot: Snapshot,
}

impl<S: FileChannel> TreeSender<S> {
    /// A sender on `stream`; `counters` say how far it is.
    pub fn new(stream: S, counters: Arc<FileCounters>) -> Self {
        Self { frames: Frames::new(stream, Some(counters.clone())), counters, sent: HashMap::new() }
    }

    /// Sends the whole of `tree`, as far as the destination lacks it, and returns when all of it
    /// stands there and is on disk. Files may change meanwhile; [`TreeSender::send_changes`] then
    /// sends them again.
    ///
    /// # Errors
    /// When the tree cannot be read, the stream breaks, or the destination fails; its words are in
    /// [`FileError::Peer`].
    pub fn send(&mut self, tree: &FileTree) -> Result<()> {
        let sent = self.first_pass(tree);
        self.concluded(sent)
    }

    /// Sends what changed in `tree` since it was sent last, removals included, and returns when it
    /// is in place and on disk. The workload stands still.
    ///
    /// # Errors
    /// As [`TreeSender::send`]; also when something else goes on writing in the tree.
    pub fn send_changes(&mut self, tree: &FileTree) -> Result<()> {
        let sent = self.changes_pass(tree);
        self.concluded(sent)
    }

    /// Tells the destination that nothing more comes.
    ///
    /// # Errors
    /// When the stream is broken.
    pub fn finish(mut self) -> Result<()> {
        self.frames.end()
    }

    /// An error of ours is told to the destination; after one of its own it is let go.
    fn concluded(&mut self, result: Result<()>) -> Result<()> {
        if let Err(error) = &result {
            self.frames.tell(error);
            if let Err(error) = self.frames.end() {
                tracing::debug!(%error, "The file stream cannot be ended");
            }
        }
        result
    }

    fn first_pass(&mut self, tree: &FileTree) -> Result<()> {
        let path = PathBuf::from(&tree.path);
        let root = Root::open(&path)?;
        let (mut snapshot, scan) = Snapshot::first(&root, tree.live)?;
        self.send_index(tree, false, &scan)?;
        let wanted = self.await_wanted(&root, &scan.entries)?;
        let vanished = self.send_content(&root, &scan.entries, &wanted, false)?;
        for number in vanished {
            snapshot.forget(&scan.entries, number);
        }
        self.frames.await_done()?;
        self.sent.insert(tree.id, Sent { root, snapshot });
        Ok(())
    }

    fn changes_pass(&mut self, tree: &FileTree) -> Result<()> {
        let no_first_pass = || FileError::NoFirstPass { path: PathBuf::from(&tree.path) };
        let mut sent = self.sent.remove(&tree.id).ok_or_else(no_first_pass)?;
        let scan = sent.snapshot.changes(&sent.root)?;
        self.send_index(tree, true, &scan)?;
        let wanted: Vec<_> =
            (0..scan.entries.len()).filter(|number| scan.entries[*number].has_content()).collect();
        self.send_content(&sent.root, &scan.entries, &wanted, true)?;
        self.frames.await_done()?;
        self.sent.insert(tree.id, sent);
        Ok(())
    }

    fn send_index(&mut self, tree: &FileTree, changes: bool, scan: &Scan) -> Result<()> {
        self.frames.begin_pass();
        let begin = Begin { tree: tree.id, changes };
        self.frames.send(FrameKind::Begin, &begin.encode_to_vec())?;
        let mut part = Vec::with_capacity(CHUNK);
        for entry in &scan.entries {
            self.add_to_part(
                &mut part,
                IndexPart { entries: vec![entry.clone()], removed: vec![] },
            )?;
        }
        for path in &scan.removed {
            self.add_to_part(
                &mut part,
                IndexPart { entries: vec![], removed: vec![path.clone()] },
            )?;
        }
        self.frames.send(FrameKind::Index, &part)?;
        self.frames.send(FrameKind::IndexEnd, &[])
    }

    /// Messages one after another are one message with all their repeated fields.
    fn add_to_part(&mut self, part: &mut Vec<u8>, piece: IndexPart) -> Result<()> {
        if part.len() + piece.encoded_len() > CHUNK {
            self.frames.send(FrameKind::Index, part)?;
            part.clear();
        }
        part.extend_from_slice(&piece.encode_to_vec());
        Ok(())
    }

    /// What the destination lacks, once it knows.
    fn await_wanted(&mut self, root: &Root, entries: &[Entry]) -> Result<Vec<usize>> {
        let mut asked = false;
        loop {
            match self.frames.next()? {
                (FrameKind::AskHash, bits) if !asked => {
                    asked = true;
                    let numbers = named_by(bits, entries)?;
                    self.send_hashes(root, entries, &numbers)?;
                }
                (FrameKind::Wanted, bits) => return named_by(bits, entries),
                (other, _) => return Err(out_of_turn(other)),
            }
        }
    }

    /// Sends the hashes of the entries asked for, in their order. A file that vanished has none that
    /// is any content's. One that grew is hashed as long as the index says it is; it is sent again
    /// with the changes in any case.
    fn send_hashes(&mut self, root: &Root, entries: &[Entry], numbers: &[usize]) -> Result<()> {
        let most = FrameKind::Hash.cap();
        let mut sums = Vec::with_capacity(most);
        let mut hashed = 0;
        for &number in numbers {
            let entry = &entries[number];
            let shown = root.shown(&entry.path);
            let sum = match root.open_file(&entry.path).doing("open", &shown)? {
                Some(file) => hash(file.take(entry.size), &shown)?,
                None => [0; SUM],
            };
            sums.extend_from_slice(&sum);
            hashed += entry.size;
            if sums.len() + SUM > most || hashed >= HASHED_MOST {
                self.frames.send(FrameKind::Hash, &sums)?;
                self.frames.flush()?;
                sums.clear();
                hashed = 0;
            }
        }
        if sums.is_empty() { Ok(()) } else { self.frames.send(FrameKind::Hash, &sums) }
    }

    fn send_content(
        &mut self,
        root: &Root,
        entries: &[Entry],
        wanted: &[usize],
        paused: bool,
    ) -> Result<Vec<usize>> {
        let total = wanted.iter().map(|number| entries[*number].size).sum();
        self.counters.total_bytes.fetch_add(total, Ordering::Relaxed);
        let packing = Packing { root, entries, paused, counters: &self.counters };
        packing.send(&mut self.frames, wanted)
    }
}

/// The entries whose bit the receiver set; only such as have content.
fn named_by(bits: &[u8], entries: &[Entry]) -> Result<Vec<usize>> {
    let named = Bitmap::from_wire(bits, entries.len())
        .ok_or_else(|| FileError::protocol("a wish of the wrong length"))?;
    let named: Vec<_> = (0..entries.len()).filter(|at| named.has(*at)).collect();
    if named.iter().any(|number| !entries[*number].has_content()) {
        return Err(FileError::protocol("a wish for what has no content"));
    }
    Ok(named)
}

/// SHA-256 of everything in `file`.
pub(super) fn hash(mut file: impl Read, path: &Path) -> Result<[u8; SUM]> {
    let mut sum = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(sum.finalize().into()),
            Ok(count) => sum.update(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).doing("read", path),
        }
    }
}

#[cfg(test)]
impl<S> TreeSender<S> {
    pub(super) fn counters(&self) -> Arc<FileCounters> {
        self.counters.clone()
    }

    pub(super) fn sent_so_far(&self) -> u64 {
        self.counters.sent_bytes.load(Ordering::Relaxed)
    }
}
