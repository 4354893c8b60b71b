//! Virtio devices (OASIS, Virtual I/O Device 1.2) behind the MMIO transport.
//!
//! | file | what lives there |
//! |---|---|
//! | `device` | what a device is to everything else: [`device::Device`], and what it works with |
//! | `interrupt` | a device's interrupt line and its cause |
//! | `poller` | what a device's thread waits for |
//! | `registers` | the registers that a driver sees, and what its writes mean |
//! | `worker` | the thread of a device, its pauses and its end |
//! | `complaints` | how often a device speaks of its driver in the log |
//! | `state` | the section of a device, as it travels |
//! | `bus` | all devices of one VM |
//! | `conformance` | what every device must stand, and the driver of tests |
//! | `tried` | a device without a thread, for fuzzers |
//! | `net`, `rng`, `balloon`, `console`, `block`, `vsock`, … | one device each |
//!
//! The path of a request: the guest writes a queue's number to the notify register; KVM turns that into an
//! eventfd ([`poller`]), which wakes the device's thread ([`worker`]); the device takes descriptor chains from
//! the queue, reads and writes guest memory (every write marks its pages dirty), gives the chains back, and
//! raises its line ([`interrupt`]) unless the driver does not want to hear of it.
//!
//! A device works only with its lock held, and only while it is neither paused nor broken. So whoever paused it
//! knows that nothing is under way, in guest memory or on the host, and may save it.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod bus;
pub(crate) mod complaints;
#[cfg(test)]
pub(crate) mod conformance;
pub(crate) mod console;
pub(crate) mod device;
mod interrupt;
pub(crate) mod net;
mod poller;
mod registers;
pub(crate) mod rng;
mod state;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod tried;
pub(crate) mod vsock;
mod worker;
