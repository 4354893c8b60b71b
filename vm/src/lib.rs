//! `decamp-vm`: a small VMM on KVM, and the backend that moves its guests.
//!
//! Nothing here knows what a container is, and nothing here speaks to another host: sections,
//! pages and refusals are handed to `decamp-shared`.

#![deny(unsafe_code)]

mod error;
mod memory;
mod spec;
#[allow(unsafe_code)]
mod sys;

pub use error::VmError;
pub use spec::VmSpec;
