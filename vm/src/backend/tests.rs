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
    })
}

fn manifest(spec: &VmSpec) -> Manifest {
    let kvm = host::open_kvm().expect("KVM");
    let (cpuid, tsc_khz) = crate::cpuid::of_this_host(&kvm).expect("CPUID");
    let needs =
        Needs { vmm: "0.1.0".into(), cpuid, tsc_khz, capabilities: host::capabilities(&kvm) };
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
    bad["kernel"] = json!(dir.path().join("missing"));
    bad["memory_bytes"] = json!(1u64 << 42);
    assert_eq!(codes(&backend().check(&bad)), [RefusalCode::File, RefusalCode::Memory]);

    let text = dir.path().join("text");
    fs::write(&text, "no kernel\n").expect("write");
    bad = good.clone();
    bad["kernel"] = json!(text);
    let refusals = backend().check(&bad);
    assert_eq!(codes(&refusals), [RefusalCode::File]);
    assert!(refusals[0].text.contains("ELF"), "{}", refusals[0].text);

    bad = good;
    bad["cpus"] = json!(4);
    assert_eq!(codes(&backend().check(&bad)), [RefusalCode::Request]);
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
    let listener = std::os::unix::net::UnixListener::bind(console_socket(&place)).expect("bind");
    drop(listener);
    backend().sweep(&spec, &place).expect("a socket");
    assert!(!console_socket(&place).exists());
    fs::write(console_socket(&place), "mine").expect("write");
    backend().sweep(&spec, &place).expect("a file");
    assert!(console_socket(&place).exists());
}
