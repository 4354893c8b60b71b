//! A workload out of a file: everything is looked at first, then an empty workload is filled, and only
//! when all of it is there it runs.

use std::io::Read;

use super::error::{ArchiveError, Result};
use super::header::PartInfo;
use super::parcel::Unpacking;
use super::read::Archive;
use crate::files::Landing;
use crate::workload::DestinationWorkload;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many bytes are checked of so many.
    Checking(u64, u64),
    /// So many bytes are in place of so many.
    Placing(u64, u64),
    /// Everything is there; the state is being loaded.
    Loading,
}

/// Goes through all of `archive`. Touches nothing.
///
/// # Errors
/// Everything that is wrong with the file, or keeps it from being restored here.
pub fn verify(
    archive: &mut Archive,
    unpacking: &mut dyn Unpacking,
    tell: &dyn Fn(Step),
) -> Result<()> {
    let total = archive.header().bytes();
    let mut done = 0;
    let path = archive.path().to_owned();
    let looked = archive.verify(&mut |part, content| {
        unpacking.look(part, content)?;
        done += part.size;
        tell(Step::Checking(done, total));
        Ok(())
    });
    // What is wrong with a part is wrong with the file.
    let refused = |what: String| ArchiveError::Refused { path: path.clone(), what };
    looked.map_err(|error| match error {
        error
        @ (ArchiveError::Part { .. } | ArchiveError::Files(_) | ArchiveError::Workload(_)) => {
            refused(crate::session::error::chain(&error))
        }
        other => other,
    })?;
    unpacking.check(archive)
}

/// Fills `destination` from a verified `archive`, and loads it: it could run then.
///
/// # Errors
/// When anything fails; the caller discards the workload and what has landed.
pub fn fill(
    archive: &Archive,
    unpacking: &mut dyn Unpacking,
    destination: &mut dyn DestinationWorkload,
    landing: &Landing,
    tell: &dyn Fn(Step),
) -> Result<()> {
    let total = archive.header().bytes();
    let mut done = 0;
    archive.unpack(&mut |part: &PartInfo, content: &mut dyn Read| {
        fail::fail_point!("restore-part", |_| Err(failed_on_purpose("restore-part")));
        unpacking.take(part, content, destination, landing)?;
        done += part.size;
        tell(Step::Placing(done, total));
        Ok(())
    })?;
    tell(Step::Loading);
    let sections = unpacking.finish(landing)?;
    Ok(destination.load(sections)?)
}

#[cfg(feature = "failpoints")]
fn failed_on_purpose(name: &str) -> ArchiveError {
    crate::workload::WorkloadError::plain(format!("Failed on purpose ({name})")).into()
}
