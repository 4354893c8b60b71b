//! The packet filter of a network namespace, changed by its own tool.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::error::{ContainerError, Result};

/// Has `nft` carry out `commands`, all or none, in the network namespace of this thread.
///
/// # Errors
/// When it cannot be started, or what it says.
pub(crate) fn carry_out(commands: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ContainerError::io("start nft (of nftables)"))?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends early says why.
        let _ = input.write_all(commands.as_bytes());
    }
    let said = child.wait_with_output().map_err(ContainerError::io("wait for nft"))?;
    if said.status.success() {
        return Ok(());
    }
    Err(ContainerError::Tool {
        tool: "nft",
        what: "change the packet filter of the container".to_owned(),
        said: String::from_utf8_lossy(&said.stderr).trim().to_owned(),
    })
}
