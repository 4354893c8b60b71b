//! `decamp-vm`: a small VMM on KVM, and the backend that moves its guests.
//!
//! Nothing here knows what a container is, and nothing here speaks to another host: sections,
//! pages and refusals are handed to `decamp-shared`.

#![deny(unsafe_code)]

mod acpi;
mod archive;
mod backend;
mod boot;
mod caretaker;
mod cgroup;
mod confinement;
mod console;
mod cpuid;
mod devices;
mod dirty;
mod disk;
mod ending;
mod error;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod host;
mod ids;
mod interfaces;
mod keeper;
mod kept;
mod layout;
mod machine;
mod memory;
mod monitor;
mod needs;
mod ports;
mod power;
mod reader;
mod sandbox;
mod serial;
mod spec;
mod state;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod testing;
mod throttle;
mod topology;
mod vcpu;
mod virtio;

pub use backend::{VmBackend, vsock_socket};
pub use cpuid::CpuidEntry;
pub use cpuid::baseline::{Baseline, Held, Offer};
pub use cpuid::registers::FeatureRegister;
pub use error::VmError;
pub use keeper::keeper_main;
pub use memory::GUEST_MEMORY;
pub use needs::Needs;
pub use reader::GuestReader;
pub use spec::{DiskSpec, VmSpec, VsockSpec};
