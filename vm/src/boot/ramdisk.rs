//! Whether an initial ramdisk is whole, as far as its format tells: archives of cpio, and what gzip and zstd have packed,
//! one after the other as the kernel takes them. What is in another format is the kernel's business.
//!
//! A kernel that meets one that was cut off says so where nobody looks, and goes on without what was missing.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};

/// Unpacked, none is looked at beyond this: what goes on like that is whole enough.
const LOOKED_AT: u64 = 4 << 30;
/// Bytes of a header of cpio (`newc`), eight hexadecimal digits each after the first six.
const HEADER: usize = 110;
/// The longest name that Linux takes, with its zero.
const LONGEST_NAME: u64 = 4096;
/// The name of the last entry.
const LAST: &[u8] = b"TRAILER!!!\0";

/// What is wrong with the ramdisk that `file` holds, if anything is.
///
/// # Errors
/// When it cannot be read.
pub(super) fn problem(file: impl Read) -> io::Result<Option<String>> {
    let mut reader = BufReader::new(file);
    loop {
        // Between archives there may be zeros.
        let gone = skip_zeros(&mut reader)?;
        if gone {
            return Ok(None);
        }
        let mut magic = [0; 6];
        let seen = reader.buffer().len().min(magic.len());
        magic[..seen].copy_from_slice(&reader.buffer()[..seen]);
        let (what, read) = match magic {
            [b'0', b'7', b'0', b'7', b'0', b'1' | b'2'] => ("archive", read_archive(&mut reader)),
            [0x1f, 0x8b, ..] => {
                ("gzip data", read_all(flate2::bufread::GzDecoder::new(&mut reader)))
            }
            [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd data", read_zstd(&mut reader)),
            _ => return Ok(None),
        };
        match read {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Ok(Some(format!("it is cut off: its {what} has no end")));
            }
            // What the reader below says is about the file; what is said of its contents has no number.
            Err(error) if error.raw_os_error().is_some() => return Err(error),
            Err(error) => return Ok(Some(format!("its {what} is damaged ({error})"))),
        }
    }
}

/// Skips zeros; whether nothing follows.
fn skip_zeros(reader: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(true);
        }
        let zeros = buffer.iter().take_while(|byte| **byte == 0).count();
        let all = zeros == buffer.len();
        reader.consume(zeros);
        if !all {
            return Ok(false);
        }
    }
}

fn read_all(packed: impl Read) -> io::Result<()> {
    io::copy(&mut packed.take(LOOKED_AT), &mut io::sink()).map(drop)
}

fn read_zstd(reader: &mut impl BufRead) -> io::Result<()> {
    read_all(zstd::stream::read::Decoder::with_buffer(reader)?.single_frame())
}

/// Reads entries until the last, or until the file ends where one would begin. Each is padded to a multiple of four bytes,
/// its header and name together too; there may be more zeros between them.
fn read_archive(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        if skip_zeros(reader)? {
            return Ok(());
        }
        let mut header = [0; HEADER];
        reader.read_exact(&mut header)?;
        if !matches!(&header[..6], b"070701" | b"070702") {
            return Err(damaged("an entry does not begin where the one before ends"));
        }
        let number = |index: usize| {
            let digits = std::str::from_utf8(&header[6 + index * 8..][..8]).ok();
            let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            number.map(u64::from).ok_or_else(|| damaged("a length is no number"))
        };
        let (bytes, name_bytes) = (number(6)?, number(11)?);
        if name_bytes > LONGEST_NAME {
            return Err(damaged("a name is too long"));
        }
        let mut name = vec![0; name_bytes as usize];
        reader.read_exact(&mut name)?;
        if name.starts_with(LAST) {
            return Ok(());
        }
        skip(reader, padding(HEADER as u64 + name_bytes))?;
        skip(reader, bytes + padding(bytes))?;
    }
}

fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(4) - bytes
}

fn skip(reader: &mut impl BufRead, bytes: u64) -> io::Result<()> {
    match io::copy(&mut reader.take(bytes), &mut io::sink())? {
        skipped if skipped == bytes => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// An archive of these files, as `cpio -H newc` writes it.
    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut all = Vec::new();
        let mut add = |name: &str, content: &[u8]| {
            let name = [name.as_bytes(), b"\0"].concat();
            let mut numbers = [0; 13];
            (numbers[6], numbers[11]) = (content.len(), name.len());
            all.extend(b"070701");
            numbers.iter().for_each(|number| all.extend(format!("{number:08X}").bytes()));
            for part in [&name[..], content] {
                all.extend(part);
                all.resize(all.len().next_multiple_of(4), 0);
            }
        };
        files.iter().for_each(|(name, content)| add(name, content));
        add("TRAILER!!!", b"");
        all.resize(all.len().next_multiple_of(512), 0);
        all
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).expect("packed");
        packer.finish().expect("packed")
    }

    fn wrong(bytes: &[u8]) -> Option<String> {
        problem(bytes).expect("read")
    }

    #[test]
    fn whole_ones_of_every_kind_are_fine() {
        let noise: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
        let main = archive(&[("init", &noise), ("etc/passwd", b"root:x:0:0\n"), ("empty", b"")]);
        let early = archive(&[("kernel/x86/microcode/AuthenticAMD.bin", b"microcode")]);
        let zstd = zstd::encode_all(&main[..], 3).expect("packed");
        for whole in [main.clone(), gzip(&main), zstd.clone(), [&early[..], &zstd].concat()] {
            assert_eq!(wrong(&whole), None);
            assert_eq!(wrong(&[&whole[..], &[0; 700], &gzip(&main)].concat()), None);
        }
        // Of these nobody here knows what is whole.
        for other in [&b"ramdisk"[..], b"\xfd7zXZ\0whatever", b"", b"\0\0\0"] {
            assert_eq!(wrong(other), None);
        }
    }

    #[test]
    fn what_is_cut_off_or_damaged_is_told() {
        let noise: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
        let main = archive(&[("init", &noise), ("etc/passwd", b"root:x:0:0\n")]);
        let zstd = zstd::encode_all(&main[..], 3).expect("packed");
        let early = archive(&[("kernel/x86/microcode/AuthenticAMD.bin", b"microcode")]);
        for whole in [main.clone(), gzip(&main), zstd, [early, gzip(&main)].concat()] {
            // The last block of an archive is padded.
            for left in [whole.len() - 600, whole.len() / 2] {
                let text = wrong(&whole[..left]).expect("it is cut off");
                assert!(text.contains("cut off"), "{text}");
            }
            let mut spoiled = whole.clone();
            spoiled[whole.len() - 5] ^= 0x55;
            let at = whole.len() / 2;
            spoiled[at..at + 20].fill(0xa5);
            let is_plain = whole[..6] == *b"070701" && whole == main;
            assert_eq!(wrong(&spoiled).is_some(), !is_plain, "what is in a file is the file's");
        }
        let mut odd = main.clone();
        odd[HEADER + 8] = 0xff;
        odd[54..62].fill(b'z');
        assert!(wrong(&odd).expect("no number").contains("damaged"));
    }

    proptest! {
        #[test]
        fn hostile_bytes_end(kind in 0usize..4, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let magic: [&[u8]; 4] = [b"070701", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b""];
            let _ = wrong(&[magic[kind], &bytes].concat());
        }
    }
}
