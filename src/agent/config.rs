//! The agent's configuration: a TOML file, checked whole before anything starts. Every complaint
//! names line and column.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use decamp_shared::methods::Methods;
use decamp_shared::network::is_interface_name;
use decamp_shared::protocol::PORT;
use decamp_shared::transport::PeerAddress;
use decamp_shared::workload::{HostTools, IdRange, is_plain_absolute};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::messages::is_host_name;

/// A UNIX socket's path has at most 107 bytes, and a keeper's is `STATE_DIR/workloads/NAME/console.sock`.
const STATE_DIR_MAX: usize = 107 - "/workloads//console.sock".len() - 40;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file could not be read.
    #[error("Cannot read the configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    /// What it says is wrong.
    #[error("The configuration {path} is wrong: {text}")]
    Wrong { path: PathBuf, text: String },
}

/// What the command line says instead of the file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    /// Where to listen for other hosts.
    pub(crate) listen: Option<SocketAddr>,
    /// Where to listen for the CLI.
    pub(crate) socket: Option<PathBuf>,
    /// Where to keep state.
    pub(crate) state_dir: Option<PathBuf>,
}

/// Whether pages that come here or leave here may travel unencrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PageEncryption {
    /// Never.
    #[default]
    On,
    /// When the other host says `off` too.
    Off,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Name of this host, as its certificate says.
    #[serde(deserialize_with = "host_name")]
    pub(crate) name: String,
    /// Where to listen for other hosts.
    #[serde(default = "default_listen", deserialize_with = "listen_address")]
    pub(crate) listen: SocketAddr,
    /// The local API.
    #[serde(default = "default_socket", deserialize_with = "absolute_path")]
    pub(crate) socket: PathBuf,
    /// Registry, journal and the workloads' directories.
    #[serde(default = "default_state_dir", deserialize_with = "state_dir")]
    pub(crate) state_dir: PathBuf,
    /// The authority that every host's certificate comes from.
    pub(crate) ca: PathBuf,
    /// This host's certificate.
    pub(crate) certificate: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
    /// Whether pages may travel unencrypted.
    #[serde(default)]
    pub(crate) page_encryption: PageEncryption,
    /// CRIU: a path, or a name to look for in PATH.
    #[serde(default = "default_criu")]
    pub(crate) criu: PathBuf,
    /// runc: a path, or a name to look for in PATH.
    #[serde(default = "default_runc")]
    pub(crate) runc: PathBuf,
    /// How containers may be moved.
    #[serde(default, deserialize_with = "methods")]
    pub(crate) containers: Methods,
    /// crun: a path, or a name to look for in PATH.
    #[serde(default = "default_crun")]
    pub(crate) crun: PathBuf,
    /// How long a paused workload waits for its agent before it resumes by itself.
    #[serde(default = "default_resume_after", deserialize_with = "time")]
    pub(crate) resume_after: Duration,
    /// Hosts that workloads can be moved to: `ADDR[:PORT]` by name.
    #[serde(default, deserialize_with = "hosts")]
    pub(crate) hosts: BTreeMap<String, String>,
    /// Where arriving files go that stood below another path on their source.
    #[serde(default, deserialize_with = "mappings")]
    pub(crate) paths: Vec<(PathBuf, PathBuf)>,
    /// Bridges that arriving interfaces go to which hung on another one on their source, by that one's name.
    #[serde(default, deserialize_with = "bridges")]
    pub(crate) bridges: BTreeMap<String, String>,
    /// Numbers of users that nobody else has, `FIRST-LAST`: the VMM of each virtual machine runs as one of them.
    #[serde(default, deserialize_with = "users")]
    pub(crate) vm_users: IdRange,
}

impl Config {
    /// Reads and checks `path`. Certificates are looked for relative to its directory.
    ///
    /// # Errors
    /// When the file cannot be read or anything in it is wrong.
    pub(crate) fn load(path: &Path, overrides: Overrides) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let wrong = |text: String| ConfigError::Wrong { path: path.to_owned(), text };
        let mut config: Config = toml::from_str(&text)
            .map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
        let base = path.parent().unwrap_or(Path::new(""));
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
        for file in [&mut config.ca, &mut config.certificate, &mut config.key] {
            *file = base.join(&*file);
        }
        if config.hosts.contains_key(&config.name) {
            return Err(wrong(format!(
                "[hosts] names {} itself; it is for other hosts",
                config.name
            )));
        }
        config.apply(overrides).map_err(wrong)?;
        Ok(config)
    }

    fn apply(&mut self, overrides: Overrides) -> Result<(), String> {
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        if let Some(listen) = overrides.listen {
            self.listen = listen;
        }
        if let Some(socket) = overrides.socket {
            self.socket = absolute(socket);
        }
        if let Some(dir) = overrides.state_dir {
            self.state_dir = absolute(dir);
            check_state_dir(&self.state_dir)?;
        }
        Ok(())
    }

    /// The tools that backends use. `decamp` is this executable.
    pub(crate) fn tools(&self, decamp: PathBuf) -> HostTools {
        HostTools {
            decamp,
            criu: self.criu.clone(),
            runc: self.runc.clone(),
            crun: self.crun.clone(),
            resume_after: self.resume_after,
            methods: self.containers,
            bridges: self.bridges.clone(),
            users: self.vm_users,
        }
    }

    /// The host behind `HOST[:PORT]`, if it is in `[hosts]`.
    pub(crate) fn peer(&self, to: &str) -> Option<PeerAddress> {
        let (name, port) = match to.split_once(':') {
            Some((name, port)) => (name, Some(port.parse::<u16>().ok()?)),
            None => (to, None),
        };
        let known = self.hosts.get(name)?;
        let address = match (port, known.rsplit_once(':')) {
            (Some(port), Some((host, _))) => format!("{host}:{port}"),
            _ => known.clone(),
        };
        Some(PeerAddress { name: name.to_owned(), address })
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], PORT))
}

fn default_socket() -> PathBuf {
    "/run/decamp.sock".into()
}

fn default_state_dir() -> PathBuf {
    "/var/lib/decamp".into()
}

fn default_criu() -> PathBuf {
    "criu".into()
}

fn default_runc() -> PathBuf {
    "runc".into()
}

fn default_crun() -> PathBuf {
    "crun".into()
}

fn default_resume_after() -> Duration {
    Duration::from_secs(5)
}

/// Reads a value with `check`, so that a complaint carries the value's place in the file.
fn checked<'de, D, T, R, E>(
    deserializer: D,
    check: impl FnOnce(T) -> Result<R, E>,
) -> Result<R, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
    E: Display,
{
    check(T::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn host_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, |name: String| match is_host_name(&name) {
        true => Ok(name),
        false => Err(format!(
            "{name:?} cannot be the name of a host: letters, digits, dots and hyphens, at most 63"
        )),
    })
}

fn listen_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    checked(deserializer, |text: String| {
        text.parse::<SocketAddr>()
            .or_else(|_| text.parse::<IpAddr>().map(|address| SocketAddr::new(address, PORT)))
            .map_err(|_| format!("{text:?} is not ADDR or ADDR:PORT, as in 10.0.0.1:{PORT}"))
    })
}

fn absolute_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    checked(deserializer, |path: PathBuf| match is_plain_absolute(&path) {
        true => Ok(path),
        false => Err(format!("{} is not an absolute path without `..`", path.display())),
    })
}

fn state_dir<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    checked(deserializer, |path: PathBuf| check_state_dir(&path).map(|()| path))
}

fn check_state_dir(path: &Path) -> Result<(), String> {
    if !is_plain_absolute(path) {
        return Err(format!("{} is not an absolute path without `..`", path.display()));
    }
    match path.as_os_str().len() {
        0..=STATE_DIR_MAX => Ok(()),
        long => Err(format!(
            "the state directory's path has {long} bytes; more than {STATE_DIR_MAX} leave no room for \
             the paths of sockets below it"
        )),
    }
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    checked(deserializer, |text: String| match humantime::parse_duration(&text) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(format!("{text:?} is not a time; write 500ms, 5s or 1m")),
    })
}

fn methods<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Methods, D::Error> {
    checked(deserializer, |methods: Methods| match methods.contradiction() {
        Some(text) => Err(text),
        None => Ok(methods),
    })
}

fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    checked(deserializer, |table: BTreeMap<String, String>| {
        table
            .into_iter()
            .map(|(name, address)| match (is_host_name(&name), with_port(&address)) {
                (true, Some(address)) => Ok((name, address)),
                (false, _) => Err(format!("{name:?} cannot be the name of a host")),
                (true, None) => Err(format!(
                    "the address {address:?} of {name} is not ADDR or ADDR:PORT, as in 10.0.0.2:{PORT}"
                )),
            })
            .collect::<Result<_, String>>()
    })
}

/// `ADDR[:PORT]` with its port; an IPv6 address in brackets.
fn with_port(text: &str) -> Option<String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return (address.port() > 0).then(|| address.to_string());
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, PORT).to_string());
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, port.parse::<u16>().ok().filter(|&port| port > 0)?),
        None => (text, PORT),
    };
    is_host_name(name).then(|| format!("{name}:{port}"))
}

fn mappings<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<(PathBuf, PathBuf)>, D::Error> {
    checked(deserializer, |table: BTreeMap<PathBuf, PathBuf>| {
        match table.iter().find(|(old, new)| !is_plain_absolute(old) || !is_plain_absolute(new)) {
            Some((old, new)) => Err(format!(
                "{:?} = {:?} has to be two absolute paths without `..`",
                old.display(),
                new.display()
            )),
            None => Ok(table.into_iter().collect()),
        }
    })
}

fn bridges<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    checked(deserializer, |table: BTreeMap<String, String>| {
        let mut names = table.keys().chain(table.values());
        let wrong = names.find(|name| !is_interface_name(name)).cloned();
        match wrong {
            Some(name) => Err(format!("{name:?} cannot be the name of a bridge")),
            None => Ok(table),
        }
    })
}

/// Users up to this one are, or may be, of people and services (systemd's UIDS-GIDS).
const OF_PEOPLE: u32 = 65_535;

fn users<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IdRange, D::Error> {
    checked(deserializer, |text: String| {
        let read = |text: &str| text.trim().parse::<u32>().ok();
        let ends = text.split_once('-').and_then(|(first, last)| read(first).zip(read(last)));
        match ends {
            // Whatever runs as one of them when its VM has ended is ended: those below are of people and services.
            // The very last means none.
            Some((first, last)) if OF_PEOPLE < first && first <= last && last < u32::MAX => {
                Ok(IdRange { first, last })
            }
            _ => Err(format!(
                "{text:?} is no range of users above {OF_PEOPLE}: write FIRST-LAST, as in \
                 1879048192-1879113727"
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use decamp_shared::methods::{HidingChoice, RestoreChoice, TrackerChoice};

    use super::*;

    const GOOD: &str = r#"
name = "alpha"
ca = "ca.pem"
certificate = "/etc/decamp/alpha.pem"
key = "alpha.key"

[hosts]
beta = "10.77.0.2"
gamma = "10.77.0.3:7421"
delta = "delta.example.org"
six = "[fd77::4]:7422"

[paths]
"/srv/old" = "/srv/new"

[bridges]
vmbr0 = "br0"
"#;

    fn load(text: &str) -> Result<Config, String> {
        load_with(text, Overrides::default())
    }

    fn load_with(text: &str, overrides: Overrides) -> Result<Config, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).expect("written");
        let config = Config::load(&path, overrides).map_err(|error| error.to_string());
        if let Ok(config) = &config {
            assert_eq!(config.ca, dir.path().join("ca.pem"));
        }
        config
    }

    #[test]
    fn a_short_configuration_has_sensible_defaults() {
        let config = load(GOOD).expect("right");
        assert_eq!(config.listen, "0.0.0.0:7420".parse().expect("an address"));
        assert_eq!(config.socket, Path::new("/run/decamp.sock"));
        assert_eq!(config.state_dir, Path::new("/var/lib/decamp"));
        assert_eq!(config.certificate, Path::new("/etc/decamp/alpha.pem"));
        assert_eq!(config.page_encryption, PageEncryption::On);
        assert_eq!(config.containers, Methods::default());
        assert_eq!(config.resume_after, Duration::from_secs(5));
        assert_eq!(config.paths, [("/srv/old".into(), "/srv/new".into())]);
        assert_eq!(config.tools("decamp".into()).bridges["vmbr0"], "br0");
        assert_eq!(config.tools("decamp".into()).users, IdRange::default());
    }

    #[test]
    fn users_of_virtual_machines_are_a_range_without_root() {
        let with =
            |users: &str| load(&GOOD.replacen("name =", &format!("vm_users = {users}\nname ="), 1));
        let config = with("\"200000-200099\"").expect("right");
        assert_eq!(config.vm_users, IdRange { first: 200_000, last: 200_099 });
        assert_eq!(config.vm_users.count(), 100);
        for bad in [
            "\"0-5\"",
            "\"1000-1999\"",
            "\"65535-65600\"",
            "\"7-6\"",
            "\"7\"",
            "\"70000-4294967295\"",
            "\"-1-4\"",
            "\"a-b\"",
            "7",
        ] {
            let error = with(bad).expect_err(bad);
            assert!(
                error.contains("FIRST-LAST") || error.contains("invalid type"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn hosts_get_the_port_of_the_protocol() {
        let config = load(GOOD).expect("right");
        let address = |to: &str| config.peer(to).map(|peer| peer.address);
        assert_eq!(address("beta").as_deref(), Some("10.77.0.2:7420"));
        assert_eq!(address("beta:9000").as_deref(), Some("10.77.0.2:9000"));
        assert_eq!(address("gamma").as_deref(), Some("10.77.0.3:7421"));
        assert_eq!(address("delta").as_deref(), Some("delta.example.org:7420"));
        assert_eq!(address("six:1").as_deref(), Some("[fd77::4]:1"));
        assert_eq!(address("omega"), None);
        assert_eq!(address("beta:x"), None);
    }

    #[test]
    fn the_command_line_wins() {
        let overrides = Overrides {
            listen: Some("127.0.0.1:1".parse().expect("an address")),
            socket: Some("/tmp/s".into()),
            state_dir: Some("/tmp/d".into()),
        };
        let config = load_with(GOOD, overrides).expect("right");
        assert_eq!(config.listen.port(), 1);
        assert_eq!(config.socket, Path::new("/tmp/s"));
        assert_eq!(config.state_dir, Path::new("/tmp/d"));
        let long = Overrides { state_dir: Some("/x".repeat(40).into()), ..Overrides::default() };
        assert!(load_with(GOOD, long).expect_err("too long").contains("no room"));
    }

    #[test]
    fn the_ways_of_moving_containers_are_chosen_each_by_itself() {
        let with = |table: &str| load(&format!("{GOOD}\n[containers]\n{table}\n"));
        let methods =
            with("tracker = \"page-hash\"\nrestore = \"eager\"").expect("right").containers;
        let expected = Methods {
            tracker: TrackerChoice::PageHash,
            restore: RestoreChoice::Eager,
            ..Methods::default()
        };
        assert_eq!(methods, expected);
        let config = with("hiding = \"none\"").expect("right");
        assert_eq!(config.tools("decamp".into()).methods.hiding, HidingChoice::None);
        // What is wrong is said with what would be right.
        for (table, says) in [
            (
                "tracker = \"softdirty\"",
                "`auto`, `write-protect`, `soft-dirty`, `page-hash`, `none`",
            ),
            ("restore = \"late\"", "`auto`, `lazy`, `eager`"),
            ("forked = \"twice\"", "`auto`, `shared`, `apart`, `each`"),
            ("hiding = \"seccomp\"", "`auto`, `hidden`, `none`"),
            ("traker = \"auto\"", "`tracker`, `hiding`, `restore`"),
            ("tracker = \"page-hash\"\nhiding = \"none\"", "cannot be with hiding"),
        ] {
            let error = with(table).expect_err(table);
            assert!(error.contains(says) && error.contains("at line "), "{error}");
        }
    }

    #[test]
    fn complaints_name_line_and_column() {
        let with = |line: &str| format!("{line}\n{GOOD}");
        for (text, line, says) in [
            (with("nmae = \"x\""), 1, "unknown field `nmae`"),
            (with("listen = \"nowhere\""), 1, "is not ADDR or ADDR:PORT"),
            (with("resume_after = \"5\""), 1, "is not a time"),
            (with("page_encryption = \"maybe\""), 1, "unknown variant `maybe`"),
            (with("socket = \"run/decamp.sock\""), 1, "is not an absolute path"),
            (with(&format!("state_dir = \"/{}\"", "d".repeat(60))), 1, "leave no room"),
            (GOOD.replace("\"alpha\"", "\"al pha\""), 2, "cannot be the name of a host"),
            (GOOD.replace("\"alpha\"", "7"), 2, "invalid type"),
            (GOOD.replace("\"10.77.0.2\"", "\"10.77.0.2:0\""), 7, "of beta is not ADDR"),
            (GOOD.replace("\"/srv/new\"", "\"new\""), 13, "two absolute paths"),
            (GOOD.replace("\"br0\"", "\"br/0\""), 16, "cannot be the name of a bridge"),
            ("name = \"alpha".to_owned(), 1, "string"),
        ] {
            let error = load(&text).expect_err(&text);
            assert!(error.contains(says), "{error}");
            assert!(error.contains("at line "), "{error}");
            // A whole table is named by where it begins.
            if line < 7 {
                assert!(error.contains(&format!("line {line}, column ")), "{error}");
            }
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = load("name = \"alpha\"\n").expect_err("no certificate");
        assert!(error.contains("missing field"), "{error}");
        let error = load(&GOOD.replace("beta =", "alpha =")).expect_err("names itself");
        assert!(error.contains("names alpha itself"), "{error}");
    }
}
