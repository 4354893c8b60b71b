//! The configuration of this host's podman (containers.conf(5)), with other commands in it.

use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::error::{ContainerError, Result};

/// What podman itself reads, where it is not told otherwise; what comes later has the last word.
const FILES: [&str; 2] =
    ["/usr/share/containers/containers.conf", "/etc/containers/containers.conf"];
const MORE: &str = "/etc/containers/containers.conf.d";
/// Where podman looks for its helpers.
const HELPERS: [&str; 4] = [
    "/usr/local/libexec/podman",
    "/usr/local/lib/podman",
    "/usr/libexec/podman",
    "/usr/lib/podman",
];

/// All of it.
pub(super) fn of_host() -> Result<Table> {
    let mut all = Table::new();
    for path in files() {
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            text => text.map_err(ContainerError::io(format!("read {}", path.display())))?,
        };
        let more: Table = text
            .parse()
            .map_err(|error| ContainerError::malformed(path, format!("is no TOML: {error}")))?;
        add(&mut all, more);
    }
    Ok(all)
}

fn files() -> Vec<PathBuf> {
    if let Some(only) = std::env::var_os("CONTAINERS_CONF") {
        return vec![only.into()];
    }
    let mut more: Vec<PathBuf> =
        fs::read_dir(MORE).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    more.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
    more.sort();
    FILES.iter().map(PathBuf::from).chain(more).collect()
}

fn add(to: &mut Table, more: Table) {
    for (key, value) in more {
        match (to.get_mut(&key), value) {
            (Some(Value::Table(there)), Value::Table(more)) => add(there, more),
            (_, value) => {
                to.insert(key, value);
            }
        }
    }
}

fn helpers(config: &Table) -> Vec<PathBuf> {
    let named = config.get("engine").and_then(|engine| engine.get("helper_binaries_dir"));
    match named.and_then(Value::as_array) {
        Some(named) => named.iter().filter_map(Value::as_str).map(PathBuf::from).collect(),
        None => HELPERS.iter().map(PathBuf::from).collect(),
    }
}

/// Where podman finds its helper `name`.
pub(super) fn helper(config: &Table, name: &str) -> Option<PathBuf> {
    helpers(config).into_iter().map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// The program that podman has be the first process of a container with `--init`, by default `name`.
pub(super) fn init(config: &Table, name: &str) -> Option<PathBuf> {
    let named = config.get("containers").and_then(|containers| containers.get("init_path"));
    match named.and_then(Value::as_str) {
        Some(path) => Some(path.into()),
        None => helper(config, name).or_else(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path)
                .map(|directory| directory.join(name))
                .find(|path| path.is_file())
        }),
    }
}

/// The same, with `program` for the OCI runtime called `runtime`, and helpers in `bin` before all others.
pub(super) fn with(mut config: Table, runtime: &str, program: &Path, bin: &Path) -> Result<String> {
    let text = |path: &Path| Value::String(path.display().to_string());
    let mut directories = vec![text(bin)];
    directories.extend(helpers(&config).iter().map(|path| text(path)));
    let mut runtimes = Table::new();
    runtimes.insert(runtime.to_owned(), Value::Array(vec![text(program)]));
    let mut engine = Table::new();
    engine.insert("runtimes".to_owned(), Value::Table(runtimes));
    engine.insert("helper_binaries_dir".to_owned(), Value::Array(directories));
    let mut more = Table::new();
    more.insert("engine".to_owned(), Value::Table(engine));
    add(&mut config, more);
    toml::to_string(&config).map_err(|error| {
        ContainerError::State(format!("podman's configuration cannot be written: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_exchanged_is_exchanged_and_the_rest_stays() {
        let mut config: Table = "[engine]\nevents_logger = \"file\"\n[engine.runtimes]\nrunc = [\"/a\"]\ncrun = [\"/c\"]"
            .parse()
            .expect("TOML");
        add(&mut config, "[engine]\nhelper_binaries_dir = [\"/h\"]\n".parse().expect("TOML"));
        let text = with(config, "runc", Path::new("/x/runc"), Path::new("/x/bin")).expect("text");
        let config: Table = text.parse().expect("TOML");
        let engine = &config["engine"];
        assert_eq!(engine["events_logger"].as_str(), Some("file"));
        assert_eq!(engine["runtimes"]["runc"][0].as_str(), Some("/x/runc"));
        assert_eq!(engine["runtimes"]["crun"][0].as_str(), Some("/c"));
        assert_eq!(engine["helper_binaries_dir"][1].as_str(), Some("/h"));
    }
}
