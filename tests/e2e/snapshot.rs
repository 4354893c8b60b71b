//! What there is on a host: processes, namespaces, mounts, links, firewall tables, cgroups, files. Taken
//! before and after, it shows what a failed move left behind.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::hosts::{ALPHA, BETA, Hosts};
use crate::running::until;

/// How long leftovers may take to go.
const CLEAN_WITHIN: Duration = Duration::from_secs(120);

/// Lists everything, one thing a line. Processes first and without starting any, so that it sees none of
/// its own. Not named: a database's working files, what runc and CRIU make for themselves at their first use and
/// keep, and what a container's own processes start: that comes and goes as the workload likes, and is there
/// as long as the container's first process is, which is named. Who came in from outside has a parent outside.
const SCRIPT: &str = r#"
export LC_ALL=C
numbers() { # PID: in each of its PID namespaces, and its parent's number here
    local line lines
    numbers=() parent=0
    # All at once: `read` goes back to where a line ended, and the kernel writes the file anew for that, longer or
    # shorter by then.
    mapfile -t lines <"/proc/$1/status"
    for line in "${lines[@]}"; do
        case $line in
            PPid:*) parent=${line##*[[:space:]]} ;;
            NSpid:*) read -ra numbers <<<"${line#*:}"; return ;;
        esac
    done
    return 1 # It has gone.
}
for dir in /proc/[0-9]*; do
    mapfile -d '' -t words <"$dir/cmdline" 2>/dev/null || continue
    ((${#words[@]})) || continue
    numbers "${dir##*/}" || continue
    if ((${#numbers[@]} > 1 && numbers[-1] != 1)); then
        depth=${#numbers[@]}
        numbers "$parent" || continue
        ((${#numbers[@]} < depth)) || continue
    fi
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
    /// Looks at both hosts, until they look the same twice: what comes and goes while something is still about to
    /// begin or to end (programs that an agent asks, say) would be missed later.
    #[track_caller]
    pub(crate) fn take(hosts: &'static Hosts) -> Self {
        let mut things = look(hosts);
        until("the hosts to come to rest", CLEAN_WITHIN, || {
            let now = look(hosts);
            std::mem::replace(&mut things, now) == things
        });
        Self { hosts, things }
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
