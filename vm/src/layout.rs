//! Where things lie in a guest's physical address space and on its interrupt lines. A guest that moves finds
//! everything where it was: what stands here changes only with the version of the sections that depend on it.

/// Where the hole for devices begins: memory below it is low memory.
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// Where memory goes on after the hole.
pub(crate) const HOLE_END: u64 = 1 << 32;

/// Where the first virtio device's registers are.
const VIRTIO_START: u64 = 0xd000_0000;
/// How far apart they are.
pub(crate) const VIRTIO_STRIDE: u64 = 0x1000;
/// Interrupt lines of the I/O APIC that virtio devices have, by their number: first those that no old device
/// ever had.
const VIRTIO_LINES: [u32; 14] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 15];
/// The most virtio devices that a VM has.
pub(crate) const MAX_VIRTIO: usize = VIRTIO_LINES.len();

/// A place for a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Where its registers are.
    pub(crate) address: u64,
    /// Its interrupt line, which is active high and level-triggered.
    pub(crate) line: u32,
}

impl Slot {
    /// The place of virtio device `number`, if there are that many.
    pub(crate) fn of(number: usize) -> Option<Self> {
        let line = *VIRTIO_LINES.get(number)?;
        Some(Self { address: VIRTIO_START + number as u64 * VIRTIO_STRIDE, line })
    }

    /// Which device `address` belongs to, and where in its registers it is.
    pub(crate) fn find(address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(VIRTIO_START)?;
        let number = usize::try_from(offset / VIRTIO_STRIDE).ok()?;
        (number < MAX_VIRTIO).then_some((number, offset % VIRTIO_STRIDE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_by_its_address() {
        for number in 0..MAX_VIRTIO {
            let slot = Slot::of(number).expect("a place");
            assert_eq!(Slot::find(slot.address + 0x50), Some((number, 0x50)));
            assert!(slot.address >= HOLE_START && slot.address + VIRTIO_STRIDE <= 0xfec0_0000);
        }
        assert_eq!(Slot::of(MAX_VIRTIO), None);
        let end = Slot::of(MAX_VIRTIO - 1).expect("the last").address + VIRTIO_STRIDE;
        assert_eq!((Slot::find(end), Slot::find(0)), (None, None));
    }
}
