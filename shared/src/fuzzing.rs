//! Ways in for fuzzers: what a peer sends before anybody has looked at it. Nothing may come of it but a value or an
//! error, and what was read and is written again says the same. What a workload's sections mean is its backend's:
//! those have ways in of their own.

use std::path::Path;

use prost::Message;

use crate::archive::Header;
use crate::console::Size;
use crate::files;
use crate::network::frames::speaker;
use crate::pages::batch::{self, BatchHeader, BatchKind};
use crate::pages::{self, PAGE_SIZE};
use crate::protocol::control::{Reply, Request, reply, request};
use crate::protocol::header::{Answer, Hello, Versions};
use crate::protocol::manifest::Manifest;

/// What the first byte of an input says that the rest is.
mod what {
    pub(super) const HELLO: u8 = 0;
    pub(super) const REQUEST: u8 = 1;
    pub(super) const REPLY: u8 = 2;
    pub(super) const BATCH: u8 = 3;
    pub(super) const INDEX: u8 = 4;
    pub(super) const CHANGES: u8 = 5;
    pub(super) const ARCHIVE: u8 = 6;
    pub(super) const MANIFEST: u8 = 7;
    pub(super) const FRAME: u8 = 8;
    pub(super) const SIZE: u8 = 9;
    pub(super) const KINDS: u8 = 10;
}

/// The versions that an answer is for.
const OFFERED: Versions = Versions { min: 1, max: 3 };
/// Pages of the space that batches are for.
const PAGES: u64 = 1 << 20;

/// What a peer sends: the first byte says what of, the rest is it.
pub fn wire(bytes: &[u8]) {
    let [of, bytes @ ..] = bytes else { return };
    match of % what::KINDS {
        what::HELLO => first_header(bytes),
        what::REQUEST => message::<Request>(bytes),
        what::REPLY => message::<Reply>(bytes),
        what::BATCH => {
            let _ = page_batch(bytes);
        }
        what::INDEX => files::try_index(bytes, false, Path::new("/tree")),
        what::CHANGES => files::try_index(bytes, true, Path::new("/tree")),
        what::ARCHIVE => archive(bytes),
        what::MANIFEST => message::<Manifest>(bytes),
        what::FRAME => {
            let _ = speaker(bytes);
        }
        _ => {
            let _ = Size::from_bytes(bytes);
        }
    }
}

/// Inputs of [`wire`] to begin with.
pub fn wire_seeds() -> Vec<Vec<u8>> {
    let of = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    let request = |body| of(what::REQUEST, &Request::from(body).encode_to_vec());
    let reply = |body| of(what::REPLY, &Reply::from(body).encode_to_vec());
    let mut all = vec![
        of(what::HELLO, &Hello { versions: OFFERED, role: 1 }.encode()),
        of(what::HELLO, &Answer { versions: OFFERED, role: 1, verdict: Ok(2) }.encode()),
        request(request::Body::Hello(Default::default())),
        request(request::Body::Offer(Default::default())),
        request(request::Body::Part(Default::default())),
        request(request::Body::Commit(Default::default())),
        reply(reply::Body::Verdict(Default::default())),
        reply(reply::Body::Settled(Default::default())),
        of(
            what::ARCHIVE,
            br#"{"format":"decamp-checkpoint","version":1,"parts":[{"name":"a","size":1}]}"#,
        ),
        of(what::SIZE, &Size { rows: 24, columns: 80 }.to_bytes()),
        of(
            what::FRAME,
            &[&[0xff; 6][..], &[2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[2; 20]].concat(),
        ),
    ];
    all.extend([what::INDEX, what::CHANGES].map(|kind| of(kind, &files::index_seed())));
    all.extend(pages::batch_seeds().iter().map(|batch| of(what::BATCH, batch)));
    all
}

fn first_header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(Hello::decode(&hello.encode()).ok(), Some(hello));
    }
    if let Ok(answer) = Answer::decode(bytes, OFFERED) {
        assert_eq!(Answer::decode(&answer.encode(), OFFERED).ok(), Some(answer));
    }
}

/// Bytes again, and not the value: a number that is none is not equal to itself.
fn message<M: Message + Default>(bytes: &[u8]) {
    let Ok(read) = M::decode(bytes) else { return };
    let written = read.encode_to_vec();
    let again = M::decode(&written[..]).map(|read| read.encode_to_vec());
    assert_eq!(again.ok(), Some(written), "it is not what it was");
}

/// A batch as a receiver takes it: header, table, payload.
fn page_batch(bytes: &[u8]) -> Option<()> {
    let (head, rest) = bytes.split_first_chunk()?;
    let header = BatchHeader::decode(head).ok()?;
    assert_eq!(header.encode()[..], head[..], "a header is not what it was");
    if header.kind != BatchKind::Pages {
        return None;
    }
    let (table, mut payload) = rest.split_at_checked(header.table_len())?;
    let mut entries = Vec::new();
    batch::decode_table(&header, table, PAGES, &mut entries).ok()?;
    let again: Vec<u8> = entries.iter().flat_map(batch::Entry::encode).collect();
    assert_eq!(again, table, "a table is not what it was");
    let mut last = 0;
    for entry in &entries {
        let range = entry.range(header.space);
        assert!(range.first >= last && range.first + range.count <= PAGES, "{range:?}");
        last = range.first + range.count;
        let (run, rest) = payload.split_at_checked(entry.length as usize)?;
        payload = rest;
        let wanted = usize::from(entry.count) * PAGE_SIZE;
        pages::try_run(entry.encoding, run, wanted);
    }
    Some(())
}

fn archive(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes) else { return };
    assert!(header.parts.iter().all(|part| part.size <= header.bytes()));
    message::<Manifest>(&header.manifest().encode_to_vec());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_fuzzers_begin_with_comes_back() {
        for mut seed in wire_seeds() {
            wire(&seed);
            for at in 0..seed.len() {
                let was = std::mem::replace(&mut seed[at], 0xff);
                wire(&seed);
                seed[at] = was;
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_peer_sends_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            wire(&bytes);
        }
    }
}
