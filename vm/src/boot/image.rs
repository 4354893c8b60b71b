//! What a kernel's file is: which protocol enters it, where it is loaded, and whether it is whole. Found out by
//! reading the file alone; nothing is written before all of it is known.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::{BOOT_PAGES, ONE_MIB};
use crate::memory::Memory;

/// Where the setup header stands in a bzImage.
const HEADER_AT: usize = 0x1f1;
/// Where its length is said, counted from [`LENGTH_FROM`].
const LENGTH_AT: usize = 0x201;
const LENGTH_FROM: usize = 0x202;
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Protocol 2.12, the first that says whether there is a 64-bit entry.
const OLDEST: u16 = 0x020c;
/// Loaded above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// There is a 64-bit entry.
const KERNEL_64: u16 = 1;
/// Where the 64-bit entry is in what is loaded.
const ENTRY_64: u64 = 0x200;
/// What a kernel without a setup header of its own is told of itself: protocol 2.15.
const OWN_VERSION: u16 = 0x020f;

/// Bytes of an ELF header and of a program header.
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const EXECUTABLE: u16 = 2;
const LOADED: u32 = 1;
const NOTE: u32 = 4;
/// Xen's note with the entry of PVH.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// The most bytes of notes that are looked at.
const MAX_NOTES: usize = 1 << 20;
/// The most program headers that are looked at.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// The addresses that Linux is linked to run at.
const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;

/// The longest command line that this VMM hands on, without its zero.
const CMDLINE_MAX: u64 = 4095;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Protocol {
    /// By its PVH note.
    Pvh,
    /// By the Linux boot protocol, with this header.
    Linux(setup_header),
}

/// A kernel that can be loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    pub(super) protocol: Protocol,
    /// Address of its first instruction.
    pub(super) entry: u64,
    /// One past the last byte that it uses before it knows the memory map.
    pub(super) end: u64,
    /// One past the highest byte of a ramdisk.
    pub(super) ramdisk_end: u64,
    /// The longest command line that it takes, in bytes, without its zero.
    pub(super) cmdline_max: u64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Elf,
    /// What follows the setup code is loaded there.
    BzImage {
        address: u64,
    },
}

type Found<T> = Result<T, String>;

impl Image {
    /// Looks at `file`, for memory that ends at `low_end` below the hole.
    pub(super) fn read(file: &mut File, low_end: u64) -> Found<Self> {
        let length = file.metadata().map_err(unread)?.len();
        let mut head = [0; 0x1000];
        let have = read_at_most(file, &mut head).map_err(unread)?;
        let head = &head[..have];
        if head.starts_with(b"\x7fELF") {
            Self::of_elf(file, head, length, low_end)
        } else if u32_at(head, 0x202) == Some(HEADER_MAGIC) {
            Self::of_bzimage(head, length, low_end)
        } else {
            Err(stranger(head))
        }
    }

    fn of_bzimage(head: &[u8], length: u64, low_end: u64) -> Found<Self> {
        let header = setup_header_of(head)?;
        let (version, flags) = (header.version, header.xloadflags);
        if header.boot_flag != BOOT_FLAG || header.loadflags & LOADED_HIGH == 0 {
            return Err(
                "it is an image for the first 640 KiB, or its setup header is damaged".into()
            );
        }
        if version < OLDEST {
            return Err(format!(
                "it speaks version {}.{} of the Linux boot protocol, and 2.12 is needed",
                version >> 8,
                version & 0xff
            ));
        }
        if flags & KERNEL_64 == 0 {
            return Err("it is a Linux kernel for 32-bit processors: it has no 64-bit entry".into());
        }
        let setup =
            (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
        let code = u64::from(header.syssize) * 16;
        let payload = u64::from(header.payload_offset) + u64::from(header.payload_length);
        if setup + code.max(payload) > length || code == 0 {
            return Err(format!(
                "it is cut off: {length} bytes of the {} that its header tells of",
                setup + code.max(payload)
            ));
        }
        let address = header.pref_address;
        // Signatures may follow the code: all of it is copied.
        let needs = u64::from(header.init_size).max(length - setup);
        let end = address.saturating_add(needs);
        if address < ONE_MIB || end > low_end {
            return Err(format!(
                "it needs memory from {address:#x} to {end:#x}, and the guest's ends at {low_end:#x}"
            ));
        }
        Ok(Self {
            protocol: Protocol::Linux(header),
            entry: address + ENTRY_64,
            end,
            ramdisk_end: u64::from(header.initrd_addr_max) + 1,
            cmdline_max: u64::from(header.cmdline_size).min(CMDLINE_MAX),
            kind: Kind::BzImage { address },
        })
    }

    fn of_elf(file: &File, head: &[u8], length: u64, low_end: u64) -> Found<Self> {
        let Segments { loaded: segments, notes } = segments_of(file, head, length)?;
        for segment in &segments {
            segment.check(length, low_end)?;
        }
        let end = segments.iter().map(Segment::end).max().ok_or("it has nothing to be loaded")?;
        let entry = u64_at(head, 24).unwrap_or_default();
        let (entry, protocol) = match pvh_entry(file, &notes)? {
            Some(entry) => (entry, Protocol::Pvh),
            None if is_linux(entry, &segments) => (entry, Protocol::Linux(own_header())),
            None => {
                return Err(
                    "it has neither a PVH entry note nor the addresses of a Linux kernel: use a \
                            bzImage, or an uncompressed ELF kernel (vmlinux) built with CONFIG_PVH"
                        .into(),
                );
            }
        };
        let inside = |segment: &&Segment| (segment.address..segment.end()).contains(&entry);
        if !segments.iter().any(|segment| inside(&segment)) {
            return Err(format!("its entry at {entry:#x} is not in what is loaded"));
        }
        Ok(Self {
            protocol,
            entry,
            end,
            ramdisk_end: low_end,
            cmdline_max: CMDLINE_MAX,
            kind: Kind::Elf,
        })
    }

    /// Loads it.
    pub(super) fn load(&self, file: &mut File, memory: &Memory) -> Found<()> {
        let map = memory.map();
        match self.kind {
            Kind::Elf => Elf::load(map, None, file, None).map(drop),
            Kind::BzImage { address } => {
                BzImage::load(map, Some(GuestAddress(address)), file, None).map(drop)
            }
        }
        .map_err(|error| format!("it cannot be loaded ({error})"))
    }
}

/// The setup header, as far as the file says that it has one; zeros beyond.
fn setup_header_of(head: &[u8]) -> Found<setup_header> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let end = LENGTH_FROM + usize::from(head.get(LENGTH_AT).copied().unwrap_or_default());
    let count = end.saturating_sub(HEADER_AT).min(bytes.len());
    let found = head
        .get(HEADER_AT..HEADER_AT + count)
        .ok_or("it is cut off within the setup header of a Linux bzImage")?;
    bytes[..count].copy_from_slice(found);
    Ok(header)
}

/// For an ELF kernel, which has no setup header: what the kernel itself looks at.
fn own_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: OWN_VERSION,
        loadflags: LOADED_HIGH,
        cmdline_size: CMDLINE_MAX as u32,
        ..Default::default()
    }
}

/// A part of an ELF file that is loaded.
#[derive(Clone, Copy, Debug)]
struct Segment {
    at: u64,
    virtual_address: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address.saturating_add(self.in_memory)
    }

    fn check(&self, length: u64, low_end: u64) -> Found<()> {
        let Self { at, address, in_file, in_memory, .. } = *self;
        if at.checked_add(in_file).is_none_or(|end| end > length) || in_file > in_memory {
            return Err(format!(
                "it is cut off or damaged: {length} bytes, and {in_file} from {at} on are to be loaded"
            ));
        }
        if self.end() > low_end {
            return Err(format!(
                "it needs memory from {address:#x} to {:#x}, and the guest's ends at {low_end:#x}",
                self.end()
            ));
        }
        let pages = address / 0x1000..self.end().div_ceil(0x1000);
        let in_the_way = BOOT_PAGES.iter().chain([&(0x9f, 0x100)]);
        if in_the_way.into_iter().any(|(from, to)| pages.start < *to && *from < pages.end) {
            return Err(format!(
                "it wants to be loaded at {address:#x}, where the start info or the ACPI tables must lie"
            ));
        }
        Ok(())
    }
}

/// What of an ELF file matters here.
#[derive(Debug, Default)]
struct Segments {
    loaded: Vec<Segment>,
    notes: Vec<Segment>,
}

fn segments_of(file: &File, head: &[u8], length: u64) -> Found<Segments> {
    let cut = || format!("it is an ELF file that is cut off: {length} bytes");
    let byte = |at: usize| head.get(at).copied().ok_or_else(cut);
    if byte(4)? != CLASS_64 || byte(5)? != LITTLE_ENDIAN {
        return Err("it is an ELF file for 32-bit or big-endian processors".into());
    }
    let half = |at: usize| Ok::<_, String>(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
    if half(18)? != MACHINE_X86_64 {
        return Err(format!("it is an ELF file for another processor (machine {})", half(18)?));
    }
    if half(16)? != EXECUTABLE || usize::from(half(54)?) != PROGRAM_HEADER {
        return Err("it is an ELF file, but no executable that stands at an address of its own, as a kernel \
                    does: use a bzImage, or a vmlinux (with a PVH entry, or as Linux links it)"
            .into());
    }
    let (at, count) = (u64_at(head, 32).ok_or_else(cut)?, half(56)?);
    if at < ELF_HEADER as u64 || count > MAX_PROGRAM_HEADERS {
        return Err(format!("its ELF header is damaged: {count} program headers at {at}"));
    }
    let mut segments = Segments::default();
    for number in 0..u64::from(count) {
        let mut bytes = [0; PROGRAM_HEADER];
        let place = number
            .checked_mul(PROGRAM_HEADER as u64)
            .and_then(|offset| at.checked_add(offset))
            .ok_or_else(cut)?;
        file.read_exact_at(&mut bytes, place).map_err(|_| cut())?;
        let word = |at: usize| u64_at(&bytes, at).unwrap_or_default();
        let (kind, segment) = (
            u32_at(&bytes, 0).unwrap_or_default(),
            Segment {
                at: word(8),
                virtual_address: word(16),
                address: word(24),
                in_file: word(32),
                in_memory: word(40),
            },
        );
        match kind {
            LOADED => segments.loaded.push(segment),
            NOTE if segment.at.checked_add(segment.in_file).is_none_or(|end| end > length) => {
                return Err(cut());
            }
            NOTE => segments.notes.push(segment),
            _ => {}
        }
    }
    Ok(segments)
}

/// The entry that a PVH note tells, if there is one.
fn pvh_entry(file: &File, notes: &[Segment]) -> Found<Option<u64>> {
    for note in notes {
        let length = usize::try_from(note.in_file).ok().filter(|length| *length <= MAX_NOTES);
        let length = length.ok_or("it has more than a mebibyte of notes")?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, note.at).map_err(unread)?;
        if let Some(entry) = pvh_note(&bytes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// The entry that one of these ELF notes tells.
fn pvh_note(mut notes: &[u8]) -> Option<u64> {
    loop {
        let [name, described] = [u32_at(notes, 0)? as usize, u32_at(notes, 4)? as usize];
        let kind = u32_at(notes, 8)?;
        let rest = notes.get(12..)?;
        let after = rest.get(name.next_multiple_of(4)..)?;
        if kind == NOTE_PHYS32_ENTRY && rest.get(..name)? == b"Xen\0" {
            return u32_at(after.get(..described)?, 0).map(u64::from);
        }
        notes = after.get(described.next_multiple_of(4)..)?;
    }
}

/// Linux is linked to run in the upper half of the address space, and entered by its physical address.
fn is_linux(entry: u64, segments: &[Segment]) -> bool {
    segments.iter().any(|segment| {
        segment.virtual_address >= KERNEL_HALF && (segment.address..segment.end()).contains(&entry)
    })
}

/// What a file that is no kernel for these machines looks like.
fn stranger(head: &[u8]) -> String {
    let known: [(&[u8], usize, &str); 3] = [
        (b"\x1f\x8b", 0, "it is a file compressed by gzip, perhaps with a kernel in it: unpack it"),
        (b"ARM\x64", 0x38, "it is a kernel for ARM processors"),
        (b"RSC\x05", 0x38, "it is a kernel for RISC-V processors"),
    ];
    known
        .into_iter()
        .find(|(magic, at, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map_or("it is neither an ELF kernel nor a Linux bzImage", |(_, _, text)| text)
        .to_owned()
}

fn read_at_most(file: &mut File, into: &mut [u8]) -> std::io::Result<usize> {
    file.seek(SeekFrom::Start(0))?;
    let mut have = 0;
    while have < into.len() {
        match file.read(&mut into[have..])? {
            0 => break,
            count => have += count,
        }
    }
    Ok(have)
}

fn unread(error: std::io::Error) -> String {
    format!("it cannot be read ({error})")
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*word))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*word))
}
