//! `decamp-vm`: a small VMM on KVM, and the backend that moves its guests.
//!
//! Nothing here knows what a container is, and nothing here speaks to another host: sections,
//! pages and refusals are handed to `decamp-shared`.

#![deny(unsafe_code)]

mod boot;
mod console;
mod cpuid;
mod dirty;
mod error;
mod host;
mod machine;
mod memory;
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

pub use error::VmError;
pub use spec::VmSpec;
