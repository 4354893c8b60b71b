//! `decamp-vm`: a small VMM on KVM, and the backend that moves its guests.
//!
//! Nothing here knows what a container is, and nothing here speaks to another host: sections,
//! pages and refusals are handed to `decamp-shared`.

#![deny(unsafe_code)]

mod archive;
mod backend;
mod boot;
mod console;
mod cpuid;
mod dirty;
mod error;
mod host;
mod kept;
mod machine;
mod memory;
mod needs;
mod ports;
mod reader;
mod serial;
mod spec;
mod state;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod testing;
mod throttle;
mod vcpu;

pub use backend::{VmBackend, console_socket};
pub use cpuid::CpuidEntry;
pub use error::VmError;
pub use kept::keeper_main;
pub use memory::GUEST_MEMORY;
pub use needs::Needs;
pub use reader::GuestReader;
pub use spec::VmSpec;
