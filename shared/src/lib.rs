//! `decamp-shared`: all that moving a virtual machine and moving a container have in common.
//!
//! Rooms, from the wire inwards: [`protocol`] (messages, no I/O), [`transport`] (connections),
//! [`pages`] (the page engine), [`files`] (file trees that travel with a workload), [`session`]
//! (the two ends of a move, the commit, the report), [`archive`] (workloads in files), [`workload`]
//! (what a backend implements), [`console`] (who sees what a workload prints, and types), [`network`]
//! (interfaces on bridges), [`methods`] (words for the ways of moving memory), [`sparse`] (where files
//! have data) and [`keeper`] (the process that lives as long as a workload). Nothing here knows what KVM
//! or CRIU is.

#![deny(unsafe_code)]

pub mod archive;
pub mod console;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod keeper;
pub mod methods;
pub mod network;
pub mod pages;
pub mod protocol;
pub mod session;
pub mod sparse;
#[allow(unsafe_code)]
pub mod sys;
pub mod transport;
pub mod workload;
