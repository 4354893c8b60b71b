//! What a keeper writes down before files of its workload are replaced by others: whoever finds that, after whatever
//! crash, knows that the new ones are the workload's, and whoever does not, that the old ones are.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::workload::Place;

/// No migration has a longer name.
const NAME_CAP: u64 = 64;

/// Notes that the files of the workload at `place` are those that `migration` made. On disk when this returns.
///
/// # Errors
/// When it could not be written: then it does not stand there.
pub fn record_switch(place: &Place, migration: &str) -> io::Result<()> {
    let path = record(place);
    write_durably(&path, migration.as_bytes()).inspect_err(|_| drop(remove_durably(&path)))
}

/// Whether the files of the workload at `place` are those that `migration` made.
///
/// # Errors
/// When that cannot be read.
pub fn switched_for(place: &Place, migration: &str) -> io::Result<bool> {
    let mut text = String::new();
    match File::open(record(place)) {
        Ok(file) => file.take(NAME_CAP).read_to_string(&mut text).map(|_| text == migration),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Nobody needs to know any more.
pub fn forget_switch(place: &Place) {
    if let Err(error) = remove_durably(&record(place))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(workload = place.name, %error, "Cannot remove the record of a switch");
    }
}

/// Writes a file whole, or not at all, whatever crash comes. On disk, with its name, when this returns.
///
/// # Errors
/// When it cannot be written; its name may be there then.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Before anything is there: what cannot be made to last is not begun.
    let around = File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
    let fresh = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut write = || {
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&fresh)))?;
    around.sync_all()
}

/// Removes a file, also from what a crash leaves.
fn remove_durably(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

fn record(place: &Place) -> PathBuf {
    place.dir.join("switched")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_is_known_by_its_migration() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        assert!(!switched_for(&place, "one").expect("looked"));
        record_switch(&place, "one").expect("written");
        record_switch(&place, "two").expect("written");
        assert!(switched_for(&place, "two").expect("looked"));
        assert!(!switched_for(&place, "one").expect("looked"));
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 1, "nothing else is left");
        forget_switch(&place);
        forget_switch(&place);
        assert!(!switched_for(&place, "two").expect("looked"));
        let path = record(&place);
        fs::create_dir(&path).expect("made");
        record_switch(&place, "one").expect_err("a directory stands there");
        assert!(!path.with_extension("new").exists(), "half of it is left");
        let gone = Place { dir: dir.path().join("none"), ..place };
        record_switch(&gone, "one").expect_err("there is no such place");
    }
}
