//! What runtimes and CRIU call: [`oci`] registers a container with the agent when it starts and has it
//! forgotten when it ends, [`criu`] puts decamp's look and its network handling around a checkpoint that
//! somebody else makes, [`install`] has both called.
//!
//! What calls them waits for them, and goes by their exit codes: they are short, they never wait without
//! end, and what they are told is checked before it is believed.

pub(crate) mod criu;
pub(crate) mod install;
pub(crate) mod oci;

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

/// What a container is annotated with that is to be registered.
pub(crate) const ANNOTATION: &str = "decamp.migratable";
/// The value that says so.
pub(crate) const MIGRATABLE: &str = "true";
/// Where the host's log listens.
const LOG: &str = "/dev/log";
/// A warning of a daemon (RFC 5424, 6.2.1).
const PRIORITY: u8 = 3 << 3 | 4;

/// Says `text` on standard error, and line by line in the host's log: a runtime keeps what a hook says to
/// itself unless that fails. Nobody is waited for, and that nobody listens is no error.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
    let Ok(socket) = UnixDatagram::unbound() else { return };
    let _ = socket.set_nonblocking(true);
    for line in text.lines() {
        let _ = socket.send_to(format!("<{PRIORITY}>decamp: {line}").as_bytes(), LOG);
    }
}
