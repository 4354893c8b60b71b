//! The one room of this crate where `unsafe` is allowed: the KVM calls that `kvm-ioctls` does not
//! wrap, the tie between guest memory and the VM that maps it, files that are read into it and written
//! from it, and the signal that kicks a vCPU.
//!
//! State that KVM hands out as structures of a fixed ABI is moved as bytes ([`Block`]), so that
//! nothing here interprets it and no padding of a Rust structure is ever read. Ioctl numbers carry
//! the size of their structure; constants below hold both against the kernel's headers as
//! `kvm-bindings` has them.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs2, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use libc::{c_int, c_ulong, c_void};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::memory::Memory;

pub(crate) mod frames;
pub(crate) mod process;
pub(crate) mod tap;

const KVMIO: c_ulong = 0xae;
const WRITE: c_ulong = 1;
const READ: c_ulong = 2;

const fn request(direction: c_ulong, number: c_ulong, size: usize) -> c_ulong {
    (direction << 30) | ((size as c_ulong) << 16) | (KVMIO << 8) | number
}

/// A structure of the KVM ABI that can be read and written back whole.
#[derive(Debug)]
pub(crate) struct Block {
    /// Name as the kernel's documentation has it, for errors.
    pub(crate) name: &'static str,
    /// Bytes in it.
    pub(crate) size: usize,
    get: c_ulong,
    set: c_ulong,
}

/// General registers.
pub(crate) const REGS: Block = block::<kvm_regs>("REGS", (READ, 0x81), (WRITE, 0x82));
/// Segment and control registers with the PDPTRs.
pub(crate) const SREGS2: Block = block::<kvm_sregs2>("SREGS2", (READ, 0xcc), (WRITE, 0xcd));
/// Extended control registers.
pub(crate) const XCRS: Block = block::<kvm_xcrs>("XCRS", (READ, 0xa6), (WRITE, 0xa7));
/// Debug registers.
pub(crate) const DEBUGREGS: Block =
    block::<kvm_debugregs>("DEBUGREGS", (READ, 0xa1), (WRITE, 0xa2));
/// The local APIC's register page.
pub(crate) const LAPIC: Block = block::<kvm_lapic_state>("LAPIC", (READ, 0x8e), (WRITE, 0x8f));
/// Whether the vCPU runs, halts or waits for its start.
pub(crate) const MP_STATE: Block = block::<kvm_mp_state>("MP_STATE", (READ, 0x98), (WRITE, 0x99));
/// Pending exceptions, interrupts and NMIs.
pub(crate) const VCPU_EVENTS: Block =
    block::<kvm_vcpu_events>("VCPU_EVENTS", (READ, 0x9f), (WRITE, 0xa0));
/// One of the three interrupt chips; the chip's number stands in the first four bytes.
pub(crate) const IRQCHIP: Block =
    block::<kvm_irqchip>("IRQCHIP", (READ | WRITE, 0x62), (READ, 0x63));
/// The interval timer.
pub(crate) const PIT2: Block = block::<kvm_pit_state2>("PIT2", (READ, 0x9f), (WRITE, 0xa0));
/// The VM's paravirtual clock.
pub(crate) const CLOCK: Block = block::<kvm_clock_data>("CLOCK", (READ, 0x7c), (WRITE, 0x7b));

const fn block<T>(name: &'static str, get: (c_ulong, c_ulong), set: (c_ulong, c_ulong)) -> Block {
    let size = size_of::<T>();
    Block { name, size, get: request(get.0, get.1, size), set: request(set.0, set.1, size) }
}

const KVM_GET_XSAVE2: c_ulong = request(READ, 0xcf, size_of::<kvm_xsave>());
const KVM_SET_XSAVE: c_ulong = request(WRITE, 0xa5, size_of::<kvm_xsave>());
const KVM_CLEAR_DIRTY_LOG: c_ulong = request(READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>());
const KVM_SET_DEVICE_ATTR: c_ulong = request(WRITE, 0xe1, size_of::<kvm_device_attr>());
const KVM_GET_DEVICE_ATTR: c_ulong = request(WRITE, 0xe2, size_of::<kvm_device_attr>());
const KVM_HAS_DEVICE_ATTR: c_ulong = request(WRITE, 0xe3, size_of::<kvm_device_attr>());

// The numbers as `linux/kvm.h` expands them on x86-64: a structure of another size fails here.
const _: () = {
    assert!(REGS.get == 0x8090_ae81 && REGS.set == 0x4090_ae82);
    assert!(SREGS2.get == 0x8140_aecc && SREGS2.set == 0x4140_aecd);
    assert!(XCRS.get == 0x8188_aea6 && XCRS.set == 0x4188_aea7);
    assert!(DEBUGREGS.get == 0x8080_aea1 && DEBUGREGS.set == 0x4080_aea2);
    assert!(LAPIC.get == 0x8400_ae8e && LAPIC.set == 0x4400_ae8f);
    assert!(MP_STATE.get == 0x8004_ae98 && MP_STATE.set == 0x4004_ae99);
    assert!(VCPU_EVENTS.get == 0x8040_ae9f && VCPU_EVENTS.set == 0x4040_aea0);
    assert!(IRQCHIP.get == 0xc208_ae62 && IRQCHIP.set == 0x8208_ae63);
    assert!(PIT2.get == 0x8070_ae9f && PIT2.set == 0x4070_aea0);
    assert!(CLOCK.get == 0x8030_ae7c && CLOCK.set == 0x4030_ae7b);
    assert!(KVM_GET_XSAVE2 == 0x9000_aecf && KVM_SET_XSAVE == 0x5000_aea5);
    assert!(KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
    assert!(KVM_SET_DEVICE_ATTR == 0x4018_aee1);
};

/// Reads a block of state into `bytes`, which carries its selector (if any) on the way in.
pub(crate) fn get_block(fd: &impl AsRawFd, block: &Block, bytes: &mut [u8]) -> io::Result<()> {
    exact(bytes.len(), block.size)?;
    // SAFETY: the request's number says that the kernel writes `block.size` bytes, and `bytes` is
    // exactly that long. A descriptor of another kind refuses the request.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), block.get, bytes.as_mut_ptr()) })
}

/// Writes a block of state back.
pub(crate) fn set_block(fd: &impl AsRawFd, block: &Block, bytes: &[u8]) -> io::Result<()> {
    exact(bytes.len(), block.size)?;
    // SAFETY: the kernel reads `block.size` bytes, and `bytes` is exactly that long. (IRQCHIP's
    // number says READ by an old mistake; the kernel only reads from it.)
    check(unsafe { libc::ioctl(fd.as_raw_fd(), block.set, bytes.as_ptr()) })
}

/// Bytes of one vCPU's extended state in a VM, as the kernel says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XsaveSize(usize);

impl XsaveSize {
    /// Asks the kernel.
    pub(crate) fn of(vm: &VmFd) -> Self {
        let said = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Self(said.max(size_of::<kvm_xsave>()))
    }

    /// The size in bytes, never below 4096.
    pub(crate) fn bytes(self) -> usize {
        self.0
    }
}

/// Reads the extended state (KVM_GET_XSAVE2).
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: XsaveSize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; size.0];
    // SAFETY: the kernel writes what KVM_CAP_XSAVE2 of this VM says at most, which `size` holds.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_XSAVE2, bytes.as_mut_ptr()) })?;
    Ok(bytes)
}

/// Writes the extended state back; `bytes` is as long as `size` says.
pub(crate) fn set_xsave(vcpu: &VcpuFd, size: XsaveSize, bytes: &[u8]) -> io::Result<()> {
    exact(bytes.len(), size.0)?;
    // SAFETY: the kernel reads what KVM_CAP_XSAVE2 of this VM says at most, which `size` holds.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, bytes.as_ptr()) })
}

/// ARCH_REQ_XCOMP_GUEST_PERM (the kernel's `Documentation/arch/x86/xstate.rst`).
const REQUEST_GUEST_COMPONENT: c_int = 0x1025;
/// The state component with the tiles of AMX.
const TILE_DATA: c_ulong = 18;

/// Lets guests of this process use the tiles of AMX where the host has them: KVM offers no extended state that
/// was not asked for before the first vCPU. Where there are none, or when it comes too late, nothing changes.
pub(crate) fn permit_guest_tiles() {
    // SAFETY: the request takes the component's number and no address.
    let _ = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_GUEST_COMPONENT, TILE_DATA) };
}

/// Whether the vCPU has the 64-bit attribute `attr` of `group`.
pub(crate) fn has_attribute(vcpu: &VcpuFd, group: u32, attr: u64) -> bool {
    let wanted = kvm_device_attr { group, attr, ..Default::default() };
    // SAFETY: the kernel reads one `kvm_device_attr` and does not follow its address.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR, ptr::from_ref(&wanted)) == 0 }
}

/// Reads a 64-bit attribute of the vCPU. Only for attributes that are 64 bits wide.
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let wanted = tsc_offset_at(ptr::from_mut(&mut value) as u64);
    // SAFETY: KVM_VCPU_TSC_OFFSET is a u64, written to `value`, which outlives the call.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, ptr::from_ref(&wanted)) })?;
    Ok(value)
}

/// Sets what is added to the host's TSC to give the guest's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let wanted = tsc_offset_at(ptr::from_ref(&offset) as u64);
    // SAFETY: KVM_VCPU_TSC_OFFSET is a u64, read from `offset`, which outlives the call.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, ptr::from_ref(&wanted)) })
}

fn tsc_offset_at(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr,
        ..Default::default()
    }
}

/// A VM and the memory that its slots map. One owner for both, because the kernel writes through
/// the mapping for as long as a vCPU runs: whoever runs a vCPU holds this.
#[derive(Debug)]
pub(crate) struct Backed {
    vm: VmFd,
    memory: Memory,
}

impl Backed {
    /// Maps every region of `memory` as a slot of `vm`, the slot's number being the region's.
    pub(crate) fn new(vm: VmFd, memory: Memory) -> io::Result<Arc<Self>> {
        let backed = Self { vm, memory };
        backed.map(0)?;
        Ok(Arc::new(backed))
    }

    /// The VM.
    pub(crate) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Switches KVM's dirty log on or off for every slot.
    pub(crate) fn log_dirty(&self, on: bool) -> io::Result<()> {
        self.map(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn map(&self, flags: u32) -> io::Result<()> {
        for (slot, region) in (0u32..).zip(self.memory.map().iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is `self.memory`'s, which lives as long as `self`; vCPUs that run
            // hold `self`. Slots do not overlap, as regions do not.
            unsafe { self.vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Clears the pages whose bits are set in `bitmap` from the log of `slot` and arms them again
    /// (KVM_CLEAR_DIRTY_LOG). `pages` is the slot's length: bits beyond it must not be set.
    pub(crate) fn clear_dirty(&self, slot: u32, pages: u32, bitmap: &mut [u64]) -> io::Result<()> {
        if (bitmap.len() as u64) * 64 < u64::from(pages) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap.as_mut_ptr().cast::<c_void>(),
            },
        };
        // SAFETY: the kernel reads one bit for each of `num_pages`, and `bitmap` is that long.
        check(unsafe {
            libc::ioctl(self.vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, ptr::from_mut(&mut request))
        })
    }

    /// Asks for huge pages behind the mapping where the host gives them on request; elsewhere this
    /// changes nothing.
    pub(crate) fn advise_huge_pages(&self) {
        for region in self.memory.map().iter() {
            let len = usize::try_from(region.len()).unwrap_or(0);
            // SAFETY: the range is one whole mapping of ours; the advice changes no contents. A
            // kernel without huge pages answers EINVAL, which is no loss.
            let _ = unsafe { libc::madvise(region.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
}

/// The request for a block device's size in bytes (`linux/fs.h`).
const BLKGETSIZE64: c_ulong = 0x8008_1272;

/// Bytes of the block device `file`.
pub(crate) fn device_bytes(file: &File) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the kernel writes one u64 to `bytes`, which outlives the call; what is no block device refuses.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, ptr::from_mut(&mut bytes)) })?;
    Ok(bytes)
}

/// The most pieces that one call reads or writes (UIO_MAXIOV, `linux/uio.h`).
const PIECES: usize = 1024;

/// Reads from `offset` of `file` into guest memory, as much as one call gives. What may have been written counts
/// as dirty.
pub(crate) fn read_slices_at<B: BitmapSlice>(
    file: &File,
    into: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let into = &into[..into.len().min(PIECES)];
    let guards: Vec<_> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let count = pieces.len() as c_int;
    // SAFETY: each piece is a slice of mapped guest memory that `guards` keep, as long as it says; nothing in Rust
    // refers to what is in it.
    let read = unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, offset) };
    let error = io::Error::last_os_error();
    let read = usize::try_from(read);
    // One that failed may have written anywhere.
    let mut left = read.unwrap_or(usize::MAX);
    for slice in into {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
    read.map_err(|_| error)
}

/// Writes guest memory to `offset` of `file`, as much as one call takes.
pub(crate) fn write_slices_at<B: BitmapSlice>(
    file: &File,
    from: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let from = &from[..from.len().min(PIECES)];
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let count = pieces.len() as c_int;
    // SAFETY: each piece is a slice of mapped guest memory that `guards` keep, as long as it says; the kernel only
    // reads it.
    let written = unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), count, offset) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// The descriptor of `event`, as the standard library lends descriptors.
pub(crate) fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and lives for as long as it is lent.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

thread_local! {
    /// The byte `immediate_exit` of the vCPU that this thread runs, for the signal handler.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// While it lives, a kick of this thread makes the vCPU leave KVM_RUN, or not enter it. Stays on
/// the thread that made it.
#[derive(Debug)]
pub(crate) struct Kickable {
    _vcpu: Arc<Mutex<VcpuFd>>,
    _this_thread: PhantomData<*const ()>,
}

impl Kickable {
    /// Ties this thread's kicks to `vcpu`, which stays mapped for as long.
    pub(crate) fn new(vcpu: &Arc<Mutex<VcpuFd>>) -> Self {
        let mut fd = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let byte = ptr::from_mut(&mut fd.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(byte.cast_const().cast());
        drop(fd);
        Self { _vcpu: vcpu.clone(), _this_thread: PhantomData }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// Number of the signal that kicks a vCPU's thread.
pub(crate) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick, for the whole process. Harmless when done twice.
pub(crate) fn install_kick() -> io::Result<()> {
    Ok(register_signal_handler(kick_signal(), on_kick)?)
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: the pointer is into this thread's mapped kvm_run, set and reset by `Kickable`,
        // whose owner keeps the vCPU alive. One byte, stored atomically; no lock, no allocation.
        unsafe { (*byte).store(1, Ordering::SeqCst) }
    }
}

fn exact(have: usize, want: usize) -> io::Result<()> {
    if have == want { Ok(()) } else { Err(io::Error::from(io::ErrorKind::InvalidInput)) }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
