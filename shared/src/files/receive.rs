//! The destination's end of a file stream: takes passes until the source ends, and carries each out
//! before it says that it is done.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use prost::Message;
use rustix::fs::{self, FileType, Stat};

use super::beneath::{Identity, Root, identity};
use super::channel::FileChannel;
use super::earlier::{Earlier, is_alike};
use super::error::{Doing, FileError, Result};
use super::frame::{DataReader, FrameKind, Frames, out_of_turn};
use super::index::{Begin, Bitmap, Gathering, Index, IndexPart, Type};
use super::landing::{Landing, stat_of, taken};
use super::pack::{PLAIN, ZSTD};
use super::placing::Placing;
use super::sender::{SUM, hash};
use crate::workload::PlacedTree;

/// Memory that a compressed archive may ask for, as a power of two.
const WINDOW_LOG: u32 = 23;
/// Zeros that end an archive.
const TRAILER: u64 = 1024;

/// A tree that is expected.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Which, and where it goes.
    pub tree: PlacedTree,
    /// What stands there is an earlier copy of this very workload's tree: files that are equal in
    /// size, modification time, mode and content are kept, and what the source does not have is
    /// removed.
    pub keep_equal: bool,
}

/// Receives `trees` until the source ends; blocks. What it makes is remembered by `landing`.
///
/// # Errors
/// When the stream breaks, the source misbehaves ([`FileError::Hostile`], with nothing touched
/// outside the trees), something stands in the way, or the disk fails; the source is told why.
pub fn receive<S: FileChannel>(stream: S, trees: Vec<Incoming>, landing: &Landing) -> Result<()> {
    let mut receiver =
        Receiver { frames: Frames::new(stream, None), trees: HashMap::new(), landing };
    let received = receiver.expect_trees(trees).and_then(|()| receiver.run());
    if let Err(error) = &received {
        receiver.frames.tell(error);
        if error.is_local() {
            receiver.frames.drain();
        }
    }
    received
}

struct Receiver<'a, S> {
    frames: Frames<S>,
    trees: HashMap<u32, Arriving>,
    landing: &'a Landing,
}

/// A tree and how far it is.
struct Arriving {
    incoming: Incoming,
    state: State,
}

enum State {
    Awaited,
    /// The first pass is in place.
    Placed(Root),
    /// A file with this content was there before, and is used as it is.
    Found,
}

impl<S: FileChannel> Receiver<'_, S> {
    /// Trees stand beside each other: links in one must never lead into another.
    fn expect_trees(&mut self, trees: Vec<Incoming>) -> Result<()> {
        for incoming in trees {
            let path = &incoming.tree.path;
            if !crate::workload::is_plain_absolute(path) || path.file_name().is_none() {
                return Err(FileError::hostile(path, "a tree that is to go to no plain path"));
            }
            for other in self.trees.values().map(|other| &other.incoming.tree.path) {
                if path.starts_with(other) || other.starts_with(path) {
                    return Err(FileError::hostile(path, "a tree within another one"));
                }
            }
            let id = incoming.tree.tree.id;
            let path = path.clone();
            if self.trees.insert(id, Arriving { incoming, state: State::Awaited }).is_some() {
                return Err(FileError::hostile(path, "two trees with one number"));
            }
        }
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        loop {
            self.frames.begin_pass();
            let begin = match self.frames.next()? {
                (FrameKind::Begin, bytes) => decode::<Begin>(bytes)?,
                (FrameKind::End, _) => return self.all_came(),
                (other, _) => return Err(out_of_turn(other)),
            };
            let Some(mut arriving) = self.trees.remove(&begin.tree) else {
                return Err(FileError::protocol(format!(
                    "a tree {} that nobody expects",
                    begin.tree
                )));
            };
            arriving.state = self.pass(&arriving, begin.changes)?;
            self.trees.insert(begin.tree, arriving);
            self.frames.send(FrameKind::Done, &[])?;
            self.frames.flush()?;
        }
    }

    fn all_came(&self) -> Result<()> {
        let missing = self.trees.values().find(|tree| matches!(tree.state, State::Awaited));
        match missing {
            Some(tree) => Err(FileError::Incomplete { path: tree.incoming.tree.path.clone() }),
            None => Ok(()),
        }
    }

    fn pass(&mut self, arriving: &Arriving, changes: bool) -> Result<State> {
        let path = &arriving.incoming.tree.path;
        let index = self.gather(changes, path)?;
        match (&arriving.state, changes) {
            (State::Awaited, false) => match index.entries[0].kind() {
                Type::File => self.first_file(&index, &arriving.incoming),
                _ => self.first_directory(&index, &arriving.incoming),
            },
            (State::Placed(root), true) => {
                let root = root.again().doing("open", path)?;
                self.changes(&index, &root)?;
                Ok(State::Placed(root))
            }
            (State::Found, true) => {
                if !index.entries.is_empty() || !index.removed.is_empty() {
                    return Err(FileError::PathTaken {
                        path: path.clone(),
                        what: "an equal file was found there, and the source now changes its own"
                            .to_owned(),
                    });
                }
                self.take_nothing()?;
                Ok(State::Found)
            }
            _ => Err(FileError::protocol("a pass out of turn")),
        }
    }

    fn gather(&mut self, changes: bool, root: &Path) -> Result<Index> {
        let mut gathering = Gathering::default();
        loop {
            match self.frames.next()? {
                (FrameKind::Index, bytes) => {
                    let length = bytes.len();
                    gathering.add(decode::<IndexPart>(bytes)?, length, root)?;
                }
                (FrameKind::IndexEnd, _) => return gathering.checked(changes, root),
                (other, _) => return Err(out_of_turn(other)),
            }
        }
    }

    fn first_directory(&mut self, index: &Index, incoming: &Incoming) -> Result<State> {
        let path = &incoming.tree.path;
        let root = self.landing.land_directory(path, incoming.keep_equal)?;
        let earlier = Earlier::look(&root, index)?;
        let equal = self.same_content(&root, index, earlier.alike)?;
        let mut placing = Placing::new(&root, index, self.landing, None);
        let wanted = placing.reconcile(&earlier.remove, equal)?;
        placing.make_nodes()?;
        self.want(&wanted)?;
        self.take_content(&mut placing, index, &wanted)?;
        placing.finish(true)?;
        Ok(State::Placed(root))
    }

    fn first_file(&mut self, index: &Index, incoming: &Incoming) -> Result<State> {
        let path = &incoming.tree.path;
        let entry = &index.entries[0];
        let (parent, name) = {
            let _step = self.landing.step()?;
            self.landing.land_parent(path)?
        };
        let there = stat_of(&parent, &name, path)?;
        let kept = |stat: &Stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && is_alike(entry, stat, 1)
        };
        let alike: BTreeMap<_, _> = there
            .iter()
            .filter(|stat| incoming.keep_equal && kept(stat))
            .map(|stat| (0, identity(stat)))
            .collect();
        if let (Some(stat), true) = (&there, alike.is_empty()) {
            if self.has_content(path, entry.size)? {
                self.want(&Bitmap::empty(1))?;
                self.take_nothing()?;
                return Ok(State::Found);
            }
            let replaceable = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if !(incoming.keep_equal && replaceable) {
                return Err(taken(path, "something else stands there"));
            }
        }
        let root = Root::file(parent, name, path.clone());
        let fresh = there.is_none().then(|| path.clone());
        let equal = self.same_content(&root, index, alike)?;
        let mut placing = Placing::new(&root, index, self.landing, fresh);
        let wanted = placing.reconcile(&[], equal)?;
        self.want(&wanted)?;
        self.take_content(&mut placing, index, &wanted)?;
        placing.finish(true)?;
        Ok(State::Placed(root))
    }

    /// Whether a file with the source's content stands at `path`. A link there is this host's own
    /// and is read through, as whoever uses the path will.
    fn has_content(&mut self, path: &Path, size: u64) -> Result<bool> {
        let Ok(there) = std::fs::metadata(path) else { return Ok(false) };
        if !there.is_file() || there.len() != size {
            return Ok(false);
        }
        let mut asked = Bitmap::empty(1);
        asked.set(0);
        self.frames.send(FrameKind::AskHash, asked.bytes())?;
        let file = std::fs::File::open(path).doing("open", path)?;
        self.frames.flush()?;
        let ours = hash(file, path)?;
        Ok(self.frames.expect(FrameKind::Hash)? == ours)
    }

    /// Those of the files that look `alike` whose content is the source's. Both ends hash at the
    /// same time, the source a little ahead.
    fn same_content(
        &mut self,
        root: &Root,
        index: &Index,
        alike: BTreeMap<usize, Identity>,
    ) -> Result<HashMap<usize, Identity>> {
        let mut equal = HashMap::new();
        let mut asked = Bitmap::empty(index.entries.len());
        let mut left = Vec::new();
        for (number, file) in alike {
            // What is empty is equal.
            if index.entries[number].size == 0 {
                equal.insert(number, file);
            } else {
                asked.set(number);
                left.push((number, file));
            }
        }
        if left.is_empty() {
            return Ok(equal);
        }
        self.frames.send(FrameKind::AskHash, asked.bytes())?;
        let mut left = left.into_iter();
        while left.len() > 0 {
            let theirs = self.frames.expect(FrameKind::Hash)?;
            let count = theirs.len() / SUM;
            if theirs.len() % SUM != 0 || !(1..=left.len()).contains(&count) {
                return Err(FileError::protocol("another number of hashes than was asked for"));
            }
            for (theirs, (number, file)) in theirs.chunks_exact(SUM).zip(left.by_ref().take(count))
            {
                let _step = self.landing.step()?;
                if hash_of(root, &index.entries[number].path, file)?
                    .is_some_and(|sum| sum == theirs)
                {
                    equal.insert(number, file);
                }
            }
        }
        Ok(equal)
    }

    fn changes(&mut self, index: &Index, root: &Root) -> Result<()> {
        let kind = if root.is_file() { Type::File } else { Type::Directory };
        let stranger = index.entries.iter().find(|entry| match entry.path.is_empty() {
            true => entry.kind() != kind,
            false => root.is_file(),
        });
        if let Some(entry) = stranger {
            return Err(FileError::hostile(
                root.shown(&entry.path),
                "an entry that is not of this tree",
            ));
        }
        if root.is_file() && !index.removed.is_empty() {
            return Err(FileError::hostile(root.shown(b""), "a removal in a single file"));
        }
        let mut wanted = Bitmap::empty(index.entries.len());
        for (number, entry) in index.entries.iter().enumerate() {
            if entry.has_content() {
                wanted.set(number);
            }
        }
        let mut placing = Placing::new(root, index, self.landing, None);
        placing.remove_gone()?;
        placing.make_nodes()?;
        if let Some(number) = self.take_content(&mut placing, index, &wanted)? {
            let path = root.shown(&index.entries[number].path);
            return Err(FileError::hostile(path, "an entry without its content"));
        }
        placing.finish(false)
    }

    fn want(&mut self, wanted: &Bitmap) -> Result<()> {
        self.frames.send(FrameKind::Wanted, wanted.bytes())?;
        self.frames.flush()
    }

    /// A pass without content still has an (empty) archive.
    fn take_nothing(&mut self) -> Result<()> {
        self.unpack(&mut |_, _, path| {
            Err(FileError::hostile(path, "content that nobody asked for"))
        })
    }

    /// Takes the archive. Gives the first entry that was wanted and did not come.
    fn take_content(
        &mut self,
        placing: &mut Placing<'_>,
        index: &Index,
        wanted: &Bitmap,
    ) -> Result<Option<usize>> {
        let mut left = wanted.clone();
        self.unpack(&mut |name, content, path| {
            let number = number_of(name).filter(|number| left.has(*number));
            let Some(number) = number else {
                let what =
                    format!("content {:?} that nobody asked for", String::from_utf8_lossy(name));
                return Err(FileError::hostile(path, what));
            };
            let entry = &index.entries[number];
            if content.size != entry.size {
                let what = format!(
                    "{} bytes of content where the index says {}",
                    content.size, entry.size
                );
                return Err(FileError::hostile(super::index::as_path(&entry.path), what));
            }
            left.clear(number);
            placing.place_file(number, content.read)
        })?;
        Ok((0..index.entries.len()).find(|number| left.has(*number)))
    }

    fn unpack(&mut self, take: &mut Take<'_>) -> Result<()> {
        let encoding = self.frames.expect(FrameKind::Content)?.first().copied();
        let data = DataReader::new(&mut self.frames);
        let unpacked = match encoding {
            Some(PLAIN) => unpack_from(data, take),
            Some(ZSTD) => zstd::Decoder::new(data)
                .and_then(|mut decoder| decoder.window_log_max(WINDOW_LOG).map(|()| decoder))
                .map_err(|error| spoiled(&error))
                .and_then(|decoder| unpack_from(decoder, take)),
            other => Err(FileError::protocol(format!("an archive encoded as {other:?}"))),
        };
        match self.frames.take_fault() {
            Some(fault) => Err(fault),
            None => unpacked,
        }
    }
}

/// The hash of the file at `path`, if it still is the one that was seen there.
fn hash_of(root: &Root, path: &[u8], seen: Identity) -> Result<Option<[u8; SUM]>> {
    let shown = root.shown(path);
    let Some(file) = root.open_file(path).doing("open", &shown)? else { return Ok(None) };
    if identity(&fs::fstat(&file).doing("look at", &shown)?) != seen {
        return Ok(None);
    }
    hash(file, &shown).map(Some)
}

/// One file of an archive.
struct Content<'a> {
    size: u64,
    read: &'a mut dyn Read,
}

/// Takes a file by its name in the archive; the path is for messages.
type Take<'a> = dyn FnMut(&[u8], Content<'_>, &Path) -> Result<()> + 'a;

fn unpack_from(from: impl Read, take: &mut Take<'_>) -> Result<()> {
    let mut archive = tar::Archive::new(from);
    // Raw: long names and other extensions would be gathered in memory as long as they come.
    let entries = archive.entries().map_err(|error| spoiled(&error))?.raw(true);
    for entry in entries {
        let mut entry = entry.map_err(|error| spoiled(&error))?;
        let name = entry.path_bytes().into_owned();
        let path = PathBuf::from(format!("archive member {}", String::from_utf8_lossy(&name)));
        if entry.header().entry_type() != tar::EntryType::Regular {
            return Err(FileError::hostile(path, "something that is no file in an archive"));
        }
        let size = entry.size();
        take(&name, Content { size, read: &mut entry }, &path)?;
    }
    let mut rest = Vec::new();
    let mut from = archive.into_inner().take(TRAILER);
    from.read_to_end(&mut rest).map_err(|error| spoiled(&error))?;
    if rest.len() as u64 == TRAILER || rest.iter().any(|byte| *byte != 0) {
        return Err(spoiled(&io::Error::other("data after its end")));
    }
    Ok(())
}

fn spoiled(error: &io::Error) -> FileError {
    FileError::hostile("archive", format!("an archive that cannot be unpacked: {error}"))
}

/// The entry's number that an archive's name says, in its one plain form.
fn number_of(name: &[u8]) -> Option<usize> {
    let text = std::str::from_utf8(name).ok()?;
    let number = text.parse::<u32>().ok()?;
    (number.to_string() == text).then_some(number as usize)
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M> {
    M::decode(bytes)
        .map_err(|error| FileError::protocol(format!("a message that cannot be read: {error}")))
}
