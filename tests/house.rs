//! The rules of the house that can be read from its files: who may depend on whom, and who may name whom.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Where a crate's own files are.
const ROOMS: [&str; 4] = ["src", "shared", "vm", "container"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The decamp crates that a package of this workspace depends on, in any way.
fn depends_on(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|one| one["name"] == package).expect("the package");
    let dependencies = found["dependencies"].as_array().expect("dependencies");
    dependencies
        .iter()
        .filter_map(|one| one["name"].as_str())
        .filter(|name| name.starts_with("decamp"))
        .map(str::to_owned)
        .collect()
}

/// Every Rust file below a directory of the workspace.
fn files(below: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(below), &mut found);
    found
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn dependencies_run_one_way() {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(depends_on("decamp-shared"), names(&[]), "shared stands alone");
    assert_eq!(depends_on("decamp-vm"), names(&["decamp-shared"]));
    assert_eq!(depends_on("decamp-container"), names(&["decamp-shared"]));
    assert_eq!(depends_on("decamp"), names(&["decamp-shared", "decamp-vm", "decamp-container"]));
}

/// Packages of a lock file, as name and version.
fn locked(path: &str) -> BTreeSet<String> {
    let lock = text(&root().join(path));
    let packages = lock.split("[[package]]").skip(1);
    packages.map(|one| one.lines().skip(1).take(2).collect::<Vec<_>>().join(" ")).collect()
}

/// What is fuzzed is what is built. `cargo metadata --manifest-path tests/fuzzers/Cargo.toml`, with a copy of our lock
/// file there, makes one that is right.
#[test]
fn fuzzers_have_the_versions_of_everything_else() {
    let ours = locked("Cargo.lock");
    let more: Vec<_> = locked("tests/fuzzers/Cargo.lock").difference(&ours).cloned().collect();
    let names = ["arbitrary", "decamp-fuzzers", "libfuzzer-sys"];
    assert_eq!(more.len(), names.len(), "{more:?}");
    for (one, name) in more.iter().zip(names) {
        assert!(one.starts_with(&format!("name = \"{name}\"")), "{more:?}");
    }
}

#[test]
fn one_file_names_both_kinds() {
    for path in files("src") {
        let text = text(&path);
        let names = text.contains("decamp_vm") || text.contains("decamp_container");
        assert_eq!(names, path.ends_with("src/backend.rs"), "{}", path.display());
    }
}

#[test]
fn neither_kind_is_named_by_what_they_share() {
    for (below, strangers) in [
        ("shared", &["decamp_vm", "decamp_container"][..]),
        ("vm", &["decamp_container"]),
        ("container", &["decamp_vm"]),
    ] {
        for path in files(below) {
            let text = text(&path);
            for stranger in strangers {
                assert!(!text.contains(stranger), "{} names {stranger}", path.display());
            }
        }
    }
}

#[test]
fn main_is_short_and_every_room_says_what_it_is() {
    assert!(text(&root().join("src/main.rs")).lines().count() < 80);
    for path in ROOMS.iter().flat_map(|room| files(room)) {
        assert!(text(&path).starts_with("//!"), "{} does not say what it is", path.display());
    }
}
