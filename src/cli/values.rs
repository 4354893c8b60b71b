//! Values on the command line: sizes, times, names, path mappings. Each reader gives a sentence that
//! says what would have been right; clap prints it and ends with 2.

use std::path::{Path, PathBuf};
use std::time::Duration;

use decamp_shared::workload::{Storage, is_plain_absolute};

use crate::messages::is_workload_name;

/// `512M`, `2G`, `1048576`: bytes, or binary units K, M, G, T with or without `iB`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size; write 512M or 2G");
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit: u64 = match &text[digits..] {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is more than any machine has"))
}

/// `300ms`, `2s`, `10m`, `1h 30m`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() => Err(format!("{text:?} is no time at all")),
        Ok(time) => Ok(time),
        Err(_) => Err(format!("{text:?} is not a time; write 300ms, 2s or 10m")),
    }
}

/// Name of a workload.
pub(crate) fn workload(text: &str) -> Result<String, String> {
    if is_workload_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a workload's name is 1 to 40 of a-z, 0-9, `_`, `.` and `-`, \
             beginning with a letter or digit"
            .to_owned())
    }
}

/// Id of a migration, the beginning of one, or the name of the workload that it moves.
pub(crate) fn migration(text: &str) -> Result<String, String> {
    if is_workload_name(text) {
        Ok(text.to_owned())
    } else {
        Err("this is neither the id of a migration nor the name of a workload".to_owned())
    }
}

/// `OLD=NEW`, both absolute and without `..`.
pub(crate) fn mapping(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (old, new) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not a mapping; write OLD=NEW, two absolute paths"))?;
    let plain = |side: &str| {
        let path = Path::new(side);
        if is_plain_absolute(path) {
            Ok(path.to_owned())
        } else {
            Err(format!("{side:?} is not an absolute path without `..`"))
        }
    };
    Ok((plain(old)?, plain(new)?))
}

/// `copy`, `shared`, or either of one mount: `PATH=copy`.
pub(crate) fn storage(text: &str) -> Result<(Option<PathBuf>, Storage), String> {
    let (path, word) = match text.rsplit_once('=') {
        Some((path, word)) => (Some(path), word),
        None => (None, text),
    };
    let storage = match word {
        "copy" => Storage::Copy,
        "shared" => Storage::Shared,
        _ => {
            return Err(format!(
                "{word:?} is no way to store anything; write copy or shared, or PATH=copy for one mount"
            ));
        }
    };
    let plain = |path: &str| {
        let plain = is_plain_absolute(Path::new(path)).then(|| PathBuf::from(path));
        plain.ok_or_else(|| format!("{path:?} is not an absolute path without `..`"))
    };
    Ok((path.map(plain).transpose()?, storage))
}

/// `HOST[:PORT]`.
pub(crate) fn host(text: &str) -> Result<String, String> {
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let port_is_right = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    if crate::messages::is_host_name(name) && port_is_right {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is not HOST or HOST:PORT"))
    }
}

/// `path` as the agent, whose working directory is another, has to read it.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    // What does not exist is for the agent to refuse, with all other reasons, or to make.
    path.canonicalize()
        .or_else(|_| within_its_directory(path))
        .or_else(|_| std::path::absolute(path))
        .unwrap_or_else(|_| path.to_owned())
}

/// What does not exist, in a directory that does.
fn within_its_directory(path: &Path) -> std::io::Result<PathBuf> {
    let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    Ok(directory.canonicalize()?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_a_word_for_all_or_for_one() {
        assert_eq!(storage("shared"), Ok((None, Storage::Shared)));
        assert_eq!(storage("/a=b=copy"), Ok((Some("/a=b".into()), Storage::Copy)));
        for bad in ["", "move", "/a", "/a=", "/a=moved", "a=copy", "/a/../b=copy", "=copy"] {
            assert!(storage(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2G"), Ok(2 << 30));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1KiB"), Ok(1024));
        for bad in ["", "M", "-1G", "1.5G", "2g", "2 G", "2GB", "99999999999999999999", "20000000T"]
        {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("10m"), Ok(Duration::from_secs(600)));
        for bad in ["", "300", "0ms", "-1s", "fast"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_may_name_a_port() {
        for good in ["beta", "edge-2", "beta:7421", "a.example.org:1"] {
            assert_eq!(host(good), Ok(good.to_owned()));
        }
        for bad in ["", ":7420", "beta:", "beta:0", "beta:65536", "be ta", "a:1:2"] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mappings_need_two_plain_absolute_paths() {
        assert_eq!(mapping("/a=/b/c"), Ok(("/a".into(), "/b/c".into())));
        for bad in ["/a", "a=/b", "/a=b", "/a=/b/../c", "=", "/a="] {
            assert!(mapping(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_does_not_exist_still_becomes_absolute() {
        assert!(absolute(Path::new("no/such/kernel")).is_absolute());
        let here = std::env::current_dir().expect("a directory").canonicalize().expect("is there");
        assert_eq!(absolute(Path::new("new.tar.zst")), here.join("new.tar.zst"));
        let above = here.parent().expect("not the top").join("new.tar.zst");
        assert_eq!(absolute(Path::new("../new.tar.zst")), above);
    }
}
