//! What the scripts of this folder must not do to a machine: kill or remove what they did not make. What
//! they are for is shown by the end-to-end tests, which stand on them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nix::fcntl::{Flock, FlockArg};

const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz");
const HOSTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosts");
const LAB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/run");
const SETUP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/setup");

fn hosts(verb: &str, dir: &Path, data: &Path) -> Output {
    let mut command = Command::new(HOSTS);
    command.arg(verb).env("DECAMP_HOSTS_DIR", dir).env("DECAMP_HOSTS_DATA", data);
    // No host is made should a test go wrong.
    command.env("DECAMP_BIN", "/bin/false").output().expect("tests/hosts runs")
}

fn assert_refused(output: &Output, says: &str) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(says), "{told}");
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A name for hosts that nobody else has.
fn name() -> String {
    format!("decamp-scripts-{}", std::process::id())
}

#[test]
fn hosts_have_names_that_nothing_else_has() {
    let scratch = tempfile::tempdir().expect("a directory");
    let data = scratch.path().join("data");
    for dir in
        ["decamp", "docker", "system.slice", "decamp-", "decamp-a_b", "dh", "DH-a", "decamp-a/.."]
    {
        for slashes in ["", "/", "//"] {
            let dir = scratch.path().join(format!("{dir}{slashes}"));
            fs::create_dir_all(&dir).expect("a directory");
            fs::write(dir.join("theirs"), "x").expect("written");
            for verb in ["down", "up", "status"] {
                assert_refused(&hosts(verb, &dir, &data), "DECAMP_HOSTS_DIR");
            }
            assert!(dir.join("theirs").exists());
        }
    }
    for dir in ["/", "decamp-here", "./decamp-here", "/tmp/../decamp-here"] {
        assert_refused(&hosts("down", Path::new(dir), &data), "DECAMP_HOSTS_DIR");
    }
    let within = scratch.path().join(name());
    assert_refused(&hosts("down", &within, &within.join("data")), "are apart");
    assert_refused(&hosts("down", &within, Path::new("data")), "absolute");
}

#[test]
fn directories_that_hold_something_else_are_not_removed() {
    if !is_root() {
        println!("[skipped: needs root]");
        return;
    }
    let scratch = tempfile::tempdir().expect("a directory");
    let [dir, data, link] =
        [name(), "data".into(), "link".into()].map(|one| scratch.path().join(one));
    for (theirs, empty) in [(&dir, &data), (&data, &dir)] {
        fs::create_dir_all(theirs).expect("a directory");
        fs::create_dir_all(empty).expect("a directory");
        fs::write(theirs.join("theirs"), "x").expect("written");
        for verb in ["down", "up"] {
            let arguments: &[&str] = if verb == "up" { &["up", "--no-agent"] } else { &["down"] };
            let output = Command::new(HOSTS)
                .args(arguments)
                .env("DECAMP_HOSTS_DIR", format!("{}/", dir.display()))
                .env("DECAMP_HOSTS_DATA", &data)
                .output()
                .expect("tests/hosts runs");
            assert_refused(&output, "was not made by tests/hosts");
            assert!(theirs.join("theirs").exists(), "{verb}");
        }
        fs::remove_file(theirs.join("theirs")).expect("removed");
    }
    std::os::unix::fs::symlink(&data, &link).expect("linked");
    assert_refused(&hosts("down", &dir, &link), "symbolic link");
    // What it made it removes, with a slash at the end too.
    for made in [&dir, &data] {
        fs::write(made.join(".made-by-decamp-tests-hosts"), "").expect("written");
        fs::write(made.join("ours"), "x").expect("written");
    }
    let output = hosts("down", &dir.join(""), &data);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!dir.exists() && !data.exists());
}

#[test]
fn a_second_run_leaves_the_hosts_of_the_first() {
    if !is_root() {
        println!("[skipped: needs root]");
        return;
    }
    let scratch = tempfile::tempdir().expect("a directory");
    let (dir, data) = (scratch.path().join(name()), scratch.path().join("data"));
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join(".made-by-decamp-tests-hosts"), "").expect("written");
    let lock = scratch.path().join(format!("{}.run.lock", name()));
    let file = fs::File::create(&lock).expect("a lock");
    let held = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("locked");
    for script in ["all", "demo"] {
        let output = Command::new(format!("{}/tests/{script}", env!("CARGO_MANIFEST_DIR")))
            .env("DECAMP_HOSTS_DIR", dir.join(""))
            .env("DECAMP_HOSTS_DATA", &data)
            .output()
            .expect("the script runs");
        assert_refused(&output, "another run is on");
        assert!(dir.exists(), "{script} took down what it had not made");
        assert!(lock.exists(), "{script} unlocked what it had not locked");
    }
    drop(held);
}

/// The lab on a machine that has only what its way in takes.
#[test]
fn a_lab_that_cannot_be_says_what_it_lacks() {
    let scratch = tempfile::tempdir().expect("a directory");
    let [bin, kernels] = ["bin", "kernels"].map(|one| scratch.path().join(one));
    fs::create_dir(&bin).expect("a directory");
    for name in ["bash", "dirname", "readlink"] {
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(name), bin.join(name))
            .expect("linked");
    }
    let lab = |words: &[&str]| {
        let mut command = Command::new(LAB);
        command.args(words).env_clear().env("PATH", &bin).env("DECAMP_LAB_DIR", &kernels);
        command.env("TMPDIR", scratch.path()).env("DECAMP_QEMU", bin.join("qemu-system-x86_64"));
        command.output().expect("tests/lab/run runs")
    };
    let skips = |output: &Output| {
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{told}");
        assert!(told.lines().any(|line| line.starts_with("skipped: ")), "{told}");
        told.into_owned()
    };
    assert!(skips(&lab(&["guests"])).contains("python3"));
    if !Path::new("/usr/bin/python3").exists() {
        return;
    }
    std::os::unix::fs::symlink("/usr/bin/python3", bin.join("python3")).expect("linked");
    for name in ["guests", "peers", "refusals", "crossing", "containers"] {
        let told = skips(&lab(&[name]));
        assert!(told.contains("qemu-system-x86_64"), "{told}");
        assert!(told.contains(&format!("test lab::{name} ... skipped: ")), "{told}");
    }
    assert_eq!(lab(&["nonsense"]).status.code(), Some(2));
    let left = fs::read_dir(scratch.path()).expect("listed").count();
    assert_eq!((left, kernels.exists()), (1, false), "something was left behind");
}

/// Fuzzers on a machine that has no compiler for C++.
#[test]
fn fuzzers_that_cannot_be_built_are_skipped() {
    let scratch = tempfile::tempdir().expect("a directory");
    let [bin, target] = ["bin", "target"].map(|one| scratch.path().join(one));
    fs::create_dir(&bin).expect("a directory");
    for name in ["bash", "dirname", "readlink", "cat"] {
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(name), bin.join(name))
            .expect("linked");
    }
    // Neither is run.
    for name in ["cargo", "rustc"] {
        std::os::unix::fs::symlink("/bin/false", bin.join(name)).expect("linked");
    }
    let fuzz = |words: &[&str]| {
        let mut command = Command::new(FUZZ);
        command.args(words).env_clear().env("PATH", &bin).env("CARGO_TARGET_DIR", &target);
        command.output().expect("tests/fuzz runs")
    };
    let output = fuzz(&["1", "device", "wire"]);
    let told = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(told.contains("test fuzz::device ... skipped: no c++\n"), "{told}");
    assert!(told.ends_with("0 passed, 0 failed, 2 skipped\n"), "{told}");
    assert!(!target.exists(), "something was left behind");
    for words in [&["1", "nonsense"][..], &["0"], &["soon"]] {
        assert_eq!(fuzz(words).status.code(), Some(2), "{words:?}");
    }
}

#[test]
fn a_guard_of_a_run_that_was_killed_goes_with_the_next() {
    let scratch = tempfile::tempdir().expect("a directory");
    let policy = scratch.path().join("policy-rc.d");
    let run = |steps: &str| {
        let script =
            format!("cleanup=(); {steps}; for step in \"${{cleanup[@]}}\"; do $step; done");
        let output = setup_with(scratch.path(), &script, &policy);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run("guard_services; [[ -x $POLICY ]]");
    assert!(!policy.exists(), "it goes with its run");
    run("guard_services; cleanup=()");
    assert!(policy.exists(), "that run was killed");
    run("adopt_guard; guard_services");
    assert!(!policy.exists());
    fs::write(&policy, "#!/bin/sh\nexit 101\n").expect("written");
    run("adopt_guard; guard_services || true");
    assert!(policy.exists(), "it is not ours");
}

/// Runs functions of `tests/setup`, all that stands before its main part, on a prefix.
fn setup(prefix: &Path, script: &str) -> Output {
    setup_with(prefix, script, Path::new("/dev/null/none"))
}

/// The same, with another guard against services.
fn setup_with(prefix: &Path, script: &str, policy: &Path) -> Output {
    let functions = fs::read_to_string(SETUP).expect("tests/setup");
    let (functions, _) = functions.split_once("# ---- the whole").expect("a main part");
    let script = format!("{functions}\n{script}");
    let mut command = Command::new("bash");
    command.args(["-c", &script]).env("DECAMP_CRIU_PREFIX", prefix).env("DECAMP_POLICY_RC", policy);
    command.output().expect("bash runs")
}

#[test]
fn a_prefix_may_hold_what_is_not_ours() {
    let scratch = tempfile::tempdir().expect("a directory");
    let prefix = scratch.path();
    for dir in ["lib", "share", "4.1", "4.2-1", "4.2.1-1", "4.2.1-1.new", "bin"] {
        fs::create_dir(prefix.join(dir)).expect("a directory");
    }
    for dir in ["4.2-1", "4.2.1-1", "4.2.1-1.new"] {
        fs::write(prefix.join(dir).join(".made-by-decamp-tests-setup"), "").expect("written");
    }
    let output = setup(prefix, "remove_others 4.2.1-1; check_ours \"$PREFIX/4.2.1-1\"");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left = |dir: &str| prefix.join(dir).exists();
    assert!(["lib", "share", "4.1", "4.2.1-1", "bin"].into_iter().all(left));
    assert!(!left("4.2-1") && !left("4.2.1-1.new"));
    assert_refused(&setup(prefix, "check_ours \"$PREFIX/4.1\""), "was not made by tests/setup");
    fs::write(prefix.join("bin/criu"), "#!/bin/sh\n").expect("written");
    assert_refused(&setup(prefix, "check_program_is_ours"), "was not made by tests/setup");
}

#[test]
fn what_was_unpacked_before_there_were_markers_is_known_by_its_wrapper() {
    let scratch = tempfile::tempdir().expect("a directory");
    let prefix = scratch.path();
    for dir in ["4.1-1", "4.2-1", "bin"] {
        fs::create_dir(prefix.join(dir)).expect("a directory");
    }
    let wrapper =
        format!("# Made by tests/setup of decamp: CRIU\nexec {}/4.1-1/x\n", prefix.display());
    fs::write(prefix.join("bin/criu"), wrapper).expect("written");
    let output = setup(prefix, "mark_earlier; check_program_is_ours; remove_others 5.0-1");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!prefix.join("4.1-1").exists(), "it was ours");
    assert!(prefix.join("4.2-1").exists(), "nobody says that this is");
}
