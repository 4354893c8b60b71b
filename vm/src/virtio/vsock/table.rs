//! The connections of one guest, by their ports: whose packet is whose, and who speaks next.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;

use super::connection::{BUFFER, Connection, Fate};
use super::packet::{Header, STREAM, op};

/// The host's context identifier.
pub(super) const HOST: u64 = 2;
/// Resets that wait for room in the guest at most. When there are as many, nothing more is taken from it.
const MOST_RESETS: usize = 256;
/// Where the ports of host programs begin, which get one each: beyond those that services use.
const FIRST_PORT: u32 = 1 << 30;

/// The ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pair {
    host: u32,
    guest: u32,
}

impl Pair {
    /// Those of a packet of the guest's.
    pub(super) fn of(header: &Header) -> Self {
        Self { host: header.to_port, guest: header.from_port }
    }
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    token: u32,
    /// Stands in `turn`.
    queued: bool,
}

/// The connections of one guest.
#[derive(Debug)]
pub(super) struct Table {
    guest: u64,
    entries: BTreeMap<Pair, Entry>,
    tokens: BTreeMap<u32, Pair>,
    /// Those that may have something for the guest, the next first.
    turn: VecDeque<Pair>,
    resets: VecDeque<Header>,
    next_port: u32,
}

impl Table {
    /// No connections of the guest with this identifier.
    pub(super) fn new(guest: u64) -> Self {
        Self {
            guest,
            entries: BTreeMap::new(),
            tokens: BTreeMap::new(),
            turn: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Connections that there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether `token` is that of a connection.
    pub(super) fn has_token(&self, token: u32) -> bool {
        self.tokens.contains_key(&token)
    }

    /// Whether there is a connection of these ports.
    pub(super) fn has(&self, pair: Pair) -> bool {
        self.entries.contains_key(&pair)
    }

    /// Whether the guest has to take resets before anything more is taken from it.
    pub(super) fn is_full_of_resets(&self) -> bool {
        self.resets.len() >= MOST_RESETS
    }

    /// No connection is left; host programs see theirs closed.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.tokens.clear();
        self.turn.clear();
        self.resets.clear();
    }

    /// A host program wants to be connected to `port` of the guest. Its stream is watched as `token`.
    pub(super) fn connect(&mut self, port: u32, stream: UnixStream, token: u32) {
        let mut pair = Pair { host: self.next_port, guest: port };
        // There are fewer connections than ports.
        while self.has(pair) {
            pair.host = following(pair.host);
        }
        self.next_port = following(pair.host);
        self.add(pair, Connection::asked_by_host(stream), token);
    }

    /// The guest is connected to `stream`, watched as `token`, as it asked by `request`.
    pub(super) fn accept(&mut self, request: &Header, stream: UnixStream, token: u32) {
        self.add(Pair::of(request), Connection::asked_by_guest(stream, request), token);
    }

    fn add(&mut self, pair: Pair, connection: Connection, token: u32) {
        self.tokens.insert(token, pair);
        self.entries.insert(pair, Entry { connection, token, queued: false });
        self.settle(pair);
    }

    /// The guest hears that `header` belongs to nothing.
    pub(super) fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// The guest sends `header` with `data` to a connection that there is.
    pub(super) fn take(&mut self, header: &Header, data: &[u8]) {
        let pair = Pair::of(header);
        match self.entries.get_mut(&pair) {
            Some(entry) if !entry.connection.is_left() => {
                entry.connection.take(header, data);
                self.settle(pair);
            }
            _ => self.refuse(header),
        }
    }

    /// The stream watched as `token` may have changed.
    pub(super) fn ready(&mut self, token: u32) {
        if let Some(pair) = self.tokens.get(&token).copied() {
            self.look_at(pair);
        }
    }

    /// Every stream may have changed.
    pub(super) fn all_ready(&mut self) {
        let pairs: Vec<Pair> = self.entries.keys().copied().collect();
        pairs.into_iter().for_each(|pair| self.look_at(pair));
    }

    fn look_at(&mut self, pair: Pair) {
        if let Some(entry) = self.entries.get_mut(&pair) {
            entry.connection.ready();
            self.settle(pair);
        }
    }

    /// Gives `pair` a turn, or forgets it when it is over.
    fn settle(&mut self, pair: Pair) {
        let Some(entry) = self.entries.get_mut(&pair) else { return };
        match entry.connection.fate() {
            Fate::Lives => {
                if !std::mem::replace(&mut entry.queued, true) {
                    self.turn.push_back(pair);
                }
                return;
            }
            Fate::Broken => {
                let reset = Header { op: op::RST, ..self.header(pair) };
                self.resets.push_back(reset);
            }
            Fate::Over => {}
        }
        if let Some(entry) = self.entries.remove(&pair) {
            self.tokens.remove(&entry.token);
            if entry.queued {
                self.turn.retain(|other| *other != pair);
            }
        }
    }

    /// The next packet for the guest, with its data in the first bytes of `into`.
    pub(super) fn next(&mut self, into: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(pair) = self.turn.pop_front() {
            let Some(entry) = self.entries.get_mut(&pair) else { continue };
            entry.queued = false;
            let said = entry.connection.next(into);
            let forwarded = said.map(|_| entry.connection.tell_forwarded());
            // It is the others' turn now; and it may have found out that it is over.
            if said.is_some() || entry.connection.fate() != Fate::Lives {
                self.settle(pair);
            }
            if let (Some((op, flags, length)), Some(forwarded)) = (said, forwarded) {
                let length = length as u32;
                return Some(Header { op, flags, length, forwarded, ..self.header(pair) });
            }
            if let Some(reset) = self.resets.pop_front() {
                return Some(reset);
            }
        }
        None
    }

    fn header(&self, pair: Pair) -> Header {
        Header {
            from: HOST,
            to: self.guest,
            from_port: pair.host,
            to_port: pair.guest,
            kind: STREAM,
            buffer: BUFFER,
            ..Header::default()
        }
    }
}

/// The port after `port`, of those that host programs get. The last of all means any.
fn following(port: u32) -> u32 {
    if port >= u32::MAX - 1 { FIRST_PORT } else { port + 1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::connection::MOST_DATA;
    use super::*;

    /// What happens to a table.
    #[derive(Clone, Debug)]
    enum Step {
        /// The guest sends this, with so much data.
        Sends(Header, usize),
        /// A program asks for a port.
        Calls(u32),
        /// A program writes, reads, ends sending, or goes; by its number.
        Writes(usize, usize),
        Reads(usize),
        Ends(usize),
        Goes(usize),
        /// The guest has room for so many packets.
        Gives(usize),
    }

    fn header() -> impl Strategy<Value = Header> {
        let ports = (0u32..3, prop_oneof![0u32..3, FIRST_PORT..FIRST_PORT + 4]);
        let room = prop_oneof![Just(0u32), Just(1000), Just(65_536), any::<u32>()];
        (ports, 0u16..9, 0u32..5, room, prop_oneof![Just(0u32), any::<u32>()]).prop_map(
            |((from_port, to_port), op, flags, buffer, forwarded)| Header {
                from: 3,
                to: HOST,
                from_port,
                to_port,
                kind: STREAM,
                op,
                flags,
                buffer,
                forwarded,
                length: 0,
            },
        )
    }

    fn step() -> impl Strategy<Value = Step> {
        let length = || prop_oneof![0usize..100, Just(MOST_DATA)];
        prop_oneof![
            6 => (header(), length()).prop_map(|(header, length)| Step::Sends(header, length)),
            2 => (0u32..3).prop_map(Step::Calls),
            2 => (any::<usize>(), length()).prop_map(|(who, length)| Step::Writes(who, length)),
            1 => any::<usize>().prop_map(Step::Reads),
            1 => any::<usize>().prop_map(Step::Ends),
            1 => any::<usize>().prop_map(Step::Goes),
            3 => (0usize..8).prop_map(Step::Gives),
        ]
    }

    /// A table with programs at the other ends.
    struct Bench {
        table: Table,
        programs: Vec<UnixStream>,
        next_token: u32,
    }

    impl Bench {
        fn pair(&mut self) -> (UnixStream, u32) {
            let (ours, theirs) = UnixStream::pair().expect("pair");
            ours.set_nonblocking(true).expect("non-blocking");
            theirs.set_nonblocking(true).expect("non-blocking");
            self.programs.push(theirs);
            self.next_token += 1;
            (ours, self.next_token)
        }

        fn program(&mut self, who: usize) -> Option<&mut UnixStream> {
            let count = self.programs.len().max(1);
            self.programs.get_mut(who % count)
        }

        fn go(&mut self, step: Step) {
            use std::io::{Read, Write};
            match step {
                Step::Sends(header, length) => {
                    let has = self.table.has(Pair::of(&header));
                    let data = vec![7; length];
                    if has {
                        self.table.take(&header, &data);
                    } else if header.op == op::REQUEST {
                        let (stream, token) = self.pair();
                        self.table.accept(&header, stream, token);
                    } else {
                        self.table.refuse(&header);
                    }
                }
                Step::Calls(port) => {
                    let (stream, token) = self.pair();
                    self.table.connect(port, stream, token);
                }
                Step::Writes(who, length) => {
                    let _ = self.program(who).map(|program| program.write(&vec![1; length]));
                }
                Step::Reads(who) => {
                    let _ = self.program(who).map(|program| program.read(&mut [0; 70_000]));
                }
                Step::Ends(who) => {
                    let end = std::net::Shutdown::Write;
                    let _ = self.program(who).map(|program| program.shutdown(end));
                }
                Step::Goes(who) if !self.programs.is_empty() => {
                    self.programs.swap_remove(who % self.programs.len());
                }
                Step::Goes(_) => {}
                Step::Gives(packets) => {
                    self.table.all_ready();
                    let mut room = vec![0; 4096];
                    for _ in 0..packets {
                        let Some(header) = self.table.next(&mut room) else { break };
                        assert!(header.length as usize <= room.len());
                        assert_eq!((header.from, header.kind), (HOST, STREAM));
                        assert!((op::REQUEST..=op::CREDIT_REQUEST).contains(&header.op));
                    }
                }
            }
        }

        /// What holds whatever a guest and programs do.
        fn check(&self) {
            let table = &self.table;
            assert_eq!(table.tokens.len(), table.entries.len());
            let mut queued: Vec<Pair> = table.turn.iter().copied().collect();
            queued.sort_unstable();
            let marked: Vec<Pair> = table
                .entries
                .iter()
                .filter(|(_, entry)| entry.queued)
                .map(|(pair, _)| *pair)
                .collect();
            assert_eq!(queued, marked, "each has one turn");
            for entry in table.entries.values() {
                assert!(entry.connection.waits() <= BUFFER as usize);
                assert_eq!(entry.connection.fate(), Fate::Lives);
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_is_said_the_table_stays_one(
            steps in prop::collection::vec(step(), 0..120),
        ) {
            let mut bench =
                Bench { table: Table::new(3), programs: Vec::new(), next_token: 0 };
            for step in steps {
                bench.go(step);
                bench.check();
            }
            bench.table.clear();
            prop_assert_eq!(bench.table.len(), 0);
        }
    }
}
