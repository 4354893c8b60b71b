//! Whether this host has podman start containers by itself, when it boots or when podman's package is upgraded: also
//! a container that has moved away, or that is on its way here and is made already. podman's own service for
//! that (`podman-restart.service`, which Debian enables) goes by the restart policy, which podman does not let
//! go of before 5.1.

use std::fs;
use std::path::Path;

use super::made::Made;

/// podman's service that starts containers.
const SERVICE: &str = "podman-restart.service";
/// Where systemd finds what is enabled.
const UNITS: [&str; 4] =
    ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"];

/// Why a container made like that cannot leave this host, or come to it, as long as that is so.
pub(crate) fn obstacle(made: &Made) -> Option<String> {
    obstacle_below(Path::new("/"), made)
}

fn obstacle_below(root: &Path, made: &Made) -> Option<String> {
    let policy = made.restart.as_str();
    if !matches!(policy, "always" | "unless-stopped") || !is_enabled(root) {
        return None;
    }
    Some(format!(
        "Its restart policy is {policy}, and {SERVICE} is enabled: when this host boots, that would start it \
         here also after it has left, or before it has come. systemctl disable {SERVICE}; before you \
         enable it again, remove it where it has left (podman rm {})",
        made.name
    ))
}

/// Whether any other unit wants it.
fn is_enabled(root: &Path) -> bool {
    let wanting =
        UNITS.iter().flat_map(|units| fs::read_dir(root.join(units)).into_iter().flatten());
    wanting.flatten().map(|entry| entry.path()).any(|path| {
        let is_list = path.extension().is_some_and(|end| end == "wants" || end == "requires");
        // A link, whose end may be in another root.
        is_list && path.join(SERVICE).symlink_metadata().is_ok()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn who_is_started_at_boot_stays_where_he_is() {
        let room = tempfile::tempdir().expect("a directory");
        let wants = room.path().join("etc/systemd/system/default.target.wants");
        let made = |policy: &str| Made { restart: policy.into(), ..Made::default() };
        fs::create_dir_all(&wants).expect("made");
        assert_eq!(obstacle_below(room.path(), &made("always")), None);
        symlink("/lib/systemd/system/podman-restart.service", wants.join(SERVICE)).expect("linked");
        for (policy, is_started) in [
            ("always", true),
            ("unless-stopped", true),
            ("on-failure:3", false),
            ("no", false),
            ("", false),
        ] {
            assert_eq!(
                obstacle_below(room.path(), &made(policy)).is_some(),
                is_started,
                "{policy}"
            );
        }
    }
}
