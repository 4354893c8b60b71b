//! The destination's tmpfs mounts: made when the first pages of a file on one are to come, completed in
//! the stop, and mounted by CRIU where the container has them. What is written on them comes from another
//! host: a name is one name, what is there already is an error, and nothing is followed.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use decamp_shared::pages::{PAGE_SIZE, SpaceId};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
    chmodat, chownat, linkat, lsetxattr, mkdirat, mknodat, openat, openat2, symlinkat, utimensat,
};

use super::{Entry, TREES, Tree, travels};
use crate::error::{ContainerError, Result};
use crate::images::PAGE_LIMIT;

/// A limit of its own has to be there from the beginning, or none can be set later.
const OPTIONS: &str = "mode=0700,size=1024T";
/// How paths on it are resolved.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A tmpfs of ours that the container will have.
pub(crate) struct Mounted {
    place: PathBuf,
    root: OwnedFd,
}

impl Mounted {
    /// Mounts one at `place`, which is made, under the name `source`.
    pub(crate) fn mount(place: &Path, source: &str) -> Result<Self> {
        fs::create_dir_all(place)
            .map_err(ContainerError::io(format!("make {}", place.display())))?;
        let what = || format!("mount a tmpfs on {}", place.display());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(source), place, Some("tmpfs"), flags, Some(OPTIONS))
            .map_err(ContainerError::errno(what()))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, place, flags, Mode::empty());
        let root = root.map_err(|errno| ContainerError::io(what())(errno.into()));
        match root {
            Ok(root) => Ok(Self { place: place.to_owned(), root }),
            Err(error) => {
                let _ = umount2(place, MntFlags::MNT_DETACH);
                Err(error)
            }
        }
    }

    /// Where it is mounted.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// A file on it that has no name yet.
    pub(crate) fn file(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        Ok(openat(&self.root, ".", flags, Mode::from(0o600))?.into())
    }

    /// Makes all that is in `tree`; `file_of` gives the files that have come in spaces. Then it has the
    /// limits that it shall have.
    pub(crate) fn fill<'a>(
        &self,
        tree: &Tree,
        file_of: impl Fn(SpaceId) -> Option<&'a File>,
    ) -> Result<()> {
        let mut filling = Filling { root: self.root.as_fd(), paths: Vec::new() };
        for (at, entry) in tree.entries.iter().enumerate() {
            filling.make(at, entry, &tree.entries, &file_of).map_err(|error| {
                let what = format!("cannot have {} on {}", shown(entry), tree.mounted);
                ContainerError::section(TREES, format!("{what}: {error}"))
            })?;
        }
        filling.set_times(&tree.entries).map_err(ContainerError::io("set the times of files"))?;
        let (options, flags) = limits(&tree.options);
        let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let remount =
            |options: &str| mount(None::<&str>, &self.place, None::<&str>, flags, Some(options));
        // Its pages are as large as they are; a kernel may not know larger ones.
        let plain = || options.iter().filter(|option| !option.starts_with("huge="));
        let plain = || plain().map(String::as_str).collect::<Vec<_>>().join(",");
        remount(&options.join(",")).or_else(|_| remount(&plain())).map_err(ContainerError::errno(
            format!("give the tmpfs for {} its limits ({})", tree.mounted, tree.options),
        ))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.place, MntFlags::MNT_DETACH) {
            tracing::warn!(%error, place = %self.place.display(), "Cannot unmount a tmpfs");
        }
        let _ = fs::remove_dir(&self.place);
    }
}

/// Options that limit it as `options` do, and flags for it.
fn limits(options: &str) -> (Vec<String>, MsFlags) {
    let known = ["size=", "nr_inodes=", "huge="];
    let mut found: Vec<String> = options
        .split(',')
        .filter(|option| known.iter().any(|name| option.starts_with(name)))
        .map(str::to_owned)
        .collect();
    if !found.iter().any(|option| option.starts_with("size=")) {
        // What the kernel has where nothing is said.
        found.push("size=50%".to_owned());
    }
    let read_only = options.split(',').any(|option| option == "ro");
    (found, if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() })
}

fn shown(entry: &Entry) -> String {
    format!("{:?}", String::from_utf8_lossy(&entry.name))
}

/// A tree that is being made.
struct Filling<'a> {
    root: BorrowedFd<'a>,
    /// Of each entry that was made, its path below the root.
    paths: Vec<PathBuf>,
}

impl Filling<'_> {
    fn make<'a>(
        &mut self,
        at: usize,
        entry: &Entry,
        entries: &[Entry],
        file_of: &impl Fn(SpaceId) -> Option<&'a File>,
    ) -> io::Result<()> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let kind = FileType::from_raw_mode(entry.mode);
        if at == 0 {
            if kind != FileType::Directory || !entry.name.is_empty() {
                return Err(bad("it is no root"));
            }
            self.paths.push(PathBuf::from("."));
            return set_attributes(self.root, c".".to_bytes(), entry, kind);
        }
        let name = &entry.name[..];
        if name.is_empty() || name.len() > 255 || name.contains(&b'/') || name.contains(&0) {
            return Err(bad("its name is none"));
        }
        let parent = entry.parent as usize;
        let is_directory =
            |entry: &Entry| FileType::from_raw_mode(entry.mode) == FileType::Directory;
        let (Some(path), true) =
            (self.paths.get(parent), entries.get(parent).is_some_and(is_directory))
        else {
            return Err(bad("its directory is none"));
        };
        let path = path.clone();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat2(self.root, &path, flags, Mode::empty(), CONFINED)?;
        self.paths.push(path.join(as_name(name)));
        if let Some(same) = entry.same_as {
            // One that was made before, and no directory: the kernel refuses those.
            let same =
                self.paths[..at].get(same as usize).ok_or_else(|| bad("it is made later"))?;
            return Ok(linkat(self.root, same, &directory, name, AtFlags::empty())?);
        }
        let mode = Mode::from(0o600);
        match kind {
            FileType::Directory => mkdirat(&directory, name, Mode::from(0o700))?,
            FileType::Symlink => symlinkat(&entry.target[..], &directory, name)?,
            FileType::Fifo => mknodat(&directory, name, FileType::Fifo, mode, 0)?,
            FileType::RegularFile => make_file(&directory, name, entry, file_of)?,
            _ => return Err(bad("it is of no kind that is moved")),
        }
        set_attributes(directory.as_fd(), name, entry, kind)
    }

    /// Last, and directories after what is in them: whatever is made in one changes its own.
    fn set_times(&self, entries: &[Entry]) -> io::Result<()> {
        for (entry, path) in entries.iter().zip(&self.paths).rev() {
            let time = Timespec {
                tv_sec: entry.written,
                tv_nsec: i64::from(entry.written_more.min(999_999_999)),
            };
            let times = Timestamps { last_access: time, last_modification: time };
            utimensat(self.root, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

fn make_file<'a>(
    directory: &OwnedFd,
    name: &[u8],
    entry: &Entry,
    file_of: &impl Fn(SpaceId) -> Option<&'a File>,
) -> io::Result<()> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if entry.size > PAGE_LIMIT * PAGE_SIZE as u64 {
        return Err(bad("it is longer than memory can be"));
    }
    if let Some(space) = entry.space {
        let file = file_of(SpaceId(space)).ok_or_else(|| bad("its contents never came"))?;
        // What came behind its end goes.
        file.set_len(entry.size)?;
        let held = format!("/proc/self/fd/{}", file.as_raw_fd());
        return Ok(linkat(CWD, &held[..], directory, name, AtFlags::SYMLINK_FOLLOW)?);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(directory, name, flags, Mode::from(0o600))?);
    file.set_len(entry.size)?;
    for data in &entry.data {
        let end = data.offset.checked_add(data.bytes.len() as u64);
        if end.is_none_or(|end| end > entry.size) {
            return Err(bad("it holds more than it is long"));
        }
        file.write_all_at(&data.bytes, data.offset)?;
    }
    Ok(())
}

/// Owner first: a change of it takes other things away.
fn set_attributes(
    directory: BorrowedFd<'_>,
    name: &[u8],
    entry: &Entry,
    kind: FileType,
) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(entry.owner), Gid::from_raw(entry.group));
    chownat(directory, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        chmodat(directory, name, Mode::from_raw_mode(entry.mode & 0o7777), AtFlags::empty())?;
    }
    let path = format!("/proc/self/fd/{}/", directory.as_raw_fd());
    let path = [path.as_bytes(), name].concat();
    for attribute in &entry.attributes {
        if !travels(&attribute.name) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an attribute of it is not moved",
            ));
        }
        lsetxattr(&path[..], &attribute.name[..], &attribute.value, XattrFlags::empty())?;
    }
    Ok(())
}

fn as_name(name: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;
    use crate::tmpfs::{Data, list, read_section, section};

    /// One for a test, where it can be mounted.
    fn mounted(place: &Path) -> Option<Mounted> {
        let mounted = Mounted::mount(place, "shm");
        mounted.inspect_err(|error| eprintln!("skipped: {error}: needs root")).ok()
    }

    fn listed(mounted: &Mounted, space_of: impl Fn(u64) -> Option<u32>) -> Vec<Entry> {
        let device = fs::metadata(mounted.place()).expect("metadata").dev();
        list::entries(mounted.root.as_fd(), device, space_of).expect("listed")
    }

    fn tree(entries: Vec<Entry>) -> Tree {
        let options = "rw,size=65536k,nr_inodes=1000,mode=755,inode64".to_owned();
        Tree { number: 0, mounted: "/x".into(), source: "shm".into(), options, entries }
    }

    #[test]
    fn what_is_listed_is_made_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let Some(from) = mounted(&directory.path().join("from")) else { return };
        let at = |name: &str| from.place().join(name);
        fs::create_dir(at("some")).expect("a directory");
        fs::write(at("some/small"), b"contents").expect("a file");
        fs::set_permissions(at("some/small"), PermissionsExt::from_mode(0o4640)).expect("a mode");
        fs::hard_link(at("some/small"), at("again")).expect("a link");
        symlink("/nowhere/at all", at("link")).expect("a link");
        fs::write(at("large"), vec![7; 300 << 10]).expect("a file");
        let sparse = File::create(at("sparse")).expect("a file");
        sparse
            .set_len(1 << 40)
            .and_then(|()| sparse.write_all_at(b"end", 1 << 30))
            .expect("sparse");
        let large = fs::metadata(at("large")).expect("metadata").ino();
        let entries = listed(&from, |inode| (inode == large).then_some(9));
        let told = section(&[tree(entries.clone())]).expect("a section");
        let [told] = &read_section(&told).expect("a tree")[..] else { panic!("one") };

        let Some(to) = mounted(&directory.path().join("to")) else { return };
        let file = to.file().expect("a file");
        file.write_all_at(&vec![7; 304 << 10], 0).expect("it came");
        to.fill(told, |space| (space == SpaceId(9)).then_some(&file)).expect("filled");
        let there = |name: &str| to.place().join(name);
        assert_eq!(fs::read(there("large")).expect("read"), vec![7; 300 << 10]);
        let large = fs::metadata(there("large")).expect("metadata").ino();
        // In the order in which each lists them.
        let by_name = |mut entries: Vec<Entry>| {
            entries.sort_by(|one, other| one.name.cmp(&other.name));
            let plain =
                |entry: Entry| Entry { parent: 0, same_as: None, data: Vec::new(), ..entry };
            entries.into_iter().map(plain).collect::<Vec<_>>()
        };
        let again = listed(&to, |inode| (inode == large).then_some(9));
        assert_eq!(by_name(again), by_name(entries));
        assert_eq!(fs::read(there("again")).expect("read"), b"contents");
        assert_eq!(fs::metadata(there("again")).expect("metadata").nlink(), 2);
        assert!(fs::metadata(there("sparse")).expect("metadata").blocks() < 64);
        let found = nix::sys::statvfs::statvfs(to.place()).expect("its limits");
        assert_eq!((found.blocks() * found.fragment_size(), found.files()), (64 << 20, 1000));
    }

    #[test]
    fn what_lies_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Entry { mode: libc::S_IFDIR | 0o755, ..Entry::default() };
        let file = |name: &[u8]| Entry {
            name: name.to_vec(),
            mode: libc::S_IFREG | 0o600,
            size: 4,
            ..Entry::default()
        };
        let link = Entry { mode: libc::S_IFLNK | 0o777, target: b"/tmp".to_vec(), ..file(b"l") };
        let long = Data { offset: u64::MAX, bytes: vec![1; 4] };
        let lies: [(&str, Vec<Entry>); 11] = [
            ("upwards", vec![file(b"..")]),
            ("a path", vec![file(b"a/b")]),
            ("no name", vec![file(b"")]),
            ("twice", vec![file(b"a"), file(b"a")]),
            ("below a link", vec![link, Entry { parent: 1, ..file(b"a") }]),
            ("below a file", vec![file(b"a"), Entry { parent: 1, ..file(b"b") }]),
            ("below what comes later", vec![Entry { parent: 7, ..file(b"a") }]),
            ("a space that never came", vec![Entry { space: Some(3), ..file(b"a") }]),
            ("a device", vec![Entry { mode: libc::S_IFBLK | 0o600, ..file(b"a") }]),
            ("too much", vec![Entry { data: vec![long], ..file(b"a") }]),
            ("itself", vec![Entry { same_as: Some(1), ..file(b"a") }]),
        ];
        for (at, (what, entries)) in lies.into_iter().enumerate() {
            let Some(to) = mounted(&directory.path().join(at.to_string())) else { return };
            let tree = tree([vec![root.clone()], entries].concat());
            let error = to.fill(&tree, |_| None).expect_err(what);
            eprintln!("{what}: {error}");
        }
    }
}
