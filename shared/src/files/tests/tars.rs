//! Trees through plain tars: what stands still comes back as it was, other tools read it, and a tar that
//! lies makes nothing at all.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use super::trees::Room;
use super::*;
use tar::EntryType;

/// The tar of a tree.
fn tar_of(root: &Path) -> Result<Vec<u8>> {
    let tree = TarTree::scan(root, None)?;
    let mut bytes = Vec::new();
    tree.write(&mut bytes)?;
    assert_eq!(bytes.len() as u64, tree.bytes(), "its length was known beforehand");
    Ok(bytes)
}

/// Lists a tar and makes the tree.
pub(super) fn land(tar: &[u8], path: &Path) -> Result<()> {
    let landing = Landing::new();
    let lander = TreeLander::list(path, &mut &*tar)?;
    assert!(!path.exists(), "listing touches nothing");
    lander.land(&landing, &mut &*tar)?;
    landing.keep();
    Ok(())
}

/// A tree through a tar.
#[track_caller]
pub(super) fn assert_comes_back(from: &Path, to: &Path) {
    land(&tar_of(from).expect("a tar"), to).expect("it lands");
    assert_same(from, to, "after a tar");
}

#[test]
fn other_tools_read_it_and_we_read_theirs() {
    if !is_root("other_tools_read_it_and_we_read_theirs") {
        return;
    }
    let room = Room::new();
    let source = room.path("source");
    room.write("source/etc/passwd", b"root");
    room.write(&format!("source/{}/{}/deep", "d".repeat(90), "e".repeat(90)), &noise(1, 70_000));
    std::os::unix::fs::symlink("/etc/passwd", source.join("absolute")).expect("a link");
    std::os::unix::fs::symlink("x".repeat(150), source.join("long")).expect("a link");
    fs::hard_link(source.join("etc/passwd"), source.join("twice")).expect("a link");
    fs::set_permissions(source.join("etc"), fs::Permissions::from_mode(0o1750)).expect("a mode");
    let null = rustix::fs::makedev(1, 3);
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, source.join("null"), kind, mode, null).expect("a node");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(source.join("etc"), "user.x", &[0, 255, 10], flags).expect("set");
    assert_comes_back(&source, &room.path("ours"));

    let tar = room.write("tar", &tar_of(&source).expect("a tar"));
    fs::create_dir(room.path("theirs")).expect("a directory");
    let gnu = |words: &[&str]| {
        let mut command = Command::new("tar");
        let options = ["--xattrs", "--xattrs-include=*", "--numeric-owner"];
        command.args(options).args(words);
        let status = command.stderr(Stdio::null()).status().expect("tar runs");
        assert!(status.success(), "{words:?}");
    };
    let text = |path: &Path| path.to_str().expect("plain").to_owned();
    gnu(&["-xpf", &text(&tar), "-C", &text(&room.path("theirs"))]);
    // GNU tar leaves directories with the time at which it put something in them.
    for name in ["etc", &"d".repeat(90)] {
        let mut touch = Command::new("touch");
        touch.arg("-r").arg(source.join(name)).arg(room.path("theirs").join(name));
        assert!(touch.status().expect("touch runs").success());
    }
    assert_same(&source, &room.path("theirs"), "unpacked by tar");
    let other = text(&room.path("other.tar"));
    gnu(&["--format=posix", "-cf", &other, "-C", &text(&source), "."]);
    land(&read_all(Path::new(&other)), &room.path("back")).expect("it lands");
    assert_same(&source, &room.path("back"), "packed by tar");
}

#[test]
fn a_part_of_a_tree_can_be_left_out() {
    let room = Room::new();
    for name in ["source/rootfs/a", "source/rootfs-2/b", "source/config.json"] {
        room.write(name, b"x");
    }
    let tree = TarTree::scan(&room.path("source"), Some(b"rootfs")).expect("a tree");
    let mut tar = Vec::new();
    tree.write(&mut tar).expect("written");
    land(&tar, &room.path("rest")).expect("it lands");
    assert!(!room.path("rest/rootfs").exists());
    assert!(room.path("rest/rootfs-2/b").exists() && room.path("rest/config.json").exists());
}

#[test]
fn devices_of_the_host_go_into_no_tar() {
    if !is_root("devices_of_the_host_go_into_no_tar") {
        return;
    }
    let room = Room::new();
    let disk = rustix::fs::makedev(8, 0);
    let (kind, mode) = (rustix::fs::FileType::BlockDevice, rustix::fs::Mode::RUSR);
    let path = room.path("source/disk");
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, disk).expect("a node");
    let error = tar_of(&room.path("source")).expect_err("a disk");
    assert!(error.to_string().contains("device node (8:0)"), "{error}");
}

#[test]
fn a_file_that_changes_under_the_tar_is_an_error() {
    let room = Room::new();
    let file = room.write("source/file", &noise(2, 5000));
    let tree = TarTree::scan(&room.path("source"), None).expect("a tree");
    fs::write(&file, "short").expect("written");
    let changed = tree.write(&mut Vec::new());
    assert!(matches!(changed, Err(FileError::ChangedWhilePaused { .. })), "{changed:?}");
}

/// A tar of what no honest tar has. It begins with a root.
struct Liar(tar::Builder<Vec<u8>>);

impl Liar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new())).with("./", EntryType::Directory, "", b"")
    }

    fn with(mut self, name: &str, kind: EntryType, link: &str, bytes: &[u8]) -> Self {
        let mut head = tar::Header::new_ustar();
        let ustar = head.as_ustar_mut().expect("ustar");
        ustar.name[..name.len()].copy_from_slice(name.as_bytes());
        ustar.linkname[..link.len()].copy_from_slice(link.as_bytes());
        head.set_entry_type(kind);
        head.set_mode(0o755);
        head.set_uid(0);
        head.set_gid(0);
        head.set_mtime(1);
        if matches!(kind, EntryType::Block | EntryType::Char) {
            head.set_device_major(8).expect("a device");
            head.set_device_minor(0).expect("a device");
        }
        head.set_size(bytes.len() as u64);
        head.set_cksum();
        self.0.append(&head, bytes).expect("written");
        self
    }

    fn file(self, name: &str) -> Self {
        self.with(name, EntryType::Regular, "", b"evil")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("ended")
    }
}

/// Refused before anything is made.
#[track_caller]
fn refused(tar: &[u8], says: &str) {
    let room = Room::new();
    let before = Picture::of(&room.path(""));
    let path = room.path("destination");
    let listed = TreeLander::list(&path, &mut &*tar);
    match listed {
        Err(error @ FileError::Hostile { .. }) => {
            assert!(error.to_string().contains(says), "{error}");
        }
        other => panic!("it was not refused for {says:?}: {other:?}"),
    }
    assert_eq!(Picture::of(&room.path("")), before);
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../evil", "a/../../evil", "./../evil"] {
        refused(&Liar::new().file(name).bytes(), "leads upwards");
    }
    refused(&Liar::new().file("/etc/evil").bytes(), "an absolute path");
    refused(&Liar::new().file("a//evil").bytes(), "plain form");
    let long = "x".repeat(4096);
    let mut liar = Liar::new();
    liar.0.append_pax_extensions([("path", long.as_bytes())]).expect("a record");
    refused(&liar.file("x").bytes(), "too long");
    let mut liar = Liar::new();
    liar.0.append_pax_extensions([("path", &b"../evil"[..])]).expect("a record");
    refused(&liar.file("x").bytes(), "leads upwards");
}

#[test]
fn nothing_goes_through_a_link() {
    let through = |target| Liar::new().with("a", EntryType::Symlink, target, b"").file("a/evil");
    for target in ["/etc", "..", "b"] {
        refused(&through(target).bytes(), "below something that is no directory");
    }
    let twice = Liar::new().with("a", EntryType::Symlink, "/etc/passwd", b"").file("a");
    refused(&twice.bytes(), "a path twice");
    refused(&Liar::new().file("none/evil").bytes(), "without its directory");
}

#[test]
fn hard_links_lead_to_earlier_files_alone() {
    for target in ["/etc/passwd", "../../etc/passwd", "none", "b"] {
        let liar = Liar::new().file("a").with("b", EntryType::Link, target, b"");
        refused(&liar.bytes(), "a hard link to what is no earlier file");
    }
    let to_link = Liar::new().with("a", EntryType::Symlink, "/etc/passwd", b"").with(
        "b",
        EntryType::Link,
        "a",
        b"",
    );
    refused(&to_link.bytes(), "a hard link to what is no earlier file");
}

#[test]
fn devices_are_refused() {
    for kind in [EntryType::Block, EntryType::Char] {
        refused(&Liar::new().with("disk", kind, "", b"").bytes(), "a device node (8:0)");
    }
}

#[test]
fn what_is_no_tar_of_a_tree_is_refused() {
    refused(b"", "without the root");
    refused(&[7; 2048], "cannot be unpacked");
    refused(&Liar(tar::Builder::new(Vec::new())).file("a").bytes(), "without the root");
    refused(&Liar(tar::Builder::new(Vec::new())).file("./").bytes(), "root that is no directory");
    let kinds = [EntryType::GNUSparse, EntryType::GNULongName, EntryType::XGlobalHeader];
    for kind in kinds {
        refused(&Liar::new().with("x", kind, "", b"").bytes(), "kind that it does not know");
    }
    let with_content = Liar::new().with("x", EntryType::Directory, "", b"content");
    refused(&with_content.bytes(), "content for what is no file");
    let mut half = Liar::new();
    half.0.append_pax_extensions([("path", &b"x"[..])]).expect("a record");
    refused(&half.bytes(), "belong to no entry");
    for records in ["x", "9 a=b\n", "5 a=b", "4 ab\n", "99999999999999999999 a=b\n", " a=b\n"] {
        let liar = Liar::new().with("r", EntryType::XHeader, "", records.as_bytes());
        refused(&liar.file("x").bytes(), "records that cannot be read");
    }
    let mut liar = Liar::new();
    liar.0.append_pax_extensions([("size", &b"99999999"[..])]).expect("a record");
    refused(&liar.file("x").bytes(), "in two places");
    let mut after = Liar::new().file("x").bytes();
    after.extend_from_slice(&[1; 512]);
    refused(&after, "data after the end");
}

#[test]
fn a_size_beyond_the_data_makes_nothing() {
    let whole = Liar::new().file("x").bytes();
    // In the middle of the file's content, and of its head.
    refused(&whole[..1024 + 2], "cannot be unpacked");
    refused(&whole[..700], "cannot be unpacked");
}

#[test]
fn another_tar_than_the_listed_one_is_taken_away_again() {
    let room = Room::new();
    let path = room.path("destination");
    let listed = Liar::new().file("a").file("b").bytes();
    for other in [
        Liar::new().file("a").bytes(),
        Liar::new().file("a").file("c").bytes(),
        Liar::new().file("a").file("b").file("c").bytes(),
        Liar::new().file("a").with("b", EntryType::Regular, "", b"longer").bytes(),
        Liar::new().file("a").with("b", EntryType::Symlink, "/etc", b"").bytes(),
    ] {
        let landing = Landing::new();
        let lander = TreeLander::list(&path, &mut &*listed).expect("a tree");
        let landed = lander.land(&landing, &mut &*other);
        assert!(matches!(landed, Err(FileError::Hostile { .. })), "{landed:?}");
        drop(landing);
        assert!(!path.exists());
    }
}

#[test]
fn nothing_is_put_over_what_stands_there() {
    let room = Room::new();
    let theirs = room.write("destination/theirs", b"precious");
    let tar = Liar::new().file("theirs").bytes();
    let landing = Landing::new();
    let lander = TreeLander::list(&room.path("destination"), &mut &*tar).expect("a tree");
    assert!(matches!(lander.land(&landing, &mut &*tar), Err(FileError::PathTaken { .. })));
    drop(landing);
    assert_eq!(read_all(&theirs), b"precious");
    // A single file is used when it is the very same, and never replaced.
    let file = FileLander::new(&theirs, 8);
    assert!(file.is_there(&file_sum(&theirs).expect("a sum")).expect("the same"));
    assert!(matches!(file.is_there(&[0; 32]), Err(FileError::PathTaken { .. })));
    assert!(file.land(&Landing::new(), &mut &b"another!"[..]).is_err());
    let fresh = FileLander::new(&room.path("fresh/file"), 3);
    assert!(!fresh.is_there(&[0; 32]).expect("nothing there"));
    let landing = Landing::new();
    fresh.land(&landing, &mut &b"new"[..]).expect("it lands");
    assert_eq!(read_all(&room.path("fresh/file")), b"new");
    drop(landing);
    assert!(!room.path("fresh").exists(), "taken away again");
}

#[test]
fn times_are_read_as_they_are_written() {
    use super::super::tar_tree::{read_time, time_text};
    let times = [(0, 0), (5, 1), (-1, 999_999_999), (-1, 0), (-2, 5), (1_700_000_000, 120_000_000)];
    for (s, ns) in times {
        assert_eq!(read_time(&time_text(s, ns)), Some((s, ns)), "{s} {ns}");
    }
    assert_eq!(read_time("12.5"), Some((12, 500_000_000)));
    for bad in ["", "x", "1.x", "1.-5", "99999999999999999999"] {
        assert_eq!(read_time(bad), None, "{bad}");
    }
}
