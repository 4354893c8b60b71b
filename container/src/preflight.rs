//! Whether a container can run here, or come here: every reason against it at once, nothing touched.

use std::path::Path;

use decamp_shared::keeper::ends::available_memory;
use decamp_shared::network::need;
use decamp_shared::workload::{HostTools, Kind, Manifest, Place, PlacedTree, Refusal, RefusalCode};

use crate::bundle::Bundle;
use crate::claim;
use crate::crun;
use crate::facts::{HostNeeds, Needs};
use crate::file_locks;
use crate::obstacles::host::{Free, criu_obstacle, makes_no_user_namespaces};
use crate::podman;
use crate::runtime::{self, RuntimeKind};
use crate::spec::ContainerSpec;
use crate::swrk;
use crate::volumes;
use crate::ways;

/// What a small container needs beside its memory while it comes.
const MARGIN: u64 = 32 << 20;

/// Why the container of `spec` cannot be started here.
pub(crate) fn for_run(tools: &HostTools, spec: &serde_json::Value) -> Vec<Refusal> {
    let spec = match ContainerSpec::from_json(spec) {
        Ok(spec) => spec,
        Err(error) => return vec![Refusal::new(RefusalCode::Request, error.to_string())],
    };
    let mut found = spec.refusals();
    let config = spec.bundle.join("config.json");
    match Bundle::read(&spec.bundle) {
        Ok(bundle) => {
            found.extend(bundle.run_refusals());
            let volumes = volumes::found(&bundle.with_volumes(&spec.volumes)).obstacles;
            found.extend(volumes.into_iter().map(|text| Refusal::new(RefusalCode::File, text)));
        }
        Err(_) if !config.is_file() => found.push(Refusal::new(
            RefusalCode::File,
            format!("{} is no OCI bundle: it has no config.json", spec.bundle.display()),
        )),
        Err(error) => found.push(Refusal::new(RefusalCode::File, error.to_string())),
    }
    found.extend(of_host(tools, &spec));
    found.extend(own_bridge(&spec).and_then(need::bridge_refusal));
    found
}

/// The bridge that it hangs on by itself. Podman makes its own.
fn own_bridge(spec: &ContainerSpec) -> Option<&str> {
    let net = spec.net.as_ref().filter(|_| spec.podman.is_none());
    net.map(|net| net.bridge.as_str())
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
    let is_volume = |placed: &PlacedTree| placed.tree.role().is_volume();
    if trees.iter().filter(|placed| !is_volume(placed)).count() != 1 {
        refuse(RefusalCode::Request, "A container has one bundle".to_owned());
    }
    let volumes = spec.as_ref().map_or(&[][..], |spec| &spec.volumes);
    let volumes = volumes::placed(volumes, trees).unwrap_or_else(|error| {
        refuse(RefusalCode::Request, error.to_string());
        Vec::new()
    });
    let place = Place { name: manifest.name.clone(), uuid: manifest.uuid.clone(), dir: "/".into() };
    // Without a spec it is refused anyway.
    let kind = spec.as_ref().ok().and_then(|spec| spec.kind().ok());
    match kind.map(|kind| claim::taken(tools, &place, kind)) {
        Some(Ok(Some(taken))) => refuse(RefusalCode::NameTaken, taken),
        Some(Err(error)) => refuse(RefusalCode::Request, error.to_string()),
        Some(Ok(None)) | None => {}
    }
    if spec.as_ref().is_ok_and(|spec| spec.podman.is_some())
        && podman::has(&manifest.name) == Some(true)
    {
        refuse(
            RefusalCode::NameTaken,
            format!(
                "podman has a container {0} there already: podman rm {0} removes it",
                manifest.name
            ),
        );
    }
    match &needs {
        Ok(needs) => {
            for obstacle in &needs.obstacles {
                refuse(RefusalCode::Unsupported, obstacle.clone());
            }
            for text in file_locks::in_the_way(&needs.locks, trees) {
                refuse(RefusalCode::File, text);
            }
            let directory = trees.iter().find(|placed| !is_volume(placed));
            let directory = directory.map_or(Path::new("/"), |tree| tree.path.as_path());
            let bundle = Bundle::parse(directory, needs.config.as_bytes());
            let is_mapped = bundle.as_ref().is_ok_and(|bundle| bundle.mapped_root().is_some());
            match bundle {
                // The source may have said the same.
                Ok(bundle) => {
                    let bundle = bundle.with_volumes(&volumes);
                    bundle
                        .arrival_refusals()
                        .into_iter()
                        .filter(|refusal| !needs.obstacles.contains(&refusal.text))
                        .for_each(|refusal| refuse(RefusalCode::Unsupported, refusal.text));
                    if let Some(mut made) = spec.as_ref().ok().and_then(|spec| spec.podman.clone())
                    {
                        podman::volumes::note_shared(&mut made.volumes, &volumes, trees);
                        podman::volumes::refusals(&made.volumes, &bundle)
                            .into_iter()
                            .chain(podman::own::refusals(&made.own, &bundle))
                            .for_each(|text| refuse(RefusalCode::Unsupported, text));
                    }
                }
                Err(error) => refuse(RefusalCode::File, error.to_string()),
            }
            if is_mapped && makes_no_user_namespaces() {
                refuse(
                    RefusalCode::Kernel,
                    "It has a user namespace, and the host there makes none: raise user.max_user_namespaces"
                        .to_owned(),
                );
            }
            if let Some(obstacle) = ways::arrival_obstacle(&tools.methods, is_mapped) {
                refuse(RefusalCode::Unsupported, obstacle);
            }
            // Pages are in the store or in the restored processes, and little more than one piece of
            // them in both; where memory cannot come late, all of them are.
            let beside = match ways::late(&tools.methods, is_mapped) {
                Ok(()) => (needs.resident / 8).max(MARGIN),
                Err(_) => needs.resident,
            };
            let wanted = manifest.memory_bytes.max(needs.resident.saturating_add(beside));
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
            for lack in needs.host.lacks(&HostNeeds::of_this_host(), &Free::here()) {
                refuse(lack.code(), lack.text);
            }
            if let Some(said) = criu_obstacle(&tools.criu) {
                refuse(RefusalCode::Criu, format!("At the destination: {said}"));
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
            if let Some(bridge) = own_bridge(&spec) {
                found.extend(need::refusals(&manifest.networks, [bridge], &tools.bridges));
            }
        }
        Err(error) => found.push(Refusal::new(RefusalCode::Request, error)),
    }
    found
}

/// What the host lacks for any container of this spec.
fn of_host(tools: &HostTools, spec: &ContainerSpec) -> Vec<Refusal> {
    let mut found = Vec::new();
    // One that is not known is refused for that.
    if let Ok(kind) = spec.kind() {
        let program = kind.program(tools);
        let version = runtime::version(kind, program);
        found.extend(tool(kind.word(), RefusalCode::Runtime, program, version, kind.wanted()));
        let obstacle = (kind == RuntimeKind::Crun).then(crun::obstacle).flatten();
        found.extend(obstacle.map(|text| Refusal::new(RefusalCode::Runtime, text)));
    }
    let criu = swrk::version(&tools.criu);
    found.extend(tool("CRIU", RefusalCode::Criu, &tools.criu, criu, swrk::WANTED));
    if let Some(made) = &spec.podman {
        let against = podman::refusals(made).into_iter();
        found.extend(against.map(|text| Refusal::new(RefusalCode::Runtime, text)));
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use decamp_shared::methods::Methods;
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
                {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup", "path": "/x"}]},
        });
        let needs = Needs {
            config: config.to_string(),
            resident: 0,
            shared_huge: 0,
            on_tmpfs: 0,
            criu: (4, 1),
            obstacles: Vec::new(),
            host: HostNeeds::default(),
            locks: Vec::new(),
        };
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
            runc: none.clone(),
            crun: none,
            resume_after: Duration::ZERO,
            methods: Methods::default(),
            bridges: Default::default(),
            users: Default::default(),
        };
        let trees = [PlacedTree { tree: FileTree::default(), path: "/srv/web".into() }];
        let found = for_move(&tools, &manifest, &trees);
        for text in ["root file system", "hooks", "/host", "pid namespace", "cgroup namespace"] {
            let said = found.iter().filter(|refusal| refusal.text.contains(text)).count();
            assert_eq!(said, 1, "{text}: {found:#?}");
        }
    }
}
