//! A virtual machine with the test guest in it, which says by itself whether its memory is right.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::hosts::Hosts;
use crate::running::{find, until};

/// A guest reports every 50 ms: this is a hundred reports.
const REPORT_WITHIN: Duration = Duration::from_secs(120);
/// A dozen reports.
const ADVANCES_WITHIN: Duration = Duration::from_millis(600);
/// Sweeping or verifying a GiB, on a busy machine.
const VERIFY_WITHIN: Duration = Duration::from_secs(180);

/// A virtual machine; taken away from both hosts when it is dropped.
pub(crate) struct Guest {
    hosts: &'static Hosts,
    name: &'static str,
}

impl Guest {
    /// Starts one and waits until it is filled. `memory` is for `--memory`, `options` are the guest's own.
    #[track_caller]
    pub(crate) fn start(
        hosts: &'static Hosts,
        host: &str,
        name: &'static str,
        memory: &str,
        options: &str,
    ) -> Self {
        Self::start_with(hosts, host, name, memory, options, &[])
    }

    /// The same with more words for `decamp run vm`.
    #[track_caller]
    pub(crate) fn start_with(
        hosts: &'static Hosts,
        host: &str,
        name: &'static str,
        memory: &str,
        options: &str,
        more: &[&str],
    ) -> Self {
        let guest = Self { hosts, name };
        guest.remove();
        let words =
            ["run", "vm", name, "--kernel", "/srv/guest.elf", "--memory", memory, "--cmdline"];
        hosts.decamp(host, &[&words[..], &[options], more].concat()).expect(0);
        until(&format!("{name} to report"), VERIFY_WITHIN, || {
            guest.log(host).contains("verdict=clean")
        });
        guest
    }

    /// One that somebody else started.
    pub(crate) fn found(hosts: &'static Hosts, name: &'static str) -> Self {
        Self { hosts, name }
    }

    /// Whether it reports within a moment in which it would report often.
    pub(crate) fn advances(&self, host: &str) -> bool {
        let mark = self.log(host).len();
        std::thread::sleep(ADVANCES_WITHIN);
        self.log(host).len() > mark
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        self.name
    }

    /// Its console log on a host, as far as it goes.
    pub(crate) fn log(&self, host: &str) -> String {
        let bytes = fs::read(self.log_path(host)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Where that log is, as seen from outside.
    pub(crate) fn log_path(&self, host: &str) -> PathBuf {
        self.hosts.path(host, &format!("state/workloads/{}/console.log", self.name))
    }

    /// Waits for two more reports, the second of which was written wholly after this call; both clean.
    #[track_caller]
    pub(crate) fn runs_clean(&self, host: &str) {
        let mark = self.log(host).len();
        let what = format!("{} to report from {host}", self.name);
        let seen = find(&what, REPORT_WITHIN, || {
            let log = self.log(host);
            let news = log.get(mark..)?;
            (news.matches("verdict=").count() >= 2).then(|| news.to_owned())
        });
        assert!(!seen.contains("BAD") && !seen.contains("FAILED"), "{}", self.tail(host));
    }

    /// Gives it a command.
    #[track_caller]
    pub(crate) fn tell(&self, host: &str, command: u8) {
        let socket = self.hosts.path(host, &format!("state/workloads/{}/console.sock", self.name));
        let mut console = UnixStream::connect(&socket)
            .unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        console.write_all(&[command]).expect("the console takes a byte");
    }

    /// Waits until it says `what`, a whole line, anew.
    #[track_caller]
    pub(crate) fn says(&self, host: &str, what: &str) {
        let mark = self.log(host).len();
        until(&format!("{} to say {what:?} on {host}", self.name), REPORT_WITHIN, || {
            self.log(host)
                .get(mark..)
                .is_some_and(|news| news.lines().skip(1).any(|line| line == what))
        });
    }

    /// Has it look at all its memory at once.
    #[track_caller]
    pub(crate) fn verify(&self, host: &str) {
        let mark = self.log(host).len();
        self.tell(host, b'v');
        let what = format!("{} to verify itself on {host}", self.name);
        let said = find(&what, VERIFY_WITHIN, || {
            let log = self.log(host);
            let news = log.get(mark..)?;
            // Whole lines only: the last one may be half written.
            let whole = &news[..news.rfind('\n')?];
            Some(whole.lines().find(|line| line.starts_with("verified "))?.to_owned())
        });
        assert!(said.contains("bad=0 verdict=clean"), "{said}\n{}", self.tail(host));
        // The same as a user sees it.
        let logs = self.hosts.decamp(host, &["logs", self.name]).expect(0);
        assert!(!logs.stdout.contains("BAD"), "{}", self.tail(host));
    }

    fn tail(&self, host: &str) -> String {
        let log = self.log(host);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Takes it away wherever it is.
    fn remove(&self) {
        for host in [crate::hosts::ALPHA, crate::hosts::BETA] {
            if self.hosts.agent_runs(host) {
                self.hosts.decamp(host, &["stop", self.name]);
                // The guest's image serves the next one too.
                self.hosts.decamp(host, &["rm", self.name, "--yes", "--keep-files"]);
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.remove();
        }
    }
}
