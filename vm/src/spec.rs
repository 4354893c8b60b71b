//! What `run` asks for: the spec of a virtual machine, as it is stored and as it travels. Only the
//! text of it is checked here; files and the host are looked at elsewhere.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Result, VmError};

/// The most vCPUs that this version runs.
pub(crate) const MAX_CPUS: u32 = 1;
/// The least memory that the boot protocol fits in, in bytes.
pub(crate) const MIN_MEMORY: u64 = 2 << 20;
/// The most memory that a guest can have, in bytes.
pub(crate) const MAX_MEMORY: u64 = 1 << 42;
/// The longest command line, in bytes.
pub(crate) const MAX_CMDLINE: usize = 4095;

/// A virtual machine as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initial ramdisk, handed to the kernel as its first module.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
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
                "A VM with {} vCPUs is not supported: this version runs exactly {MAX_CPUS}; use --cpus 1",
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> serde_json::Value {
        json!({"kernel": "/k", "cmdline": "a=b", "cpus": 1, "memory_bytes": 16 << 20})
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
    }

    #[test]
    fn what_cannot_run_is_refused_in_words() {
        assert!(refusal("cpus", json!(2)).contains("--cpus 1"));
        assert!(refusal("cpus", json!(0)).contains("0 vCPUs"));
        assert!(refusal("memory_bytes", json!(4096)).contains("outside the bounds"));
        assert!(refusal("memory_bytes", json!((16 << 20) + 5)).contains("multiple of 4096"));
        assert!(refusal("cmdline", json!("a\0b")).contains("zero byte"));
        assert!(refusal("cmdline", json!("x".repeat(5000))).contains("longer than"));
        assert!(refusal("disk", json!("/d")).contains("unknown field"));
    }
}
