//! The wire of protocol 1: messages, versions, error codes. No I/O, no unsafe.
//!
//! `PROTOCOL.md` beside this crate says the same in prose; a test holds the two together.

pub mod control;
pub mod header;
pub mod manifest;

/// The one port of an agent.
pub const PORT: u16 = 7420;
/// Application protocol in the TLS handshake.
pub const ALPN: &[u8] = b"decamp";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use prost::Message;

    use super::control::*;
    use super::manifest::*;

    const DOCUMENT: &str = include_str!("../../PROTOCOL.md");

    /// Field numbers at the top level of an encoded message.
    fn tags(mut bytes: &[u8]) -> Vec<u32> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (tag, wire) = prost::encoding::decode_key(&mut bytes).expect("our own encoding");
            let context = prost::encoding::DecodeContext::default();
            prost::encoding::skip_field(wire, tag, &mut bytes, context).expect("our own encoding");
            found.push(tag);
        }
        found
    }

    fn row(name: &str, message: &impl Message) -> (String, Vec<u32>) {
        (name.to_owned(), tags(&message.encode_to_vec()))
    }

    /// Every message with every field set to something.
    fn messages() -> Vec<(String, Vec<u32>)> {
        let text = || "x".to_owned();
        let space = SpaceInfo { id: 1, page_limit: 1, label: text(), process: 1 };
        let tree = FileTree {
            id: 1,
            role: 1,
            path: text(),
            bytes: 1,
            live: true,
            storage: 1,
            mounts: vec![text()],
            place: text(),
            space: 1,
        };
        let neighbour = NetworkNeighbour { address: vec![1; 4], mac: vec![2; 6] };
        let network = NetworkNeed {
            bridge: text(),
            mtu: 1500,
            vlans: VlanUse::Filtered.into(),
            vlan: 1,
            neighbours: vec![neighbour.clone()],
        };
        let mapping = PathMapping { old: text(), new: text() };
        let refusal = Refusal { code: 1, text: text() };
        let manifest = Manifest {
            name: text(),
            uuid: text(),
            kind: 1,
            memory_bytes: 1,
            spaces: vec![space.clone()],
            files: vec![tree.clone()],
            networks: vec![network.clone()],
            spec: vec![1],
            needs: vec![1],
        };
        let offer = Offer {
            manifest: Some(manifest.clone()),
            token: 1,
            paths: vec![mapping.clone()],
            streams: 1,
            dry_run: true,
            probes: vec![text()],
        };
        let verdict = Verdict { refusals: vec![refusal.clone()], secret: vec![1], streams: 1 };
        vec![
            row("Hello", &Hello { migration: text(), host: text(), plain_pages: true }),
            row("Offer", &offer),
            row("Prepare", &Prepare {}),
            row("Round", &Round { round: 1, spaces: vec![space.clone()] }),
            row("Part", &Part { kind: text(), version: 1, total: 1, bytes: vec![1] }),
            row("Load", &Load { sections: 1, round: 2 }),
            row("Commit", &Commit { migration: text(), token: 1 }),
            row("Abort", &Abort { reason: text() }),
            row("Ping", &Ping {}),
            row("Welcome", &Welcome { host: text(), plain_pages: true }),
            row("Verdict", &verdict),
            row("Ready", &Ready {}),
            row("RoundDone", &RoundDone { round: 1, pages: 1 }),
            row(
                "Loaded",
                &Loaded { load_us: 1, restore: "lazy".into(), fallbacks: vec!["why".into()] },
            ),
            row("Settled", &Settled { settlement: 1, reason: text() }),
            row("Failed", &Failed { text: text() }),
            row("Pong", &Pong {}),
            row("Manifest", &manifest),
            row("CpuQuestion", &CpuQuestion {}),
            row("CpuAnswer", &CpuAnswer { offer: vec![1] }),
            row("SpaceInfo", &space),
            row("FileTree", &tree),
            row("NetworkNeed", &network),
            row("NetworkNeighbour", &neighbour),
            row("PathMapping", &mapping),
            row("Refusal", &refusal),
        ]
    }

    /// Rows of the document's tables: first column to the column that lists fields.
    fn documented() -> BTreeMap<String, Vec<u32>> {
        DOCUMENT
            .lines()
            .filter_map(|line| {
                let cells: Vec<_> = line.strip_prefix("| ")?.split('|').map(str::trim).collect();
                let fields =
                    if cells.get(1)?.parse::<u32>().is_ok() { cells.get(2)? } else { &cells[1] };
                let numbers = fields
                    .split(", ")
                    .filter_map(|field| field.split_once(' ')?.0.parse().ok())
                    .collect();
                Some((cells[0].to_owned(), numbers))
            })
            .collect()
    }

    #[test]
    fn the_document_lists_every_field_of_every_message() {
        let documented = documented();
        for (name, tags) in messages() {
            assert_eq!(documented.get(&name), Some(&tags), "{name} in PROTOCOL.md");
        }
    }

    #[test]
    fn envelopes_have_the_documented_numbers() {
        let number = |bytes: Vec<u8>| tags(&bytes)[0];
        let request = |body: request::Body| number(Request::from(body).encode_to_vec());
        let reply = |body: reply::Body| number(Reply::from(body).encode_to_vec());
        let found = [
            ("Hello", request(request::Body::Hello(Hello::default()))),
            ("Offer", request(request::Body::Offer(Offer::default()))),
            ("Prepare", request(request::Body::Prepare(Prepare {}))),
            ("Round", request(request::Body::Round(Round::default()))),
            ("Part", request(request::Body::Part(Part::default()))),
            ("Load", request(request::Body::Load(Load::default()))),
            ("Commit", request(request::Body::Commit(Commit::default()))),
            ("Abort", request(request::Body::Abort(Abort::default()))),
            ("Ping", request(request::Body::Ping(Ping {}))),
            ("CpuQuestion", request(request::Body::CpuQuestion(CpuQuestion {}))),
            ("Welcome", reply(reply::Body::Welcome(Welcome::default()))),
            ("Verdict", reply(reply::Body::Verdict(Verdict::default()))),
            ("Ready", reply(reply::Body::Ready(Ready {}))),
            ("RoundDone", reply(reply::Body::RoundDone(RoundDone::default()))),
            ("Loaded", reply(reply::Body::Loaded(Loaded::default()))),
            ("Settled", reply(reply::Body::Settled(Settled::default()))),
            ("Failed", reply(reply::Body::Failed(Failed::default()))),
            ("Pong", reply(reply::Body::Pong(Pong {}))),
            ("CpuAnswer", reply(reply::Body::CpuAnswer(CpuAnswer::default()))),
        ];
        for (name, tag) in found {
            let row = DOCUMENT.lines().find(|line| line.starts_with(&format!("| {name} | ")));
            let second = row.and_then(|row| row.split('|').nth(2)).map(str::trim);
            assert_eq!(second, Some(tag.to_string().as_str()), "{name} in PROTOCOL.md");
        }
    }
}
