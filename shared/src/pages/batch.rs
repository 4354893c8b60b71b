//! The layout of a page batch on the wire: a fixed header, a table of runs, their payloads.
//!
//! Only layout and its checks live here: no I/O, no compression. Integers are little endian. Every
//! number that a peer sends is checked against a cap before anything is made of it.

use super::address::{PAGE_SIZE, PageRange, SpaceId};

/// Bytes of a batch header.
pub const HEADER_LEN: usize = 32;
/// Bytes of one entry of the table that follows it.
pub const ENTRY_LEN: usize = 16;
/// First bytes of each batch.
pub const MAGIC: [u8; 4] = *b"DCPB";
/// Most entries in a batch.
pub const MAX_ENTRIES: u16 = 1024;
/// Most payload bytes in a batch.
pub const MAX_PAYLOAD: u32 = 4 << 20;
/// Most pages in an entry that has a payload: what is decoded at a time.
pub const MAX_RUN: u16 = 64;

/// What a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BatchKind {
    /// Pages of one space.
    Pages = 1,
    /// The round's last on this stream.
    Barrier = 2,
    /// The stream's last.
    End = 3,
}

/// The fixed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// What the batch is.
    pub kind: BatchKind,
    /// Entries in the table.
    pub entries: u16,
    /// The round that it belongs to, counted from 1; 0 in an end.
    pub round: u32,
    /// The space of all its pages; 0 in other kinds.
    pub space: SpaceId,
    /// Pages in this batch; in a barrier, pages of the round on this stream; 0 in an end.
    pub pages: u64,
    /// Bytes after the table.
    pub payload: u32,
}

/// How the pages of an entry are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// All zero, no payload.
    Zero = 0,
    /// As they are.
    Raw = 1,
    /// One LZ4 block.
    Lz4 = 2,
    /// One zstd frame.
    Zstd = 3,
}

/// A run of pages in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the first page.
    pub first: u64,
    /// Bytes of its payload.
    pub length: u32,
    /// How many pages.
    pub count: u16,
    /// How they are written down.
    pub encoding: Encoding,
}

/// What is wrong with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Not a batch at all.
    #[error("A page batch begins with the wrong bytes")]
    Magic,
    /// A kind that this build does not know.
    #[error("A page batch is of unknown kind {0}")]
    Kind(u8),
    /// Bytes that must be zero are not.
    #[error("A page batch has bytes set that have no meaning in this protocol")]
    Reserved,
    /// A count that fits no batch of its kind.
    #[error("A page batch claims {0} entries")]
    Entries(u16),
    /// More payload than a batch may have, or payload where none belongs.
    #[error("A page batch claims a payload of {0} bytes")]
    Payload(u32),
    /// A batch without pages that names a space, or the like.
    #[error("A page batch of its kind cannot be for {space} with {pages} pages")]
    Misplaced {
        /// The space that it names.
        space: SpaceId,
        /// The pages that it claims.
        pages: u64,
    },
    /// An encoding that this build does not know.
    #[error("Pages are encoded in unknown way {0}")]
    Encoding(u8),
    /// An entry of no pages, or of too many.
    #[error("An entry of a page batch has {0} pages")]
    Count(u16),
    /// A payload whose length does not go with the encoding and the number of pages.
    #[error("An entry of {count} pages, {encoding:?}, claims {length} bytes")]
    Length {
        /// Pages.
        count: u16,
        /// Encoding.
        encoding: Encoding,
        /// Bytes.
        length: u32,
    },
    /// Entries out of order or over one another.
    #[error("Page {0:#x} of a batch is out of order")]
    Order(u64),
    /// Pages beyond the end of the space.
    #[error("{range} lie beyond its end ({limit:#x})")]
    Beyond {
        /// The pages.
        range: PageRange,
        /// The space's limit.
        limit: u64,
    },
    /// The table does not add up to what the header says.
    #[error("The entries of a page batch do not add up to its header")]
    Sum,
}

impl BatchHeader {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.entries.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.round.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.space.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.pages.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.payload.to_le_bytes());
        bytes
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// When it is no header, or claims more than a batch may hold.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, BatchError> {
        if bytes[..4] != MAGIC {
            return Err(BatchError::Magic);
        }
        if bytes[5] != 0 || bytes[28..] != [0; 4] {
            return Err(BatchError::Reserved);
        }
        let kind = match bytes[4] {
            1 => BatchKind::Pages,
            2 => BatchKind::Barrier,
            3 => BatchKind::End,
            other => return Err(BatchError::Kind(other)),
        };
        let header = Self {
            kind,
            entries: u16::from_le_bytes(array(bytes, 6)),
            round: u32::from_le_bytes(array(bytes, 8)),
            space: SpaceId(u32::from_le_bytes(array(bytes, 12))),
            pages: u64::from_le_bytes(array(bytes, 16)),
            payload: u32::from_le_bytes(array(bytes, 24)),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), BatchError> {
        let Self { kind, entries, space, pages, payload, .. } = *self;
        let carries = kind == BatchKind::Pages;
        if carries != (1..=MAX_ENTRIES).contains(&entries) || (!carries && entries != 0) {
            return Err(BatchError::Entries(entries));
        }
        if payload > if carries { MAX_PAYLOAD } else { 0 } {
            return Err(BatchError::Payload(payload));
        }
        let misplaced = match kind {
            BatchKind::Pages => pages == 0,
            BatchKind::Barrier => space != SpaceId(0),
            BatchKind::End => space != SpaceId(0) || pages != 0 || self.round != 0,
        };
        if misplaced {
            return Err(BatchError::Misplaced { space, pages });
        }
        Ok(())
    }

    /// Bytes of the table that follows.
    pub fn table_len(&self) -> usize {
        usize::from(self.entries) * ENTRY_LEN
    }
}

impl Entry {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.count.to_le_bytes());
        bytes[14] = self.encoding as u8;
        bytes
    }

    /// Its pages in `space`.
    pub fn range(&self, space: SpaceId) -> PageRange {
        PageRange::new(space, self.first, u64::from(self.count))
    }

    fn decode(bytes: &[u8; ENTRY_LEN]) -> Result<Self, BatchError> {
        let encoding = match bytes[14] {
            0 => Encoding::Zero,
            1 => Encoding::Raw,
            2 => Encoding::Lz4,
            3 => Encoding::Zstd,
            other => return Err(BatchError::Encoding(other)),
        };
        if bytes[15] != 0 {
            return Err(BatchError::Reserved);
        }
        let entry = Self {
            first: u64::from_le_bytes(array(bytes, 0)),
            length: u32::from_le_bytes(array(bytes, 8)),
            count: u16::from_le_bytes(array(bytes, 12)),
            encoding,
        };
        entry.check()?;
        Ok(entry)
    }

    fn check(&self) -> Result<(), BatchError> {
        let Self { length, count, encoding, .. } = *self;
        if count == 0 || (encoding != Encoding::Zero && count > MAX_RUN) {
            return Err(BatchError::Count(count));
        }
        let raw = u32::from(count) * PAGE_SIZE as u32;
        let fits = match encoding {
            Encoding::Zero => length == 0,
            Encoding::Raw => length == raw,
            Encoding::Lz4 | Encoding::Zstd => (1..raw).contains(&length),
        };
        if fits { Ok(()) } else { Err(BatchError::Length { count, encoding, length }) }
    }
}

/// Reads the table of a [`BatchKind::Pages`] batch into `entries` (emptied first). `table` is
/// `header.table_len()` long, `limit` is the space's page limit.
///
/// # Errors
/// When an entry is wrong in itself, out of order, beyond the space, or all do not add up.
pub fn decode_table(
    header: &BatchHeader,
    table: &[u8],
    limit: u64,
    entries: &mut Vec<Entry>,
) -> Result<(), BatchError> {
    entries.clear();
    let (mut next, mut pages, mut payload) = (0, 0, 0);
    let (chunks, rest) = table.as_chunks::<ENTRY_LEN>();
    if !rest.is_empty() || chunks.len() != usize::from(header.entries) {
        return Err(BatchError::Sum);
    }
    for bytes in chunks {
        let entry = Entry::decode(bytes)?;
        if entry.first < next {
            return Err(BatchError::Order(entry.first));
        }
        let beyond = BatchError::Beyond { range: entry.range(header.space), limit };
        next = entry.first.checked_add(u64::from(entry.count)).ok_or(beyond)?;
        if next > limit {
            return Err(beyond);
        }
        pages += u64::from(entry.count);
        payload += u64::from(entry.length);
        entries.push(entry);
    }
    if pages != header.pages || payload != u64::from(header.payload) {
        return Err(BatchError::Sum);
    }
    Ok(())
}

/// `N` bytes from offset `at`, which the caller has as a constant within a fixed-size array.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: BatchHeader = BatchHeader {
        kind: BatchKind::Pages,
        entries: 2,
        round: 0x0403_0201,
        space: SpaceId(0x0807_0605),
        pages: 5,
        payload: 0x1001,
    };
    const GOLDEN_HEADER: [u8; HEADER_LEN] = [
        b'D', b'C', b'P', b'B', 1, 0, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 0, 0, 0, 0, 0, 0, 0, 1,
        0x10, 0, 0, 0, 0, 0, 0,
    ];
    const GOLDEN_TABLE: [u8; 2 * ENTRY_LEN] = [
        1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, // three zero pages
        4, 2, 3, 0, 0, 0, 0, 0, 1, 0x10, 0, 0, 2, 0, 2, 0, // two pages, LZ4
    ];
    const LIMIT: u64 = 0x03_0206;

    fn entries() -> [Entry; 2] {
        [
            Entry { first: 0x03_0201, length: 0, count: 3, encoding: Encoding::Zero },
            Entry { first: 0x03_0204, length: 0x1001, count: 2, encoding: Encoding::Lz4 },
        ]
    }

    fn table(header: &BatchHeader, table: &[u8], limit: u64) -> Result<Vec<Entry>, BatchError> {
        let mut entries = Vec::new();
        decode_table(header, table, limit, &mut entries).map(|()| entries)
    }

    #[test]
    fn the_bytes_of_a_batch_never_change() {
        assert_eq!(HEADER.encode(), GOLDEN_HEADER);
        assert_eq!(BatchHeader::decode(&GOLDEN_HEADER), Ok(HEADER));
        let encoded: Vec<u8> = entries().iter().flat_map(Entry::encode).collect();
        assert_eq!(encoded, GOLDEN_TABLE);
        assert_eq!(table(&HEADER, &GOLDEN_TABLE, LIMIT), Ok(entries().to_vec()));
        let barrier = BatchHeader {
            kind: BatchKind::Barrier,
            entries: 0,
            round: 1,
            space: SpaceId(0),
            pages: 9,
            payload: 0,
        };
        let mut golden = [0; HEADER_LEN];
        golden[..4].copy_from_slice(b"DCPB");
        (golden[4], golden[8], golden[16]) = (2, 1, 9);
        assert_eq!(barrier.encode(), golden);
        assert_eq!(BatchHeader::decode(&golden), Ok(barrier));
    }

    /// As the document prints bytes.
    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_document_says_the_same() {
        let document = include_str!("../../PROTOCOL.md");
        let example = BatchHeader { round: 1, space: SpaceId(7), ..HEADER };
        let (kind, space) = (BatchKind::Barrier, SpaceId(0));
        let barrier = BatchHeader { kind, entries: 0, round: 1, space, pages: 9, payload: 0 };
        let lines = [hex(&example.encode()), hex(&GOLDEN_TABLE[..16]), hex(&GOLDEN_TABLE[16..])];
        for line in lines.iter().chain([&hex(&barrier.encode())]) {
            assert!(document.contains(line), "PROTOCOL.md lacks {line}");
        }
        for (field, words) in [
            (u64::from(MAX_ENTRIES), "entries: 1 to 1024"),
            (u64::from(MAX_PAYLOAD), "at most 4,194,304; 0 in other kinds"),
            (u64::from(MAX_RUN), "at most 64 if there is a payload"),
            (PAGE_SIZE as u64, "A page is 4096 bytes"),
        ] {
            assert!(document.contains(words), "PROTOCOL.md lacks {words}");
            assert!(words.replace(',', "").contains(&field.to_string()), "{field} is not {words}");
        }
    }

    #[test]
    fn each_lie_in_a_header_is_named() {
        let with = |change: fn(&mut BatchHeader)| {
            let mut header = HEADER;
            change(&mut header);
            BatchHeader::decode(&header.encode())
        };
        let at = |index: usize, value: u8| {
            let mut bytes = GOLDEN_HEADER;
            bytes[index] = value;
            BatchHeader::decode(&bytes)
        };
        assert_eq!(at(0, 0), Err(BatchError::Magic));
        assert_eq!(at(4, 9), Err(BatchError::Kind(9)));
        assert_eq!(at(5, 1), Err(BatchError::Reserved));
        assert_eq!(at(31, 1), Err(BatchError::Reserved));
        assert_eq!(with(|h| h.entries = 0), Err(BatchError::Entries(0)));
        assert_eq!(with(|h| h.entries = 1025), Err(BatchError::Entries(1025)));
        assert_eq!(
            with(|h| h.payload = MAX_PAYLOAD + 1),
            Err(BatchError::Payload(MAX_PAYLOAD + 1))
        );
        assert!(matches!(with(|h| h.pages = 0), Err(BatchError::Misplaced { .. })));
        assert_eq!(at(4, 2), Err(BatchError::Entries(2)));
        let empty = |change: fn(&mut BatchHeader)| {
            let kind = BatchKind::End;
            let space = SpaceId(0);
            let mut header =
                BatchHeader { kind, entries: 0, round: 0, space, pages: 0, payload: 0 };
            change(&mut header);
            BatchHeader::decode(&header.encode()).map(|_| ())
        };
        assert_eq!(empty(|_| ()), Ok(()));
        assert_eq!(empty(|h| h.payload = 1), Err(BatchError::Payload(1)));
        assert!(matches!(empty(|h| h.space = SpaceId(1)), Err(BatchError::Misplaced { .. })));
        assert!(matches!(empty(|h| h.pages = 1), Err(BatchError::Misplaced { .. })));
        assert!(matches!(empty(|h| h.round = 1), Err(BatchError::Misplaced { .. })));
    }

    #[test]
    fn each_lie_in_a_table_is_named() {
        let with = |change: fn(&mut [Entry; 2])| {
            let mut entries = entries();
            change(&mut entries);
            let bytes: Vec<u8> = entries.iter().flat_map(Entry::encode).collect();
            table(&HEADER, &bytes, LIMIT).map(|_| ())
        };
        let at = |index: usize, value: u8| {
            let mut bytes = GOLDEN_TABLE;
            bytes[index] = value;
            table(&HEADER, &bytes, LIMIT).map(|_| ())
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert_eq!(at(14, 9), Err(BatchError::Encoding(9)));
        assert_eq!(at(15, 1), Err(BatchError::Reserved));
        assert_eq!(with(|e| e[0].count = 0), Err(BatchError::Count(0)));
        assert_eq!(with(|e| e[1].count = 65), Err(BatchError::Count(65)));
        assert!(matches!(with(|e| e[0].length = 1), Err(BatchError::Length { .. })));
        assert!(matches!(with(|e| e[1].length = 8192), Err(BatchError::Length { .. })));
        assert!(matches!(with(|e| e[1].length = 0), Err(BatchError::Length { .. })));
        assert!(matches!(with(|e| e[1].encoding = Encoding::Raw), Err(BatchError::Length { .. })));
        assert_eq!(with(|e| e.swap(0, 1)), Err(BatchError::Order(0x03_0201)));
        assert_eq!(with(|e| e[1].first -= 1), Err(BatchError::Order(0x03_0203)));
        assert!(matches!(with(|e| e[1].first += 1), Err(BatchError::Beyond { .. })));
        assert!(matches!(with(|e| e[1].first = u64::MAX), Err(BatchError::Beyond { .. })));
        assert_eq!(with(|e| e[0].count = 2), Err(BatchError::Sum));
        assert_eq!(with(|e| e[1].length -= 1), Err(BatchError::Sum));
        assert_eq!(table(&HEADER, &GOLDEN_TABLE[..16], LIMIT), Err(BatchError::Sum));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_batch_or_an_error(
            header in prop::array::uniform32(any::<u8>()),
            kind in 0u8..5,
            bytes in prop::collection::vec(0u8..4, 0..200),
        ) {
            let mut header = header;
            header[..4].copy_from_slice(&MAGIC);
            (header[4], header[5], header[7]) = (kind, 0, 0);
            header[28..].fill(0);
            if let Ok(header) = BatchHeader::decode(&header) {
                let _ = table(&header, &bytes, 1 << 40);
            }
        }
    }
}
