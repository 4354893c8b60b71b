//! What travels between the CLI and the agent on the connection of an attached console, once it has been
//! upgraded to [`PROTOCOL`]: frames of a kind (one byte), a length (`u32`, little-endian) and that many
//! bytes, both ways. No I/O here.

use decamp_shared::console::Size;

use crate::messages::ConsoleEnd;

/// Name of the protocol in the `Upgrade` header of the request.
pub(crate) const PROTOCOL: &str = "decamp-console";
/// The most bytes of one frame.
pub(crate) const FRAME_CAP: usize = 64 << 10;
/// Kind and length.
const HEADER: usize = 5;

const BYTES: u8 = 1;
const SIZE: u8 = 2;
const INPUT_END: u8 = 3;
const END: u8 = 4;

/// One frame.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Frame {
    /// From the CLI: what was typed. From the agent: what was printed.
    Bytes(Vec<u8>),
    /// From the CLI: how large its window is.
    Size(Size),
    /// From the CLI: nothing more will be typed, but it looks on.
    InputEnd,
    /// From the agent, last: why there is nothing more to see.
    End(ConsoleEnd),
}

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// Longer than any.
    #[error("A frame of {0} bytes is too long")]
    Long(usize),
    /// Of no kind that is known, or not what its kind should be.
    #[error("A frame of kind {0} makes no sense")]
    Kind(u8),
}

impl Frame {
    /// As it travels. Bytes must be [`FRAME_CAP`] at most.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Frame::Bytes(bytes) => framed(BYTES, bytes),
            Frame::Size(size) => framed(SIZE, &size.to_bytes()),
            Frame::InputEnd => framed(INPUT_END, &[]),
            // It is made of strings and numbers: there is nothing that JSON has no words for.
            Frame::End(end) => framed(END, &serde_json::to_vec(end).unwrap_or_default()),
        }
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let wrong = FrameError::Kind(kind);
        match kind {
            BYTES => Ok(Frame::Bytes(payload.to_vec())),
            SIZE => Size::from_bytes(payload).map(Frame::Size).ok_or(wrong),
            INPUT_END if payload.is_empty() => Ok(Frame::InputEnd),
            END => serde_json::from_slice(payload).map(Frame::End).map_err(|_| wrong),
            _ => Err(wrong),
        }
    }
}

fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() <= FRAME_CAP);
    let length = payload.len() as u32;
    [&[kind][..], &length.to_le_bytes(), payload].concat()
}

/// Makes frames of what arrives.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    held: Vec<u8>,
}

impl Decoder {
    /// Takes what arrived.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// The next frame, if all of it is there.
    ///
    /// # Errors
    /// When what comes next is none.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((header, rest)) = self.held.split_at_checked(HEADER) else { return Ok(None) };
        let &[kind, a, b, c, d] = header else { return Ok(None) };
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > FRAME_CAP {
            return Err(FrameError::Long(length));
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Frame::from_parts(kind, payload)?;
        self.held.drain(..HEADER + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let frames = [
            Frame::Bytes(b"ls\n\x00\xff".to_vec()),
            Frame::Size(Size { columns: 80, rows: 25 }),
            Frame::Bytes(vec![7; FRAME_CAP]),
            Frame::InputEnd,
            Frame::End(ConsoleEnd::Moved { to: Some("beta".into()) }),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::to_bytes).collect();
        for cut in [1, 3, 4096, bytes.len()] {
            let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next().expect("frames") {
                    seen.push(frame);
                }
            }
            assert_eq!(seen, frames);
        }
    }

    #[test]
    fn what_is_no_frame_is_refused_before_it_is_waited_for() {
        for (bytes, error) in [
            (&[BYTES, 1, 0, 1, 0][..], FrameError::Long(FRAME_CAP + 1)),
            (&[9, 0, 0, 0, 0], FrameError::Kind(9)),
            (&[SIZE, 1, 0, 0, 0, 0], FrameError::Kind(SIZE)),
            (&[INPUT_END, 1, 0, 0, 0, 0], FrameError::Kind(INPUT_END)),
            (&[END, 2, 0, 0, 0, b'{', b'}'], FrameError::Kind(END)),
        ] {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            assert_eq!(decoder.next(), Err(error));
        }
    }
}
