//! The header of a packet (Virtual I/O Device 1.2, section 5.10.6): 44 bytes, little-endian.
//!
//! The crate `virtio-vsock` has one too, but finds packets only in chains of one or two buffers. A driver may cut a
//! chain wherever it likes (section 2.7.4.1), and Linux sends pages of a program without copying them as buffers of
//! their own.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;

/// The only type of socket that is offered.
pub(super) const STREAM: u16 = 1;

/// What a packet is for.
pub(super) mod op {
    /// Connects.
    pub(crate) const REQUEST: u16 = 1;
    /// Accepts.
    pub(crate) const RESPONSE: u16 = 2;
    /// There is no such connection, or no longer.
    pub(crate) const RST: u16 = 3;
    /// Who says so sends, or takes, nothing more.
    pub(crate) const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub(crate) const RW: u16 = 5;
    /// Says how much room there is, as every packet does.
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Of a shutdown: who says so takes nothing more.
pub(super) const RECEIVES_NO_MORE: u32 = 1;
/// Of a shutdown: who says so sends nothing more.
pub(super) const SENDS_NO_MORE: u32 = 2;
/// Both.
pub(super) const ENDED: u32 = RECEIVES_NO_MORE | SENDS_NO_MORE;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Who sends it.
    pub(super) from: u64,
    /// Whom it is for.
    pub(super) to: u64,
    /// The sender's port.
    pub(super) from_port: u32,
    /// The receiver's port.
    pub(super) to_port: u32,
    /// Bytes that follow.
    pub(super) length: u32,
    /// Type of the socket.
    pub(super) kind: u16,
    /// What it is for: one of [`op`].
    pub(super) op: u16,
    /// Flags of a shutdown.
    pub(super) flags: u32,
    /// Bytes that the sender buffers at most.
    pub(super) buffer: u32,
    /// Bytes that have left the sender's buffer since the connection began, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Header {
    /// Reads a header.
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(short(at)) | u32::from(short(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            from: long(0),
            to: long(8),
            from_port: word(16),
            to_port: word(20),
            length: word(24),
            kind: short(28),
            op: short(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// Writes it.
    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.from.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.to.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.from_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.to_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The reset that answers it.
    pub(super) fn reset(&self) -> Self {
        Self {
            from: self.to,
            to: self.from,
            from_port: self.to_port,
            to_port: self.from_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_what_the_specification_lays_out() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| at as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(header.to, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.from_port, header.to_port), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.length, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!((header.flags, header.buffer), (0x2322_2120, 0x2726_2524));
        assert_eq!(header.forwarded, 0x2b2a_2928);
        let back = header.reset();
        assert_eq!((back.from, back.to_port, back.op), (header.to, header.from_port, op::RST));
    }
}
