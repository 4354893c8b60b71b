//! What `run` asks for: the spec of a virtual machine, as it is stored and as it travels. Only the
//! text of it is checked here; files and the host are looked at elsewhere.

use std::path::PathBuf;

use decamp_shared::network::{Mac, is_interface_name};
use decamp_shared::workload::is_plain_absolute;
use serde::{Deserialize, Serialize};

use crate::cpuid::baseline::Held;
use crate::error::{Result, VmError};
use crate::layout::MAX_VIRTIO;

/// The most vCPUs that this version runs: identities of eight bits, without that which means all.
pub(crate) const MAX_CPUS: u32 = 254;
/// The least memory that the boot protocol fits in, in bytes.
pub(crate) const MIN_MEMORY: u64 = 2 << 20;
/// The most memory that a guest can have, in bytes.
pub(crate) const MAX_MEMORY: u64 = 1 << 42;
/// The longest command line, in bytes.
pub(crate) const MAX_CMDLINE: usize = 4095;
/// The most network interfaces.
pub(crate) const MAX_NETS: usize = 8;
/// The most disks and network interfaces: four places are for devices that a VM has one of.
const MAX_CHOSEN: usize = MAX_VIRTIO - 4;

/// The most disks of one VM.
pub(crate) const MAX_DISKS: usize = 8;

/// A disk as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw file, or a block device.
    pub path: PathBuf,
    /// The guest may not write it.
    #[serde(default)]
    pub readonly: bool,
    /// It lies on storage that the hosts share: a move leaves it where it is, unless it is told otherwise.
    #[serde(default)]
    pub shared: bool,
}

/// A virtual machine as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Linux bzImage, or ELF kernel.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The CPU that the guest is held to; without one it sees all that the host has where it is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_baseline: Option<Held>,
    /// Sockets between programs of the guest and of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// Its disks, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Its network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,
}

/// The sockets of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context identifier. It means nothing outside the guest: each has sockets of its own on the host,
    /// so that any number of guests may have the same.
    #[serde(default = "VsockSpec::usual_cid")]
    pub cid: u32,
}

impl VsockSpec {
    /// The first identifier that is not taken by the specification.
    fn usual_cid() -> u32 {
        3
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Bridge of the host that it hangs on.
    pub bridge: String,
    /// Hardware address; without one it follows from the VM's identity, so that it is the same on every host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

impl NetSpec {
    /// The hardware address of this interface, which is `number` of the VM with the identity `uuid`.
    pub(crate) fn mac_of(&self, uuid: &str, number: u8) -> Mac {
        self.mac.unwrap_or_else(|| Mac::of_workload(uuid, number))
    }
}

impl VmSpec {
    /// Reads a spec from its JSON and checks what the text alone can tell.
    ///
    /// # Errors
    /// [`VmError::Spec`] when a field is missing, unknown or outside its bounds.
    pub fn parse(json: &serde_json::Value) -> Result<Self> {
        let spec: Self = serde_json::from_value(json.clone()).map_err(|error| {
            VmError::Spec(format!("The spec of the VM cannot be read: {error}"))
        })?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(VmError::Spec(text));
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return wrong(format!(
                "A VM with {} vCPUs is not supported: this version runs 1 to {MAX_CPUS}; use --cpus N",
                self.cpus
            ));
        }
        if self.memory_bytes < MIN_MEMORY || self.memory_bytes > MAX_MEMORY {
            return wrong(format!(
                "Guest memory of {} bytes is outside the bounds of {MIN_MEMORY} to {MAX_MEMORY} bytes",
                self.memory_bytes
            ));
        }
        if !self.memory_bytes.is_multiple_of(4096) {
            return wrong(format!(
                "Guest memory of {} bytes is not a multiple of 4096 bytes",
                self.memory_bytes
            ));
        }
        if self.cmdline.len() > MAX_CMDLINE || self.cmdline.contains('\0') {
            return wrong(format!(
                "The command line of {} bytes is longer than {MAX_CMDLINE}, or holds a zero byte",
                self.cmdline.len()
            ));
        }
        if let Some(held) = &self.cpu_baseline
            && let Err(why) = held.check()
        {
            return wrong(format!("The CPU baseline of the VM cannot be used: {why}"));
        }
        if let Some(vsock) = &self.vsock
            && !(3..u32::MAX).contains(&vsock.cid)
        {
            return wrong(format!(
                "The context identifier {} means another than the guest: take one from 3 to {}",
                vsock.cid,
                u32::MAX - 1
            ));
        }
        self.check_disks()?;
        self.check_net()
    }

    fn check_disks(&self) -> Result<()> {
        let wrong = |text: String| Err(VmError::Spec(text));
        if self.disks.len() > MAX_DISKS {
            let count = self.disks.len();
            return wrong(format!("A VM has at most {MAX_DISKS} disks, not {count}"));
        }
        for (number, disk) in self.disks.iter().enumerate() {
            let path = disk.path.display();
            if !is_plain_absolute(&disk.path) {
                return wrong(format!("Disk {path} is not an absolute path without `..`"));
            }
            if self.disks[..number].iter().any(|other| other.path == disk.path) {
                return wrong(format!("Disk {path} is named twice: a VM has each once"));
            }
        }
        Ok(())
    }

    fn check_net(&self) -> Result<()> {
        let wrong = |text: String| Err(VmError::Spec(text));
        if self.net.len() > MAX_NETS {
            return wrong(format!(
                "A VM has at most {MAX_NETS} network interfaces, not {}",
                self.net.len()
            ));
        }
        if self.disks.len() + self.net.len() > MAX_CHOSEN {
            return wrong(format!(
                "A VM has at most {MAX_CHOSEN} disks and network interfaces together, not {}",
                self.disks.len() + self.net.len()
            ));
        }
        for (number, net) in self.net.iter().enumerate() {
            if !is_interface_name(&net.bridge) {
                return wrong(format!("{:?} is no name of a bridge", net.bridge));
            }
            let Some(mac) = net.mac else { continue };
            if !mac.is_of_one() {
                return wrong(format!(
                    "The hardware address {mac} is not one of a single interface: write one whose first byte is \
                     even, as 02:00:00:00:00:05"
                ));
            }
            if self.net[..number].iter().any(|other| other.mac == Some(mac)) {
                return wrong(format!("Two network interfaces have the hardware address {mac}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> serde_json::Value {
        json!({"kernel": "/k", "cmdline": "a=b", "cpus": 1, "memory_bytes": 16 << 20,
            "net": [{"bridge": "br0"}, {"bridge": "br0", "mac": "02:00:00:00:00:05"}]})
    }

    fn refusal(field: &str, value: serde_json::Value) -> String {
        let mut json = spec();
        json[field] = value;
        VmSpec::parse(&json).expect_err(field).to_string()
    }

    #[test]
    fn a_plain_spec_survives_its_json() {
        let parsed = VmSpec::parse(&spec()).expect("plain spec");
        let again = serde_json::to_value(&parsed).expect("to JSON");
        assert_eq!(VmSpec::parse(&again).expect("own JSON"), parsed);
        assert!(again.get("vsock").is_none(), "what is not asked for is not said");
        let mut json = spec();
        json["vsock"] = json!({});
        let parsed = VmSpec::parse(&json).expect("with sockets");
        assert_eq!(parsed.vsock, Some(VsockSpec { cid: 3 }));
    }

    #[test]
    fn what_cannot_run_is_refused_in_words() {
        assert!(refusal("cpus", json!(255)).contains("1 to 254"));
        assert!(refusal("cpus", json!(0)).contains("0 vCPUs"));
        assert!(refusal("memory_bytes", json!(4096)).contains("outside the bounds"));
        assert!(refusal("memory_bytes", json!((16 << 20) + 5)).contains("multiple of 4096"));
        assert!(refusal("cmdline", json!("a\0b")).contains("zero byte"));
        assert!(refusal("cmdline", json!("x".repeat(5000))).contains("longer than"));
        assert!(refusal("cpu_baseline", json!([])).contains("no CPUID entry 0x0"));
        assert!(refusal("vsock", json!({"cid": 2})).contains("from 3"));
        assert!(refusal("vsock", json!({"cid": u32::MAX})).contains("from 3"));
        assert!(refusal("vsock", json!({"port": 5})).contains("unknown field"));
        assert!(refusal("disk", json!("/d")).contains("unknown field"));
        assert!(refusal("disks", json!([{"path": "d"}])).contains("absolute"));
        let twice = json!([{"path": "/d"}, {"path": "/d", "readonly": true}]);
        assert!(refusal("disks", twice).contains("named twice"));
        let many: Vec<_> = (0..9).map(|number| json!({"path": format!("/d{number}")})).collect();
        assert!(refusal("disks", json!(many)).contains("at most 8"));
        let nets = |macs: &[&str]| {
            let one = |mac: &&str| json!({"bridge": "br0", "mac": mac});
            refusal("net", macs.iter().map(one).collect())
        };
        assert!(nets(&["01:00:00:00:00:01"]).contains("single interface"));
        assert!(nets(&["00:00:00:00:00:00"]).contains("single interface"));
        assert!(nets(&["02:00:00:00:00"]).contains("no hardware address"));
        assert!(nets(&["02:00:00:00:00:01"; 2]).contains("Two network interfaces"));
        assert!(refusal("net", json!([{"bridge": "br/0"}])).contains("no name of a bridge"));
        assert!(refusal("net", vec![json!({"bridge": "br0"}); 9].into()).contains("at most 8"));
    }
}
