//! A look at the running tree for what CRIU cannot dump, before anything is frozen.

use std::fs;
use std::path::Path;

/// Namespaces that every process of a container shares with its first one.
const SHARED_NAMESPACES: [&str; 6] = ["ipc", "mnt", "net", "pid", "user", "uts"];

/// Every reason why the processes `pids` of the container with first process `init` cannot be moved.
/// A process that ends while it is looked at gives none.
pub(crate) fn obstacles(pids: &[i32], init: i32) -> Vec<String> {
    let mut found = Vec::new();
    let ours: Vec<_> = SHARED_NAMESPACES.iter().map(|kind| namespace(init, kind)).collect();
    for pid in pids {
        for (kind, ours) in SHARED_NAMESPACES.iter().zip(&ours) {
            if namespace(*pid, kind).is_some_and(|theirs| Some(&theirs) != ours.as_ref()) {
                found.push(format!(
                    "Process {} is in another {kind} namespace than the container",
                    label(*pid)
                ));
            }
        }
        if tracer(*pid).is_some_and(|tracer| tracer != 0) {
            found.push(format!("Process {} is traced (by a debugger?)", label(*pid)));
        }
        for what in descriptors(*pid) {
            found.push(format!("Process {} uses {what}, which CRIU cannot dump", label(*pid)));
        }
    }
    found.sort();
    found.dedup();
    found
}

fn namespace(pid: i32, kind: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

fn tracer(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()
}

fn label(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{pid} ({})", name.trim())
}

/// What among the open descriptors of a process is in the way.
fn descriptors(pid: i32) -> Vec<&'static str> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let mut found: Vec<&'static str> = entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter_map(|link| in_the_way(&link))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn in_the_way(link: &Path) -> Option<&'static str> {
    match link.to_str()? {
        "anon_inode:[io_uring]" => Some("io_uring"),
        "anon_inode:[userfaultfd]" => Some("a userfaultfd"),
        "anon_inode:kvm-vm" | "/dev/kvm" => Some("KVM"),
        "anon_inode:[perf_event]" => Some("a performance counter"),
        "anon_inode:bpf-map" | "anon_inode:bpf-prog" => Some("BPF"),
        "anon_inode:[fanotify]" => Some("fanotify"),
        path if path.starts_with("/dev/dri/") || path.starts_with("/dev/nvidia") => {
            Some("a graphics device")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_ourselves_are_not_in_the_way_until_we_use_userfaultfd() {
        let pid = std::process::id() as i32;
        assert_eq!(obstacles(&[pid], pid), Vec::<String>::new());
        assert_eq!(in_the_way(Path::new("anon_inode:[io_uring]")), Some("io_uring"));
        assert_eq!(in_the_way(Path::new("/dev/null")), None);
    }
}
