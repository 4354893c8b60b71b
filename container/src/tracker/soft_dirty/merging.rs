//! What KSM does on this host: it forgets the bit of a page that it merges, and the page that it takes apart
//! again may lie where it once lay.

use std::fs;
use std::io;
use std::path::Path;

pub(super) const DIRECTORY: &str = "/sys/kernel/mm/ksm";
/// What changes when it merges, or takes apart (kernel document `admin-guide/mm/ksm`).
const COUNTS: [&str; 5] =
    ["full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"];

/// What it has done so far: the same at two times if it did nothing in between. Nothing when it is at work.
pub(super) fn so_far() -> Option<Vec<String>> {
    so_far_in(Path::new(DIRECTORY))
}

fn so_far_in(directory: &Path) -> Option<Vec<String>> {
    match fs::read_to_string(directory.join("run")) {
        Ok(run) if run.trim() == "0" => {}
        // The kernel was built without.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(Vec::new()),
        _ => return None,
    }
    let count = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
    Some(COUNTS.map(count).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_merged_meanwhile_is_found_out() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path();
        assert_eq!(so_far_in(directory), Some(Vec::new()), "there is no such thing");
        let set = |name: &str, text: &str| fs::write(directory.join(name), text).expect("a file");
        set("run", "0\n");
        let before = so_far_in(directory).expect("it is not at work");
        assert_eq!(so_far_in(directory).as_ref(), Some(&before));
        for run in ["1\n", "2\n", ""] {
            set("run", run);
            assert_eq!(so_far_in(directory), None, "{run:?}");
        }
        set("run", "0\n");
        for name in COUNTS {
            set(name, "1\n");
            assert_ne!(so_far_in(directory).as_ref(), Some(&before), "{name}");
            fs::remove_file(directory.join(name)).expect("a file");
        }
    }
}
