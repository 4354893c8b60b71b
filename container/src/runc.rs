//! What runc writes down about a container: where, and how it is read and made.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::runtime::Known;

/// Where runc keeps the state of containers when it is not told otherwise.
pub(crate) const ROOT: &str = "/run/runc";
/// The file in a container's directory there.
pub(crate) const STATE: &str = "state.json";

/// `state` of a stand-in, with the process, root and bundle of the real container.
pub(crate) fn adopted(
    mut state: Value,
    init: i32,
    started: u64,
    rootfs: &Path,
    bundle: &Path,
) -> Value {
    state["init_process_pid"] = json!(init);
    state["init_process_start"] = json!(started);
    state["config"]["rootfs"] = json!(rootfs);
    if let Some(paths) = state["namespace_paths"].as_object_mut() {
        for path in paths.values_mut() {
            let kind = path.as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
            *path = json!(format!("/proc/{init}/ns/{kind}"));
        }
    }
    if let Some(labels) = state["config"]["labels"].as_array_mut() {
        for label in labels
            .iter_mut()
            .filter(|label| label.as_str().is_some_and(|text| text.starts_with("bundle=")))
        {
            *label = json!(format!("bundle={}", bundle.display()));
        }
    }
    state
}

/// What a state says of its container.
pub(crate) fn known(state: &Value) -> Option<Known> {
    let labels = state.pointer("/config/labels")?.as_array()?;
    let bundle = labels.iter().find_map(|label| label.as_str()?.strip_prefix("bundle="))?;
    Some(Known {
        init: i32::try_from(state.get("init_process_pid")?.as_i64()?).ok()?,
        started: state.get("init_process_start")?.as_u64()?,
        bundle: PathBuf::from(bundle),
        rootfs: PathBuf::from(state.pointer("/config/rootfs")?.as_str()?),
    })
}

/// The last error in a log of runc.
pub(crate) fn last_error(log: &str) -> Option<&str> {
    let last = log.lines().rfind(|line| line.contains("level=error"))?;
    Some(last.split_once("msg=")?.1.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adopted_state_points_at_the_real_container() {
        let state = json!({
            "id": "web", "init_process_pid": 5, "init_process_start": 6,
            "namespace_paths": {"NEWNET": "/proc/5/ns/net", "NEWPID": "/proc/5/ns/pid"},
            "config": {"rootfs": "/tmp/stand-in", "labels": ["a=b", "bundle=/tmp"]},
        });
        let state = adopted(state, 77, 88, Path::new("/srv/web/rootfs"), Path::new("/srv/web"));
        assert_eq!(state["namespace_paths"]["NEWPID"], "/proc/77/ns/pid");
        assert_eq!(state["config"]["labels"], json!(["a=b", "bundle=/srv/web"]));
        let known = known(&state).expect("whole");
        assert_eq!((known.init, known.started), (77, 88));
        assert_eq!(known.bundle, Path::new("/srv/web"));
        assert_eq!(known.rootfs, Path::new("/srv/web/rootfs"));
    }

    #[test]
    fn the_last_error_is_found() {
        let log = "time=x level=error msg=\"first\"\ntime=x level=error msg=\"last\"\n";
        assert_eq!(last_error(log), Some("last"));
        assert_eq!(last_error("level=info msg=x"), None);
    }
}
