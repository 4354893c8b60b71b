//! Somebody on the destination who may write in a directory of the tree puts something else in the
//! place of what arrives, at the worst moment.

use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::super::beneath::{Root, open_directory};
use super::super::index::{Entry, Gathering, Index, IndexPart, Type};
use super::super::placing::{Placing, TEMPORARY};
use super::trees::Room;
use super::*;

/// An index of a set-user-ID file and another name of it.
fn index(room: &Room) -> Index {
    let meta = room.path("source").metadata().expect("a directory");
    let root = Entry {
        kind: Type::Directory.into(),
        mode: 0o755,
        uid: meta.uid(),
        gid: meta.gid(),
        ..Entry::default()
    };
    let file = Entry {
        path: b"file".to_vec(),
        kind: Type::File.into(),
        mode: 0o4755,
        size: 4,
        ..root.clone()
    };
    let link = Entry { path: b"link".to_vec(), link: 2, ..file.clone() };
    let mut gathering = Gathering::default();
    let part = IndexPart { entries: vec![root, file, link], removed: vec![] };
    gathering.add(part, 100, &room.path("tree")).expect("an index");
    gathering.checked(false, &room.path("tree")).expect("an index")
}

/// A place for the tree, and somebody's file outside that must stay as it is.
struct Scene {
    room: Room,
    index: Index,
    root: Root,
    victim: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let room = Room::new();
        let victim = room.write("victim", b"victim");
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&victim, mode).expect("a mode");
        let tree = room.path("tree");
        fs::create_dir(&tree).expect("a directory");
        let root = Root::landing(open_directory(&tree).expect("it"), tree);
        Self { index: index(&room), room, root, victim }
    }

    fn placing<'a>(&'a self, landing: &'a Landing) -> Placing<'a> {
        Placing::new(&self.root, &self.index, landing, None)
    }

    /// Puts a link to the victim, or another name of it, where `name` stands.
    fn swap(&self, name: &str, hard: bool) {
        let path = self.room.path("tree").join(name);
        fs::remove_file(&path).expect("what stood there");
        match hard {
            true => fs::hard_link(&self.victim, &path),
            false => symlink(&self.victim, &path),
        }
        .expect("a link");
    }

    #[track_caller]
    fn caught(&self, result: Result<()>) {
        let error = result.expect_err("noticed");
        assert!(error.to_string().contains("took its place"), "{error}");
        let meta = self.victim.metadata().expect("the victim");
        assert_eq!(meta.mode() & 0o7777, 0o600, "the victim is as it was");
        assert_eq!(read_all(&self.victim), b"victim");
    }
}

/// Content that swaps the temporary file for a link while it is read.
struct Swapping<'a> {
    scene: &'a Scene,
    hard: bool,
}

impl Read for Swapping<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let names = fs::read_dir(self.scene.room.path("tree")).expect("the tree");
        let name = names
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("plain"))
            .find(|name| name.starts_with(TEMPORARY));
        self.scene.swap(&name.expect("a temporary file"), self.hard);
        into.fill(b'x');
        Ok(into.len())
    }
}

#[test]
fn a_temporary_file_that_is_swapped_while_it_is_written() {
    for hard in [false, true] {
        let scene = Scene::new();
        let landing = Landing::new();
        let mut placing = scene.placing(&landing);
        scene.caught(placing.place_file(1, &mut Swapping { scene: &scene, hard }));
        assert!(!scene.room.path("tree/file").exists(), "nothing was put into place");
    }
}

#[test]
fn a_file_that_is_swapped_after_it_was_placed() {
    for hard in [false, true] {
        let scene = Scene::new();
        let landing = Landing::new();
        let mut placing = scene.placing(&landing);
        placing.place_file(1, &mut &b"good"[..]).expect("placed");
        scene.swap("file", hard);
        scene.caught(placing.finish(true));
    }
}

#[test]
fn a_file_that_is_swapped_before_it_is_linked() {
    // Changes do not set the attributes of the file once more, so the link alone must notice.
    for hard in [false, true] {
        let scene = Scene::new();
        let landing = Landing::new();
        let mut placing = scene.placing(&landing);
        placing.place_file(1, &mut &b"good"[..]).expect("placed");
        scene.swap("file", hard);
        scene.caught(placing.finish(false));
        assert!(scene.room.path("tree/link").symlink_metadata().is_err());
    }
}

#[test]
fn a_link_keeps_its_own_attributes() {
    // Through /proc a held link leads to itself and no further.
    if !is_root("a_link_keeps_its_own_attributes") {
        return;
    }
    let room = Room::new();
    let victim = room.write("victim", b"victim");
    let link = room.path("source/link");
    symlink(&victim, &link).expect("a link");
    let flags = rustix::fs::XattrFlags::empty();
    let labelled = rustix::fs::lsetxattr(&link, "trusted.label", b"of the link", flags);
    if let Err(error) = labelled {
        eprintln!("SKIPPED trusted.label on a link: {error}");
    }
    std::os::unix::fs::lchown(&link, Some(12), Some(34)).expect("an owner");
    let before = Picture::of(&victim);
    room.arrive(false, || {
        room.write("source/more", b"more");
    });
    room.assert_equal();
    assert_eq!(Picture::of(&victim), before);
}
