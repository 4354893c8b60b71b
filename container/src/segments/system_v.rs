//! System V segments at the destination: CRIU makes them, as it found them, and empty. What they hold it
//! reads from a parent image, whose pages file is what has come.

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;

use decamp_shared::pages::PAGE_SIZE;
use decamp_shared::sparse::Data;
use nix::sched::{CloneFlags, setns};

use super::message::{Image, Message};
use super::{Moved, SEGMENTS};
use crate::beside;
use crate::error::{ContainerError, Result};
use crate::images::{PE_PARENT, Pagemap};
use crate::sys;

const PAGE: u64 = PAGE_SIZE as u64;
const IPCNS_SHM_MAGIC: u32 = 0x4628_3044;
/// The kernel's mark of a segment that goes with its last attachment (`SHM_DEST`).
const DESTROYED: u64 = 0o1000;

/// The number of the pages file of a space that is a System V segment; those of processes are lower.
pub(super) fn pages_id(space: u32) -> u32 {
    space.saturating_add(2)
}

/// Enters what has come in `file` for the segment `moved` into `images`, as pages of their parent.
pub(super) fn enter(images: &Path, parent: &Path, moved: &Moved, file: &File) -> Result<()> {
    let name = format!("pagemap-shmem-{}.img", moved.inode);
    let bad = |what: &str| ContainerError::section(SEGMENTS, format!("has {name}, which {what}"));
    let path = images.join(&name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        // Nobody had it attached any more, and it was deleted.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ContainerError::io(format!("read {}", path.display()))(error)),
    };
    let mut pagemap = Pagemap::parse(&bytes).map_err(bad)?;
    let data = data(file).map_err(ContainerError::io("look at System V memory"))?;
    let Some(end) = data.last().map(|range| range.end) else { return Ok(()) };
    pagemap.add_hidden(&data, PE_PARENT).map_err(bad)?;
    // CRIU waits for ever for what is behind the end of a file.
    file.set_len(end * PAGE).map_err(ContainerError::io("complete System V memory"))?;
    let write = |path: &Path, pagemap: &Pagemap| {
        fs::write(path, pagemap.to_bytes())
            .map_err(ContainerError::io(format!("write {}", path.display())))
    };
    write(&path, &pagemap)?;
    write(&parent.join(&name), &Pagemap::of_pages(pages_id(moved.space), end))
}

/// Segments that were destroyed, and lasted as long as somebody had them attached, CRIU makes as if they
/// had not been. The restored tasks, the first of which is `init`, stand still and have them attached.
pub(crate) fn destroy_again(images: &Path, init: i32) -> Result<()> {
    let list = || format!("list {}", images.display());
    let mut doomed = Vec::new();
    for entry in fs::read_dir(images).map_err(ContainerError::io(list()))? {
        let entry = entry.map_err(ContainerError::io(list()))?;
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| name.starts_with("ipcns-shm-")) {
            continue;
        }
        for segment in Image::read(&entry.path(), IPCNS_SHM_MAGIC)?
            .into_iter()
            .flat_map(|image| image.messages)
        {
            let described = segment.bytes(1).and_then(Message::parse);
            let number = |tag| described.as_ref().and_then(|described| described.number(tag));
            if number(6).is_some_and(|mode| mode & DESTROYED != 0) {
                doomed.extend(number(7).and_then(|id| i32::try_from(id).ok()));
            }
        }
    }
    if doomed.is_empty() {
        return Ok(());
    }
    let namespace = format!("/proc/{init}/ns/ipc");
    let namespace =
        File::open(&namespace).map_err(ContainerError::io(format!("open {namespace}")))?;
    // A thread of its own: it never comes back from there.
    let destroy = || -> std::io::Result<()> {
        setns(&namespace, CloneFlags::CLONE_NEWIPC)?;
        doomed.iter().try_for_each(|id| sys::destroy_segment(*id))
    };
    beside::apart(|| {
        destroy().map_err(ContainerError::io("destroy System V segments as they were"))
    })
}

/// Pages of a file that hold something.
fn data(file: &File) -> std::io::Result<Vec<Range<u64>>> {
    Data::of(file).pages().collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::images::PagemapHead;
    use crate::segments::FIRST_SPACE;

    #[test]
    fn what_has_come_is_in_the_parent() {
        let directory = tempfile::tempdir().expect("a directory");
        let (images, parent) = (directory.path().join("images"), directory.path().join("parent"));
        fs::create_dir(&images).and_then(|()| fs::create_dir(&parent)).expect("directories");
        let file = File::options();
        let file = file.clone().read(true).write(true).create_new(true).open(parent.join("pages"));
        let file = file.expect("a file");
        file.set_len(100 * PAGE).expect("a size");
        file.write_all_at(&[1; 2 * PAGE_SIZE], 8 * PAGE).expect("written");
        let moved = Moved { space: FIRST_SPACE, inode: 7, system_v: true };
        enter(&images, &parent, &moved, &file).expect("it is gone");
        let empty = Pagemap { head: PagemapHead { pages_id: 4 }, entries: Vec::new() };
        let path = images.join("pagemap-shmem-7.img");
        fs::write(&path, empty.to_bytes()).expect("written");
        enter(&images, &parent, &moved, &file).expect("entered");
        let read = |path: &Path| Pagemap::parse(&fs::read(path).expect("read")).expect("a pagemap");
        let entered = read(&path);
        let ranges: Vec<_> = entered.entries.iter().filter_map(|entry| entry.range()).collect();
        // A file system may hold more than was written.
        assert!(ranges.first().is_some_and(|range| range.start <= 8), "{ranges:?}");
        assert!(entered.entries.iter().all(|entry| entry.flags == Some(PE_PARENT)));
        let end = ranges.last().map_or(0, |range| range.end);
        let whole = read(&parent.join("pagemap-shmem-7.img"));
        assert_eq!(whole.entries.last().and_then(|entry| entry.range()), Some(0..end));
        assert_eq!(file.metadata().expect("metadata").len(), end * PAGE);
        fs::write(&path, b"no pagemap").expect("written");
        assert!(enter(&images, &parent, &moved, &file).is_err());
    }
}
