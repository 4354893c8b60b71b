//! State sections as they leave: in parts, over the control connection, beside whatever else travels.
//!
//! What is in a section, and when everything has been sent, is not known here.

use super::link::Outbox;
use crate::protocol::control::{Load, Part, request};
use crate::workload::Section;

/// Bytes of a state section that travel in one control message.
const PART: usize = 1 << 20;

/// Sends `sections` in parts; how many there are.
pub(super) async fn send_parts(sections: Vec<Section>, to: &Outbox) -> u32 {
    let count = sections.len() as u32;
    for section in sections {
        let total = section.bytes.len() as u64;
        let mut rest = &section.bytes[..];
        loop {
            let (part, after) = rest.split_at(rest.len().min(PART));
            to.send(request::Body::Part(Part {
                kind: section.kind.clone(),
                version: section.version,
                total,
                bytes: part.to_vec(),
            }))
            .await;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
    }
    count
}

/// Asks to load `sections` sections as soon as `round`, which was begun, is over; nothing else comes.
pub(super) async fn send_load(sections: u32, round: u32, to: &Outbox) {
    to.send(request::Body::Load(Load { sections, round })).await;
}
