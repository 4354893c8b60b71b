//! Whether a container can run here, or come here: every reason against it at once, nothing touched.

use std::fs;
use std::path::Path;

use decamp_shared::workload::{HostTools, Kind, Manifest, Place, PlacedTree, Refusal, RefusalCode};

use crate::bundle::Bundle;
use crate::facts::Needs;
use crate::network::bridge_exists;
use crate::runtime::{self, Runtime};
use crate::spec::{ContainerSpec, runtime_id};
use crate::swrk;

/// Why the container of `spec` cannot be started here.
pub(crate) fn for_run(tools: &HostTools, spec: &serde_json::Value) -> Vec<Refusal> {
    let spec = match ContainerSpec::from_json(spec) {
        Ok(spec) => spec,
        Err(error) => return vec![Refusal::new(RefusalCode::Request, error.to_string())],
    };
    let mut found = spec.refusals();
    let config = spec.bundle.join("config.json");
    match Bundle::read(&spec.bundle) {
        Ok(bundle) => found.extend(bundle.run_refusals()),
        Err(_) if !config.is_file() => found.push(Refusal::new(
            RefusalCode::File,
            format!("{} is no OCI bundle: it has no config.json", spec.bundle.display()),
        )),
        Err(error) => found.push(Refusal::new(RefusalCode::File, error.to_string())),
    }
    found.extend(of_host(tools, &spec));
    found
}

/// Why the container of `manifest` cannot come here.
pub(crate) fn for_move(
    tools: &HostTools,
    manifest: &Manifest,
    trees: &[PlacedTree],
) -> Vec<Refusal> {
    let mut found = Vec::new();
    let mut refuse = |code, text: String| found.push(Refusal::new(code, text));
    if manifest.kind != i32::from(Kind::Container) {
        refuse(RefusalCode::Request, "This is no manifest of a container".to_owned());
    }
    let spec = serde_json::from_slice::<serde_json::Value>(&manifest.spec)
        .map_err(|error| error.to_string())
        .and_then(|spec| ContainerSpec::from_json(&spec).map_err(|error| error.to_string()));
    let needs = serde_json::from_slice::<Needs>(&manifest.needs);
    if trees.len() != 1 {
        refuse(RefusalCode::Request, "A container has one bundle".to_owned());
    }
    let place = Place { name: manifest.name.clone(), uuid: manifest.uuid.clone(), dir: "/".into() };
    match runtime_id(&place) {
        Ok(id) if Runtime::new(&tools.runc, id).exists() => refuse(
            RefusalCode::NameTaken,
            format!("runc has a container {id} there already: remove it with runc delete {id}"),
        ),
        Ok(_) => {}
        Err(error) => refuse(RefusalCode::Request, error.to_string()),
    }
    match &needs {
        Ok(needs) => {
            for obstacle in &needs.obstacles {
                refuse(RefusalCode::Unsupported, obstacle.clone());
            }
            let directory = trees.first().map_or(Path::new("/"), |tree| tree.path.as_path());
            match Bundle::parse(directory, needs.config.as_bytes()) {
                // The source may have said the same.
                Ok(bundle) => bundle
                    .arrival_refusals()
                    .into_iter()
                    .filter(|refusal| !needs.obstacles.contains(&refusal.text))
                    .for_each(|refusal| refuse(RefusalCode::Unsupported, refusal.text)),
                Err(error) => refuse(RefusalCode::File, error.to_string()),
            }
            // Until a restore has finished, pages are in the store and in the restored processes.
            let wanted = manifest.memory_bytes.max(needs.resident.saturating_mul(2));
            if let Some(free) = available_memory().filter(|free| *free < wanted) {
                refuse(
                    RefusalCode::Memory,
                    format!(
                        "It takes {} MiB of memory there, and {} MiB are available",
                        wanted >> 20,
                        free >> 20
                    ),
                );
            }
            match swrk::version(&tools.criu) {
                Ok(ours) if ours >= swrk::WANTED && ours < needs.criu => refuse(
                    RefusalCode::Criu,
                    format!(
                        "CRIU there is {}.{}, older than {}.{} at the source, whose images it may not read",
                        ours.0, ours.1, needs.criu.0, needs.criu.1
                    ),
                ),
                _ => {}
            }
        }
        Err(error) => {
            refuse(RefusalCode::Request, format!("The manifest's needs make no sense: {error}"))
        }
    }
    match spec {
        Ok(spec) => {
            found.extend(spec.refusals());
            found.extend(of_host(tools, &spec));
        }
        Err(error) => found.push(Refusal::new(RefusalCode::Request, error)),
    }
    found
}

/// What the host lacks for any container of this spec.
fn of_host(tools: &HostTools, spec: &ContainerSpec) -> Vec<Refusal> {
    let mut found = Vec::new();
    let runc = runtime::version(&tools.runc);
    found.extend(tool("runc", RefusalCode::Runtime, &tools.runc, runc, runtime::WANTED));
    let criu = swrk::version(&tools.criu);
    found.extend(tool("CRIU", RefusalCode::Criu, &tools.criu, criu, swrk::WANTED));
    if let Some(net) = &spec.net
        && !bridge_exists(&net.bridge)
    {
        found.push(Refusal::new(
            RefusalCode::Bridge,
            format!("There is no bridge {}: make it with ip link add {0} type bridge", net.bridge),
        ));
    }
    found
}

fn tool(
    name: &str,
    code: RefusalCode,
    path: &Path,
    version: crate::error::Result<(i32, i32)>,
    wanted: (i32, i32),
) -> Option<Refusal> {
    let path = path.display();
    let wanted_text = format!("{}.{}", wanted.0, wanted.1);
    match version {
        Ok(version) if version >= wanted => None,
        Ok((major, minor)) => Some(Refusal::new(
            code,
            format!("{name} at {path} is {major}.{minor}; {wanted_text} or newer is needed"),
        )),
        Err(error) => Some(Refusal::new(
            code,
            format!("There is no {name} {wanted_text} or newer at {path} ({error})"),
        )),
    }
}

fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use decamp_shared::workload::FileTree;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_destination_believes_no_source_that_says_nothing() {
        let config = json!({
            "root": {"path": "../../etc"},
            "hooks": {"createRuntime": [{"path": "/bin/sh"}]},
            "mounts": [{"destination": "/host", "type": "bind", "source": "/"}],
            "linux": {"namespaces": [{"type": "network"}, {"type": "pid", "path": "/proc/1/ns/pid"},
                {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}]},
        });
        let needs =
            Needs { config: config.to_string(), resident: 0, criu: (4, 1), obstacles: Vec::new() };
        let manifest = Manifest {
            name: "web".to_owned(),
            kind: Kind::Container.into(),
            spec: json!({"bundle": "/srv/web"}).to_string().into_bytes(),
            needs: serde_json::to_vec(&needs).expect("JSON"),
            ..Manifest::default()
        };
        let none = PathBuf::from("/nowhere");
        let tools = HostTools {
            decamp: none.clone(),
            criu: none.clone(),
            runc: none,
            resume_after: Duration::ZERO,
        };
        let trees = [PlacedTree { tree: FileTree::default(), path: "/srv/web".into() }];
        let found = for_move(&tools, &manifest, &trees);
        for text in ["root file system", "hooks", "/host", "pid namespace", "cgroup namespace"] {
            let said = found.iter().filter(|refusal| refusal.text.contains(text)).count();
            assert_eq!(said, 1, "{text}: {found:#?}");
        }
    }
}
