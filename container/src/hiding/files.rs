//! Files whose contents this process makes up: as much of the kernel's FUSE protocol (linux/fuse.h, here 7.31)
//! as one directory of files that are only read and asked takes. What they hold is the business of whoever
//! serves them.
//!
//! Requests come from the kernel, and from nobody else: one that makes no sense ends the service.

/// Node of the directory; the files' nodes are the numbers above, in their order.
pub(crate) const ROOT: u64 = 1;
/// The longest read that is asked for.
pub(crate) const LONGEST_READ: usize = 1 << 20;
/// Room for any request: the kernel wants 8 KiB at least, and nobody writes.
pub(crate) const REQUEST_ROOM: usize = 64 << 10;

const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// `struct fuse_in_header`.
const HEADER: usize = 40;
/// Nothing here ever changes.
const VALID_SECONDS: u64 = 1 << 20;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GET_ATTRIBUTES: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const IOCTL: u32 = 39;
const FORGET_MANY: u32 = 42;

/// Flag of INIT: reads may be longer than 128 KiB.
const MAX_PAGES: u32 = 1 << 22;
/// Flag of OPEN: every read comes here, whatever the size of the file.
const DIRECT_IO: u32 = 1;

/// One request of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    /// The kernel's number for it.
    unique: u64,
    pub(crate) what: What<'a>,
}

/// What is requested.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum What<'a> {
    /// To begin, with flags of what the kernel can.
    Begin(u32),
    /// The file of this name in the directory.
    Find(&'a [u8]),
    /// What a node is.
    Describe(u64),
    /// A node, by thread `caller`.
    Open {
        node: u64,
        caller: i32,
    },
    Read {
        handle: u64,
        offset: u64,
        count: usize,
    },
    /// An `ioctl` with this request number by thread `caller`, and the bytes that it gave.
    Ask {
        handle: u64,
        caller: i32,
        number: u32,
        bytes: &'a [u8],
    },
    Close(u64),
    /// An answer of nothing is enough.
    Agree,
    /// No answer is expected.
    Note,
    /// Not supported.
    Other,
}

/// What a request is answered with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Begun(u32),
    /// A file, by its node.
    Found(u64),
    Described(u64),
    /// With a handle of our choice.
    Opened(u64),
    Bytes(Vec<u8>),
    /// What the `ioctl` returns, and the bytes that it gives back.
    Told(i32, Vec<u8>),
    Agreed,
    Failed(i32),
}

impl<'a> Request<'a> {
    /// Reads one request; nothing when it makes no sense.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let body = bytes.get(HEADER..)?;
        let (code, node) = (word(bytes, 4)?, long(bytes, 16)?);
        let caller = word(bytes, 32)? as i32;
        let what = match code {
            INIT => What::Begin(word(body, 12)?),
            LOOKUP => What::Find(body.split(|byte| *byte == 0).next()?),
            GET_ATTRIBUTES => What::Describe(node),
            OPEN => What::Open { node, caller },
            READ => What::Read {
                handle: long(body, 0)?,
                offset: long(body, 8)?,
                count: (word(body, 16)? as usize).min(LONGEST_READ),
            },
            IOCTL => What::Ask {
                handle: long(body, 0)?,
                caller,
                number: word(body, 12)?,
                bytes: body.get(32..)?,
            },
            RELEASE => What::Close(long(body, 0)?),
            FLUSH => What::Agree,
            FORGET | FORGET_MANY | INTERRUPT => What::Note,
            _ => What::Other,
        };
        Some(Self { unique: long(bytes, 8)?, what })
    }

    /// The bytes that answer it.
    pub(crate) fn answer(&self, reply: &Reply) -> Vec<u8> {
        let mut error = 0;
        let mut body: Vec<u8> = Vec::new();
        match reply {
            Reply::Begun(flags) => {
                put(&mut body, &[MAJOR, MINOR, 0, flags & MAX_PAGES]);
                // Requests at once, writes of 4 KiB, one nanosecond, pages of a read; the rest is zero.
                put(&mut body, &[9 << 16 | 12, 4096, 1, (LONGEST_READ / 4096) as u32]);
                body.resize(64, 0);
            }
            Reply::Found(node) => {
                put_long(&mut body, &[*node, 0, VALID_SECONDS, VALID_SECONDS, 0]);
                put_attributes(&mut body, *node);
            }
            Reply::Described(node) => {
                put_long(&mut body, &[VALID_SECONDS, 0]);
                put_attributes(&mut body, *node);
            }
            Reply::Opened(handle) => {
                put_long(&mut body, &[*handle]);
                put(&mut body, &[DIRECT_IO, 0]);
            }
            Reply::Bytes(bytes) => body.extend_from_slice(bytes),
            Reply::Told(result, bytes) => {
                put(&mut body, &[*result as u32, 0, 0, 0]);
                body.extend_from_slice(bytes);
            }
            Reply::Agreed => {}
            Reply::Failed(number) => error = -number,
        }
        let mut bytes = Vec::with_capacity(16 + body.len());
        put(&mut bytes, &[16 + body.len() as u32, error as u32]);
        put_long(&mut bytes, &[self.unique]);
        bytes.append(&mut body);
        bytes
    }
}

/// `struct fuse_attr`: a directory or a file, of root's and readable by it.
fn put_attributes(bytes: &mut Vec<u8>, node: u64) {
    let mode = if node == ROOT { libc::S_IFDIR | 0o500 } else { libc::S_IFREG | 0o400 };
    // Number, size, blocks, three times; nanoseconds, mode, links, owner, group, device, block size, flags.
    put_long(bytes, &[node, 0, 0, 0, 0, 0]);
    put(bytes, &[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]);
}

fn put(bytes: &mut Vec<u8>, words: &[u32]) {
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
}

fn put_long(bytes: &mut Vec<u8>, words: &[u64]) {
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(code: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, &[(HEADER + body.len()) as u32, code]);
        put_long(&mut bytes, &[99, node]);
        put(&mut bytes, &[0, 0, 4711, 0]);
        bytes.extend_from_slice(body);
        bytes
    }

    fn parsed(bytes: &[u8]) -> What<'_> {
        Request::parse(bytes).expect("a request").what
    }

    #[test]
    fn requests_are_read() {
        assert_eq!(parsed(&request(LOOKUP, 1, b"name\0")), What::Find(b"name"));
        assert_eq!(parsed(&request(OPEN, 7, &[0; 8])), What::Open { node: 7, caller: 4711 });
        let mut body = Vec::new();
        put_long(&mut body, &[5, 4096]);
        put(&mut body, &[512, 0, 0, 0, 0, 0]);
        let expected = What::Read { handle: 5, offset: 4096, count: 512 };
        assert_eq!(parsed(&request(READ, 2, &body)), expected);
        let mut body = Vec::new();
        put_long(&mut body, &[5]);
        put(&mut body, &[0, 0xc060_6610]);
        put_long(&mut body, &[0xdead_0000]);
        put(&mut body, &[2, 2]);
        body.extend_from_slice(b"hi");
        let expected = What::Ask { handle: 5, caller: 4711, number: 0xc060_6610, bytes: b"hi" };
        assert_eq!(parsed(&request(IOCTL, 2, &body)), expected);
        assert_eq!(parsed(&request(FORGET, 2, &[0; 8])), What::Note);
        assert_eq!(parsed(&request(4000, 2, &[])), What::Other);
    }

    /// Lengths are those of the kernel's structures.
    #[test]
    fn answers_have_the_lengths_that_the_kernel_expects() {
        let bytes = request(LOOKUP, 1, b"name\0");
        let request = Request::parse(&bytes).expect("a request");
        for (reply, length) in [
            (Reply::Begun(u32::MAX), 64),
            (Reply::Found(2), 128),
            (Reply::Described(2), 104),
            (Reply::Opened(1), 16),
            (Reply::Told(3, vec![0; 96]), 112),
            (Reply::Bytes(vec![1; 5]), 5),
            (Reply::Agreed, 0),
            (Reply::Failed(libc::ENOENT), 0),
        ] {
            let answer = request.answer(&reply);
            assert_eq!(answer.len(), 16 + length, "{reply:?}");
            assert_eq!(word(&answer, 0), Some(answer.len() as u32));
            assert_eq!(long(&answer, 8), Some(99));
            let error = if matches!(reply, Reply::Failed(_)) { -libc::ENOENT } else { 0 };
            assert_eq!(word(&answer, 4), Some(error as u32));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(
            code in 0u32..64,
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = Request::parse(&bytes);
            let _ = Request::parse(&request(code, 3, &bytes));
        }
    }
}
