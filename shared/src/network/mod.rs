//! What a virtual machine and a container have in common on a host's network: an interface whose host's end is a
//! port of a bridge.
//!
//! | file | what lives there |
//! |---|---|
//! | `mac` | hardware addresses |
//! | `frames` | frames that say where an address is, and who says so |
//! | `announce` | saying so again and again, after a move |
//! | `netlink` | how the kernel is asked |
//! | `link` | interfaces, bridges and neighbours, as the kernel tells of them |
//! | `port` | the port of a bridge: off the network, and back |
//! | `name` | names and addresses that follow from a workload's identity and place |
//! | `need` | what a workload needs of the networks that it comes to |
//! | `probe` | asking whether somebody is behind a bridge |
//!
//! All of it is about the network namespace that the calling thread is in.

pub mod announce;
mod error;
pub mod frames;
mod link;
mod mac;
mod name;
pub mod need;
mod netlink;
mod port;
mod probe;

pub use announce::Announcer;
pub use error::NetworkError;
pub use frames::Neighbour;
pub use link::{Link, Vlans, index_of};
pub use mac::Mac;
pub use name::{interface_name, is_interface_name};
pub use port::Port;

pub use crate::sys::packet_socket;

#[cfg(test)]
mod tests;
