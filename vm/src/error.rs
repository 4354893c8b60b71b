//! What can go wrong with a virtual machine. Each variant names what was tried and on what.

use std::io;
use std::path::PathBuf;

use decamp_shared::console::ConsoleError;
use decamp_shared::network::NetworkError;
use decamp_shared::workload::WorkloadError;

/// What went wrong with a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The spec asks for something that no VM can have.
    #[error("{0}")]
    Spec(String),
    /// The kernel or initial ramdisk cannot be booted.
    #[error("File {path} cannot be booted: {reason}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A disk cannot be used.
    #[error("Disk {path} cannot be used: {reason}")]
    Disk {
        /// Its file or device.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The monitor ended before it had answered: what it was asked for is done, or it is not.
    #[error("{0}")]
    Unanswered(String),
    /// The operating system or KVM refused something.
    #[error("Could not {what}")]
    Refused {
        /// What was tried, and on what.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// KVM refused a model-specific register.
    #[error("Could not {what} model-specific register {index:#x} of vCPU {vcpu}{detail}")]
    Msr {
        /// `read` or `write`.
        what: &'static str,
        /// Number of the register.
        index: u32,
        /// Number of the vCPU.
        vcpu: u32,
        /// The value that was refused, if any.
        detail: String,
    },
    /// A state section is not what it should be.
    #[error("State section {section} cannot be used: {reason}")]
    Section {
        /// Kind of the section.
        section: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest's console.
    #[error(transparent)]
    Console(ConsoleError),
    /// The host's network did not do what was asked.
    #[error(transparent)]
    Network(NetworkError),
    /// The guest is not in the state that was needed.
    #[error("{0}")]
    State(String),
}

impl VmError {
    /// The kernel refused `what`.
    pub(crate) fn refused(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Refused { what: what.into(), source: source.into() }
    }

    /// The message with those beneath it, for a refusal.
    pub(crate) fn with_causes(&self) -> String {
        with_causes(self)
    }

    /// `section` is wrong because of `reason`.
    pub(crate) fn section(section: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Section { section: section.into(), reason: reason.into() }
    }
}

impl From<VmError> for WorkloadError {
    fn from(error: VmError) -> Self {
        let what = error.to_string();
        match error {
            VmError::Refused { source, .. }
            | VmError::Network(NetworkError::Refused { source, .. }) => {
                WorkloadError::new(what, source)
            }
            VmError::Console(error) => error.into(),
            _ => WorkloadError::plain(what),
        }
    }
}

/// What `error` says, with all that is beneath it.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Result of work on a virtual machine.
pub(crate) type Result<T> = std::result::Result<T, VmError>;
