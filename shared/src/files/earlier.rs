//! What stands of an earlier copy where a tree is to land, held against the index: what must go, and
//! which files may be the same. Nothing here changes anything, and nothing that is mounted below is
//! entered: it is somebody else's.

use std::collections::{BTreeMap, HashSet};
use std::io;

use rustix::fs::{self, AtFlags, Stat, StatxAttributes, StatxFlags};

use super::attributes::type_of;
use super::beneath::{Identity, Root, Visit, identity, is_dir, is_gone};
use super::error::{Doing, FileError, Result};
use super::index::{Entry, Index, split};

/// An earlier copy beside the index of what comes.
#[derive(Debug, Default)]
pub(super) struct Earlier {
    /// Paths that the index lacks or has as something else, without what is below them.
    pub(super) remove: Vec<Vec<u8>>,
    /// Entries whose file looks the same. Only its content can say whether it is.
    pub(super) alike: BTreeMap<usize, Identity>,
}

impl Earlier {
    /// Looks at everything that stands at `root`.
    ///
    /// # Errors
    /// When it cannot be read, or something is mounted below it.
    pub(super) fn look(root: &Root, index: &Index) -> Result<Self> {
        let mut earlier = Self::default();
        let (mut gone, mut claimed) = (HashSet::new(), HashSet::new());
        root.walk(|visit| {
            if is_mounted(visit)? {
                return Err(FileError::mounted(&root.shown(visit.path)));
            }
            let found = index.find(visit.path);
            if let Some((number, entry)) = found.map(|number| (number, &index.entries[number]))
                && type_of(visit.stat) == Some(entry.kind())
            {
                let file = identity(visit.stat);
                if entry.has_content()
                    && is_alike(entry, visit.stat, index.names(number))
                    && claimed.insert(file)
                {
                    earlier.alike.insert(number, file);
                }
                return Ok(());
            }
            let below_gone = gone.contains(split(visit.path).0);
            if is_dir(visit.stat) {
                gone.insert(visit.path.to_vec());
            }
            if !below_gone {
                earlier.remove.push(visit.path.to_vec());
            }
            Ok(())
        })?;
        Ok(earlier)
    }
}

/// Whether a file that stands there may have the entry's content: no proof, because size and time
/// can be the same for another content (`cp -p`, `touch -r`, times that a build clamps). `names`:
/// how many it has in the index; with any other number, writing in it later would change a file that
/// is none of its names.
pub(super) fn is_alike(entry: &Entry, stat: &Stat, names: u64) -> bool {
    stat.st_size as u64 == entry.size
        && (stat.st_mtime, stat.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_ns)
        && stat.st_mode & 0o7777 == entry.mode
        && i128::from(stat.st_nlink) == i128::from(names)
}

/// Whether something is mounted in the place of this very entry. A bind mount has the device of
/// what it shows, so the kernel is asked; kernels before 5.8 tell by the device alone.
fn is_mounted(visit: &Visit<'_>) -> Result<bool> {
    if visit.path.is_empty() {
        return Ok(false);
    }
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    match fs::statx(visit.dir, visit.name, flags, StatxFlags::TYPE) {
        Ok(seen) if seen.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) => {
            Ok(seen.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        }
        Ok(_) => Ok(visit.device.is_some() && is_dir(visit.stat)),
        Err(error) if is_gone(&io::Error::from(error)) => Ok(false),
        Err(error) => Err(error).doing("look at", &visit.root.shown(visit.path)),
    }
}
