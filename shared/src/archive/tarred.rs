//! The tar in a file, compressed or not: how it is opened, stepped through and held to its end. What its
//! entries mean is the business of `read` and `foreign`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::error::{ArchiveError, Result};

/// How every zstd frame begins.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// How a file of gzip's begins.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Bytes of a tar block, and where in the first of them the tar says what it is.
pub(super) const BLOCK: u64 = 512;
const USTAR: usize = 257;
/// Bytes of the records before an entry of another program's at most.
const RECORDS_MOST: u64 = 64 << 10;
/// Bytes of directories and records that are passed over, with their headers, at most.
const PASSED_MOST: u64 = 64 << 20;
/// Why a tar with such an entry is not read.
const HUGE: &str = "it has a part of 8 GiB or more, which is not for this version";
/// Memory that decompression may ask for, as a power of two.
const WINDOW_LOG: u32 = 27;
/// Zeros that may end a tar: two blocks, and what fills a record of the usual length.
const TRAILER: u64 = 16 << 10;

/// Opens a file that may be a checkpoint.
pub(super) fn open(path: &Path) -> Result<File> {
    let failed = |source| ArchiveError::Io { what: "open", path: path.to_owned(), source };
    let refused =
        |what: &str| ArchiveError::Refused { path: path.to_owned(), what: what.to_owned() };
    // What waits for a writer must not hold us up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(refused("it is no file"));
    }
    if metadata.len() == 0 {
        return Err(refused("it is empty"));
    }
    match Coding::of(&file) {
        Some(Coding::Gzip) => Err(refused(
            "it is compressed by gzip. `zcat FILE | zstd -o FILE.tar.zst` makes one of it that is not",
        )),
        Some(Coding::Zstd | Coding::Plain) => Ok(file),
        None => Err(refused("it is not compressed by zstd, so it is no checkpoint")),
    }
}

/// How a tar is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Zstd,
    Gzip,
    Plain,
}

impl Coding {
    fn of(file: &File) -> Option<Self> {
        let mut begin = [0; BLOCK as usize];
        let read = file.read_at(&mut begin, 0).ok()?;
        let begin = &begin[..read];
        match () {
            _ if begin.starts_with(&ZSTD_MAGIC) => Some(Self::Zstd),
            _ if begin.starts_with(&GZIP_MAGIC) => Some(Self::Gzip),
            _ if begin.get(USTAR..).is_some_and(|rest| rest.starts_with(b"ustar")) => {
                Some(Self::Plain)
            }
            _ => None,
        }
    }
}

/// What of a tar stands behind its entries, which end at `end`: zeros, as many as a tar ends with.
pub(super) fn must_end<R: Read>(
    mut rest: Counting<R>,
    end: u64,
) -> std::result::Result<(), String> {
    let mut left = Vec::new();
    let read = rest.by_ref().take(TRAILER + 1).read_to_end(&mut left);
    read.map_err(|error| said(&error))?;
    if left.len() as u64 > TRAILER || left.iter().any(|byte| *byte != 0) {
        return Err("it has data after its end".to_owned());
    }
    if rest.count < end + 2 * BLOCK {
        return Err("it is cut short".to_owned());
    }
    Ok(())
}

/// The next entry of an archive of another program's that is a file. Directories say nothing, and of
/// records before an entry only such are passed over as change neither name nor size. `passed` counts the
/// bytes of all of these.
pub(super) fn next_file<'a, R: Read + 'a>(
    entries: &mut tar::Entries<'a, R>,
    passed: &mut u64,
) -> std::result::Result<Option<tar::Entry<'a, R>>, String> {
    for entry in entries {
        let mut entry = entry.map_err(|error| said(&error))?;
        match entry.header().entry_type() {
            tar::EntryType::Directory if entry.size() == 0 => {}
            tar::EntryType::XHeader | tar::EntryType::XGlobalHeader => {
                let mut records = Vec::new();
                if entry.size() > RECORDS_MOST {
                    return Err("it has records that are longer than any".to_owned());
                }
                entry.read_to_end(&mut records).map_err(|error| said(&error))?;
                for record in tar::PaxExtensions::new(&records) {
                    let record = record.map_err(|_| "it has records that are none".to_owned())?;
                    match record.key_bytes() {
                        b"size" => return Err(HUGE.to_owned()),
                        b"path" | b"linkpath" => {
                            return Err("it has a name in two places".to_owned());
                        }
                        _ => {}
                    }
                }
            }
            _ => return Ok(Some(entry)),
        }
        *passed += BLOCK + entry.size().next_multiple_of(BLOCK);
        if *passed > PASSED_MOST {
            return Err("it has more directories and records than any".to_owned());
        }
    }
    Ok(None)
}

/// The next entry of an archive of ours in which the part `name` follows, and before it at most the
/// directory that it is in.
pub(super) fn next_before<'a, R: Read + 'a>(
    entries: &mut tar::Entries<'a, R>,
    name: &str,
) -> io::Result<Option<tar::Entry<'a, R>>> {
    let next = entries.next().transpose()?;
    let directory = name.rsplit_once('/').map(|(directory, _)| format!("{directory}/"));
    let is_it = next.as_ref().is_some_and(|entry| {
        entry.header().entry_type() == tar::EntryType::Directory
            && entry.size() == 0
            && Some(&*entry.path_bytes()) == directory.as_ref().map(String::as_bytes)
    });
    if is_it { entries.next().transpose() } else { Ok(next) }
}

/// Counts what is read.
pub(super) struct Counting<R> {
    from: R,
    count: u64,
}

impl<R> Counting<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, count: 0 }
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(into)?;
        self.count += read as u64;
        Ok(read)
    }
}

/// The tar in a file.
pub(super) enum Decoder<'a> {
    Zstd(zstd::Decoder<'static, BufReader<&'a File>>),
    Plain(BufReader<&'a File>),
}

impl Read for Decoder<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Zstd(decoder) => decoder.read(into),
            Self::Plain(file) => file.read(into),
        }
    }
}

/// From the beginning of `file`.
pub(super) fn decoder(mut file: &File) -> io::Result<Decoder<'_>> {
    let coding = Coding::of(file);
    file.rewind()?;
    if coding == Some(Coding::Plain) {
        return Ok(Decoder::Plain(BufReader::new(file)));
    }
    let mut decoder = zstd::Decoder::new(file)?;
    decoder.window_log_max(WINDOW_LOG)?;
    Ok(Decoder::Zstd(decoder))
}

/// What a reader had to say, about the archive.
pub(super) fn said(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => format!("it is damaged ({error})"),
    }
}
