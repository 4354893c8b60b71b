//! What podman's tools read of a checkpoint: the container in podman's words and its OCI configuration.
//! Nothing of it is read when decamp restores.
//!
//! A bundle has no image, so podman is told one that holds nothing ([`EMPTY_IMAGE`]); the root file system
//! comes whole as the difference to it. Networks are the host's own: podman makes a network namespace with
//! a loopback interface, and `podman network connect` does the rest.

use decamp_shared::archive::{Parcel, Result};
use decamp_shared::workload::Manifest;
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::dump::ContainerState;
use crate::facts::Needs;
use crate::spec::ContainerSpec;

/// The image that podman has to have: an empty one.
const EMPTY_IMAGE: &str = "localhost/decamp/empty:latest";
/// SIGTERM, as `decamp stop` uses it.
const STOP_SIGNAL: u32 = 15;
/// Seconds that a stopped one has to end by itself.
const STOP_TIMEOUT: u32 = 10;
/// Bytes of a shared memory file system, which is in the images and not podman's.
const SHM: u64 = 64_000 << 10;

/// The parts for podman.
pub(super) fn parcels(
    manifest: &Manifest,
    spec: &ContainerSpec,
    bundle: &Bundle,
    needs: &Needs,
    state: &ContainerState,
) -> Result<Vec<Parcel>> {
    let id = id_of(&manifest.uuid);
    let config = config(manifest, spec, needs, &id);
    let oci = spec_of(bundle, needs, &id);
    // Standard input, output and error, by which a runtime finds what it has to put in their places.
    let descriptors = ["/dev/null", &state.output, &state.output];
    Ok(vec![
        Parcel::json("config.dump", &config)?,
        Parcel::json("spec.dump", &oci)?,
        Parcel::json("network.status", &json!({}))?,
        Parcel::json("checkpoint/descriptors.json", &descriptors)?,
    ])
}

/// Podman's `ContainerConfig`, as far as a restore reads it.
fn config(manifest: &Manifest, spec: &ContainerSpec, needs: &Needs, id: &str) -> Value {
    let oci: Value = serde_json::from_str(&needs.config).unwrap_or_default();
    json!({
        "id": id,
        "name": manifest.name,
        "rootfsImageName": EMPTY_IMAGE,
        // Its identity is another one wherever it is made; podman finds it by its name here too.
        "rootfsImageID": EMPTY_IMAGE,
        "command": oci.pointer("/process/args"),
        "runtime": spec.runtime,
        "createNetNS": true,
        "networkMode": "bridge",
        "NoShm": true,
        "NOShmShare": true,
        "shmSize": SHM,
        "stopSignal": STOP_SIGNAL,
        "stopTimeout": STOP_TIMEOUT,
        "createdTime": "1970-01-01T00:00:00Z",
        "cgroupManager": "cgroupfs",
        "cgroupParent": "/libpod_parent",
        "logDriver": "k8s-file",
        "labels": {"decamp.uuid": manifest.uuid},
    })
}

/// The OCI configuration, marked as podman's own are.
fn spec_of(bundle: &Bundle, needs: &Needs, id: &str) -> Value {
    let mut oci: Value = serde_json::from_str(&needs.config).unwrap_or_default();
    oci["root"]["path"] = json!(bundle.rootfs());
    oci["linux"]["cgroupsPath"] = json!(format!("/libpod_parent/libpod-{id}"));
    oci["annotations"]["io.container.manager"] = json!("libpod");
    oci
}

/// Podman's names for containers are 64 hexadecimal digits.
fn id_of(uuid: &str) -> String {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).collect();
    format!("{:0<64}", digits.repeat(2).chars().take(64).collect::<String>())
}
