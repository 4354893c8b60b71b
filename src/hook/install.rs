//! Having runtimes and CRIU call decamp, and taking exactly that out again: a file in a directory of OCI
//! hooks, a script for CRIU, and a block in the configuration that runtimes have CRIU read. All is looked
//! at before anything is written; what is not ours is never overwritten and never removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::{ANNOTATION, MIGRATABLE};

/// Where podman and CRI-O look for hooks.
pub(crate) const HOOKS_DIR: &str = "/usr/share/containers/oci/hooks.d";
/// What runc, crun and so podman have CRIU read.
pub(crate) const CRIU_CONF: &str = "/etc/criu/runc.conf";
/// The hook's file, and the script, which stands beside CRIU's configuration.
const HOOK: &str = "decamp.json";
const SCRIPT: &str = "decamp-action-script";
/// How our part of CRIU's configuration, and our script, are known.
const BEGIN: &str = "# decamp hook install: from here";
const END: &str = "# decamp hook install: to here";
const MADE: &str = "# Made by decamp hook install";
/// Settings of CRIU that there can be one of.
const OURS_ALONE: [&str; 2] = ["action-script", "network-lock"];
/// No file of these is longer.
const FILE_CAP: u64 = 1 << 20;
/// A runtime that gets no answer within so many seconds goes on.
const HOOK_TIMEOUT: u32 = 5;

/// Where everything stands.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Directory of OCI hooks.
    pub(crate) hooks_dir: PathBuf,
    /// CRIU's configuration.
    pub(crate) criu_conf: PathBuf,
}

/// What is called, and how.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// The executable, absolute.
    pub(crate) path: PathBuf,
    /// The agent's socket, where it is not the usual one.
    pub(crate) socket: Option<PathBuf>,
}

/// What has become of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Did {
    /// It is new, or new in part.
    Written,
    /// It was there.
    Unchanged,
    /// It, or our part of it, is gone.
    Removed,
    /// There was nothing of ours.
    Absent,
}

/// A file, and what was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Done {
    pub(crate) path: PathBuf,
    pub(crate) did: Did,
}

/// Why nothing, or not everything, was done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// Something stands in the way; nothing was changed.
    #[error("{0}. Nothing was changed")]
    InTheWay(String),
    /// The file system.
    #[error("Cannot {what} {path}{hint}")]
    File { what: &'static str, path: PathBuf, hint: &'static str, source: io::Error },
}

type Result<T> = std::result::Result<T, InstallError>;

/// A file as it shall be: with this content and mode, or not at all.
struct Change {
    path: PathBuf,
    /// What is there.
    before: Option<String>,
    after: Option<String>,
    mode: u32,
}

/// Puts everything in place; what is in place already stays as it is.
///
/// # Errors
/// When something of somebody else's is in the way, or a file cannot be written.
pub(crate) fn install(places: &Places, program: &Program) -> Result<Vec<Done>> {
    let script = script_of(places)?;
    let text = format!(
        "#!/bin/sh\n{MADE}: CRIU calls this at each step of a dump or restore.\n\
         PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\nexec '{}' hook criu\n",
        plain(&program.path)?
    );
    let changes = vec![
        Change::to(places.hooks_dir.join(HOOK), hook_of(program)?, 0o644, is_our_hook)?,
        Change::to(script.clone(), text, 0o755, is_our_script)?,
        // Last: what it names is there by then.
        configure(places, plain(&script)?)?,
    ];
    let directories = [Some(places.hooks_dir.as_path()), places.criu_conf.parent()];
    let missing: Vec<_> = directories.into_iter().flatten().map(missing).collect::<Result<_>>()?;
    for directory in missing.into_iter().flatten() {
        fs::create_dir_all(directory).map_err(failed("make", directory))?;
    }
    changes.into_iter().map(Change::carry_out).collect()
}

/// The hook as a `hooks.d` file of version 1.0.0 (oci-hooks(5)).
fn hook_of(program: &Program) -> Result<String> {
    let mut args = vec!["decamp"];
    if let Some(socket) = &program.socket {
        args.extend(["--socket", plain(socket)?]);
    }
    args.extend(["hook", "oci"]);
    let annotation = format!("^{}$", ANNOTATION.replace('.', "\\."));
    let hook = json!({
        "version": "1.0.0",
        "hook": { "path": plain(&program.path)?, "args": args, "timeout": HOOK_TIMEOUT },
        "when": { "annotations": { annotation: format!("^{MIGRATABLE}$") } },
        "stages": ["poststart", "poststop"],
    });
    let text = serde_json::to_string_pretty(&hook).map(|text| text + "\n");
    text.map_err(|error| InstallError::InTheWay(error.to_string()))
}

/// Takes everything out that [`install`] put in place.
///
/// # Errors
/// When what stands there cannot be told apart from what is somebody else's, or cannot be removed.
pub(crate) fn remove(places: &Places) -> Result<Vec<Done>> {
    let configured = read(&places.criu_conf)?;
    let left = match &configured {
        Some(text) => {
            let (rest, had) = without_block(text, &places.criu_conf)?;
            if had { (!rest.trim().is_empty()).then_some(rest) } else { Some(text.clone()) }
        }
        None => None,
    };
    let conf =
        Change { path: places.criu_conf.clone(), before: configured, after: left, mode: 0o644 };
    // The configuration first: CRIU fails on a script that is not there.
    let changes = [
        conf,
        Change::away(script_of(places)?, is_our_script)?,
        Change::away(places.hooks_dir.join(HOOK), is_our_hook)?,
    ];
    let removed = |change: Change| {
        let done = change.carry_out()?;
        let did = if done.did == Did::Written { Did::Removed } else { done.did };
        Ok(Done { did, ..done })
    };
    changes.into_iter().map(removed).collect()
}

/// CRIU's configuration with our block in it.
fn configure(places: &Places, script: &str) -> Result<Change> {
    let before = read(&places.criu_conf)?;
    let (mut rest, _) = match &before {
        Some(text) => without_block(text, &places.criu_conf)?,
        None => (String::new(), false),
    };
    for line in rest.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if OURS_ALONE.contains(&word) {
            return Err(InstallError::InTheWay(format!(
                "{} has a setting {:?} already, which decamp would have to replace: take it out, or name \
                 another file with --criu-conf and have your containers use it (annotation org.criu.config)",
                places.criu_conf.display(),
                line.trim()
            )));
        }
    }
    if !rest.is_empty() && !rest.ends_with('\n') {
        rest.push('\n');
    }
    let after = format!("{rest}{BEGIN}\naction-script {script}\nnetwork-lock skip\n{END}\n");
    Ok(Change { path: places.criu_conf.clone(), before, after: Some(after), mode: 0o644 })
}

/// `text` without our block, and whether it had one.
fn without_block(text: &str, path: &Path) -> Result<(String, bool)> {
    let damaged = || {
        InstallError::InTheWay(format!(
            "What decamp wrote into {} is damaged (between {BEGIN:?} and {END:?}): take it out by hand",
            path.display()
        ))
    };
    let (mut rest, mut within, mut blocks) = (String::new(), false, 0);
    for line in text.split_inclusive('\n') {
        match (line.trim_end(), within) {
            (BEGIN, false) => (within, blocks) = (true, blocks + 1),
            (END, true) => within = false,
            (BEGIN, true) | (END, false) => return Err(damaged()),
            (inner, true) => {
                let word = inner.split(' ').next().unwrap_or_default();
                if !OURS_ALONE.contains(&word) {
                    return Err(damaged());
                }
            }
            (_, false) => rest.push_str(line),
        }
    }
    if within || blocks > 1 { Err(damaged()) } else { Ok((rest, blocks == 1)) }
}

fn is_our_hook(text: &str) -> bool {
    let Ok(hook) = serde_json::from_str::<Value>(text) else { return false };
    let words = hook.pointer("/hook/args").and_then(Value::as_array);
    let words: Vec<_> = words.into_iter().flatten().map(Value::as_str).collect();
    words.windows(2).any(|pair| pair == [Some("hook"), Some("oci")])
}

fn is_our_script(text: &str) -> bool {
    text.lines().nth(1).is_some_and(|line| line.starts_with(MADE))
}

fn script_of(places: &Places) -> Result<PathBuf> {
    let parent = places.criu_conf.parent().filter(|parent| parent.is_absolute());
    let absolute = parent.filter(|_| places.hooks_dir.is_absolute());
    absolute.map(|parent| parent.join(SCRIPT)).ok_or_else(|| {
        InstallError::InTheWay("The paths of --hooks-dir and --criu-conf must be absolute".into())
    })
}

/// A path that means the same in JSON, in a shell and in CRIU's configuration.
fn plain(path: &Path) -> Result<&str> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"/_.+-,:@=".contains(&byte);
    path.to_str().filter(|text| text.starts_with('/') && text.bytes().all(good)).ok_or_else(|| {
        InstallError::InTheWay(format!(
            "{} cannot be named in a shell and in CRIU's configuration: use an absolute path of letters, \
             digits and / _ . - +",
            path.display()
        ))
    })
}

/// The directory, if it is not there and is one that packages make.
fn missing(directory: &Path) -> Result<Option<&Path>> {
    let usual = [Some(Path::new(HOOKS_DIR)), Path::new(CRIU_CONF).parent()];
    match fs::metadata(directory) {
        Ok(found) if found.is_dir() => Ok(None),
        Ok(_) => Err(InstallError::InTheWay(format!("{} is no directory", directory.display()))),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("look at", directory)(error))
        }
        Err(_) if usual.contains(&Some(directory)) => Ok(Some(directory)),
        Err(_) => Err(InstallError::InTheWay(format!(
            "There is no directory {0}: mkdir -p {0}",
            directory.display()
        ))),
    }
}

/// What stands in a regular file; nothing when there is none.
fn read(path: &Path) -> Result<Option<String>> {
    let in_the_way = |what: &str| Err(InstallError::InTheWay(format!("{} {what}", path.display())));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("look at", path)(error)),
        Ok(found) if found.is_symlink() => {
            return in_the_way("is a symbolic link, which is not followed: name the file itself");
        }
        Ok(found) if !found.is_file() => return in_the_way("is no regular file"),
        Ok(found) if found.len() > FILE_CAP => {
            return in_the_way("is longer than any configuration");
        }
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    file.and_then(|file| file.take(FILE_CAP).read_to_end(&mut bytes))
        .map_err(failed("read", path))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(_) => in_the_way("is no text"),
    }
}

impl Change {
    /// To `after`, unless what is there is somebody else's.
    fn to(path: PathBuf, after: String, mode: u32, ours: fn(&str) -> bool) -> Result<Self> {
        let before = read(&path)?;
        if before.as_ref().is_some_and(|text| !ours(text)) {
            return Err(InstallError::InTheWay(format!(
                "{} is there and was not made by decamp: move it away first",
                path.display()
            )));
        }
        Ok(Self { path, before, after: Some(after), mode })
    }

    /// To nothing, unless what is there is somebody else's.
    fn away(path: PathBuf, ours: fn(&str) -> bool) -> Result<Self> {
        let before = read(&path)?;
        let after = before.clone().filter(|text| !ours(text));
        Ok(Self { path, before, after, mode: 0o644 })
    }

    fn carry_out(self) -> Result<Done> {
        let did = match (&self.before, &self.after) {
            (None, None) => Did::Absent,
            (Some(before), Some(after)) if before == after => Did::Unchanged,
            (_, Some(after)) => {
                self.write(after)?;
                Did::Written
            }
            (Some(_), None) => {
                fs::remove_file(&self.path).map_err(failed("remove", &self.path))?;
                Did::Removed
            }
        };
        Ok(Done { path: self.path, did })
    }

    /// Replaces the file in one step; what it was remains its owner and mode.
    fn write(&self, text: &str) -> Result<()> {
        let path = &self.path;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let fresh = path.with_file_name(format!(".{name}.{}", std::process::id()));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&fresh)?;
            file.write_all(text.as_bytes())?;
            let mode = match fs::symlink_metadata(path) {
                Ok(found) => {
                    fchown(&file, Some(found.uid()), Some(found.gid()))?;
                    found.mode() & 0o7777
                }
                Err(_) => self.mode,
            };
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()?;
            fs::rename(&fresh, path)?;
            path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        };
        write().inspect_err(|_| drop(fs::remove_file(&fresh))).map_err(failed("write", path))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| {
        let denied = source.kind() == io::ErrorKind::PermissionDenied;
        let hint = if denied { " (run this as root)" } else { "" };
        InstallError::File { what, path, hint, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        _dir: tempfile::TempDir,
        places: Places,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let (hooks_dir, criu) = (dir.path().join("hooks.d"), dir.path().join("criu"));
            fs::create_dir(&hooks_dir).and_then(|()| fs::create_dir(&criu)).expect("made");
            Self { places: Places { hooks_dir, criu_conf: criu.join("runc.conf") }, _dir: dir }
        }

        fn install(&self) -> Result<Vec<Did>> {
            let program = Program { path: "/usr/local/bin/decamp".into(), socket: None };
            install(&self.places, &program).map(|done| done.iter().map(|one| one.did).collect())
        }

        fn remove(&self) -> Result<Vec<Did>> {
            remove(&self.places).map(|done| done.iter().map(|one| one.did).collect())
        }

        fn conf(&self) -> String {
            fs::read_to_string(&self.places.criu_conf).expect("read")
        }

        /// Names of all files.
        fn files(&self) -> Vec<String> {
            let names = |dir: &Path| -> Vec<String> {
                let entries = fs::read_dir(dir).into_iter().flatten().flatten();
                entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
            };
            let criu = self.places.criu_conf.parent().expect("a directory");
            let mut all = [names(&self.places.hooks_dir), names(criu)].concat();
            all.sort();
            all
        }
    }

    #[test]
    fn what_is_put_in_place_is_taken_out_again() {
        let bench = Bench::new();
        assert_eq!(bench.remove().expect("nothing"), [Did::Absent; 3]);
        assert_eq!(bench.install().expect("installs"), [Did::Written; 3]);
        assert_eq!(bench.install().expect("again"), [Did::Unchanged; 3]);
        assert_eq!(bench.files(), [SCRIPT, HOOK, "runc.conf"]);
        let text = fs::read_to_string(bench.places.hooks_dir.join(HOOK)).expect("read");
        let hook: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(hook["hook"]["args"], json!(["decamp", "hook", "oci"]));
        assert_eq!(hook["when"]["annotations"]["^decamp\\.migratable$"], "^true$");
        let script = script_of(&bench.places).expect("a path");
        assert_eq!(fs::metadata(&script).expect("there").mode() & 0o777, 0o755);
        assert!(bench.conf().contains(&format!("action-script {}\n", script.display())));
        assert_eq!(bench.remove().expect("removes"), [Did::Removed; 3]);
        assert_eq!(bench.files(), [""; 0]);
    }

    #[test]
    fn what_is_somebody_elses_stays_as_it_was() {
        let bench = Bench::new();
        let before = "# mine\ntcp-established\n  log-file x # no action-script";
        fs::write(&bench.places.criu_conf, before).expect("written");
        let mode = fs::Permissions::from_mode(0o640);
        fs::set_permissions(&bench.places.criu_conf, mode).expect("set");
        bench.install().expect("installs");
        assert!(bench.conf().starts_with(before));
        assert_eq!(fs::metadata(&bench.places.criu_conf).expect("there").mode() & 0o777, 0o640);
        bench.remove().expect("removes");
        assert_eq!(bench.conf().trim_end(), before);
        // A hook of the name that is not ours.
        let hook = bench.places.hooks_dir.join(HOOK);
        fs::write(&hook, "{\"version\": \"1.0.0\"").expect("written");
        let refused = bench.install().expect_err("in the way").to_string();
        assert!(refused.contains("not made by decamp"), "{refused}");
        let left = [Did::Unchanged, Did::Absent, Did::Unchanged];
        assert_eq!(bench.remove().expect("leaves it"), left);
        assert!(hook.exists() && bench.conf().trim_end() == before);
    }

    #[test]
    fn what_cannot_be_told_apart_is_refused_and_nothing_is_changed() {
        let half = format!("{BEGIN}\naction-script /x\n");
        let evil = format!("{BEGIN}\nevil\n{END}\n");
        for (conf, says) in [
            ("action-script /opt/other\n", "a setting \"action-script /opt/other\""),
            ("\tnetwork-lock iptables\n", "network-lock iptables"),
            (half.as_str(), "is damaged"),
            (evil.as_str(), "is damaged"),
            (END, "is damaged"),
        ] {
            let bench = Bench::new();
            fs::write(&bench.places.criu_conf, conf).expect("written");
            let refused = bench.install().expect_err(conf).to_string();
            assert!(refused.contains(says), "{refused}");
            assert_eq!((bench.conf().as_str(), bench.files().len()), (conf, 1));
        }
    }

    #[test]
    fn links_and_missing_directories_are_refused() {
        let bench = Bench::new();
        let elsewhere = bench.places.criu_conf.with_file_name("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, &bench.places.criu_conf).expect("linked");
        let refused = bench.install().expect_err("a link").to_string();
        assert!(refused.contains("symbolic link") && !elsewhere.exists(), "{refused}");
        let bench = Bench::new();
        fs::remove_dir(&bench.places.hooks_dir).expect("removed");
        let refused = bench.install().expect_err("no directory").to_string();
        assert!(refused.contains("mkdir -p") && bench.files().is_empty(), "{refused}");
        for path in ["relative", "/with space/decamp", "/quote'/decamp"] {
            let program = Program { path: path.into(), socket: None };
            assert!(install(&Bench::new().places, &program).is_err(), "{path}");
        }
    }
}
