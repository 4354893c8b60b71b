//! Every lie that a sender can tell, and some that a receiver can: the error names it, and nothing
//! outside the tree is touched.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use prost::Message;

use super::super::frame::{FrameKind, Frames};
use super::super::index::{Begin, Bitmap, Entry, Gathering, IndexPart, Type, Xattr};
use super::trees::Room;
use super::*;

/// A sender that says what it likes, and a room whose every other corner is watched.
struct Liar {
    room: Room,
    frames: Frames<UnixStream>,
    socket: UnixStream,
    receiving: std::thread::JoinHandle<Result<()>>,
    outside: Picture,
}

impl Liar {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(prepare: impl FnOnce(&Room)) -> Self {
        let room = Room::new();
        room.write("outside/secret", b"secret");
        room.write("outside/deep/secret", b"secret");
        fs::create_dir(room.path("trees")).expect("a place for trees");
        prepare(&room);
        let (here, there) = UnixStream::pair().expect("a socket pair");
        let expected =
            vec![incoming(&bundle(&room.path("source")), &room.path("trees/tree"), false)];
        let receiving = std::thread::spawn(move || receive(there, expected, &Landing::new()));
        let outside = Picture::of(&room.path("outside"));
        let socket = here.try_clone().expect("a descriptor");
        Self { room, frames: Frames::new(here, None), socket, receiving, outside }
    }

    fn say(&mut self, kind: FrameKind, payload: &[u8]) -> &mut Self {
        // The receiver may have hung up already.
        let _ = self.frames.send(kind, payload).and_then(|()| self.frames.flush());
        self
    }

    fn index(&mut self, changes: bool, entries: Vec<Entry>, removed: Vec<&[u8]>) -> &mut Self {
        let removed = removed.into_iter().map(<[u8]>::to_vec).collect();
        self.say(FrameKind::Begin, &Begin { tree: 1, changes }.encode_to_vec());
        self.say(FrameKind::Index, &IndexPart { entries, removed }.encode_to_vec());
        self.say(FrameKind::IndexEnd, &[])
    }

    /// A first pass with these entries below a root, up to where the receiver says what it wants.
    fn first(&mut self, entries: Vec<Entry>) -> &mut Self {
        let mut all = vec![directory(b"")];
        all.extend(entries);
        self.index(false, all, vec![]);
        self
    }

    fn archive(&mut self, bytes: &[u8]) -> &mut Self {
        self.say(FrameKind::Content, &[0]);
        self.say(FrameKind::Data, bytes);
        self.say(FrameKind::ContentEnd, &[])
    }

    /// A whole honest first pass, acknowledged.
    fn honest(&mut self, entries: Vec<Entry>) -> &mut Self {
        self.first(entries);
        self.frames.expect(FrameKind::Wanted).expect("a wish");
        self.archive(&[0; 1024]);
        self.frames.expect(FrameKind::Done).expect("an acknowledgement");
        self
    }

    /// The receiver's error, once it is over. Nothing outside was touched, and nothing is left.
    #[track_caller]
    fn caught(self) -> FileError {
        let Self { room, frames: _frames, socket, receiving, outside } = self;
        // It may still have something to say, which nobody reads.
        socket.shutdown(std::net::Shutdown::Write).expect("the end");
        let error = receiving.join().expect("no panic").expect_err("a lie is an error");
        assert_eq!(Picture::of(&room.path("outside")), outside);
        let left: Vec<_> = fs::read_dir(room.path("trees")).expect("the trees").collect();
        assert!(left.is_empty(), "{left:?} left");
        error
    }

    /// As [`Liar::caught`], for what an honest sender never sends.
    #[track_caller]
    fn hostile(self, says: &str) {
        let error = self.caught();
        assert!(matches!(error, FileError::Hostile { .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }

    #[track_caller]
    fn protocol(self, says: &str) {
        let error = self.caught();
        assert!(matches!(error, FileError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

fn entry(kind: Type, path: &[u8]) -> Entry {
    Entry { path: path.to_vec(), kind: kind.into(), mode: 0o700, ..Entry::default() }
}

fn directory(path: &[u8]) -> Entry {
    entry(Type::Directory, path)
}

fn file(path: &[u8], size: u64) -> Entry {
    Entry { size, ..entry(Type::File, path) }
}

fn link(path: &[u8], target: &[u8]) -> Entry {
    Entry { target: target.to_vec(), ..entry(Type::Symlink, path) }
}

/// An archive of members (name, type, size said, content).
fn tar_of(members: &[(&str, tar::EntryType, u64, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, size, content) in members {
        let mut header = tar::Header::new_ustar();
        // Past the builder's own checks of names.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(*size);
        header.set_cksum();
        builder.append(&header, *content).expect("a member");
    }
    builder.into_inner().expect("an archive")
}

const FILE: tar::EntryType = tar::EntryType::Regular;

/// The error on an index whose last entry is `lie`.
#[track_caller]
fn index_lie(lie: Entry, says: &str) {
    let mut liar = Liar::new();
    liar.first(vec![directory(b"dir"), file(b"file", 3), link(b"link", b"../../outside"), lie]);
    liar.hostile(says);
}

#[test]
fn absolute_path() {
    index_lie(file(b"/etc/passwd", 1), "an absolute path");
}

#[test]
fn path_upwards() {
    index_lie(file(b"dir/../../outside/secret", 1), "leads upwards");
}

#[test]
fn path_of_one_upwards() {
    index_lie(directory(b".."), "leads upwards");
}

#[test]
fn path_with_a_dot() {
    index_lie(file(b"dir/./x", 1), "plain form");
}

#[test]
fn path_with_an_empty_name() {
    index_lie(file(b"dir//x", 1), "plain form");
}

#[test]
fn path_with_a_nul() {
    index_lie(file(b"dir/x\0y", 1), "NUL");
}

#[test]
fn path_too_long() {
    index_lie(file(&b"dir/".repeat(1100), 1), "too long");
}

#[test]
fn name_too_long() {
    index_lie(file(&[b'x'; 256], 1), "name that is too long");
}

#[test]
fn path_twice() {
    index_lie(link(b"dir", b"../../outside"), "a path twice");
}

#[test]
fn root_twice() {
    index_lie(directory(b""), "a path twice");
}

#[test]
fn entry_without_its_directory() {
    index_lie(file(b"nowhere/x", 1), "without its directory");
}

#[test]
fn entry_below_a_symbolic_link() {
    index_lie(file(b"link/secret", 1), "below something that is no directory");
}

#[test]
fn entry_below_a_file() {
    index_lie(file(b"file/x", 1), "below something that is no directory");
}

#[test]
fn entry_before_its_directory() {
    let mut liar = Liar::new();
    liar.first(vec![file(b"dir/x", 0), directory(b"dir")]);
    liar.hostile("before its directory");
}

#[test]
fn unknown_type() {
    index_lie(Entry { kind: 77, ..file(b"x", 0) }, "unknown type 77");
}

#[test]
fn impossible_mode() {
    index_lie(Entry { mode: 0o100_644, ..file(b"x", 0) }, "mode");
}

#[test]
fn impossible_time() {
    index_lie(Entry { mtime_ns: 1_000_000_000, ..file(b"x", 0) }, "ns of a second");
}

#[test]
fn impossible_size() {
    index_lie(file(b"x", u64::MAX), "a size of");
}

#[test]
fn directory_with_a_size() {
    index_lie(Entry { size: 1, ..directory(b"x") }, "no file");
}

#[test]
fn symbolic_link_to_nothing() {
    index_lie(link(b"x", b""), "link target");
}

#[test]
fn file_with_a_link_target() {
    index_lie(Entry { target: b"y".to_vec(), ..file(b"x", 0) }, "link target");
}

#[test]
fn file_with_device_numbers() {
    index_lie(Entry { major: 8, ..file(b"x", 0) }, "no device");
}

#[test]
fn hard_link_to_a_directory() {
    index_lie(Entry { link: 1, ..file(b"x", 0) }, "no earlier file");
}

#[test]
fn hard_link_to_a_symbolic_link() {
    index_lie(Entry { link: 4, ..file(b"x", 0) }, "no earlier file");
}

#[test]
fn hard_link_to_itself() {
    index_lie(Entry { link: 5, ..file(b"x", 0) }, "no earlier file");
}

#[test]
fn hard_link_beyond_the_index() {
    index_lie(Entry { link: u32::MAX, ..file(b"x", 0) }, "no earlier file");
}

#[test]
fn hard_link_of_another_size() {
    index_lie(Entry { link: 3, ..file(b"x", 99) }, "no earlier file");
}

#[test]
fn hard_link_that_is_a_directory() {
    index_lie(Entry { link: 3, ..directory(b"x") }, "no file");
}

#[test]
fn attribute_of_the_host() {
    for name in [&b"security.evm"[..], b"system.nfs4_acl", b"user.", b"nonsense", b"user.a\0b"] {
        let xattrs = vec![Xattr { name: name.to_vec(), value: vec![1] }];
        index_lie(Entry { xattrs, ..file(b"x", 0) }, "may not travel");
    }
}

#[test]
fn attributes_too_large() {
    let xattr = |number: u8| Xattr {
        name: vec![b'u', b's', b'e', b'r', b'.', number],
        value: vec![0; 50_000],
    };
    index_lie(
        Entry { xattrs: vec![xattr(1), xattr(2), xattr(3)], ..file(b"x", 0) },
        "bytes of extended",
    );
}

#[test]
fn no_root() {
    let mut liar = Liar::new();
    liar.index(false, vec![directory(b"dir")], vec![]);
    liar.hostile("without the root");
}

#[test]
fn empty_index() {
    let mut liar = Liar::new();
    liar.index(false, vec![], vec![]);
    liar.hostile("without the root");
}

#[test]
fn root_that_is_a_symbolic_link() {
    let mut liar = Liar::new();
    liar.index(false, vec![link(b"", b"../outside")], vec![]);
    liar.hostile("neither file nor directory");
}

#[test]
fn file_as_root_with_entries_below() {
    let mut liar = Liar::new();
    liar.index(false, vec![file(b"", 0), file(b"x", 0)], vec![]);
    liar.hostile("below something that is no directory");
}

#[test]
fn removal_in_a_first_pass() {
    let mut liar = Liar::new();
    liar.index(false, vec![directory(b"")], vec![b"x"]);
    liar.hostile("a removal in a first pass");
}

#[test]
fn index_larger_than_any_tree() {
    let part = IndexPart {
        entries: vec![],
        removed: vec![Vec::new(); super::super::index::ENTRIES_MOST + 1],
    };
    let error = Gathering::default().add(part, 10, Path::new("/x")).expect_err("too many");
    assert!(error.to_string().contains("larger than any"), "{error}");
    let mut gathering = Gathering::default();
    let part = || IndexPart { entries: vec![], removed: vec![] };
    gathering.add(part(), 1 << 30, Path::new("/x")).expect("the most");
    gathering.add(part(), 1, Path::new("/x")).expect_err("more than that");
}

#[test]
fn content_that_nobody_asked_for() {
    for name in ["2", "0", "99", "-1", "01", "../../outside/secret", "/etc/passwd", ""] {
        let mut liar = Liar::new();
        liar.first(vec![file(b"file", 3)]).archive(&tar_of(&[(name, FILE, 3, b"abc")]));
        liar.hostile("that nobody asked for");
    }
}

#[test]
fn content_twice() {
    let mut liar = Liar::new();
    let twice = [("1", FILE, 3, &b"abc"[..]), ("1", FILE, 3, b"def")];
    liar.first(vec![file(b"file", 3)]).archive(&tar_of(&twice));
    liar.hostile("that nobody asked for");
}

#[test]
fn content_of_another_size() {
    for (size, content) in [(2, &b"ab"[..]), (4, b"abcd")] {
        let mut liar = Liar::new();
        liar.first(vec![file(b"file", 3)]).archive(&tar_of(&[("1", FILE, size, content)]));
        liar.hostile("where the index says 3");
    }
}

#[test]
fn size_beyond_the_data() {
    let mut liar = Liar::new();
    let archive = tar_of(&[("1", FILE, 100_000, b"abc")]);
    liar.first(vec![file(b"file", 100_000)]).archive(&archive);
    liar.hostile("cannot be unpacked");
}

#[test]
fn member_that_is_no_file() {
    use tar::EntryType as Kind;
    for kind in [
        Kind::Symlink,
        Kind::Link,
        Kind::Directory,
        Kind::GNULongName,
        Kind::XHeader,
        Kind::GNUSparse,
    ] {
        let mut liar = Liar::new();
        liar.first(vec![file(b"file", 3)]).archive(&tar_of(&[("1", kind, 3, b"abc")]));
        liar.hostile("no file in an archive");
    }
}

#[test]
fn data_after_the_archive() {
    let mut liar = Liar::new();
    let mut archive = tar_of(&[("1", FILE, 3, b"abc")]);
    archive.extend_from_slice(b"more");
    liar.first(vec![file(b"file", 3)]).archive(&archive);
    liar.hostile("data after its end");
}

#[test]
fn zeros_without_end_after_the_archive() {
    let mut liar = Liar::new();
    let mut archive = tar_of(&[("1", FILE, 3, b"abc")]);
    archive.resize(archive.len() + 4096, 0);
    liar.first(vec![file(b"file", 3)]).archive(&archive);
    liar.hostile("data after its end");
}

#[test]
fn archive_that_is_none() {
    let mut liar = Liar::new();
    liar.first(vec![file(b"file", 3)]).archive(&[7; 4096]);
    liar.hostile("cannot be unpacked");
}

#[test]
fn compressed_archive_that_is_none() {
    let mut liar = Liar::new();
    liar.first(vec![file(b"file", 3)]);
    liar.say(FrameKind::Content, &[1])
        .say(FrameKind::Data, &[7; 4096])
        .say(FrameKind::ContentEnd, &[]);
    liar.hostile("cannot be unpacked");
}

#[test]
fn compressed_archive_that_wants_much_memory() {
    let mut encoder = zstd::Encoder::new(Vec::new(), 19).expect("an encoder");
    encoder.window_log(27).expect("a large window");
    encoder.write_all(&tar_of(&[("1", FILE, 9 << 20, &vec![1; 9 << 20])])).expect("compressed");
    let archive = encoder.finish().expect("compressed");
    let mut liar = Liar::new();
    liar.first(vec![file(b"file", 9 << 20)]);
    liar.say(FrameKind::Content, &[1])
        .say(FrameKind::Data, &archive)
        .say(FrameKind::ContentEnd, &[]);
    liar.hostile("cannot be unpacked");
}

#[test]
fn archive_of_unknown_encoding() {
    let mut liar = Liar::new();
    liar.first(vec![]).say(FrameKind::Content, &[2]);
    liar.protocol("encoded as");
}

#[test]
fn change_below_a_symbolic_link() {
    // The link was placed in the first pass and leads out of the tree.
    let lies = [&b"link/new"[..], b"link/deep/new", b"link/../new", b"link/deep/secret"]
        .map(|path| [file(path, 3), directory(path), link(path, b"x"), entry(Type::Fifo, path)]);
    for lie in lies.into_iter().flatten() {
        let mut liar = Liar::new();
        liar.honest(vec![link(b"link", b"../../outside")]);
        liar.index(true, vec![lie], vec![]).archive(&tar_of(&[("0", FILE, 3, b"abc")]));
        let error = liar.caught();
        assert!(error.to_string().contains("tree/link/"), "{error}");
    }
}

#[test]
fn change_that_replaces_a_directory_by_a_link_and_writes_below() {
    let mut liar = Liar::new();
    liar.honest(vec![directory(b"dir")]);
    liar.index(true, vec![link(b"dir", b"../../outside"), file(b"dir/new", 3)], vec![]);
    liar.hostile("below something that is no directory");
}

#[test]
fn removal_below_a_symbolic_link() {
    let mut liar = Liar::new();
    liar.honest(vec![link(b"link", b"../../outside")]);
    liar.index(true, vec![], vec![b"link/deep", b"link/deep/secret", b"link/secret"]);
    liar.archive(&[0; 1024]);
    liar.frames.expect(FrameKind::Done).expect("nothing is there by that name");
    liar.say(FrameKind::Hash, &[0; 32]);
    liar.protocol("out of turn");
}

#[test]
fn removal_of_what_is_no_path_below() {
    for path in [&b""[..], b"/etc", b"..", b"a/../../outside", b"."] {
        let mut liar = Liar::new();
        liar.honest(vec![]).index(true, vec![], vec![path]);
        liar.caught();
    }
}

#[test]
fn removal_of_an_entry_that_comes() {
    let mut liar = Liar::new();
    liar.honest(vec![]).index(true, vec![directory(b"x")], vec![b"x"]);
    liar.hostile("also removes");
}

#[test]
fn change_of_the_root_into_a_file() {
    let mut liar = Liar::new();
    liar.honest(vec![]).index(true, vec![file(b"", 3)], vec![]);
    liar.hostile("not of this tree");
}

#[test]
fn change_without_its_content() {
    let mut liar = Liar::new();
    liar.honest(vec![]).index(true, vec![file(b"x", 3)], vec![]).archive(&[0; 1024]);
    liar.hostile("without its content");
}

#[test]
fn changes_before_the_tree() {
    let mut liar = Liar::new();
    liar.index(true, vec![], vec![]);
    liar.protocol("out of turn");
}

#[test]
fn first_pass_twice() {
    let mut liar = Liar::new();
    liar.honest(vec![]).first(vec![]);
    liar.protocol("out of turn");
}

#[test]
fn tree_that_nobody_expects() {
    let mut liar = Liar::new();
    liar.say(FrameKind::Begin, &Begin { tree: 2, changes: false }.encode_to_vec());
    liar.protocol("nobody expects");
}

#[test]
fn end_before_everything_came() {
    let mut liar = Liar::new();
    liar.say(FrameKind::End, &[]);
    assert!(matches!(liar.caught(), FileError::Incomplete { .. }));
}

#[test]
fn end_in_the_middle() {
    let mut liar = Liar::new();
    liar.first(vec![file(b"file", 3)]);
    liar.say(FrameKind::Content, &[0]);
    assert!(matches!(liar.caught(), FileError::Stream { .. }));
}

#[test]
fn message_that_is_none() {
    let mut liar = Liar::new();
    liar.say(FrameKind::Begin, &[0xff; 9]);
    liar.protocol("cannot be read");
}

#[test]
fn frame_longer_than_its_kind_allows() {
    let (mut here, there) = UnixStream::pair().expect("a socket pair");
    let receiving = std::thread::spawn(move || receive(there, vec![], &Landing::new()));
    here.write_all(&[FrameKind::Index as u8, 0xff, 0xff, 0xff, 0x7f]).expect("said");
    drop(here);
    let error = receiving.join().expect("no panic").expect_err("too long");
    assert!(error.to_string().contains("of 2147483647 bytes"), "{error}");
}

#[test]
fn frame_of_unknown_kind() {
    let (mut here, there) = UnixStream::pair().expect("a socket pair");
    let receiving = std::thread::spawn(move || receive(there, vec![], &Landing::new()));
    here.write_all(&[99, 0, 0, 0, 0]).expect("said");
    drop(here);
    let error = receiving.join().expect("no panic").expect_err("unknown");
    assert!(error.to_string().contains("unknown frame (99)"), "{error}");
}

#[test]
fn trees_within_each_other() {
    let room = Room::new();
    let one = incoming(&bundle(&room.path("source")), &room.path("a"), false);
    let mut two = incoming(&bundle(&room.path("source")), &room.path("a/b"), false);
    two.tree.tree.id = 2;
    let outcome = stream(vec![one, two], &Landing::new(), |_| Ok(()));
    assert!(outcome.received.expect_err("refused").to_string().contains("within another"));
}

#[test]
fn root_that_became_a_symbolic_link_is_refused() {
    let mut liar = Liar::with(|room| {
        symlink(room.path("outside"), room.path("trees/tree")).expect("a link");
    });
    liar.first(vec![]);
    let Liar { room, frames: _frames, socket, receiving, outside } = liar;
    socket.shutdown(std::net::Shutdown::Write).expect("the end");
    let error = receiving.join().expect("no panic").expect_err("a link in the way");
    assert!(matches!(error, FileError::PathTaken { .. }), "{error}");
    assert_eq!(Picture::of(&room.path("outside")), outside);
}

#[test]
fn receiver_that_asks_for_what_cannot_be() {
    let bitmap = |bits: &[usize], entries| {
        let mut bitmap = Bitmap::empty(entries);
        bits.iter().for_each(|bit| bitmap.set(*bit));
        bitmap.bytes().to_vec()
    };
    // The tree has a root and one file.
    for wish in [bitmap(&[0], 2), bitmap(&[2], 3), bitmap(&[1], 9), vec![], bitmap(&[0, 1], 2)] {
        let room = Room::new();
        room.write("source/file", b"abc");
        let (here, there) = UnixStream::pair().expect("a socket pair");
        let tree = bundle(&room.path("source"));
        let sending = std::thread::spawn(move || TreeSender::new(here, Arc::default()).send(&tree));
        let mut frames = Frames::new(there, None);
        while frames.next().expect("the index").0 != FrameKind::IndexEnd {}
        frames.send(FrameKind::Wanted, &wish).and_then(|()| frames.flush()).expect("said");
        let error = sending.join().expect("no panic").expect_err("a lie");
        assert!(matches!(error, FileError::Protocol { .. }), "{wish:?}: {error:?}");
    }
}

#[test]
fn receiver_that_confirms_what_it_never_had() {
    let room = Room::new();
    room.write("source/file", &noise(1, 64 << 20));
    let (here, there) = UnixStream::pair().expect("a socket pair");
    let tree = bundle(&room.path("source"));
    let sending = std::thread::spawn(move || TreeSender::new(here, Arc::default()).send(&tree));
    let mut frames = Frames::new(there, None);
    while frames.next().expect("the index").0 != FrameKind::IndexEnd {}
    frames.send(FrameKind::Wanted, &[0b10]).expect("a wish");
    frames.send(FrameKind::Consumed, &u64::MAX.to_le_bytes()).expect("a lie");
    while frames.next().is_ok() {}
    let error = sending.join().expect("no panic").expect_err("a lie");
    assert!(error.to_string().contains("that cannot be"), "{error}");
}

#[test]
fn receiver_that_asks_for_hashes_without_end() {
    let room = Room::new();
    let tree = kernel(&room.write("kernel", b"abc"));
    let (here, there) = UnixStream::pair().expect("a socket pair");
    let sending = std::thread::spawn(move || TreeSender::new(here, Arc::default()).send(&tree));
    let mut frames = Frames::new(there, None);
    while frames.next().expect("the index").0 != FrameKind::IndexEnd {}
    frames.send(FrameKind::AskHash, &[1]).expect("a question");
    frames.send(FrameKind::AskHash, &[1]).expect("another");
    frames.expect(FrameKind::Hash).expect("one answer");
    let error = sending.join().expect("no panic").expect_err("a lie");
    assert!(error.to_string().contains("out of turn"), "{error}");
}
