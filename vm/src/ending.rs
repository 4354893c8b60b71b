//! How the agent's side ends a VM that is to be stopped, and takes away what is left of one that is not here any more: by
//! asking its keeper or, where that does not answer, by force.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use decamp_shared::keeper::{
    ExitRecord, KeeperClient, end_by_force, end_left, listens, write_exit_record,
};
use decamp_shared::workload::{Place, Result, WorkloadError};

use crate::backend::vsock_socket;
use crate::cgroup::Cgroups;

/// How long a guest is given to end when it is stopped and nobody says: a database has much to write.
const GRACE: Duration = Duration::from_secs(60);
/// A keeper that has not ended its guest so long after that will not. It may have to do first what was asked before, as
/// to have a disk store what was written.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// What is killed has ended within this, or waits for the kernel: a disk that does not answer.
const KILLED_WITHIN: Duration = Duration::from_secs(20);
/// As of a process that was ended by SIGKILL.
const KILLED: i32 = 128 + libc::SIGKILL;

/// Ends the VM at `place`: asks its guest to power off, then, after `grace`, ends it as it is, and the keeper with it if
/// that does not answer. One that nobody can ask any more is left to [`sweep`].
///
/// # Errors
/// When its keeper refuses, nobody listens there, or it does not end even by force.
pub(crate) fn stop(place: &Place, grace: Option<Duration>) -> Result<()> {
    stop_within(place, grace.unwrap_or(GRACE), ANSWER_WITHIN)
}

fn stop_within(place: &Place, grace: Duration, within: Duration) -> Result<()> {
    let within = grace.saturating_add(within);
    let asked = KeeperClient::connect_within(place, within).and_then(|mut one| one.stop(grace));
    match asked {
        // One that no longer listens is ending by itself.
        Err(error) if is_silent(&error) && listens(place) => {
            let ended = end_by_force(place, KILLED_WITHIN).map_err(|error| {
                let what = format!("The VMM of {} does not answer, and does not end", place.name);
                WorkloadError::new(what, error)
            })?;
            if ended == 0 {
                return Err(error);
            }
            tracing::warn!(workload = place.name, %error, "Its VMM did not answer: ended by force");
            if !place.exit_record().exists() {
                let text = "its VMM did not answer, and was ended by force".to_owned();
                write_exit_record(place, &ExitRecord { status: KILLED, text });
            }
            Ok(())
        }
        asked => asked,
    }
}

/// Takes away what is left of the VM at `place`, which is not to run here: a keeper that has not ended though its guest
/// has or has gone elsewhere, its control groups and its sockets.
///
/// # Errors
/// When its keeper does not end, or a socket cannot be removed.
pub(crate) fn sweep(place: &Place) -> Result<()> {
    end_left(place)?;
    // All that a keeper holds goes with its process; its control groups and sockets stay behind.
    if let Err(error) = Cgroups::of(place).and_then(|cgroups| cgroups.remove()) {
        tracing::warn!(workload = place.name, %error, "Cannot remove its control groups");
    }
    for socket in [place.console(), vsock_socket(place)] {
        let removed = match fs::symlink_metadata(&socket) {
            Ok(meta) if meta.file_type().is_socket() => fs::remove_file(&socket),
            _ => Ok(()),
        };
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                let what = format!("Could not remove {}", socket.display());
                return Err(WorkloadError::new(what, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether `error` is that nothing was said, or in time, rather than something that a keeper said.
fn is_silent(error: &WorkloadError) -> bool {
    match error {
        WorkloadError::KeeperGone { .. } => true,
        WorkloadError::Failed { source: Some(source), .. } => {
            // So many ask already that there was no room for one more.
            let source = source.downcast_ref::<io::Error>().map(io::Error::kind);
            matches!(source, Some(ErrorKind::WouldBlock | ErrorKind::TimedOut))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command, Stdio};

    use decamp_shared::keeper::{is_kept, note_processes};

    use super::*;

    const NOW: Duration = Duration::ZERO;
    const SOON: Duration = Duration::from_millis(50);

    /// A place whose keeper is a process that ends only by force.
    fn kept() -> (tempfile::TempDir, Place, Child) {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
        let mut command = Command::new("sleep");
        let keeper = command.arg("1000").stdin(Stdio::null()).spawn().expect("started");
        note_processes(&place, &[keeper.id() as i32]).expect("noted");
        (dir, place, keeper)
    }

    fn is_noted(place: &Place) -> bool {
        let record = fs::read(place.exit_record()).expect("an exit record");
        let record: ExitRecord = serde_json::from_slice(&record).expect("JSON");
        record.status == KILLED && record.text.contains("by force")
    }

    #[test]
    fn a_keeper_that_does_not_answer_is_ended_by_force() {
        let (_dir, place, mut keeper) = kept();
        let _deaf = UnixListener::bind(place.socket()).expect("listens");
        stop_within(&place, NOW, SOON).expect("ended");
        assert_eq!(keeper.wait().expect("ended").code(), None);
        assert!(is_noted(&place));
    }

    #[test]
    fn a_keeper_that_does_not_listen_is_there_until_it_is_swept_away() {
        let (_dir, place, mut keeper) = kept();
        assert!(is_kept(&place), "taken for dead");
        let gone = stop_within(&place, NOW, SOON).expect_err("nobody can be asked");
        assert!(matches!(gone, WorkloadError::KeeperGone { .. }), "{gone}");
        assert!(is_kept(&place) && !place.exit_record().exists(), "it may be ending by itself");
        sweep(&place).expect("swept");
        assert_eq!(keeper.wait().expect("ended").code(), None);
        assert!(!is_kept(&place));
    }

    #[test]
    fn what_its_guest_ended_with_stands() {
        let (_dir, place, mut keeper) = kept();
        let record = ExitRecord { status: 0, text: "powered off".into() };
        write_exit_record(&place, &record);
        let _deaf = UnixListener::bind(place.socket()).expect("listens");
        stop_within(&place, NOW, SOON).expect("ended");
        keeper.wait().expect("ended");
        let stands = fs::read(place.exit_record()).expect("a record");
        assert_eq!(serde_json::from_slice::<ExitRecord>(&stands).expect("JSON"), record);
    }

    #[test]
    fn what_a_keeper_refuses_is_not_done_by_force() {
        let refused = WorkloadError::plain("It is fenced");
        assert!(!is_silent(&refused));
        let other =
            WorkloadError::new("Cannot connect", io::Error::from_raw_os_error(libc::EMFILE));
        assert!(!is_silent(&other));
    }
}
