//! The way of a frame out of the guest.

use std::io;

use decamp_shared::network::frames::HEAD;
use nix::sys::epoll::EpollFlags;

use super::backend::Piece;
use super::{AT_ONCE, HEADER, Net, TX, pieces};
use crate::virtio::device::{Broken, Io, Served};

impl Net {
    /// Sends what the driver gave, until there is no more, the host takes no more, or it is enough at once.
    pub(super) fn transmit(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let (mut left, mut full, mut gone) = (AT_ONCE, false, None);
        let (frames, knowledge) = (&self.frames, &self.knowledge);
        let link = self.link;
        io.serve(TX, |memory, chain| {
            if left == 0 {
                return Ok(Served::Later);
            }
            left -= 1;
            let mut frame = Vec::new();
            pieces(memory, chain.readable(), TX, &mut frame)?;
            if !link || gone.is_some() {
                return Ok(Served::Done(0));
            }
            match frames.write(&frame) {
                Ok(_) => knowledge.lock().sent(&head(&frame)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    full = true;
                    return Ok(Served::Later);
                }
                Err(error) if is_end(&error) => gone = Some(error),
                // A frame that is none, or that the host has no memory for, is lost like any on a cable.
                Err(error) => tracing::debug!("A guest's frame was not taken: {error}"),
            }
            Ok(Served::Done(0))
        })?;
        if let Some(why) = gone {
            self.lose_link(io, &why);
        }
        self.watch_also(EpollFlags::EPOLLOUT, full)?;
        if left == 0 && !full {
            self.again(TX);
        }
        Ok(())
    }
}

/// Whether this error of a tap device means that there is none any more.
pub(super) fn is_end(error: &io::Error) -> bool {
    const ENDS: [i32; 4] = [libc::EBADFD, libc::EBADF, libc::ECONNREFUSED, libc::EPIPE];
    error.raw_os_error().is_some_and(|number| ENDS.contains(&number))
}

/// The first bytes of the frame in `pieces`, behind its header. They are the guest's, who may write them meanwhile.
pub(super) fn head(pieces: &[Piece<'_>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + HEAD);
    for piece in pieces {
        let have = bytes.len();
        let count = piece.len().min(HEADER + HEAD - have);
        bytes.resize(have + count, 0);
        piece.copy_to(&mut bytes[have..]);
    }
    bytes.drain(..HEADER.min(bytes.len()));
    bytes
}
