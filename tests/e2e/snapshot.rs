//! What there is on a host: processes, namespaces, mounts, links, firewall tables, cgroups, files. Taken
//! before and after, it shows what a failed move left behind.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::hosts::{ALPHA, BETA, Hosts};

/// How long leftovers may take to go.
const CLEAN_WITHIN: Duration = Duration::from_secs(20);

/// Lists everything, one thing a line. Processes first and without starting any, so that it sees none of
/// its own. Not named: a database's working files, and what runc and CRIU make for themselves at their first
/// use and keep.
const SCRIPT: &str = r#"
export LC_ALL=C
for dir in /proc/[0-9]*; do
    mapfile -d '' -t words <"$dir/cmdline" 2>/dev/null || continue
    ((${#words[@]})) || continue
    case "${words[*]}" in *decamp-e2e-snapshot*|"sleep infinity") continue ;; esac
    echo "process ${words[*]}"
done 2>/dev/null
for kind in net mnt pid ipc uts; do
    echo "namespaces $kind $(readlink /proc/[0-9]*/ns/$kind | sort -u | wc -l)"
done
awk '{ print "mount", $5 }' /proc/self/mountinfo
ls /sys/class/net | sed 's/^/link /'
nft list tables 2>/dev/null | sed 's/^/firewall /'
find /sys/fs/cgroup -type d | sed 's/^/cgroup /'
find /run /tmp /dev/shm /srv /var/lib/decamp \( -path /run/decamp-host -o -path /run/criu.kdat \) -prune -o -print |
    grep -v -e '-wal$' -e '-shm$' -e '-journal$' -e '^/run/runc$' | sed 's/^/file /'
true
"#;

/// All that was on both hosts.
pub(crate) struct Snapshot {
    hosts: &'static Hosts,
    things: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at both hosts.
    #[track_caller]
    pub(crate) fn take(hosts: &'static Hosts) -> Self {
        Self { hosts, things: look(hosts) }
    }

    /// Waits until both hosts look as they did; panics with what is left, or missing.
    #[track_caller]
    pub(crate) fn is_restored(&self) {
        let deadline = Instant::now() + CLEAN_WITHIN;
        loop {
            let now = look(self.hosts);
            if now == self.things {
                return;
            }
            let left: Vec<_> = now.difference(&self.things).collect();
            let missing: Vec<_> = self.things.difference(&now).collect();
            assert!(
                Instant::now() < deadline,
                "after {CLEAN_WITHIN:?}\n  left behind: {left:#?}\n  missing: {missing:#?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

#[track_caller]
fn look(hosts: &Hosts) -> BTreeSet<String> {
    let mut things = BTreeSet::new();
    for host in [ALPHA, BETA] {
        let words = ["bash", "-c", SCRIPT, "decamp-e2e-snapshot"];
        let listed = hosts.exec(host, &words).expect(0).stdout;
        let mut seen = std::collections::BTreeMap::<&str, u32>::new();
        for line in listed.lines() {
            // The same thing twice is another thing.
            let count = seen.entry(line).or_default();
            *count += 1;
            things.insert(format!("{host}: {line} ({count})"));
        }
    }
    things
}
