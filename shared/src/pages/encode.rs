//! Turning runs of pages into what goes over the wire, and back: zero detection, LZ4, zstd.
//!
//! One [`Encoder`] or [`Decoder`] a thread, each with scratch memory that it keeps. Nothing ever
//! grows: a run that does not become shorter is sent as it is.

use std::ops::Range;
use std::time::Instant;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::address::PAGE_SIZE;
use super::batch::{Encoding, MAX_RUN};
use super::choose::{Chooser, Compression};

/// Level of zstd: the fastest of its ordinary ones.
const ZSTD_LEVEL: i32 = 1;
/// Pages that a sample consists of.
const SAMPLE_PAGES: usize = 4;
/// Runs shorter than this use LZ4's small table, which is cleared faster.
const SMALL_TABLE: usize = 60_000;

/// Whether every byte of `bytes` is zero. Made of plain loops over words, which the compiler turns
/// into vector code.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // A page that is not zero mostly shows it at once.
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |sum, word| sum | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|byte| *byte == 0)
}

/// Encodes the runs of one batch after another.
pub(super) struct Encoder {
    pub(super) chooser: Chooser,
    small: CompressTable,
    large: CompressTable,
    /// `None` when zstd would not start: LZ4 and raw serve as well.
    zstd: Option<zstd::bulk::Compressor<'static>>,
    output: Vec<u8>,
    used: usize,
}

impl Encoder {
    /// An encoder for batches of at most `batch` bytes of pages.
    pub(super) fn new(setting: Compression, batch: usize) -> Self {
        let slack = get_maximum_output_size(usize::from(MAX_RUN) * PAGE_SIZE);
        Self {
            chooser: Chooser::new(setting),
            small: CompressTable::small(),
            large: CompressTable::large(),
            zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL).ok(),
            output: vec![0; batch + slack],
            used: 0,
        }
    }

    /// Forgets the payloads of the batch before.
    pub(super) fn begin(&mut self) {
        self.used = 0;
    }

    /// Encodes one run. The range is where in [`Encoder::payload`] it stands, unless it is raw.
    pub(super) fn run(&mut self, bytes: &[u8]) -> (Encoding, Range<usize>) {
        if self.chooser.wants_sample(bytes.len() as u64) {
            let sample = &bytes[..bytes.len().min(SAMPLE_PAGES * PAGE_SIZE)];
            self.attempt(Encoding::Lz4, sample);
            self.attempt(Encoding::Zstd, sample);
        }
        let method = self.chooser.method();
        match self.attempt(method, bytes) {
            Some(length) if length < bytes.len() => {
                let start = self.used;
                self.used += length;
                (method, start..self.used)
            }
            _ => (Encoding::Raw, 0..0),
        }
    }

    /// The encoded bytes of the batch.
    pub(super) fn payload(&self, range: Range<usize>) -> &[u8] {
        &self.output[range]
    }

    /// Compresses behind what is used; tells the chooser how that went.
    fn attempt(&mut self, method: Encoding, bytes: &[u8]) -> Option<usize> {
        let output = &mut self.output[self.used..];
        let start = Instant::now();
        let length = match method {
            Encoding::Raw | Encoding::Zero => return None,
            Encoding::Lz4 => {
                let small = bytes.len() < SMALL_TABLE;
                let table = if small { &mut self.small } else { &mut self.large };
                compress_into_with_table(bytes, output, table).ok()
            }
            // No room beyond the raw length: what does not fit has not become shorter.
            Encoding::Zstd => self
                .zstd
                .as_mut()
                .and_then(|zstd| zstd.compress_to_buffer(bytes, &mut output[..bytes.len()]).ok()),
        };
        let counted = length.map_or(bytes.len(), |length| length.min(bytes.len()));
        self.chooser.compressed(method, bytes.len(), counted, start.elapsed());
        length
    }
}

/// What is wrong with compressed pages.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not a valid LZ4 block, or not one of this length.
    #[error("Pages are not valid LZ4")]
    Lz4(#[source] lz4_flex::block::DecompressError),
    /// Not a valid zstd frame, or not one of this length.
    #[error("Pages are not valid zstd")]
    Zstd(#[source] std::io::Error),
    /// Valid, but of another length than the run.
    #[error("Compressed pages became {got} bytes instead of {wanted}")]
    Length {
        /// What they became.
        got: usize,
        /// What the run is long.
        wanted: usize,
    },
    /// zstd would not start.
    #[error("zstd could not be started")]
    NoZstd,
}

/// Decodes compressed runs.
pub(super) struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    output: Box<[u8]>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            zstd: zstd::bulk::Decompressor::new().ok(),
            output: vec![0; usize::from(MAX_RUN) * PAGE_SIZE].into_boxed_slice(),
        }
    }

    /// The pages of a compressed run, `wanted` bytes (at most [`MAX_RUN`] pages).
    ///
    /// # Errors
    /// When `payload` is no valid compression of exactly that many bytes.
    pub(super) fn run(
        &mut self,
        encoding: Encoding,
        payload: &[u8],
        wanted: usize,
    ) -> Result<&[u8], DecodeError> {
        let output = &mut self.output[..wanted];
        let got = match encoding {
            Encoding::Zstd => self
                .zstd
                .as_mut()
                .ok_or(DecodeError::NoZstd)?
                .decompress_to_buffer(payload, output)
                .map_err(DecodeError::Zstd)?,
            _ => lz4_flex::block::decompress_into(payload, output).map_err(DecodeError::Lz4)?,
        };
        if got != wanted {
            return Err(DecodeError::Length { got, wanted });
        }
        Ok(&self.output[..wanted])
    }
}

/// Decodes one run of `wanted` bytes, at most [`MAX_RUN`] pages, for fuzzers.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn try_run(encoding: Encoding, payload: &[u8], wanted: usize) {
    if !matches!(encoding, Encoding::Lz4 | Encoding::Zstd) {
        return;
    }
    if let Ok(pages) = Decoder::new().run(encoding, payload, wanted) {
        assert_eq!(pages.len(), wanted, "it has another length");
    }
}

/// Batches of one run as they are sent, for fuzzers.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn batch_seeds() -> Vec<Vec<u8>> {
    use super::address::SpaceId;
    use super::batch::{BatchHeader, BatchKind, Entry};
    let pages: Vec<u8> = (0..2 * PAGE_SIZE).map(|at| (at / 100) as u8).collect();
    let batch = |setting: Compression| {
        let mut encoder = Encoder::new(setting, 2 * pages.len());
        encoder.begin();
        let (encoding, range) = encoder.run(&pages);
        let run = if encoding == Encoding::Raw { &pages } else { encoder.payload(range) };
        let payload = run.len() as u32;
        let header = BatchHeader {
            kind: BatchKind::Pages,
            entries: 1,
            round: 1,
            space: SpaceId(0),
            pages: 2,
            payload,
        };
        let entry = Entry { first: 5, length: payload, count: 2, encoding };
        [&header.encode()[..], &entry.encode(), run].concat()
    };
    [Compression::Lz4, Compression::Zstd, Compression::None].map(batch).to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_byte_makes_a_page_something() {
        let mut page = vec![0; PAGE_SIZE + 17];
        assert!(is_zero(&page) && is_zero(&[]));
        for at in 0..page.len() {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    proptest! {
        #[test]
        fn runs_come_back_as_they_were(
            pages in 1usize..=64,
            seed in any::<u64>(),
            variety in prop::sample::select(vec![1u64, 3, 17, 256]),
            setting in prop::sample::select(vec![Compression::Lz4, Compression::Zstd, Compression::Auto]),
        ) {
            let mut state = seed | 1;
            let bytes: Vec<u8> = (0..pages * PAGE_SIZE)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state % variety) as u8
                })
                .collect();
            let mut encoder = Encoder::new(setting, 2 * bytes.len());
            let mut decoder = Decoder::new();
            encoder.begin();
            for _ in 0..2 {
                let (encoding, range) = encoder.run(&bytes);
                if encoding == Encoding::Raw {
                    // LZ4 finds repetitions only, not rare symbols.
                    prop_assert!(variety >= 17 && setting != Compression::Zstd
                        || variety == 256 || setting == Compression::Auto);
                    continue;
                }
                prop_assert!(range.len() < bytes.len());
                let payload = encoder.payload(range);
                prop_assert!(decoder.run(encoding, payload, bytes.len()).expect("decodes") == bytes);
                prop_assert!(decoder.run(encoding, payload, bytes.len() - 1).is_err());
                if pages < 64 {
                    prop_assert!(decoder.run(encoding, payload, bytes.len() + 1).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_decode_or_are_refused(payload in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::new();
            for encoding in [Encoding::Lz4, Encoding::Zstd] {
                let _ = decoder.run(encoding, &payload, PAGE_SIZE);
            }
        }
    }
}
