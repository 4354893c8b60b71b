//! What the tests of moves stand on: a host made of namespaces, places in it, and the steps of a
//! move without a wire.

pub(crate) mod redis;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use decamp_container::ContainerBackend;
use decamp_shared::keeper::{Beginning, KeeperClient, KeeperConfig, Phase};
use decamp_shared::methods::{Methods, Ways};
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet};
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileTree, HostTools, Kind, Liveness, Place, PlacedTree,
    SourceWorkload,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

/// The workload whose keeper does nothing for a minute once CRIU has restored everything.
pub(crate) const HELD: &str = "held";
/// The one whose keeper gives no memory to anybody for a minute once all tasks are restored.
pub(crate) const HUNGRY: &str = "hungry";
/// Cgroups are the machine's own: no user's container shall have a name of ours.
const PREFIX: &str = "decamp-moves";
const PATIENCE: Duration = Duration::from_secs(20);

/// One test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Host),
}

/// Namespaces with a bridge, a `/run` of its own, and a directory for all files.
pub(crate) struct Host {
    directory: tempfile::TempDir,
    /// Why the test at hand could not be run.
    skipped: Cell<Option<&'static str>>,
    /// What the test at hand has in the place of CRIU.
    criu: RefCell<Option<PathBuf>>,
    /// What the configuration says to whoever is asked from now on.
    pub(crate) methods: Cell<Methods>,
}

/// A workload's place on the host, and what runs there.
pub(crate) struct Spot<'a> {
    host: &'a Host,
    pub(crate) place: Place,
    pub(crate) spec: Value,
}

/// What a move was like: milliseconds by step.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) times: BTreeMap<&'static str, f64>,
    /// In the stop.
    pub(crate) pages: u64,
    /// In all.
    pub(crate) sent: u64,
    /// By which tracker, or why by none.
    pub(crate) tracker: String,
    /// How it left.
    pub(crate) left: Ways,
    /// How it was restored.
    pub(crate) arrived: Ways,
}

impl Moved {
    /// Milliseconds from the beginning of the pause to the end of the activation.
    pub(crate) fn downtime(&self) -> f64 {
        ["pause", "harvest", "copy", "save", "load", "activate"]
            .iter()
            .map(|step| self.times[step])
            .sum()
    }
}

/// Runs the cases whose names the arguments are part of; as `keeper`, is a keeper.
pub(crate) fn main_with(cases: &[Case]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "keeper") {
        std::process::exit(keep(Path::new(&arguments[2])));
    }
    if arguments.first().is_some_and(|first| first == "shim") {
        let shim = decamp_container::podman::shim::shim_main;
        let done = shim(Path::new(&arguments[2]), &arguments[4..]);
        std::process::exit(done.map_or_else(
            |error| {
                eprintln!("{error}");
                1
            },
            |()| 0,
        ));
    }
    let wanted: Vec<&String> =
        arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let cases = cases.iter().filter(|case| {
        wanted.is_empty() || wanted.iter().any(|part| case.name.contains(part.as_str()))
    });
    if arguments.iter().any(|argument| argument == "--list") {
        cases.for_each(|case| println!("{}: test", case.name));
        return;
    }
    if let Some(lacking) = lacking() {
        cases.for_each(|case| println!("test {} ... skipped: {lacking}", case.name));
        return;
    }
    let host = Host::make();
    let mut failed = 0;
    for case in cases {
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.run)(&host)));
        let word = match (&outcome, host.skipped.take()) {
            (Err(_), _) => "FAILED".to_owned(),
            (Ok(()), Some(reason)) => format!("skipped: {reason}"),
            (Ok(()), None) => "ok".to_owned(),
        };
        failed += usize::from(outcome.is_err());
        println!("test {} ... {word} ({:.1} s)", case.name, begun.elapsed().as_secs_f64());
        if outcome.is_err() || std::env::var_os("DECAMP_SHOW_LOGS").is_some() {
            host.show_logs();
        }
        host.clear();
    }
    drop(host);
    std::process::exit(i32::from(failed > 0));
}

fn keep(config: &Path) -> i32 {
    let filter = std::env::var("DECAMP_LOG").unwrap_or_else(|_| "debug".to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    decamp_shared::keeper::spawn::detach();
    let config: KeeperConfig =
        serde_json::from_slice(&fs::read(config).expect("a configuration")).expect("JSON");
    let stuck = [(HELD, "container-hold"), (HUNGRY, "container-fill")];
    let stuck = stuck.iter().find(|(name, _)| is_called(&config.place.name, name));
    let scenario = stuck.map(|_| fail::FailScenario::setup());
    if let Some((_, point)) = stuck {
        fail::cfg(*point, "sleep(60000)").expect("a fail point");
    }
    let kept = decamp_container::keeper_main(&config);
    drop(scenario);
    match kept {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "The keeper failed");
            decamp_shared::keeper::spawn::report_failure(&error);
            1
        }
    }
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

fn program(name: &str) -> Option<PathBuf> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    path.split(':').map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}

/// What these tests need and this machine does not have.
fn lacking() -> Option<String> {
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
    fn make() -> Self {
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
            processes.filter(|entry| is_holder(&entry.path())).count()
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

    fn show_logs(&self) {
        let Ok(entries) = fs::read_dir(self.directory.path().join("workloads")) else { return };
        for entry in entries.flatten() {
            let text = fs::read_to_string(entry.path().join("keeper.log")).unwrap_or_default();
            eprintln!("---- {}\n{text}", entry.path().display());
        }
    }

    /// Ends what a failed test left, so that the next begins afresh.
    fn clear(&self) {
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

impl Spot<'_> {
    pub(crate) fn backend(&self) -> ContainerBackend {
        ContainerBackend::new(self.host.tools())
    }

    pub(crate) fn run(&self) {
        assert_eq!(self.backend().check(&self.spec), []);
        self.try_run(&self.spec).expect("run");
    }

    pub(crate) fn try_run(&self, spec: &Value) -> decamp_shared::workload::Result<()> {
        self.backend().run(spec, &self.place)
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.spec["bundle"].as_str().expect("a bundle").into()
    }

    pub(crate) fn change_config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.bundle().join("config.json");
        let mut config = serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
        change(&mut config);
        fs::write(&path, config.to_string()).expect("a config");
    }

    pub(crate) fn await_keeper_log(&self, text: &str) {
        let path = self.place.dir.join("keeper.log");
        await_that(&format!("the keeper to say {text}"), || {
            fs::read_to_string(&path).is_ok_and(|log| log.contains(text))
        });
    }

    /// The same name in the hands of another agent on this host.
    pub(crate) fn rival(&self) -> Self {
        let dir = self.place.dir.with_extension("rival");
        Self {
            host: self.host,
            place: Place { dir, ..self.place.clone() },
            spec: self.spec.clone(),
        }
    }

    /// Starts a keeper for it without asking anything before.
    pub(crate) fn spawn_keeper(&self) -> decamp_shared::workload::Result<()> {
        decamp_shared::keeper::spawn(&KeeperConfig {
            kind: Kind::Container,
            beginning: Beginning::Run,
            place: self.place.clone(),
            tools: self.host.tools(),
            spec: self.spec.clone(),
        })
    }

    /// The same workload at another place.
    pub(crate) fn twin(&self, name: &str) -> Self {
        self.host.spot(name, self.spec.clone())
    }

    /// The same workload at another place, with files of its own.
    pub(crate) fn twin_with_files(&self, name: &str) -> Self {
        let mut twin = self.twin(name);
        twin.spec["bundle"] = json!(twin.place.dir.with_extension("files"));
        twin
    }

    pub(crate) fn source(&self) -> Box<dyn SourceWorkload> {
        self.backend().source(&self.spec, &self.place).expect("a source")
    }

    /// The empty shell for what comes from `source`.
    pub(crate) fn prepare(&self, source: &mut dyn SourceWorkload) -> Box<dyn DestinationWorkload> {
        self.prepare_at(source, |tree| self.placed(tree))
    }

    /// The same with its files elsewhere.
    pub(crate) fn prepare_at(
        &self,
        source: &mut dyn SourceWorkload,
        place: impl Fn(&FileTree) -> PathBuf,
    ) -> Box<dyn DestinationWorkload> {
        let mut manifest = source.manifest().expect("a manifest");
        manifest.name = self.place.name.clone();
        let trees: Vec<_> = manifest
            .files
            .iter()
            .map(|tree| PlacedTree { tree: tree.clone(), path: place(tree) })
            .collect();
        let backend = self.backend();
        assert_eq!(backend.preflight(&manifest, &trees), []);
        let spec = backend.respec(&manifest, &trees).expect("a spec");
        backend.prepare(&manifest, &spec, &self.place).expect("prepare")
    }

    /// Where a tree stands here: at the same path, or as a copy where it would go elsewhere.
    fn placed(&self, tree: &FileTree) -> PathBuf {
        if tree.place.is_empty() {
            return PathBuf::from(&tree.path);
        }
        let path = self.place.dir.with_extension("files");
        let _ = fs::remove_dir_all(&path);
        let there = path.to_str().expect("UTF-8");
        let copied = Command::new("cp").args(["-a", &tree.path, there]).status();
        assert!(copied.expect("cp").success());
        path
    }

    pub(crate) fn move_to(&self, there: &Self) -> Moved {
        let mut times = BTreeMap::new();
        let mut step = |name, begun: Instant| {
            times.insert(name, begun.elapsed().as_secs_f64() * 1000.0);
        };
        let mut source = self.source();
        let begun = Instant::now();
        let mut destination = there.prepare(&mut *source);
        step("prepare", begun);
        let begun = Instant::now();
        source.pause().expect("pause");
        step("pause", begun);
        let begun = Instant::now();
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        step("harvest", begun);
        let begun = Instant::now();
        copy(&dirty, &mut *source, &mut *destination);
        step("copy", begun);
        let begun = Instant::now();
        let sections = source.save().expect("save");
        step("save", begun);
        let mut again = PageSet::new();
        source.harvest(&mut again).expect("harvest");
        assert!(again.is_empty(), "what stands still was dirty twice");
        let begun = Instant::now();
        destination.load(sections).expect("load");
        step("load", begun);
        let (left, arrived) = (source.ways(), destination.ways());
        let tracker = tracker_of(&*source);
        source.fence(1).expect("fence");
        let begun = Instant::now();
        destination.activate(1).expect("activate");
        step("activate", begun);
        let begun = Instant::now();
        source.release().expect("release");
        step("release", begun);
        let pages = dirty.len();
        Moved { times, pages, sent: pages, tracker, left, arrived }
    }

    /// Moves it to a twin that has files of its own: they are copied, as between two hosts. Its memory is copied
    /// in so many `rounds` while it runs, and in the stop.
    pub(crate) fn move_with_files(&self, there: &Self, rounds: u32) {
        let (from, to) = (self.bundle(), there.bundle());
        let copy = || {
            let _ = fs::remove_dir_all(&to);
            let copied = Command::new("cp").arg("-aT").args([&from, &to]).status();
            assert!(copied.expect("cp").success());
        };
        let mut source = self.source();
        let mut destination = there.prepare_at(&mut *source, |_| {
            copy();
            to.clone()
        });
        let mut dirty = PageSet::new();
        if rounds > 0 {
            source.track().expect("track");
        }
        for _ in 0..rounds {
            source.harvest(&mut dirty).expect("harvest");
            dirty = self::copy(&dirty, &mut *source, &mut *destination);
        }
        source.pause().expect("pause");
        copy();
        source.harvest(&mut dirty).expect("harvest");
        self::copy(&dirty, &mut *source, &mut *destination);
        destination.load(source.save().expect("save")).expect("load");
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        source.release().expect("release");
    }

    /// The same in rounds while it runs, `rounds` of them, before the stop.
    pub(crate) fn move_live(&self, there: &Self, rounds: u32) -> Moved {
        let mut times = BTreeMap::new();
        let mut source = self.source();
        assert!(matches!(source.liveness(), Liveness::Tracked { .. }), "{:?}", source.liveness());
        let mut destination = there.prepare(&mut *source);
        source.track().expect("track");
        let (mut dirty, mut pages) = (PageSet::new(), 0);
        for _ in 0..rounds {
            source.harvest(&mut dirty).expect("harvest");
            pages += dirty.len();
            dirty = copy(&dirty, &mut *source, &mut *destination);
        }
        let mut begun = Instant::now();
        let mut step = |name| {
            times.insert(name, begun.elapsed().as_secs_f64() * 1000.0);
            begun = Instant::now();
        };
        source.pause().expect("pause");
        step("pause");
        source.harvest(&mut dirty).expect("harvest");
        step("harvest");
        let missed = copy(&dirty, &mut *source, &mut *destination);
        assert!(missed.is_empty(), "what stands still went away: {missed:?}");
        step("copy");
        let sections = source.save().expect("save");
        step("save");
        destination.load(sections).expect("load");
        step("load");
        let (left, arrived) = (source.ways(), destination.ways());
        let tracker = tracker_of(&*source);
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        step("activate");
        source.release().expect("release");
        eprintln!("    {} pages in the stop after {pages}: {times:.1?}", dirty.len());
        let (sent, pages) = (pages + dirty.len(), dirty.len());
        Moved { times, pages, sent, tracker, left, arrived }
    }

    pub(crate) fn phase(&self) -> Phase {
        KeeperClient::connect(&self.place).and_then(|mut client| client.phase()).expect("a phase")
    }

    pub(crate) fn stop(&self) {
        KeeperClient::connect(&self.place)
            .and_then(|mut client| client.stop(Duration::from_millis(100)))
            .expect("stop");
    }

    pub(crate) fn kill_keeper(&self) {
        for pid in keepers_of(&self.place.dir) {
            let pid = nix::unistd::Pid::from_raw(pid);
            match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                // It has just ended by itself.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => panic!("kill the keeper: {error}"),
            }
        }
        await_that("the keeper's end", || keepers_of(&self.place.dir).is_empty());
    }

    pub(crate) fn counts(&self) -> Vec<u64> {
        let text = fs::read_to_string(self.place.log()).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// The last tick that the program with obstacles has said, or 0.
    pub(crate) fn ticks(&self) -> u64 {
        let text = fs::read_to_string(self.place.log()).unwrap_or_default();
        let last = text.lines().rev().find_map(|line| line.strip_prefix("tick ")?.parse().ok());
        last.unwrap_or(0)
    }

    pub(crate) fn last_count(&self) -> u64 {
        self.counts().last().copied().unwrap_or(0)
    }

    pub(crate) fn await_count(&self, count: u64) {
        await_that(&format!("{} to count to {count}", self.place.name), || {
            self.last_count() >= count
        });
    }

    /// The smallest of the counts that the memory program says last: rounds, its child's, its thread's.
    pub(crate) fn rounds(&self) -> u64 {
        let text = fs::read_to_string(self.place.log()).unwrap_or_default();
        assert!(!text.contains("BAD") && !text.contains("no mlock"), "{text}");
        let last = text.lines().rfind(|line| line.starts_with("ok ")).unwrap_or("ok 0");
        last[3..].split(' ').map(|number| number.parse().expect("a number")).min().unwrap_or(0)
    }

    pub(crate) fn await_rounds(&self, rounds: u64) {
        await_that(&format!("{} to check {rounds} rounds", self.place.name), || {
            self.rounds() >= rounds
        });
    }

    pub(crate) fn await_log(&self, text: &str) {
        await_that(&format!("{} to say {text}", self.place.name), || {
            fs::read_to_string(self.place.log()).is_ok_and(|log| log.contains(text))
        });
    }

    pub(crate) fn await_exit(&self) {
        await_that("the exit record", || self.place.exit_record().exists());
        await_that("the keeper's end", || keepers_of(&self.place.dir).is_empty());
    }

    pub(crate) fn exit_record(&self) -> Value {
        serde_json::from_slice(&fs::read(self.place.exit_record()).expect("a record"))
            .expect("JSON")
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
fn is_called(full: &str, name: &str) -> bool {
    full.starts_with(PREFIX) && full.rsplit('-').next() == Some(name)
}

fn tracker_of(source: &dyn SourceWorkload) -> String {
    match source.liveness() {
        Liveness::Tracked { tracker } => tracker,
        Liveness::StopOnly { reason } => reason,
    }
}

/// Every page that exists at the source goes to the destination.
pub(crate) fn copy_pages(
    source: &mut dyn SourceWorkload,
    destination: &mut dyn DestinationWorkload,
) {
    let mut dirty = PageSet::new();
    source.harvest(&mut dirty).expect("harvest");
    copy(&dirty, source, destination);
}

/// The pages of `dirty` go to the destination. Gives those that went away meanwhile.
pub(crate) fn copy(
    dirty: &PageSet,
    source: &mut dyn SourceWorkload,
    destination: &mut dyn DestinationWorkload,
) -> PageSet {
    let spaces = source.spaces().expect("spaces");
    let mut dirty = dirty.clone();
    dirty.retain_spaces(|space| spaces.iter().any(|info| info.id == space.0));
    let writer = destination.writer(&spaces).expect("a writer");
    let reader = source.reader().expect("a reader");
    let mut buffer = vec![0; 256 * PAGE_SIZE];
    for range in dirty.ranges() {
        let mut first = range.first;
        while first < range.end() {
            let part = PageRange::new(range.space, first, (range.end() - first).min(256));
            let bytes = &mut buffer[..part.bytes()];
            reader.read(part, bytes).expect("read");
            if bytes.iter().all(|byte| *byte == 0) {
                writer.zero(part).expect("zero");
            } else {
                writer.write(part, bytes).expect("write");
            }
            first = part.end();
        }
    }
    reader.take_missed()
}

/// Keepers (of this test run) whose place is `directory`.
fn keepers_of(directory: &Path) -> Vec<i32> {
    let config = directory.join("keeper.json");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        // A keeper's child that holds descriptors has its arguments, and another name.
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name == "decamp-holder\n")
        {
            continue;
        }
        if line.split(|byte| *byte == 0).any(|word| word == config.as_os_str().as_encoded_bytes()) {
            found.push(pid);
        }
    }
    found
}

/// Whether a process, by its directory in /proc, is a keeper's child that holds descriptors.
fn is_holder(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| name == "decamp-holder\n")
}

pub(crate) fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
