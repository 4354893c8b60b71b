//! What podman itself mounts in a container from its host: files that it makes for each, secrets, and the program
//! of `--init`. None of it travels: the next podman mounts its own in the same places. What has to be the same
//! there is compared, by sums with a salt, which say nothing of what they are of to who does not have it.
//!
//! In a configuration that could be run anywhere a name stands for each of them under which no host has anything,
//! so that nothing else of a host is ever taken for one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{ask, config, on_host};
use crate::bundle::{Bind, Bundle};
use crate::error::{ContainerError, Result};

/// Where nothing is, on any host.
const NOWHERE: &str = "/run/decamp-podman-own";
/// The word of podman for a program that is the first process, and starts what is asked for.
pub(super) const INIT: &str = "--init=true";
/// What podman puts before the arguments of a container for that: the program, and what ends its options.
pub(super) const INIT_WORDS: usize = 2;
const INIT_ANNOTATION: &str = "io.podman.annotations.init";
const END_OF_OPTIONS: &str = "--";
/// What podman looks for.
const INIT_PROGRAM: &str = "catatonit";
/// Where secrets are, as podman's driver `file` keeps them.
const SECRETS: &str = "secretsdata.json";
/// The directory that they are mounted in where nothing else was asked for.
const SECRETS_AT: &str = "/run/secrets";
/// No program, nor secret, is longer.
const CAP: u64 = 64 << 20;

/// Something that podman mounts by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// The program of `--init`.
    Init,
    /// The secret of this name.
    Secret(String),
    /// What it makes for each container: `passwd` and `group` with a user that its image does not name, and the
    /// directory that secrets are in.
    Made,
}

/// What the source has of one whose contents have to be the same at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    /// Where it is in the container, as the configuration writes it.
    pub at: String,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its permission bits.
    pub mode: u32,
    /// Its contents.
    pub sum: Sum,
}

/// What contents are known by again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    /// 32 hexadecimal digits, other ones each time.
    pub salt: String,
    /// SHA-256 of those and the contents, in 64 hexadecimal digits.
    pub sha256: String,
}

impl Own {
    /// What podman mounts for `mount`, of the configuration `config` that it has made for the container `id`.
    pub(super) fn of_mount(mount: &Value, config: &Value, id: &str) -> Option<Self> {
        let text = |key: &str| mount[key].as_str();
        if text("type") != Some("bind") {
            return None;
        }
        let arguments = &config["process"]["args"];
        let is_init = config["annotations"][INIT_ANNOTATION] == "TRUE"
            && arguments[0].as_str() == text("destination")
            && arguments[1] == END_OF_OPTIONS;
        if is_init {
            return Some(Self::Init);
        }
        let (_, below) = text("source")?.split_once(&format!("/{id}/userdata/"))?;
        if let Some(name) = below.strip_prefix("secrets/") {
            return is_secret(name).then(|| Self::Secret(name.to_owned()));
        }
        // Of the rest nobody knows whether the next podman would make it: a time zone it would not, nor what a
        // host gives to all of its containers.
        let made = match text("destination")? {
            "/etc/passwd" | "/etc/group" => true,
            SECRETS_AT => has_secrets(config, id),
            _ => false,
        };
        made.then_some(Self::Made)
    }

    /// What stands for it in a configuration.
    pub(super) fn source(&self) -> String {
        match self {
            Self::Init => format!("{NOWHERE}/init"),
            Self::Secret(name) => format!("{NOWHERE}/secrets/{name}"),
            Self::Made => format!("{NOWHERE}/made"),
        }
    }

    /// What `source` stands for.
    pub(crate) fn of(source: &Path) -> Option<Self> {
        let below = source.to_str()?.strip_prefix(NOWHERE)?.strip_prefix('/')?;
        match below {
            "init" => Some(Self::Init),
            "made" => Some(Self::Made),
            other => {
                let name = other.strip_prefix("secrets/").filter(|name| is_secret(name))?;
                Some(Self::Secret(name.to_owned()))
            }
        }
    }
}

/// Whether podman mounts a secret in the container `id`.
fn has_secrets(config: &Value, id: &str) -> bool {
    let part = format!("/{id}/userdata/secrets/");
    let mut mounts = config["mounts"].as_array().into_iter().flatten();
    mounts.any(|mount| mount["source"].as_str().is_some_and(|source| source.contains(&part)))
}

/// Whether podman would have it for a name of a secret.
fn is_secret(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.bytes().all(good)
}

/// All that podman itself mounts of `bundle`.
fn all(bundle: &Bundle) -> impl Iterator<Item = (Bind, Own)> {
    bundle.binds().into_iter().filter_map(|bind| Own::of(&bind.source).map(|own| (bind, own)))
}

impl Sum {
    fn of(what: impl Read) -> io::Result<Self> {
        Self::salted(format!("{:032x}", rand::random::<u128>()), what)
    }

    fn salted(salt: String, what: impl Read) -> io::Result<Self> {
        let mut sum = Sha256::new();
        sum.update(&salt);
        let mut what = what.take(CAP + 1);
        if io::copy(&mut what, &mut sum)? > CAP {
            return Err(io::Error::other("it is too long"));
        }
        let sha256 = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { salt, sha256 })
    }

    /// Whether this is the sum of `what`.
    fn is_of(&self, what: impl Read) -> io::Result<bool> {
        Ok(Self::salted(self.salt.clone(), what)? == *self)
    }
}

/// What the container whose first process is `init` has of its own mounts that has to be the same at the
/// destination, and what speaks against leaving the rest behind.
pub(crate) fn seen(bundle: &Bundle, init: i32) -> (Vec<Seen>, Vec<String>) {
    let (mut found, mut against) = (Vec::new(), Vec::new());
    let mounted: Vec<_> = bundle.binds().into_iter().map(|bind| bind.destination).collect();
    for (bind, own) in all(bundle) {
        let at = bind.destination;
        let looked = match own {
            Own::Made => strangers(init, &at, &mounted).map(|strangers| against.extend(strangers)),
            _ => look(init, &at).map(|seen| found.push(seen)),
        };
        if let Err(error) = looked {
            against.push(format!("What podman mounted at {at} cannot be read ({error})"));
        }
    }
    (found, against)
}

/// Finds what the container whose first process is `init` has at a path.
fn find(init: i32, at: &str) -> io::Result<File> {
    find_in(&File::open(format!("/proc/{init}/root"))?, at)
}

/// The same of the container with this root. It may be anything by now: a device does things when it is opened.
fn find_in(root: &File, at: &str) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(root, at, how)?.into())
}

/// Opens a file that was found.
fn open(found: &File) -> io::Result<File> {
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

fn look(init: i32, at: &str) -> io::Result<Seen> {
    let file = open(&find(init, at)?)?;
    let what = file.metadata()?;
    let (uid, gid, mode) = (what.uid(), what.gid(), what.mode() & 0o7777);
    Ok(Seen { at: at.to_owned(), uid, gid, mode, sum: Sum::of(file)? })
}

/// What is in a directory that podman makes for each container, other than what is mounted there: its like at
/// the destination would not have it.
fn strangers(init: i32, at: &str, mounted: &[String]) -> io::Result<Option<String>> {
    let directory = find(init, at)?;
    if !directory.metadata()?.is_dir() {
        return Ok(None);
    }
    let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
    let entries = entries.collect::<io::Result<Vec<_>>>()?;
    let names = entries.iter().map(|entry| format!("{at}/{}", entry.file_name().display()));
    let stranger = names.into_iter().find(|name| !mounted.contains(name));
    Ok(stranger.map(|name| {
        format!("{name} is in a directory that podman makes for each container, and would be lost: remove it")
    }))
}

/// What `podman create` is told of them, as the source has `seen` them.
pub(super) fn arguments(seen: &[Seen], bundle: &Bundle) -> Vec<String> {
    let argument = |(bind, own): (Bind, Own)| match own {
        Own::Init => Some(INIT.to_owned()),
        Own::Made => None,
        Own::Secret(name) => {
            let Seen { at, uid, gid, mode, .. } =
                seen.iter().find(|seen| seen.at == bind.destination)?;
            Some(format!(
                "--secret={name},type=mount,target={at},uid={uid},gid={gid},mode={mode:o}"
            ))
        }
    };
    all(bundle).filter_map(argument).collect()
}

/// Why this host's podman has not the same to mount for `bundle` as the source has `seen`.
pub(crate) fn refusals(seen: &[Seen], bundle: &Bundle) -> Vec<String> {
    let reason = |(bind, own): (Bind, Own)| {
        let at = bind.destination;
        if own == Own::Made {
            return None;
        }
        let Some(seen) = seen.iter().find(|seen| seen.at == at) else {
            return Some(format!("The source does not say what podman mounted at {at}"));
        };
        match own {
            Own::Init => other_init(&seen.sum),
            Own::Secret(name) if at.contains([',', '\n']) => {
                Some(format!("podman cannot be told to mount secret {name} at {at}"))
            }
            Own::Secret(name) => other_secret(&name, &seen.sum),
            Own::Made => None,
        }
    };
    all(bundle).filter_map(reason).collect()
}

fn other_init(sum: &Sum) -> Option<String> {
    let lacking = || {
        format!(
            "podman has no program for --init there: install {INIT_PROGRAM}, the same as at the source"
        )
    };
    let looked = config::of_host().ok().and_then(|config| config::init(&config, INIT_PROGRAM));
    let Some(path) = looked else { return Some(lacking()) };
    match on_host(|| sum.is_of(File::open(&path)?)) {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "The program of --init there, {}, is another than at the source, where the container has it mapped: \
             install the same",
            path.display()
        )),
        Err(error) => Some(error.to_string()),
    }
}

fn other_secret(name: &str, sum: &Sum) -> Option<String> {
    let secret = match secret(name) {
        Ok(secret) => secret,
        Err(error) => {
            return Some(format!(
                "podman has no secret {name} there that can be compared with the container's ({error}): podman secret \
             create {name}, with the same contents"
            ));
        }
    };
    match sum.is_of(&secret[..]) {
        Ok(true) => None,
        _ => Some(format!(
            "podman's secret {name} there is another than the one in the container: it takes one of that name with \
             the same contents"
        )),
    }
}

/// What podman has as the secret `name`.
fn secret(name: &str) -> Result<Vec<u8>> {
    let known = ask(&["secret", "inspect", "--", name])?;
    let text = |pointer: &str| known.pointer(pointer).and_then(Value::as_str);
    let (driver, path) = (text("/0/Spec/Driver/Name"), text("/0/Spec/Driver/Options/path"));
    let (Some("file"), Some(path), Some(id)) = (driver, path, text("/0/ID")) else {
        return Err(ContainerError::State("it is not podman that keeps it, in a file".to_owned()));
    };
    let path = Path::new(path).join(SECRETS);
    let text = on_host(|| fs::read(&path))?;
    // What is wrong is not said: it may be a secret.
    let wrong = || ContainerError::malformed(&path, "has no such secret");
    let all: BTreeMap<String, String> = serde_json::from_slice(&text).map_err(|_| wrong())?;
    let secret = all.get(id).ok_or_else(wrong)?;
    STANDARD.decode(secret).map_err(|_| wrong())
}

/// What this host's podman mounts, by `config`, in the places where `bundle` says that it mounts its own; with
/// files to mount on where one is in another.
///
/// # Errors
/// When it mounts nothing there, or not the same as the source has `seen`.
pub(super) fn stand_ins(
    config: &Value,
    bundle: &Bundle,
    seen: &[Seen],
) -> Result<BTreeMap<String, PathBuf>> {
    let mounts = config["mounts"].as_array();
    let mut found = BTreeMap::new();
    for (bind, own) in all(bundle) {
        let at = bind.destination;
        let is_it = |mount: &&Value| mount["destination"] == at && mount["type"] == "bind";
        let mount = mounts.into_iter().flatten().find(is_it);
        let source = mount.and_then(|mount| mount["source"].as_str()).map(PathBuf::from);
        let source = source.ok_or_else(|| {
            ContainerError::State(format!(
                "podman mounts nothing at {at} here, as it did at the source"
            ))
        })?;
        // CRIU mounts a link itself, where a runtime follows it.
        let source = on_host(|| fs::canonicalize(&source))?;
        if own != Own::Made {
            let same = seen.iter().find(|seen| seen.at == at);
            let same = same.map(|seen| on_host(|| seen.sum.is_of(File::open(&source)?)));
            if !same.transpose()?.unwrap_or(false) {
                return Err(ContainerError::State(format!(
                    "podman mounts another file at {at} here than at the source"
                )));
            }
        }
        found.insert(at, source);
    }
    for (at, outer) in &found {
        for inner in found.keys().filter_map(|inner| inner.strip_prefix(at.as_str())) {
            let Some(name) = inner.strip_prefix('/').filter(|name| !name.contains('/')) else {
                continue;
            };
            make_point(&outer.join(name))?;
        }
    }
    Ok(found)
}

/// Makes a file to mount another on, as a runtime does.
fn make_point(path: &Path) -> Result<()> {
    match on_host(|| File::create_new(path)) {
        Ok(_) => Ok(()),
        Err(ContainerError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_podman_mounts_is_told_from_what_people_mount() {
        let id = "7".repeat(64);
        let of_podman = |name: &str| format!("/var/x/{id}/userdata/{name}");
        let mut config = json!({"annotations": {INIT_ANNOTATION: "TRUE"},
            "process": {"args": ["/run/podman-init", "--", "/bin/sh"]}});
        let mount =
            |at: &str, source: &str| json!({"destination": at, "type": "bind", "source": source});
        let directory = mount("/run/secrets", &of_podman("run/secrets"));
        assert_eq!(Own::of_mount(&directory, &config, &id), None, "what the host gives to all");
        config["mounts"] = json!([directory, mount("/k", &of_podman("secrets/k"))]);
        let own = |at: &str, source: &str| Own::of_mount(&mount(at, source), &config, &id);
        assert_eq!(own("/run/podman-init", "/usr/bin/x"), Some(Own::Init));
        assert_eq!(own("/run/secrets", &of_podman("run/secrets")), Some(Own::Made));
        assert_eq!(own("/k", &of_podman("secrets/k-1.x")), Some(Own::Secret("k-1.x".into())));
        assert_eq!(own("/etc/passwd", &of_podman("passwd")), Some(Own::Made));
        assert_eq!(own("/etc/group", &of_podman("group")), Some(Own::Made));
        assert_eq!(own("/etc/localtime", &of_podman("localtime")), None, "--tz is not told");
        assert_eq!(own("/run/x", &of_podman("x")), None);
        assert_eq!(own("/k", &of_podman("secrets/a/../b")), None);
        assert_eq!(own("/data", "/srv/userdata/secrets/x"), None);
        for own in [Own::Init, Own::Made, Own::Secret("k".into())] {
            assert_eq!(Own::of(Path::new(&own.source())), Some(own));
        }
        for bad in
            ["", "/", "/secrets/", "/secrets/../x", "/secrets/a/b", "/x", "/init/", "-x/init"]
        {
            assert_eq!(Own::of(Path::new(&format!("{NOWHERE}{bad}"))), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_file_is_never_opened() {
        let room = tempfile::tempdir().expect("a directory");
        let path = |name: &str| room.path().join(name);
        fs::write(path("file"), "word").expect("written");
        std::os::unix::fs::symlink("/file", path("link")).expect("a link");
        std::os::unix::fs::symlink("/dev/null", path("out")).expect("a link");
        // Opening it would wait for who writes.
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        let root = File::open(room.path()).expect("opened");
        let read = |at: &str| -> io::Result<String> {
            let mut text = String::new();
            open(&find_in(&root, at)?)?.read_to_string(&mut text).map(|_| text)
        };
        assert_eq!(read("/file").expect("a file"), "word");
        assert_eq!(read("/link").expect("a file"), "word");
        assert!(read("/out").is_err(), "of the host");
        for none in ["/fifo", "/"] {
            assert!(read(none).expect_err(none).to_string().contains("no file"), "{none}");
        }
        // A device node does not need to be there to be told apart.
        let device = File::options().read(true).custom_flags(nix::libc::O_PATH).open("/dev/null");
        assert!(open(&device.expect("found")).is_err());
    }

    #[test]
    fn contents_are_known_again_and_told_to_nobody() {
        let (one, two) =
            (Sum::of(&b"word"[..]).expect("read"), Sum::of(&b"word"[..]).expect("read"));
        assert_ne!(one, two, "the same contents are seen to be the same");
        assert!(one.is_of(&b"word"[..]).expect("read"));
        assert!(!one.is_of(&b"ward"[..]).expect("read"));
        assert!(Sum::of(io::repeat(0)).is_err(), "it goes on for ever");
    }

    fn bundle() -> Bundle {
        let mount =
            |at: &str, own: Own| json!({"destination": at, "type": "bind", "source": own.source()});
        let config = json!({"mounts": [
            mount("/run/podman-init", Own::Init), mount("/run/secrets", Own::Made),
            mount("/run/secrets/k", Own::Secret("k".into())),
            {"destination": "/data", "type": "bind", "source": "/srv/data"}]});
        Bundle::parse(Path::new("/r"), config.to_string().as_bytes()).expect("a bundle")
    }

    fn seen(at: &str, contents: &str) -> Seen {
        let sum = Sum::of(contents.as_bytes()).expect("read");
        Seen { at: at.into(), uid: 5, gid: 6, mode: 0o400, sum }
    }

    #[test]
    fn podman_is_told_by_name() {
        let words = arguments(&[seen("/run/secrets/k", "word")], &bundle());
        let secret = "--secret=k,type=mount,target=/run/secrets/k,uid=5,gid=6,mode=400";
        assert_eq!(words, [INIT, secret]);
    }

    #[test]
    fn the_next_podman_has_to_mount_the_same() {
        let room = tempfile::tempdir().expect("a directory");
        let at = |name: &str| room.path().join(name);
        fs::create_dir(at("secrets")).expect("a directory");
        for (name, text) in [("program", "program"), ("k", "word")] {
            fs::write(at(name), text).expect("written");
        }
        std::os::unix::fs::symlink("program", at("init")).expect("a link");
        let mount =
            |to: &str, name: &str| json!({"destination": to, "type": "bind", "source": at(name)});
        let config = json!({"mounts": [mount("/run/podman-init", "init"),
            mount("/run/secrets", "secrets"), mount("/run/secrets/k", "k")]});
        let same = [seen("/run/podman-init", "program"), seen("/run/secrets/k", "word")];
        let found = stand_ins(&config, &bundle(), &same).expect("the same");
        assert_eq!(found.len(), 3);
        assert_eq!(found["/run/secrets/k"], at("k"));
        assert_eq!(found["/run/podman-init"], at("program"), "a link");
        assert!(at("secrets/k").is_file(), "nothing to mount it on");
        stand_ins(&config, &bundle(), &same).expect("made before");
        let other = [seen("/run/podman-init", "program"), seen("/run/secrets/k", "ward")];
        for (config, seen, says) in [
            (&config, &other[..], "another file at /run/secrets/k"),
            (&config, &same[..1], "another file at /run/secrets/k"),
            (
                &json!({"mounts": [mount("/run/podman-init", "init")]}),
                &same[..],
                "nothing at /run/secrets ",
            ),
        ] {
            let error = stand_ins(config, &bundle(), seen).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
        assert_eq!(refusals(&[], &bundle()).len(), 2, "nobody said what they are");
    }
}
