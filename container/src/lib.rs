//! `decamp-container`: containers that run under runc and move by CRIU.
//!
//! Rooms: [`spec`] (what a user asks for), `preflight` (what speaks against it), [`backend`] (the
//! agent's side), [`keeper`] and [`kept`] (the process that holds a container, and the container as
//! it holds it). Below them its parts: `bundle`, `runtime`, `cgroup`, `network`, `streams`, `init`,
//! `store`; and the move itself: `memory` (which pages are ours), `hiding` (keeping them from CRIU),
//! `swrk` (speaking to CRIU), `dump`, `images`, `restore`. Nothing here knows what a VM is.

#![deny(unsafe_code)]

mod announce;
pub mod backend;
mod begin;
mod bundle;
mod cgroup;
mod dump;
pub mod error;
pub mod facts;
mod hiding;
mod images;
mod init;
pub mod keeper;
pub mod kept;
mod memory;
mod mounts;
mod network;
mod port;
mod preflight;
pub mod reader;
mod restore;
mod runtime;
pub mod spec;
mod store;
mod streams;
mod swrk;
#[allow(unsafe_code)]
mod sys;
mod tree;

pub use backend::ContainerBackend;
pub use error::ContainerError;
pub use keeper::keeper_main;
pub use spec::ContainerSpec;
