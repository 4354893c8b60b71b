//! What is mounted into a container from outside of its bundle: copied along, or shared by both hosts. Of
//! what is shared nothing is ever removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::failures::{Failure, arm};
use crate::hosts::{ALPHA, BETA, Hosts, hosts};
use crate::refusals::refused;
use crate::running::until;
use crate::snapshot::Snapshot;
use crate::{Needs, Test};

/// A number is written within this, on a busy machine.
const SOON: Duration = Duration::from_secs(120);
/// Writes on one descriptor that is open all the time, and reads a file that is deleted.
const WRITER: &str =
    "exec 3>>/vol/log; echo kept >/vol/gone; exec 4</vol/gone; busybox rm /vol/gone
    while :; do n=$((n + 1)); echo $n >&3; usleep 50000; done";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("volumes::refused_without_a_word", Needs::Containers, without_a_word),
        Test::new("volumes::copied_there_and_back", Needs::Containers, copied),
        Test::new("volumes::shared_is_never_removed", Needs::Containers, shared),
    ]
}

/// A container that writes into a volume; taken away when it is dropped, the volume too.
struct Writer {
    hosts: &'static Hosts,
    name: &'static str,
    /// As the hosts call it.
    volume: String,
}

impl Writer {
    #[track_caller]
    fn start(name: &'static str, volume: &str) -> Self {
        let hosts = hosts();
        hosts.mend();
        let writer = Self { hosts, name, volume: volume.to_owned() };
        writer.remove();
        let bundle = format!("/srv/{name}");
        let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/counter-bundle");
        hosts.exec(ALPHA, &[maker, &bundle]).expect(0);
        hosts.exec(ALPHA, &["mkdir", "-p", volume]).expect(0);
        fs::write(writer.file(ALPHA, "mine"), "a file of the user's\n").expect("written");
        fs::write(hosts.path(ALPHA, &format!("srv/{name}.conf")), "x\n").expect("written");
        let path = hosts.path(ALPHA, &format!("srv/{name}/config.json"));
        let text = fs::read(&path).expect("a configuration");
        let mut config: Value = serde_json::from_slice(&text).expect("JSON");
        config["process"]["args"] = json!(["/bin/sh", "-c", WRITER]);
        let mount = |destination: &str, source: &str, word: &str| {
            json!({"destination": destination, "type": "bind", "source": source,
                "options": ["rbind", word]})
        };
        let conf = format!("{bundle}.conf");
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        mounts.push(mount("/vol", volume, "rw"));
        mounts.push(mount("/etc/conf", &conf, "ro"));
        fs::write(&path, config.to_string()).expect("written");
        hosts.decamp(ALPHA, &["run", "container", name, "--bundle", &bundle]).expect(0);
        writer.writes(ALPHA);
        writer
    }

    /// A file of the volume, as seen from outside.
    fn file(&self, host: &str, name: &str) -> PathBuf {
        match self.volume.strip_prefix('/').filter(|path| path.starts_with("srv/")) {
            Some(path) => self.hosts.path(host, path).join(name),
            None => Path::new(&self.volume).join(name),
        }
    }

    fn numbers(&self, host: &str) -> Vec<u64> {
        let text = fs::read_to_string(self.file(host, "log")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.parse().expect("a number")).collect()
    }

    /// Waits until it has written more, and nothing of what it wrote is lost.
    #[track_caller]
    fn writes(&self, host: &str) {
        let before = self.numbers(host).len();
        until("more numbers", SOON, || self.numbers(host).len() > before + 3);
        let numbers = self.numbers(host);
        let wanted: Vec<u64> = (1..=numbers.len() as u64).collect();
        assert_eq!(numbers, wanted, "numbers are missing, or there twice");
        let mine = fs::read_to_string(self.file(host, "mine")).expect("the user's file");
        assert_eq!(mine, "a file of the user's\n");
    }

    #[track_caller]
    fn migrates(&self, from: &str, to: &str, options: &[&str]) {
        let words = [&["migrate", self.name, "--to", to], options].concat();
        self.hosts.decamp(from, &words).expect(0);
        self.writes(to);
    }

    #[track_caller]
    fn stays(&self, options: &[&str], says: &[&str]) {
        let before = Snapshot::take(self.hosts);
        let words = [&["migrate", self.name, "--to", BETA], options].concat();
        let ran = self.hosts.decamp(ALPHA, &words);
        before.is_restored();
        refused(ran, says);
        self.writes(ALPHA);
    }

    fn remove(&self) {
        let name = self.name;
        for host in [ALPHA, BETA] {
            self.hosts.decamp(host, &["stop", name]);
            self.hosts.decamp(host, &["rm", name, "--yes", "--keep-files"]);
            let (bundle, conf) = (format!("/srv/{name}"), format!("/srv/{name}.conf"));
            self.hosts.exec(host, &["rm", "-rf", &bundle, &conf, &self.volume]);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.remove();
        }
    }
}

fn without_a_word() {
    let writer = Writer::start("wordless", "/srv/wordless-data");
    writer.stays(&[], &["--storage /vol=copy", "--storage /etc/conf=copy"]);
    writer.stays(&["--storage", "/vol=copy"], &["what becomes of /srv/wordless.conf"]);
    writer.stays(&["--storage", "copy", "--storage", "/date=copy"], &["nothing is mounted there"]);
    writer.stays(
        &["--storage", "/vol=shared", "--storage", "/etc/conf=copy"],
        &["not seen to be the same storage"],
    );
    let hosts = writer.hosts;
    hosts.decamp(ALPHA, &["migrate", "wordless", "--to", BETA, "--storage", "moved"]).expect(2);
    // Somebody's own stands there.
    hosts.exec(BETA, &["mkdir", "-p", "/srv/wordless-data/theirs"]).expect(0);
    writer.stays(&["--storage", "copy"], &["/srv/wordless-data", "--path"]);
    hosts.exec(BETA, &["rm", "-r", "/srv/wordless-data"]).expect(0);
    // It is too large, and both sizes are said.
    fs::write(writer.file(ALPHA, "big"), vec![7; 2 << 20]).expect("written");
    let disk = hosts.small_disk(BETA, "/srv", "1m");
    writer.stays(&["--storage", "copy"], &["Not enough room", "bytes needed"]);
    drop(disk);
    for bad in ["/var/lib/decamp", "/proc/sys", "/srv/nowhere"] {
        let path = hosts.path(ALPHA, "srv/wordless/config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("it")).expect("JSON");
        for mount in config["mounts"].as_array_mut().expect("mounts") {
            if mount["destination"] == "/vol" {
                mount["source"] = json!(bad);
            }
        }
        fs::write(&path, config.to_string()).expect("written");
        let words = ["run", "container", "bad", "--bundle", "/srv/wordless"];
        refused(hosts.decamp(ALPHA, &words), &[bad]);
    }
}

fn copied() {
    let writer = Writer::start("copied", "/srv/copied-data");
    let hosts = writer.hosts;
    // What fails leaves nothing there.
    arm(hosts, ALPHA, "destination.load", Failure::Error);
    hosts.decamp(ALPHA, &["migrate", "copied", "--to", BETA, "--storage", "copy"]).expect(4);
    hosts.mend();
    writer.writes(ALPHA);
    until("what came is gone", SOON, || !writer.file(BETA, "").exists());
    let elsewhere = "/srv/copied-data=/srv/copied-there/data";
    writer.hosts.exec(BETA, &["rm", "-rf", "/srv/copied-there"]).expect(0);
    let words = ["migrate", "copied", "--to", BETA, "--storage", "copy", "--path", elsewhere];
    hosts.decamp(ALPHA, &words).expect(0);
    let there = Writer { hosts, name: "copied", volume: "/srv/copied-there/data".into() };
    there.writes(BETA);
    let left = writer.numbers(ALPHA).len();
    there.writes(BETA);
    assert_eq!(writer.numbers(ALPHA).len(), left, "it still writes at its old host");
    let back = "/srv/copied-there/data=/srv/copied-data";
    writer.migrates(
        BETA,
        ALPHA,
        &[
            "--storage",
            "/vol=copy",
            "--storage",
            "/etc/conf=copy",
            "--path",
            back,
            "--remove-source",
        ],
    );
    assert!(!there.file(BETA, "").exists(), "the source's copy is still there");
    // The copy that was left at beta's own place is known again.
    writer.migrates(ALPHA, BETA, &["--storage", "copy"]);
    writer.migrates(BETA, ALPHA, &["--storage", "copy"]);
    writer.migrates(ALPHA, BETA, &["--storage", "copy", "--remove-source"]);
    assert!(!writer.file(ALPHA, "").exists());
    std::mem::forget(there);
    hosts.exec(BETA, &["rm", "-rf", "/srv/copied-there"]).expect(0);
}

fn shared() {
    let volume = hosts().shared().join("volume").display().to_string();
    let writer = Writer::start("sharing", &volume);
    let hosts = writer.hosts;
    let conf = ["--storage", "/etc/conf=copy"];
    let with = |words: &[&'static str]| [&conf[..], words].concat();
    writer.stays(&with(&["--storage", "/vol=copy"]), &["very same place", "/vol=shared"]);
    // Whatever fails, and wherever.
    for point in ["destination.prepare", "destination.load", "destination.activate"] {
        arm(hosts, ALPHA, point, Failure::Error);
        let words = ["migrate", "sharing", "--to", BETA];
        let words = [&words[..], &with(&["--storage", "/vol=shared"])].concat();
        hosts.decamp(ALPHA, &words).expect(4);
        hosts.mend();
        writer.writes(ALPHA);
    }
    // Recognised without a word. The bundle here goes, the volume stays.
    writer.migrates(ALPHA, BETA, &with(&["--remove-source"]));
    assert!(!hosts.path(ALPHA, "srv/sharing").exists());
    hosts.decamp(ALPHA, &["rm", "sharing", "--yes"]).expect(0);
    writer.writes(BETA);
    // From one that was shared a copy is made; what it is made from may still be another host's.
    let elsewhere = format!("{volume}=/srv/sharing-own");
    let words = ["migrate", "sharing", "--to", ALPHA, "--storage", "copy", "--remove-source"];
    hosts.decamp(BETA, &[&words[..], &["--path", &elsewhere]].concat()).expect(0);
    let own = Writer { hosts, name: "sharing", volume: "/srv/sharing-own".into() };
    own.writes(ALPHA);
    assert!(writer.file(BETA, "mine").exists(), "what was shared is gone");
    hosts.decamp(BETA, &["rm", "sharing", "--yes"]).expect(0);
    assert!(writer.file(BETA, "log").exists(), "what was shared is gone");
    own.remove();
    std::mem::forget(own);
}
