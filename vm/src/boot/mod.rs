//! Booting: a kernel, its command line, its initial ramdisk and the ACPI tables put into guest memory, and the
//! registers that the first vCPU begins with.
//!
//! An ELF kernel with a PVH entry is entered by it ([`pvh`]); a Linux bzImage, and a Linux ELF kernel without
//! such an entry, by the 64-bit Linux boot protocol ([`linux`]). Files are checked whole before anything is
//! written ([`image`]).

mod image;
mod linux;
mod map;
mod pvh;
mod ramdisk;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::acpi;
use crate::error::{Result, VmError};
use crate::files::Files;
use crate::layout::Slot;
use crate::memory::Memory;
use crate::spec::VmSpec;
use image::{Image, Protocol};

/// Where the command line lies.
const CMDLINE: u64 = 0x2_0000;
/// Pages below 1 MiB that what is written here may take, as (first, one past the last).
const BOOT_PAGES: [(u64, u64); 2] = [(0x1, 0x10), (0x20, 0x22)];
const ONE_MIB: u64 = 0x10_0000;

/// Where the first instruction is, and in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit, without paging.
    Pvh(u64),
    /// 64-bit, with identity page tables.
    Linux(u64),
}

/// The initial ramdisk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ramdisk {
    address: u64,
    bytes: u64,
}

/// Puts everything that `spec` boots from into `memory`, which must be fresh, for a machine with virtio
/// devices at `devices`.
///
/// # Errors
/// [`VmError::Image`] when a file cannot be read, is no kernel for these machines, or does not fit. What was
/// found out from the file alone left the memory as it was.
pub(crate) fn load(
    spec: &VmSpec,
    files: &Files,
    memory: &Memory,
    devices: &[Slot],
) -> Result<Entry> {
    let wrong = |reason: String| VmError::Image { path: spec.kernel.clone(), reason };
    let end = low_end(memory);
    let (mut file, image) = look(spec, files, end)?;
    let ramdisk = match &spec.initrd {
        Some(path) => Some(place_ramdisk(path, files, Some(&image), end)?),
        None => None,
    };
    image.load(&mut file, memory).map_err(wrong)?;
    let ramdisk = match ramdisk {
        Some((mut file, ramdisk)) => {
            copy(&mut file, ramdisk, memory).map_err(|reason| VmError::Image {
                path: spec.initrd.clone().unwrap_or_default(),
                reason,
            })?;
            Some(ramdisk)
        }
        None => None,
    };
    let rsdp = acpi::write(memory, spec.cpus, devices)?;
    let told = match image.protocol {
        Protocol::Pvh => pvh::write_start_info(spec, memory, ramdisk, rsdp),
        Protocol::Linux(header) => linux::write_zero_page(spec, memory, ramdisk, rsdp, header),
    };
    told.map_err(wrong)?;
    Ok(match image.protocol {
        Protocol::Pvh => Entry::Pvh(image.entry),
        Protocol::Linux(_) => Entry::Linux(image.entry),
    })
}

/// Everything that is wrong with the files of `spec`, as far as can be told without memory for a guest.
pub(crate) fn problems(spec: &VmSpec) -> Vec<VmError> {
    let end = Memory::low_end_of(spec.memory_bytes);
    let files = Files::Own;
    let (image, wrong) = match look(spec, &files, end) {
        Ok((_, image)) => (Some(image), None),
        Err(error) => (None, Some(error)),
    };
    let whole = |path: &PathBuf| {
        let (file, _) = place_ramdisk(path, &files, image.as_ref(), end)?;
        let wrong = |reason: String| VmError::Image { path: path.clone(), reason };
        match ramdisk::problem(file) {
            Ok(None) => Ok(()),
            Ok(Some(reason)) => Err(wrong(reason)),
            Err(error) => Err(wrong(format!("it cannot be read ({error})"))),
        }
    };
    let ramdisk = spec.initrd.as_ref().map(whole);
    wrong.into_iter().chain(ramdisk.and_then(Result::err)).collect()
}

/// Opens the kernel and looks at it, for memory that ends at `end` below the hole.
fn look(spec: &VmSpec, files: &Files, end: u64) -> Result<(File, Image)> {
    let wrong = |reason: String| VmError::Image { path: spec.kernel.clone(), reason };
    let mut file = checked(files.kernel(&spec.kernel), &spec.kernel)?;
    let image = Image::read(&mut file, end).map_err(wrong)?;
    if spec.cmdline.len() as u64 > image.cmdline_max {
        return Err(wrong(format!(
            "it takes a command line of at most {} bytes, not {}",
            image.cmdline_max,
            spec.cmdline.len()
        )));
    }
    Ok((file, image))
}

/// Sets the registers of a vCPU in its reset state so that it begins at `entry`.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    match entry {
        Entry::Pvh(address) => pvh::enter(vcpu, address),
        Entry::Linux(address) => linux::enter(vcpu, address),
    }
    .map_err(|error| VmError::refused("set the registers of the boot vCPU", error))
}

/// One past the last byte of memory below the hole.
fn low_end(memory: &Memory) -> u64 {
    memory.ranges().first().map_or(0, |(_, length)| *length)
}

/// Where the initial ramdisk will lie: as high in low memory, which ends at `end`, as the kernel lets it. Where there
/// is no kernel, as high as the machine lets it.
fn place_ramdisk(
    path: &Path,
    files: &Files,
    image: Option<&Image>,
    end: u64,
) -> Result<(File, Ramdisk)> {
    let wrong = |reason: String| VmError::Image { path: path.to_owned(), reason };
    let file = checked(files.initrd(path), path)?;
    let unread = |error: io::Error| wrong(format!("it cannot be read ({error})"));
    let bytes = file.metadata().map_err(unread)?.len();
    if bytes == 0 {
        return Err(wrong("it is empty".into()));
    }
    let end = image.map_or(end, |image| end.min(image.ramdisk_end));
    let taken = image.map_or(ONE_MIB, |image| image.end.max(ONE_MIB));
    let address = end
        .checked_sub(bytes)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= taken)
        .ok_or_else(|| {
            wrong(format!(
                "its {bytes} bytes do not fit between the kernel, which takes memory up to {taken:#x}, and {end:#x}"
            ))
        })?;
    Ok((file, Ramdisk { address, bytes }))
}

fn copy(file: &mut File, ramdisk: Ramdisk, memory: &Memory) -> std::result::Result<(), String> {
    use vm_memory::Bytes;
    let count = usize::try_from(ramdisk.bytes).map_err(|_| "it is too long".to_owned())?;
    memory.map().read_exact_volatile_from(GuestAddress(ramdisk.address), file, count).map_err(
        |error| format!("its {count} bytes cannot be copied to {:#x} ({error})", ramdisk.address),
    )
}

/// What was opened of `path`: that is looked at, not what has the name.
fn checked(opened: io::Result<File>, path: &Path) -> Result<File> {
    let wrong = |reason: String| VmError::Image { path: path.to_owned(), reason };
    let file = opened.map_err(|error| wrong(format!("it cannot be opened ({error})")))?;
    let meta = file.metadata().map_err(|error| wrong(format!("it cannot be read ({error})")))?;
    if meta.is_file() { Ok(file) } else { Err(wrong("it is no regular file".into())) }
}

#[cfg(test)]
mod tests;
