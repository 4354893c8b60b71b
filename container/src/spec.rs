//! What a user asks for when he runs a container, and what follows from it by name alone.
//!
//! Nothing here looks at the host: whether the bundle, the bridge or the runtime exist is asked in
//! `preflight`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

pub use decamp_shared::network::Mac;
use decamp_shared::network::{interface_name, is_interface_name};
use decamp_shared::workload::{Place, Refusal, RefusalCode, is_plain_absolute};
use serde::{Deserialize, Serialize};

use crate::error::{ContainerError, Result};
use crate::podman::made::Made;
use crate::runtime::RuntimeKind;
use crate::volumes::Volume;

/// A container, as `decamp run container` describes it. Travels in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// Absolute path of the OCI bundle: `config.json`, and the root file system inside it.
    pub bundle: PathBuf,
    /// The OCI runtime: `runc` or `crun`.
    #[serde(default = "runc")]
    pub runtime: String,
    /// Whether the container gets a terminal, whatever its configuration says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
    /// Set while it is one that somebody else started: as its runtime knows it. Does not travel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<String>,
    /// Set where podman is in charge of it: what the next podman is told to make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub podman: Option<Made>,
    /// Its interface; without one it has a loopback interface only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Net>,
    /// Where what is mounted from outside of the bundle stands, if it came from another host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
}

/// The container's one interface, `eth0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// Bridge of the host that the interface hangs on.
    pub bridge: String,
    /// IPv4 address with its prefix length, as `10.77.1.5/16`. It moves with the container.
    pub ip: String,
    /// IPv6 address. Refused in this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip6: Option<String>,
    /// Default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// Hardware address; without one it follows from the workload's identity, so that it is the
    /// same on every host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

impl ContainerSpec {
    /// Reads a spec.
    ///
    /// # Errors
    /// When the JSON is no spec of a container.
    pub fn from_json(spec: &serde_json::Value) -> Result<Self> {
        serde_json::from_value(spec.clone())
            .map_err(|error| ContainerError::Spec(format!("This is no container's spec: {error}")))
    }

    /// Its runtime.
    ///
    /// # Errors
    /// When it is none that is known here.
    pub(crate) fn kind(&self) -> Result<RuntimeKind> {
        RuntimeKind::from_word(&self.runtime)
            .ok_or_else(|| ContainerError::Spec(unknown_runtime(&self.runtime)))
    }

    /// What this version cannot do, and what makes no sense on any host.
    pub fn refusals(&self) -> Vec<Refusal> {
        let mut found = Vec::new();
        let mut refuse = |code, text: String| found.push(Refusal::new(code, text));
        if let Some(id) = &self.adopted {
            let runtime = if self.podman.is_some() { "podman" } else { &self.runtime };
            refuse(
                RefusalCode::Request,
                format!(
                    "It was adopted, and only {runtime} can start it: start {id} with {runtime} and \
                     adopt it again"
                ),
            );
        }
        if !is_plain_absolute(&self.bundle) {
            refuse(
                RefusalCode::Request,
                format!("Bundle {} is not an absolute path without ..", self.bundle.display()),
            );
        }
        for volume in self.volumes.iter().filter(|volume| !volume.is_plain()) {
            refuse(
                RefusalCode::Request,
                format!("{} cannot stand for {}", volume.path.display(), volume.source),
            );
        }
        if RuntimeKind::from_word(&self.runtime).is_none() {
            refuse(RefusalCode::Unsupported, unknown_runtime(&self.runtime));
        }
        if let Some(net) = &self.net {
            if let Err(error) = net.address() {
                refuse(RefusalCode::Request, error.to_string());
            }
            if net.ip6.is_some() {
                refuse(
                    RefusalCode::Unsupported,
                    "IPv6 addresses are not supported in this version".to_owned(),
                );
            }
            if net.mac.is_some_and(|mac| !mac.is_of_one()) {
                refuse(
                    RefusalCode::Request,
                    "The hardware address is not one of a single interface".to_owned(),
                );
            }
            if !is_interface_name(&net.bridge) {
                refuse(RefusalCode::Bridge, format!("{:?} is no name of a bridge", net.bridge));
            }
        }
        found
    }
}

impl Net {
    /// Address and prefix length.
    ///
    /// # Errors
    /// When the text is neither.
    pub fn address(&self) -> Result<(Ipv4Addr, u8)> {
        let bad = || {
            ContainerError::Spec(format!(
                "{:?} is no IPv4 address with a prefix length, as 10.77.1.5/16",
                self.ip
            ))
        };
        let (address, prefix) = self.ip.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if prefix > 32
            || address.is_unspecified()
            || address.is_multicast()
            || address.is_loopback()
        {
            return Err(bad());
        }
        Ok((address, prefix))
    }

    /// The hardware address: as asked for, or the one that follows from the identity `uuid`.
    pub fn mac_of(&self, uuid: &str) -> Mac {
        self.mac.unwrap_or_else(|| Mac::of_workload(uuid, 0))
    }
}

/// The host's end of the container's interface. Follows from the place alone, so that a sweep
/// finds it when the keeper is gone.
pub(crate) fn veth_name(place: &Place) -> String {
    interface_name(['d', 'c'], place, 0)
}

/// The container's name for its runtime. Follows from the place alone.
pub(crate) fn runtime_id(place: &Place) -> Result<&str> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte);
    let name = place.name.as_str();
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.bytes().all(good) {
        return Err(ContainerError::Spec(format!(
            "{name:?} cannot name a container: use letters, digits and _ . - +"
        )));
    }
    Ok(name)
}

fn unknown_runtime(word: &str) -> String {
    format!("Runtime {word:?} is not known here: use runc or crun")
}

fn runc() -> String {
    "runc".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> Result<ContainerSpec> {
        ContainerSpec::from_json(&json)
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(spec(serde_json::json!({"bundle": "/b"})).is_ok());
        assert!(spec(serde_json::json!({"bundle": "/b", "volume": "/x"})).is_err());
    }

    #[test]
    fn what_this_version_lacks_is_said_all_at_once() {
        let spec = spec(serde_json::json!({
            "bundle": "b", "runtime": "kata", "tty": true,
            "net": {"bridge": "br/0", "ip": "10.0.0.300/16", "ip6": "fd00::1/64", "mac": "01:00:00:00:00:01"},
        }))
        .expect("a spec");
        assert_eq!(spec.refusals().len(), 6);
    }

    #[test]
    fn mac_follows_from_the_identity_and_is_local() {
        let net = Net {
            bridge: "br0".into(),
            ip: "10.0.0.1/8".into(),
            ip6: None,
            gateway: None,
            mac: None,
        };
        assert_eq!(net.mac_of("a"), net.mac_of("a"));
        assert_ne!(net.mac_of("a"), net.mac_of("b"));
        assert_eq!(net.mac_of("a").0[0] & 3, 2);
        let text = net.mac_of("a").to_string();
        assert_eq!(Mac::try_from(text), Ok(net.mac_of("a")));
    }

    #[test]
    fn a_name_of_an_interface_fits_the_kernel() {
        let place = Place {
            name: "x".repeat(60),
            uuid: "u".into(),
            dir: "/var/lib/decamp/workloads/x".into(),
        };
        assert_eq!(veth_name(&place).len(), 14);
        assert!(runtime_id(&place).is_ok());
        assert!(runtime_id(&Place { name: "../x".into(), ..place }).is_err());
    }
}
