//! `decamp-container`: containers that run under an OCI runtime and move by CRIU.
//!
//! Rooms: [`spec`] (what a user asks for), `preflight` (what speaks against it), `obstacles` (what of
//! its processes does), `claim`
//! (whose a name is), [`backend`] (the
//! agent's side), [`keeper`] and [`kept`] (the process that holds a container, and the container as
//! it holds it). Below them its parts: `bundle`, `runtime` (on `runc` and `crun`), `cgroup`, `network`,
//! `streams`, `input`, `terminal`, `init`, `store`; what somebody else started: `adopt`, `foreign`, `interfaces`,
//! [`podman`];
//! and the move itself: `memory` (which pages are ours), `tracker` (which of them were written, while it
//! runs, on `pagemap` and `inject`), `comparing` (the same where the kernel does not tell), `segments` and
//! `tmpfs` (memory that processes share), `ways` (which of several ways this host goes), `throttle`,
//! `hiding` (keeping them from CRIU), `swrk` (speaking to CRIU), `warm` (having it at hand) and `watch` (whether it is stuck), `dump`, `images` and `packed` (CRIU's files on their way), `landed` (what of a
//! bundle is mounted), `confined` (what images may ask of CRIU), `ghosts` (what is deleted, and where it comes to lie), `mountable` (what may be), `rights` (which its processes may have), `file_locks` (on what both hosts share), `restore`, `locked` and `filling` (which memory comes when it runs already, and how);
//! of what comes, `placing` says what goes where by its mapping, `contained` what CRIU reads of its own images, and
//! `owned` makes the network of a container with a user namespace; `huge` knows huge pages, `keyed_hash` hashes
//! pages for whoever compares, `beside` has work done on all processors;
//! and `archive` (a container in a checkpoint's file). [`hooks`] is what other programs that checkpoint
//! containers are given of all that. Nothing here knows what a VM is.

#![deny(unsafe_code)]

mod adopt;
mod archive;
pub mod backend;
mod begin;
mod beside;
mod bundle;
mod cgroup;
mod claim;
mod comparing;
mod confined;
mod contained;
mod crun;
mod dump;
mod entries;
pub mod error;
pub mod facts;
mod file_locks;
mod filling;
mod foreign;
mod forked;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod ghosts;
mod hiding;
pub mod hooks;
mod huge;
mod images;
mod init;
mod inject;
mod input;
mod interfaces;
pub mod keeper;
pub mod kept;
mod keyed_hash;
mod landed;
mod limits;
mod looking;
mod mappings;
mod memory;
mod mountable;
mod mounts;
mod network;
mod nft;
mod obstacles;
mod owned;
mod packed;
mod pagemap;
mod placing;
pub mod podman;
mod preflight;
pub mod reader;
mod restore;
mod rights;
mod runc;
mod runtime;
mod segments;
mod source;
pub mod spec;
mod store;
mod strangers;
mod streams;
mod swrk;
#[allow(unsafe_code)]
mod sys;
mod terminal;
mod throttle;
mod tmpfs;
mod tracker;
mod volumes;
mod warm;
mod watch;
mod ways;

pub use backend::{ContainerBackend, volume_trees};
pub use error::ContainerError;
pub use keeper::keeper_main;
pub use spec::ContainerSpec;
pub use volumes::Volume;
