//! One message and the descriptors that belong to it, over a stream between two processes of ours: its length
//! as four bytes, which the descriptors come with, and JSON.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ContainerError, Result};
use crate::sys;

/// Descriptors in one message at most; the kernel takes 253.
pub(crate) const DESCRIPTORS: usize = 200;
/// No message is longer.
const CAP: usize = 1 << 16;

/// Says `what`.
pub(crate) fn say(to: &UnixStream, what: &impl Serialize, with: &[BorrowedFd<'_>]) -> Result<()> {
    let failed = "speak over a socket of a container";
    let text =
        serde_json::to_vec(what).map_err(|error| ContainerError::io(failed)(error.into()))?;
    let numbers: Vec<RawFd> = with.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let length = (text.len() as u32).to_le_bytes();
    let parts = [IoSlice::new(&length)];
    sendmsg::<()>(to.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(ContainerError::errno(failed))?;
    let mut to = to;
    to.write_all(&text).map_err(ContainerError::io(failed))
}

/// Hears what the other side says, within the stream's deadline.
pub(crate) fn hear<T: DeserializeOwned>(from: &UnixStream) -> Result<(T, Vec<OwnedFd>)> {
    let failed = "hear the other side of a socket of a container";
    let mut length = [0; 4];
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let mut descriptors = Vec::new();
    {
        let mut parts = [IoSliceMut::new(&mut length)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
        let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)
            .map_err(ContainerError::errno(failed))?;
        for control in message.cmsgs().map_err(ContainerError::errno(failed))? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                descriptors.extend(numbers.into_iter().map(sys::adopt_descriptor));
            }
        }
        if message.bytes != 4 {
            return Err(ContainerError::State("The other side of a socket ended".to_owned()));
        }
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > CAP {
        return Err(ContainerError::State(format!("A message of {length} bytes is too long")));
    }
    let mut text = vec![0; length];
    let mut from = from;
    from.read_exact(&mut text).map_err(ContainerError::io(failed))?;
    let what =
        serde_json::from_slice(&text).map_err(|error| ContainerError::io(failed)(error.into()))?;
    Ok((what, descriptors))
}
