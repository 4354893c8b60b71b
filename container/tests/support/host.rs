//! A host made of namespaces, with a bridge and a directory for all files, and the containers that can be
//! made on it.

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use decamp_shared::methods::Methods;
use decamp_shared::workload::{Backend, HostTools, Place};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::spot::Spot;
use super::{await_that, is_holder, keepers_of};

/// The workload whose keeper does nothing for a minute once CRIU has restored everything.
pub(crate) const HELD: &str = "held";
/// The one whose keeper gives no memory to anybody for a minute once all tasks are restored.
pub(crate) const HUNGRY: &str = "hungry";
/// Cgroups are the machine's own: no user's container shall have a name of ours.
const PREFIX: &str = "decamp-moves";

/// Namespaces with a bridge, a `/run` of its own, and a directory for all files.
pub(crate) struct Host {
    directory: tempfile::TempDir,
    /// Why the test at hand could not be run.
    pub(super) skipped: Cell<Option<&'static str>>,
    /// What the test at hand has in the place of CRIU.
    criu: RefCell<Option<PathBuf>>,
    /// What the configuration says to whoever is asked from now on.
    pub(crate) methods: Cell<Methods>,
}

/// crun starts nothing where the unified hierarchy beside those of version 1 has controllers, and makes
/// plain directories where one should be mounted. So there is no place for it.
fn leave_unified_out() {
    let (from, aside) = (Path::new("/sys/fs/cgroup"), Path::new("/run/cgroup"));
    let none = None::<&str>;
    fs::create_dir(aside).expect("a directory");
    mount(Some("cgroup"), aside, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
    for entry in fs::read_dir(from).expect("cgroups").flatten() {
        let (name, there) = (entry.file_name(), aside.join(entry.file_name()));
        if name == "unified" || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        fs::create_dir(&there).expect("a directory");
        mount(Some(&entry.path()), &there, none, MsFlags::MS_BIND, none).expect("a hierarchy");
    }
    mount(Some(aside), from, none, MsFlags::MS_MOVE, none).expect("in its place");
    fs::remove_dir(aside).expect("removed");
}

/// The real one.
pub(crate) fn criu() -> PathBuf {
    std::env::var_os("DECAMP_CRIU")
        .map_or_else(|| "/opt/decamp-criu/bin/criu".into(), PathBuf::from)
}

pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    path.split(':').map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}

/// What these tests need and this machine does not have.
pub(super) fn lacking() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if !criu().is_file() {
        return Some(format!("needs CRIU 4.1 or newer at {} (tests/setup)", criu().display()));
    }
    let programs = ["runc", "crun", "ip", "redis-server", "busybox", "podman"];
    programs
        .iter()
        .find(|name| program(name).is_none())
        .map(|name| format!("needs {name} (tests/setup)"))
}

impl Host {
    pub(super) fn make() -> Self {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)
            .expect("private mounts");
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a /run");
        if std::env::var_os("DECAMP_TEST_CGROUP2").is_some() {
            // Without controllers, which v1 has here, but with the freezer, which is all we use.
            mount(
                Some("cgroup2"),
                "/sys/fs/cgroup",
                Some("cgroup2"),
                MsFlags::empty(),
                None::<&str>,
            )
            .expect("cgroup2");
        } else if Path::new("/sys/fs/cgroup/unified").is_dir() {
            leave_unified_out();
        }
        let directory =
            tempfile::Builder::new().prefix("decamp-container-").tempdir().expect("a directory");
        for line in [
            "link set lo up",
            "link add br0 type bridge",
            "address add 10.99.0.1/24 dev br0",
            "link set br0 up",
            // Another port, whose address the bridge takes: nearly every random one is lower.
            "link add other address fa:ff:ff:ff:ff:ff type veth peer name other-end",
            "link set other master br0",
        ] {
            let status = Command::new("ip").args(line.split(' ')).status().expect("ip");
            assert!(status.success(), "ip {line}");
        }
        Self {
            directory,
            skipped: Cell::default(),
            criu: RefCell::default(),
            methods: Cell::default(),
        }
    }

    /// The address of the bridge, that of its lowest port.
    pub(crate) fn bridge_address(&self) -> String {
        let said = Command::new("ip").args(["-o", "link", "show", "br0"]).output().expect("ip");
        let said = String::from_utf8(said.stdout).expect("text");
        let mut words = said.split_whitespace().skip_while(|word| *word != "link/ether");
        words.nth(1).expect("an address").to_owned()
    }

    /// The directory for all files.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Says that the test at hand cannot be run, and why.
    pub(crate) fn skip(&self, reason: &'static str) {
        self.skipped.set(Some(reason));
    }

    pub(crate) fn tools(&self) -> HostTools {
        HostTools {
            decamp: std::env::current_exe().expect("our own path"),
            criu: self.criu.borrow().clone().unwrap_or_else(criu),
            runc: program("runc").expect("runc"),
            crun: program("crun").expect("crun"),
            resume_after: Duration::from_secs(30),
            methods: self.methods.get(),
            bridges: Default::default(),
            users: Default::default(),
        }
    }

    /// Has `line` of shell run where CRIU would do something, for keepers that are started from now on,
    /// and for those that were started since the same `name` was given before.
    pub(crate) fn break_criu(&self, name: &str, line: &str) {
        let path = self.directory.path().join(format!("criu-{name}"));
        let criu = criu();
        let script =
            format!("#!/bin/sh\ncase $1 in swrk) {line} ;; esac\nexec {} \"$@\"\n", criu.display());
        let fresh = path.with_extension("new");
        fs::write(&fresh, script).expect("a script");
        fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("executable");
        fs::rename(&fresh, &path).expect("in its place");
        *self.criu.borrow_mut() = Some(path);
    }

    pub(crate) fn runc(&self, arguments: &[&str]) -> String {
        let said = Command::new("runc").args(arguments).output().expect("runc");
        assert!(
            said.status.success(),
            "runc {arguments:?}: {}",
            String::from_utf8_lossy(&said.stderr)
        );
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    pub(crate) fn assert_listed_as_running(&self, name: &str) {
        let list = self.runc(&["list"]);
        let runs =
            |line: &str| line.split_whitespace().next() == Some(name) && line.contains("running");
        assert!(list.lines().any(runs), "{list}");
    }

    /// Where a container of that name has its tasks frozen.
    pub(crate) fn cgroup(&self, name: &str) -> PathBuf {
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        let root = if v1.is_dir() { v1 } else { Path::new("/sys/fs/cgroup") };
        root.join("decamp").join(name)
    }

    /// A container that counts, ten times a second.
    pub(crate) fn counter(&self, name: &str) -> Spot<'_> {
        let bundle = self.bundle(name, "counter-bundle", &[]);
        self.spot(name, json!({"bundle": bundle}))
    }

    /// The same with an address.
    pub(crate) fn counter_at(&self, name: &str, ip: &str) -> Spot<'_> {
        let bundle = self.bundle(name, "counter-bundle", &[]);
        self.spot(name, json!({"bundle": bundle, "net": {"bridge": "br0", "ip": ip}}))
    }

    /// What `ip` says.
    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        let said = Command::new("ip").args(arguments).output().expect("ip");
        assert!(said.status.success(), "ip {arguments:?}");
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// The host's end of the one interface that there is.
    pub(crate) fn link(&self) -> String {
        let [link] = &self.links()[..] else { panic!("{:?}", self.links()) };
        link.clone()
    }

    /// A container that runs one line of shell.
    pub(crate) fn shell(&self, name: &str, line: &str) -> Spot<'_> {
        let bundle = self.bundle(name, "counter-bundle", &[]);
        let path = bundle.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
        config["process"]["args"] = json!(["/bin/sh", "-c", line]);
        fs::write(&path, config.to_string()).expect("a config");
        self.spot(name, json!({"bundle": bundle}))
    }

    /// A container that runs one of the programs in C of the fixtures; nothing without a C compiler.
    pub(crate) fn program(&self, name: &str, program: &str) -> Option<Spot<'_>> {
        self.program_with(name, program, "")
    }

    /// The same with an argument.
    pub(crate) fn program_with(
        &self,
        name: &str,
        program: &str,
        argument: &str,
    ) -> Option<Spot<'_>> {
        let spot = self.shell(name, &format!("exec /bin/{program} {argument}"));
        let bundle = self.directory.path().join("bundles").join(name);
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let made = Command::new("cc")
            .args(["-static", "-pthread", "-O1", "-o"])
            .arg(bundle.join("rootfs/bin").join(program))
            .arg(fixtures.join(program).with_extension("c"))
            .status();
        made.is_ok_and(|status| status.success()).then_some(spot)
    }

    /// A container that runs Redis at an address.
    pub(crate) fn redis(&self, name: &str, ip: &str, options: &[&str]) -> Spot<'_> {
        let options = [&["--enable-debug-command", "yes"], options].concat();
        let bundle = self.bundle(name, "redis-bundle", &options);
        self.spot(name, json!({"bundle": bundle, "net": {"bridge": "br0", "ip": ip}}))
    }

    fn bundle(&self, name: &str, maker: &str, options: &[&str]) -> PathBuf {
        let bundle = self.directory.path().join("bundles").join(name);
        let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(maker);
        let status =
            Command::new(maker).arg(&bundle).args(options).status().expect("the bundle's maker");
        assert!(status.success());
        bundle
    }

    pub(crate) fn spot(&self, name: &str, spec: Value) -> Spot<'_> {
        let name = full(name);
        let dir = self.directory.path().join("workloads").join(&name);
        // Containers of one test share an identity, as they would on two hosts.
        let place = Place { name, uuid: "0b6c7c5e-test".to_owned(), dir };
        Spot { host: self, place, spec }
    }

    /// The process that holds a dead keeper's descriptors ends with the container.
    pub(crate) fn await_no_holder(&self) {
        let holders = || {
            let processes = fs::read_dir("/proc").expect("/proc").flatten();
            processes.filter(|entry| is_holder(&entry.path(), self.directory())).count()
        };
        await_that("the holder's end", || holders() == 0);
    }

    /// Nothing of workload `name` is left but its log.
    pub(crate) fn assert_nothing_left(&self, name: &str) {
        let mut left = Vec::new();
        let name = &full(name);
        let directory = self.directory.path().join("workloads").join(name);
        await_that("the keeper's end", || keepers_of(&directory).is_empty());
        let root = PathBuf::from("/sys/fs/cgroup");
        let below = fs::read_dir(&root).expect("cgroups").flatten().map(|entry| entry.path());
        for hierarchy in below.chain([root.clone()]).collect::<Vec<_>>() {
            for path in [name.clone(), format!(".criu-{name}")] {
                let path = hierarchy.join("decamp").join(path);
                if path.exists() {
                    left.push(path.display().to_string());
                }
            }
        }
        for runtime in ["/run/runc", "/run/crun"] {
            let run = Path::new(runtime).join(name);
            left.extend(run.exists().then(|| run.display().to_string()));
        }
        for part in ["oci", "store", "container.claim"] {
            let path = directory.join(part);
            left.extend(path.exists().then(|| path.display().to_string()));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(directory.to_str().expect("UTF-8")))
                .map(str::to_owned),
        );
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    /// Interfaces of containers that exist now.
    pub(crate) fn links(&self) -> Vec<String> {
        let said = self.ip(&["-o", "link", "show", "type", "veth"]);
        let names = said.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        names.filter(|name| !name.starts_with("other")).map(str::to_owned).collect()
    }

    pub(super) fn show_logs(&self) {
        let Ok(entries) = fs::read_dir(self.directory.path().join("workloads")) else { return };
        for entry in entries.flatten() {
            let text = fs::read_to_string(entry.path().join("keeper.log")).unwrap_or_default();
            eprintln!("---- {}\n{text}", entry.path().display());
        }
    }

    /// Ends what a failed test left, so that the next begins afresh.
    pub(super) fn clear(&self) {
        let workloads = self.directory.path().join("workloads");
        for entry in fs::read_dir(&workloads).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let spot = self.spot(&name, json!({}));
            if !keepers_of(&spot.place.dir).is_empty() {
                spot.kill_keeper();
            }
            let _ = spot.backend().sweep(&spot.spec, &spot.place);
        }
        *self.criu.borrow_mut() = None;
        self.methods.take();
        let links = self.links();
        if !links.is_empty() {
            eprintln!("    interfaces were left: {links:?}");
        }
        let _ = fs::remove_dir_all(&workloads);
        let _ = fs::remove_dir_all(self.directory.path().join("bundles"));
    }
}

/// The name on the machine of what a test calls `name`: another in each run, so that two runs at
/// once do not meet.
fn full(name: &str) -> String {
    match name.starts_with(PREFIX) {
        true => name.to_owned(),
        false => format!("{PREFIX}-{}-{name}", std::process::id()),
    }
}

/// Whether `full` is what some run calls `name`.
pub(super) fn is_called(full: &str, name: &str) -> bool {
    full.starts_with(PREFIX) && full.rsplit('-').next() == Some(name)
}
