//! The backend's checks and its reading and writing of manifests. What needs keepers as processes
//! is tried end to end, with the whole program.

use serde_json::json;

use super::*;
use crate::testing::guest_spec;

fn backend() -> VmBackend {
    VmBackend::new(HostTools {
        decamp: "/nowhere/decamp".into(),
        criu: "/nowhere/criu".into(),
        runc: "/nowhere/runc".into(),
        crun: "/nowhere/crun".into(),
        resume_after: Duration::from_secs(10),
        methods: Default::default(),
        bridges: Default::default(),
        users: Default::default(),
    })
}

fn manifest(spec: &VmSpec) -> Manifest {
    let kvm = host::open_kvm().expect("KVM");
    let (cpuid, tsc_khz) = crate::cpuid::of_this_host(&kvm).expect("CPUID");
    let needs = Needs {
        vmm: "0.1.0".into(),
        cpuid,
        tsc_khz,
        capabilities: host::capabilities(&kvm),
        msrs: Vec::new(),
        registers: Vec::new(),
    };
    Manifest {
        name: "web".into(),
        kind: Kind::Vm.into(),
        memory_bytes: spec.memory_bytes,
        spaces: vec![SpaceInfo {
            id: 0,
            page_limit: spec.memory_bytes / 4096,
            label: "guest memory".into(),
            process: 0,
        }],
        files: files(spec).expect("files"),
        spec: serde_json::to_vec(spec).expect("spec"),
        needs: serde_json::to_vec(&needs).expect("needs"),
        ..Default::default()
    }
}

/// Its files, where they stand already.
fn placed(manifest: &Manifest) -> Vec<PlacedTree> {
    let place = |tree: &FileTree| PlacedTree { tree: tree.clone(), path: (&tree.path).into() };
    manifest.files.iter().map(place).collect()
}

fn codes(refusals: &[Refusal]) -> Vec<RefusalCode> {
    refusals.iter().map(|refusal| refusal.code()).collect()
}

#[test]
fn a_good_spec_is_not_refused_and_a_bad_one_with_every_reason() {
    let dir = tempfile::tempdir().expect("directory");
    let good = serde_json::to_value(guest_spec(dir.path())).expect("spec");
    assert_eq!(backend().check(&good), []);

    let mut bad = good.clone();
    bad["memory_bytes"] = json!(1u64 << 42);
    assert_eq!(codes(&backend().check(&bad)), [RefusalCode::Memory]);
    let empty = dir.path().join("empty");
    fs::write(&empty, "").expect("write");
    bad["kernel"] = json!(dir.path().join("missing"));
    bad["initrd"] = json!(empty);
    let refusals = backend().check(&bad);
    assert_eq!(codes(&refusals), [RefusalCode::File, RefusalCode::File, RefusalCode::Memory]);
    assert!(refusals[0].text.contains("missing cannot be booted"), "{}", refusals[0].text);
    assert!(refusals[1].text.contains("empty cannot be booted: it is empty"), "{:?}", refusals[1]);
    bad["memory_bytes"] = good["memory_bytes"].clone();
    assert_eq!(codes(&backend().check(&bad)), [RefusalCode::File, RefusalCode::File]);

    let text = dir.path().join("text");
    fs::write(&text, "no kernel\n").expect("write");
    bad = good.clone();
    bad["kernel"] = json!(text);
    let refusals = backend().check(&bad);
    assert_eq!(codes(&refusals), [RefusalCode::File]);
    assert!(refusals[0].text.contains("ELF"), "{}", refusals[0].text);

    bad = good;
    bad["cpus"] = json!(0);
    assert_eq!(codes(&backend().check(&bad)), [RefusalCode::Request]);
    bad["cpus"] = json!(254);
    let refusals = backend().check(&bad);
    assert_eq!(codes(&refusals), [RefusalCode::Cpu]);
    assert!(refusals[0].text.contains("254 vCPUs"), "{}", refusals[0].text);
}

#[test]
fn a_manifest_of_this_host_is_welcome_on_it() {
    let dir = tempfile::tempdir().expect("directory");
    let manifest = manifest(&guest_spec(dir.path()));
    assert_eq!(backend().preflight(&manifest, &placed(&manifest)), []);
    assert_eq!(manifest.files.len(), 1);
    assert!(!manifest.files[0].live && manifest.files[0].bytes > 0);
}

#[test]
fn a_manifest_that_cannot_be_is_refused_with_every_reason() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = guest_spec(dir.path());
    let mut lying = manifest(&spec);
    lying.memory_bytes += 4096;
    lying.needs = b"nonsense".to_vec();
    assert_eq!(
        codes(&backend().preflight(&lying, &placed(&lying))),
        [RefusalCode::Request, RefusalCode::Request]
    );
    let mut more = manifest(&spec);
    more.spaces.push(SpaceInfo { id: 1, page_limit: 5, ..Default::default() });
    assert_eq!(codes(&backend().preflight(&more, &placed(&more))), [RefusalCode::Request]);
    let big = VmSpec { memory_bytes: 1 << 41, ..spec };
    let mut manifest = manifest(&guest_spec(dir.path()));
    manifest.spec = serde_json::to_vec(&big).expect("spec");
    manifest.memory_bytes = big.memory_bytes;
    manifest.spaces[0].page_limit = Memory::page_limit_of(big.memory_bytes);
    let refusals = backend().preflight(&manifest, &placed(&manifest));
    assert_eq!(codes(&refusals), [RefusalCode::Memory]);
    assert!(refusals[0].text.contains("2097152 MiB"), "{}", refusals[0].text);
}

#[test]
fn paths_follow_the_files() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = guest_spec(dir.path());
    let manifest = manifest(&spec);
    let mut trees = placed(&manifest);
    trees[0].path = "/new/place".into();
    let json = backend().respec(&manifest, &trees).expect("respec");
    let here = VmSpec::parse(&json).expect("spec");
    assert_eq!(here, VmSpec { kernel: "/new/place".into(), ..spec });
}

#[test]
fn a_spec_names_no_file_but_those_that_come_with_it() {
    let dir = tempfile::tempdir().expect("directory");
    let manifest = manifest(&guest_spec(dir.path()));
    let trees = placed(&manifest);
    let with = |edit: &dyn Fn(&mut PlacedTree)| {
        let mut tree = trees[0].clone();
        edit(&mut tree);
        tree
    };
    let elsewhere = with(&|tree| tree.tree.path = "/elsewhere".into());
    let initrd = with(&|tree| tree.tree.role = FileRole::Initrd.into());
    let bundle = with(&|tree| tree.tree.role = FileRole::Bundle.into());
    for wrong in [
        vec![],
        vec![elsewhere],
        vec![initrd.clone()],
        vec![trees[0].clone(), initrd.clone()],
        vec![trees[0].clone(), bundle],
        vec![trees[0].clone(), trees[0].clone()],
    ] {
        assert!(backend().respec(&manifest, &wrong).is_err(), "{wrong:?}");
        let refusals = backend().preflight(&manifest, &wrong);
        assert_eq!(codes(&refusals), [RefusalCode::Request], "{wrong:?}");
    }
    let mut named = manifest.clone();
    let spec = guest_spec(dir.path());
    let spec = VmSpec { initrd: Some(spec.kernel.clone()), ..spec };
    named.spec = serde_json::to_vec(&spec).expect("spec");
    assert!(backend().respec(&named, &trees).is_err(), "its initial ramdisk does not come");
    backend().respec(&named, &[trees[0].clone(), initrd]).expect("both come");
}

/// A spec with a disk that is written and one that is read.
fn with_disks(dir: &Path) -> VmSpec {
    let disk = |name: &str, readonly| {
        let path = dir.join(name);
        fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a disk");
        DiskSpec { path, readonly, shared: !readonly }
    };
    VmSpec { disks: vec![disk("data", false), disk("iso", true)], ..guest_spec(dir) }
}

#[test]
fn disks_are_listed_with_what_becomes_of_them() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = with_disks(dir.path());
    assert_eq!(backend().check(&serde_json::to_value(&spec).expect("spec")), []);
    fs::write(&spec.disks[0].path, vec![1; 8192]).expect("written");
    let said = |bytes: u64| json!({ "disks": [{ "bytes": bytes }, { "bytes": 1 << 20 }] });
    let trees = disks(&spec, &said(8192)).expect("disks");
    let facts: Vec<_> =
        trees.iter().map(|tree| (tree.role(), tree.live, tree.storage(), tree.space)).collect();
    let (role, unsaid) = (FileRole::Disk, Storage::Unsaid);
    assert_eq!(facts, [(role, true, Storage::Shared, 1), (role, false, unsaid, 0)]);
    assert_eq!((trees[0].bytes, trees[1].bytes), (8192, 1 << 20));
    let error = disks(&spec, &said(4096)).expect_err("it has grown").to_string();
    assert!(error.contains("4096 bytes, and it has 8192 now"), "{error}");

    let mut manifest = manifest(&spec);
    manifest.files.extend(trees);
    let mut trees = placed(&manifest);
    trees[1].path = "/new/data".into();
    let here = VmSpec::parse(&backend().respec(&manifest, &trees).expect("respec")).expect("spec");
    assert_eq!(here.disks[0].path, Path::new("/new/data"));
    assert_eq!(here.disks[1], spec.disks[1]);
    assert!(here.disks[0].shared);
    trees[1].tree.storage = Storage::Copy.into();
    let here = VmSpec::parse(&backend().respec(&manifest, &trees).expect("respec")).expect("spec");
    assert!(!here.disks[0].shared, "a copy is its own");
    assert_eq!(codes(&backend().pack_refusals(&manifest)), [RefusalCode::Unsupported; 2]);
    let edits: [fn(&mut FileTree); 4] = [
        |tree| tree.space = 2,
        |tree| tree.space = 0,
        |tree| tree.live = false,
        |tree| tree.role = FileRole::VolumeFile.into(),
    ];
    for edit in edits {
        let mut wrong = trees.clone();
        edit(&mut wrong[1].tree);
        assert!(backend().respec(&manifest, &wrong).is_err(), "{:?}", wrong[1]);
    }
}

#[test]
fn a_disk_that_cannot_be_used_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = with_disks(dir.path());
    let refused = |spec: &VmSpec| {
        let refusals = backend().check(&serde_json::to_value(spec).expect("spec"));
        assert_eq!(codes(&refusals), [RefusalCode::File], "{refusals:?}");
        refusals[0].text.clone()
    };
    let held = disk::Disk::new(0, &spec.disks[0]);
    held.open(Duration::ZERO).expect("opened");
    let text = refused(&spec);
    assert!(text.contains("locked by process"), "{text}");
    held.close();
    let again = dir.path().join("again");
    fs::hard_link(&spec.disks[0].path, &again).expect("linked");
    let mut twice = spec.clone();
    twice.disks[1].path = again;
    assert!(refused(&twice).contains("is the same as"));
    fs::remove_file(&spec.disks[1].path).expect("removed");
    assert!(refused(&spec).contains("No such file"));
}

#[test]
fn who_is_off_the_network_does_not_leave_and_every_interface_is_named() {
    crate::interfaces::tests::apart(|| {
        let ip = |words: &str| {
            let done = std::process::Command::new("ip").args(words.split(' ')).status();
            assert!(done.expect("ip, of iproute2").success(), "ip {words}");
        };
        for (bridge, tap) in [("br7", "tapa"), ("br8", "tapb")] {
            ip(&format!("link add {bridge} type bridge"));
            ip(&format!("tuntap add {tap} mode tap"));
            ip(&format!("link set {tap} master {bridge}"));
        }
        let one = |bridge: &str, tap: &str| {
            json!({"bridge": bridge, "tap": tap, "mac": "02:00:00:00:00:01", "mtu": 1500,
                "own": [], "neighbours": []})
        };
        let facts = json!({"networks": [one("br7", "tapa"), one("br8", "tapb")]});
        let interfaces = interfaces(&facts).expect("two");
        on_its_networks(&interfaces).expect("on the network");
        let off = || on_its_networks(&interfaces).expect_err("off it").to_string();
        ip("link set tapa master br8");
        assert!(off().contains("tapa was taken off bridge br7"), "it is on another one");
        ip("link set tapa nomaster");
        let said = off();
        assert!(said.contains("put it back with ip link set tapa master br7"), "{said}");
        ip("link delete br8");
        let said = off();
        assert!(said.contains("tapa was taken off bridge br7"), "{said}");
        assert!(said.contains("bridge br8 is gone"), "{said}");
        ip("link delete tapb");
        let said = off();
        assert!(said.contains("tapb on bridge br8 was removed"), "{said}");
    });
}

#[test]
fn only_what_a_vm_has_is_believed_of_its_keeper() {
    let dir = tempfile::tempdir().expect("directory");
    let net = |bridge: &str| crate::spec::NetSpec { bridge: bridge.into(), mac: None };
    let spec = VmSpec { net: vec![net("br7"), net("br8")], ..guest_spec(dir.path()) };
    let one = |bridge: &str, tap: &str| {
        json!({"bridge": bridge, "tap": tap, "mac": "02:00:00:00:00:01", "mtu": 1500,
            "own": [], "neighbours": []})
    };
    let its_own = |said: &[serde_json::Value]| {
        let said = interfaces(&json!({ "networks": said })).expect("interfaces");
        are_its_own(&said, &spec).is_ok()
    };
    assert!(its_own(&[one("br7", "dv00"), one("br8", "dv01")]));
    assert!(!its_own(&[one("br7", "dv00")]));
    assert!(!its_own(&[one("br7", "dv00"), one("br9", "dv01")]));
    assert!(!its_own(&[one("br7", "dv00"), one("br8", "dv01"), one("br8", "dv02")]));
    for tap in ["", "a;reboot", "$(reboot)", "\u{1b}[2J", "a/b"] {
        assert!(!its_own(&[one("br7", "dv00"), one("br8", tap)]), "{tap:?}");
    }
    are_few(&vec![SpaceInfo::default(); 9]).expect("memory and eight disks");
    are_few(&vec![SpaceInfo::default(); 10]).expect_err("more than it can have");
}

#[test]
fn only_files_are_sent() {
    let dir = tempfile::tempdir().expect("directory");
    let spec = VmSpec { kernel: dir.path().to_owned(), ..guest_spec(dir.path()) };
    let error = files(&spec).expect_err("a directory").to_string();
    assert!(error.contains("is no file"), "{error}");
}

#[test]
fn sweeping_removes_the_console_socket_and_nothing_else() {
    let dir = tempfile::tempdir().expect("directory");
    let place = Place { name: "web".into(), uuid: "u".into(), dir: dir.path().to_owned() };
    let spec = json!({});
    backend().sweep(&spec, &place).expect("nothing there");
    let listener = std::os::unix::net::UnixListener::bind(place.console()).expect("bind");
    drop(listener);
    backend().sweep(&spec, &place).expect("a socket");
    assert!(!place.console().exists());
    fs::write(place.console(), "mine").expect("write");
    backend().sweep(&spec, &place).expect("a file");
    assert!(place.console().exists());
}

#[test]
fn disks_that_moved_are_where_they_are_in_the_spec() {
    let disks = serde_json::json!([{"path": "/srv/a"}, {"path": "/srv/b", "readonly": true}]);
    let spec = serde_json::json!({
        "kernel": "/srv/k", "cpus": 1, "memory_bytes": 4 << 20, "disks": disks
    });
    let backend = backend();
    let pairs = |list: &[(&str, &str)]| -> Vec<(PathBuf, PathBuf)> {
        list.iter().map(|(old, new)| (old.into(), new.into())).collect()
    };
    let moved = backend.relocated(&spec, &pairs(&[("/srv/a", "/fast/a")])).expect("a spec");
    let paths = [0, 1].map(|number: usize| moved["disks"][number]["path"].clone());
    assert_eq!(paths, ["/fast/a", "/srv/b"]);
    // Asked twice, as after a crash.
    assert_eq!(backend.relocated(&moved, &pairs(&[("/srv/a", "/fast/a")])).expect("a spec"), moved);
    assert!(backend.relocated(&spec, &pairs(&[("/srv/c", "/fast/c")])).is_err());
}
