//! The file that what a workload prints goes to, bounded: the newest of it is kept, and what came before is cut off
//! at the front, as a hole. So a place in the file is the same as ever, whoever reads there needs no second file,
//! and whoever writes needs nothing but its descriptor.
//!
//! Where a file system has no holes, or a file would become longer than it can be, it begins anew.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ftruncate, seek};
use rustix::io::Errno;

/// So much of the newest is kept in any case, and never more than twice as much; twice that where cutting fails.
pub const KEPT: u64 = 8 << 20;
/// It is cut at multiples of this, which blocks of file systems divide.
const CUT: u64 = 64 << 10;

/// A log that is written. One that others write too is kept within bounds by each of them.
#[derive(Debug)]
pub struct Log {
    file: File,
    kept: u64,
    /// Bytes in it, as far as they came from here or were there before.
    holds: u64,
}

impl Log {
    /// The log at `path`, made when it is not there, to be appended to.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::keeping(File::options().create(true).append(true).open(path)?, KEPT)
    }

    /// Appends to `file` and keeps at least the newest `kept` bytes of it.
    fn keeping(file: File, kept: u64) -> io::Result<Self> {
        let end = seek(&file, SeekFrom::End(0))?;
        let holds = end.saturating_sub(beginning(&file)?);
        let mut log = Self { file, kept, holds };
        log.cut_when_full()?;
        Ok(log)
    }

    fn cut_when_full(&mut self) -> io::Result<()> {
        if self.holds < 2 * self.kept {
            return Ok(());
        }
        let end = seek(&self.file, SeekFrom::End(0))?;
        let cut = end.saturating_sub(self.kept) / CUT * CUT;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, 0, cut) {
            Ok(()) => self.holds = end - cut,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.begin_anew()?,
            // A full or a failing disk, for example: with the next bytes it is tried again.
            Err(_) if self.holds < 4 * self.kept => {}
            Err(_) => self.begin_anew()?,
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        ftruncate(&self.file, 0)?;
        self.holds = 0;
        Ok(())
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self.file.write(bytes) {
            Err(error) if error.kind() == ErrorKind::FileTooLarge => {
                self.begin_anew()?;
                self.file.write(bytes)
            }
            written => written,
        }?;
        self.holds += written as u64;
        self.cut_when_full()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A log that is read, from its beginning and on while it grows.
#[derive(Debug)]
pub struct LogReader {
    file: File,
    at: u64,
}

impl LogReader {
    /// The log at `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, at: 0 })
    }

    /// What comes next, about `most` bytes of it; nothing when there is nothing now. Where something is missing
    /// that was dropped, that is said in its place.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn next_piece(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let mut piece = Vec::new();
        if self.file.metadata()?.len() < self.at {
            self.at = 0;
            piece.extend(b"\n[decamp: output was dropped here]\n");
        }
        let mut bytes = vec![0; most];
        let count = self.file.read_at(&mut bytes, self.at)?;
        bytes.truncate(count);
        // After it was read: what is dropped meanwhile reads as zeros.
        let dropped = beginning(&self.file)?.saturating_sub(self.at);
        if dropped > 0 {
            let line = if self.at == 0 { "" } else { "\n" };
            piece.extend(
                format!("{line}[decamp: {dropped} earlier bytes were dropped]\n").as_bytes(),
            );
            let gone = usize::try_from(dropped).unwrap_or(usize::MAX).min(count);
            bytes.drain(..gone);
            self.at += dropped;
        }
        self.at += bytes.len() as u64;
        piece.extend(bytes);
        Ok(piece)
    }
}

/// Where what is kept begins.
fn beginning(file: &File) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(0)) {
        Ok(first) => Ok(first),
        // There is nothing in it, or the file system does not tell.
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    const SMALL: u64 = 4 * CUT;

    struct Bench {
        dir: tempfile::TempDir,
        log: Log,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("directory");
            let log = Self::log(dir.path());
            Self { dir, log }
        }

        fn log(dir: &Path) -> Log {
            let mut options = File::options();
            let file = options.create(true).append(true).open(dir.join("log")).expect("log");
            Log::keeping(file, SMALL).expect("log")
        }

        fn reader(&self) -> LogReader {
            LogReader::open(&self.dir.path().join("log")).expect("reader")
        }

        /// Prints numbered lines of 16 bytes, `from` up to `to`.
        fn print(&mut self, from: u64, to: u64) {
            let text: String = (from..to).map(|number| format!("line {number:010}\n")).collect();
            self.log.write_all(text.as_bytes()).expect("print");
        }

        fn blocks(&self) -> u64 {
            self.log.file.metadata().expect("metadata").blocks() * 512
        }
    }

    fn rest(reader: &mut LogReader) -> String {
        let mut all = Vec::new();
        loop {
            let piece = reader.next_piece(10_000).expect("read");
            if piece.is_empty() {
                return String::from_utf8(all).expect("text");
            }
            all.extend(piece);
        }
    }

    #[test]
    fn the_newest_is_kept_and_what_is_gone_is_told() {
        let mut bench = Bench::new();
        let lines = 8 * SMALL / 16;
        for first in (0..lines).step_by(100) {
            bench.print(first, lines.min(first + 100));
            assert!(bench.blocks() <= 2 * SMALL + CUT, "{} bytes on the disk", bench.blocks());
        }
        let text = rest(&mut bench.reader());
        let (told, kept) = text.split_once('\n').expect("lines");
        let dropped = 16 * lines - kept.len() as u64;
        assert_eq!(told, format!("[decamp: {dropped} earlier bytes were dropped]"));
        assert!(kept.len() as u64 >= SMALL);
        let first = lines - kept.len() as u64 / 16;
        let mut numbers = first..lines;
        for line in kept.lines() {
            assert_eq!(line, format!("line {:010}", numbers.next().expect("a line")));
        }
        assert!(numbers.is_empty(), "all of the newest");
    }

    #[test]
    fn who_follows_sees_all_or_is_told_where_something_is_missing() {
        let mut bench = Bench::new();
        let mut reader = bench.reader();
        let per = CUT / 16;
        let mut seen = String::new();
        // Faster than the log is cut: nothing is missed.
        for first in (0..40 * per).step_by(per as usize) {
            bench.print(first, first + per);
            seen += &rest(&mut reader);
        }
        let whole: String = (0..40 * per).map(|number| format!("line {number:010}\n")).collect();
        assert!(seen == whole);
        // Slower.
        bench.print(40 * per, 60 * per);
        let late = rest(&mut reader);
        let told = late.lines().nth(1).expect("a line");
        assert!(told.starts_with("[decamp: ") && told.ends_with(" dropped]"), "{told}");
        assert!(late.ends_with(&format!("line {:010}\n", 60 * per - 1)));
        assert_eq!(rest(&mut reader), "");
    }

    #[test]
    fn one_that_was_too_long_before_is_cut_when_it_is_opened() {
        let mut bench = Bench::new();
        bench.log.file.write_all(&vec![b'x'; 5 * SMALL as usize]).expect("print");
        assert!(bench.blocks() >= 5 * SMALL);
        bench.log = Bench::log(bench.dir.path());
        assert!(bench.blocks() <= SMALL + CUT);
        // And with what is in it counted.
        bench.print(0, SMALL / 16);
        assert!(bench.blocks() <= SMALL + CUT);
    }

    #[test]
    fn one_that_began_anew_is_read_on_from_there() {
        let mut bench = Bench::new();
        let mut reader = bench.reader();
        bench.print(0, 100);
        rest(&mut reader);
        bench.log.begin_anew().expect("cut");
        bench.print(7, 8);
        let text = rest(&mut reader);
        assert_eq!(text, "\n[decamp: output was dropped here]\nline 0000000007\n");
    }

    proptest! {
        #[test]
        fn a_log_that_was_not_full_is_what_was_printed(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..20),
            most in 1usize..5000,
        ) {
            let mut bench = Bench::new();
            let mut reader = bench.reader();
            let mut seen = Vec::new();
            for piece in &pieces {
                bench.log.write_all(piece).expect("print");
                seen.extend(reader.next_piece(most).expect("read"));
            }
            loop {
                let piece = reader.next_piece(most).expect("read");
                if piece.is_empty() {
                    break;
                }
                seen.extend(piece);
            }
            prop_assert_eq!(seen, pieces.concat());
        }
    }
}
