//! What every virtio device must stand, run by the tests of each; and the driver that does it, which is also
//! what their own tests speak to them with.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use decamp_shared::workload::Section;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress};

use super::bus::{Named, VirtioBus};
use super::device::Device;
use crate::error::Result;
use crate::layout::Slot;
use crate::memory::Memory;
use crate::state::tests_support::refuses_damage;
use crate::testing::wait_for;

/// Bytes of memory that the driver has.
pub(crate) const MEMORY: u64 = 16 << 20;
const VERSION_1: u64 = 1 << 32;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

/// Where the rings of each queue are, and how far the parts are apart.
const RINGS: u64 = 0x1_0000;
const PART: u64 = 0x4000;
/// Where buffers are.
const BUFFERS: u64 = 0x80_0000;
/// No queue is made longer.
const ENTRIES: u16 = 256;

/// A driver of one device, in memory of its own, without a guest.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) memory: Memory,
    pub(crate) bus: VirtioBus,
    level: Arc<AtomicBool>,
    slot: Slot,
    /// By queue: entries, next descriptor, chains offered, chains taken back.
    rings: RefCell<BTreeMap<u64, Ring>>,
    next_buffer: Cell<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    entries: u16,
    next: u16,
    offered: u16,
    taken: u16,
}

/// A chain that was offered.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    queue: usize,
    /// Its first descriptor.
    pub(crate) head: u16,
    writable: Vec<(u64, usize)>,
}

impl Driver {
    /// A driver that has not begun, of `device`, which works.
    pub(crate) fn of(device: Box<dyn Device>) -> Self {
        let driver = Self::paused(device);
        driver.bus.resume();
        driver
    }

    /// The same of a device that is paused.
    pub(crate) fn paused(device: Box<dyn Device>) -> Self {
        let memory = Memory::create(MEMORY).expect("memory");
        let level = Arc::new(AtomicBool::new(false));
        let line = level.clone();
        let named = Named { label: "it".into(), device };
        let bus = VirtioBus::new(vec![named], memory.map(), |_| {
            let line = line.clone();
            Box::new(move |high| line.store(high, Ordering::SeqCst))
        })
        .expect("a bus");
        let slot = Slot::of(0).expect("a place");
        let (rings, next_buffer) = (RefCell::default(), Cell::new(BUFFERS));
        Self { memory, bus, level, slot, rings, next_buffer }
    }

    /// The same driver with all its memory on another host, where `device` takes over; paused.
    pub(crate) fn moved_to(&self, device: Box<dyn Device>) -> Result<Self> {
        let sections = self.saved();
        let there = Self::paused(device);
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.map().read_slice(&mut bytes, GuestAddress(0)).expect("read");
        there.memory.map().write_slice(&bytes, GuestAddress(0)).expect("written");
        there.load(&sections)?;
        *there.rings.borrow_mut() = self.rings.borrow().clone();
        there.next_buffer.set(self.next_buffer.get());
        Ok(there)
    }

    /// Pauses the device and says its state.
    pub(crate) fn saved(&self) -> Vec<Section> {
        self.bus.pause();
        self.bus.save()
    }

    fn load(&self, sections: &[Section]) -> Result<()> {
        self.bus.load(|kind| {
            assert_eq!(kind, "virtio/it");
            Ok(&sections[0])
        })
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.bus.read(self.slot.address + offset, &mut word));
        u32::from_le_bytes(word)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        assert!(self.bus.write(self.slot.address + offset, &value.to_le_bytes()));
    }

    /// Bytes of its configuration.
    pub(crate) fn config(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        assert!(self.bus.read(self.slot.address + 0x100 + at, &mut bytes));
        bytes
    }

    /// Whether its interrupt line is high.
    pub(crate) fn interrupts(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    /// Acknowledges all interrupts.
    pub(crate) fn acknowledge(&self) {
        self.write(0x64, self.read(0x60));
    }

    /// Whether it stands until it is reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.read(0x70) & NEEDS_RESET != 0
    }

    /// What it offers.
    pub(crate) fn offered(&self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | u64::from(self.read(0x10)) << 32
    }

    /// Takes exactly `features`; whether the device lets it.
    pub(crate) fn takes(&self, features: u64) -> bool {
        self.write(0x70, 0);
        self.rings.borrow_mut().clear();
        self.write(0x70, ACKNOWLEDGE);
        self.write(0x70, ACKNOWLEDGE | DRIVER);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (half * 32)) as u32);
        }
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(0x70) & FEATURES_OK != 0
    }

    /// Sets the device up, with `features` of its own.
    pub(crate) fn start(&self, features: u64) {
        self.start_with(features | VERSION_1);
    }

    /// Sets the device up, with all that it offers.
    pub(crate) fn start_with_all(&self) {
        self.start_with(self.offered());
    }

    fn start_with(&self, features: u64) {
        assert!(self.takes(features), "features {features:#x} of {:#x}", self.offered());
        for queue in 0u32.. {
            self.write(0x30, queue);
            let most = self.read(0x34) as u16;
            if most == 0 {
                break;
            }
            let entries = most.min(ENTRIES);
            self.write(0x38, entries.into());
            for (part, register) in (0u64..).zip([0x80, 0x90, 0xa0]) {
                self.write(register, ring(queue as usize, part) as u32);
                self.write(register + 4, 0);
            }
            let empty = vec![0; 3 * PART as usize];
            let at = GuestAddress(ring(queue as usize, 0));
            self.memory.map().write_slice(&empty, at).expect("rings");
            self.write(0x44, 1);
            self.rings.borrow_mut().insert(queue.into(), Ring { entries, ..Ring::default() });
        }
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Offers a chain: `readable` buffers with contents, then `writable` ones of those lengths. Not kicked.
    pub(crate) fn offer(&self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Offer {
        let mut buffers = Vec::new();
        for bytes in readable {
            let at = self.buffer(bytes.len());
            self.memory.map().write_slice(bytes, GuestAddress(at)).expect("a buffer");
            buffers.push((at, bytes.len(), 0));
        }
        for length in writable {
            buffers.push((self.buffer(*length), *length, VRING_DESC_F_WRITE as u16));
        }
        self.offer_at(queue, &buffers)
    }

    /// Offers a chain of buffers where they are: (address, length, flags). Not kicked.
    pub(crate) fn offer_at(&self, queue: usize, buffers: &[(u64, usize, u16)]) -> Offer {
        let mut rings = self.rings.borrow_mut();
        let state = rings.get_mut(&(queue as u64)).expect("a queue that was set up");
        let head = state.next;
        let count = buffers.len();
        for (number, (at, length, flags)) in buffers.iter().enumerate() {
            let here = state.next;
            state.next = (here + 1) % state.entries;
            let more = if number + 1 < count { VRING_DESC_F_NEXT as u16 } else { 0 };
            self.descriptor(queue, here, *at, *length as u32, flags | more, state.next);
        }
        self.put_avail(queue, state.offered % state.entries, head);
        state.offered = state.offered.wrapping_add(1);
        self.set_avail_index(queue, state.offered);
        // As a driver with event indexes that wants to hear of every chain.
        let wants = GuestAddress(ring(queue, 1) + 4 + u64::from(state.entries) * 2);
        self.memory.map().write_obj(state.taken, wants).expect("the ring");
        let writable = buffers.iter().filter(|(_, _, flags)| *flags != 0);
        Offer { queue, head, writable: writable.map(|(at, length, _)| (*at, *length)).collect() }
    }

    /// Writes descriptor `number` of `queue`, whatever it says.
    pub(crate) fn descriptor(
        &self,
        queue: usize,
        number: u16,
        at: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let place = GuestAddress(ring(queue, 0) + u64::from(number) * 16);
        self.memory.map().write_slice(&bytes, place).expect("a descriptor");
    }

    fn put_avail(&self, queue: usize, place: u16, head: u16) {
        let at = GuestAddress(ring(queue, 1) + 4 + u64::from(place) * 2);
        self.memory.map().write_obj(head, at).expect("the ring");
    }

    fn set_avail_index(&self, queue: usize, index: u16) {
        self.memory.map().write_obj(index, GuestAddress(ring(queue, 1) + 2)).expect("the ring");
    }

    /// Tells the device to look at `queue`.
    pub(crate) fn kick(&self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// Chains of `queue` that came back and were not taken.
    pub(crate) fn back(&self, queue: usize) -> u16 {
        let index: u16 =
            self.memory.map().read_obj(GuestAddress(ring(queue, 2) + 2)).expect("the ring");
        index.wrapping_sub(self.rings.borrow()[&(queue as u64)].taken)
    }

    /// Waits for the next chain of `queue` that comes back: its head and how many bytes were written.
    pub(crate) fn take(&self, queue: usize) -> (u16, u32) {
        wait_for("a chain to come back", || self.back(queue) > 0);
        let mut rings = self.rings.borrow_mut();
        let state = rings.get_mut(&(queue as u64)).expect("a queue");
        let place = u64::from(state.taken % state.entries);
        state.taken = state.taken.wrapping_add(1);
        let wants = GuestAddress(ring(queue, 1) + 4 + u64::from(state.entries) * 2);
        self.memory.map().write_obj(state.taken, wants).expect("the ring");
        let words: [u32; 2] = [0, 4].map(|at| {
            let at = GuestAddress(ring(queue, 2) + 4 + place * 8 + at);
            self.memory.map().read_obj(at).expect("the ring")
        });
        (words[0] as u16, words[1])
    }

    /// The first `length` bytes of what the device wrote into `offer`.
    pub(crate) fn written(&self, offer: &Offer, length: u32) -> Vec<u8> {
        let mut all = Vec::new();
        for (at, length) in &offer.writable {
            let mut bytes = vec![0; *length];
            self.memory.map().read_slice(&mut bytes, GuestAddress(*at)).expect("a buffer");
            all.extend(bytes);
        }
        assert!(length as usize <= all.len(), "{length} of {} bytes", all.len());
        all.truncate(length as usize);
        all
    }

    /// One request there and back: what the device wrote into its `writable` bytes.
    pub(crate) fn request(&self, queue: usize, readable: &[&[u8]], writable: usize) -> Vec<u8> {
        let writable: &[usize] = if writable == 0 { &[] } else { &[writable] };
        let offer = self.offer(queue, readable, writable);
        self.kick(queue);
        let (head, length) = self.take(offer.queue);
        assert_eq!(head, offer.head);
        self.written(&offer, length)
    }

    fn buffer(&self, length: usize) -> u64 {
        let length = (length as u64).next_multiple_of(16).max(16);
        let at = self.next_buffer.get();
        let at = if at + length > MEMORY { BUFFERS } else { at };
        self.next_buffer.set(at + length);
        at
    }
}

fn ring(queue: usize, part: u64) -> u64 {
    RINGS + (queue as u64 * 4 + part) * PART
}

/// Everything that is asked of a device of any type. `make` makes one like the other.
pub(crate) fn conforms(make: impl Fn() -> Box<dyn Device>) {
    names_itself(&make);
    takes_only_what_it_offers(&make);
    loads_what_it_saved(&make);
    works_for_nobody_who_agreed_on_nothing(&make);
    refuses_damaged_sections(&make);
    a_reset_makes_it_new(&make);
    rings_that_are_none_break_it_alone(&make);
    does_nothing_while_paused(&make);
    survives_any_access(&make);
}

fn names_itself(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), make().id());
    let sizes: Vec<u32> = (0u32..)
        .map(|queue| {
            driver.write(0x30, queue);
            driver.read(0x34)
        })
        .take_while(|size| *size > 0)
        .collect();
    let own: Vec<u32> = make().queues().iter().map(|size| u32::from(*size)).collect();
    assert_eq!(sizes, own);
    assert!(own.iter().all(|size| size.is_power_of_two()), "{own:?}");
    let config = make().config();
    assert_eq!(driver.config(0, config.len()), config);
    assert_eq!(driver.config(config.len() as u64, 8), [0; 8], "nothing is behind it");
}

fn takes_only_what_it_offers(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    let offered = driver.offered();
    let rings = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    assert_eq!(offered & (VERSION_1 | rings), VERSION_1 | rings);
    assert!(driver.takes(offered) && driver.takes(VERSION_1));
    assert!(!driver.takes(offered & !VERSION_1), "a driver of the old interface");
    for bit in (0..64).filter(|bit| offered & (1 << bit) == 0) {
        assert!(!driver.takes(VERSION_1 | 1 << bit), "bit {bit} was never offered");
    }
}

fn loads_what_it_saved(make: &impl Fn() -> Box<dyn Device>) {
    for features in [None, Some(0), Some(u64::MAX)] {
        let driver = Driver::of(make());
        if let Some(features) = features {
            driver.start_with(driver.offered() & features | VERSION_1);
        }
        let saved = driver.saved();
        assert_eq!(saved, driver.saved(), "saving changes nothing");
        let there = driver.moved_to(make()).expect("loaded");
        assert_eq!(saved, there.saved(), "with {features:x?}");
        driver.bus.resume();
        there.bus.resume();
    }
}

/// A driver that does so keeps its guest as movable as any.
fn works_for_nobody_who_agreed_on_nothing(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    driver.write(0x70, ACKNOWLEDGE | DRIVER);
    driver.write(0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(driver.read(0x70), ACKNOWLEDGE | DRIVER);
    let there = driver.moved_to(make()).expect("loaded");
    assert_eq!(there.read(0x70), ACKNOWLEDGE | DRIVER);
    // Nor where the bit came along.
    let mut section = driver.saved().remove(0);
    let status = 6 + 8 + 6;
    section.bytes[status] |= DRIVER_OK as u8;
    let there = Driver::paused(make());
    there.load(&[section]).expect("loaded");
    assert_eq!(there.read(0x70), ACKNOWLEDGE | DRIVER);
    there.bus.resume();
    there.start_with_all();
    assert!(!there.needs_reset());
}

fn refuses_damaged_sections(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    driver.start_with_all();
    let section = driver.saved().remove(0);
    let there = Driver::paused(make());
    there.load(std::slice::from_ref(&section)).expect("undamaged");
    refuses_damage(&section, |section| {
        Driver::paused(make()).load(std::slice::from_ref(section)).is_ok()
    });
    // A queue where no memory is: its first row's descriptor table.
    if !make().queues().is_empty() {
        let mut bad = section.clone();
        let at = 6 + 8 + 6 + 36 + 6 + 8;
        bad.bytes[at..at + 8].copy_from_slice(&(MEMORY - 16).to_le_bytes());
        let error = Driver::paused(make()).load(&[bad]).expect_err("misplaced").to_string();
        assert!(error.contains("no memory"), "{error}");
    }
}

fn a_reset_makes_it_new(make: &impl Fn() -> Box<dyn Device>) {
    let fresh = Driver::of(make()).saved();
    let driver = Driver::of(make());
    driver.start_with_all();
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x70), 0);
    assert!(!driver.interrupts());
    assert_eq!(driver.saved()[0].bytes.len(), fresh[0].bytes.len());
    driver.bus.resume();
    driver.start_with_all();
    assert!(!driver.needs_reset());
}

fn rings_that_are_none_break_it_alone(make: &impl Fn() -> Box<dyn Device>) {
    for queue in 0..make().queues().len() {
        let driver = Driver::of(make());
        driver.start_with_all();
        driver.set_avail_index(queue, 0x7fff);
        driver.kick(queue);
        wait_for("the device to give up", || driver.needs_reset());
        assert!(driver.interrupts(), "its driver is told");
        driver.start_with_all();
        assert!(!driver.needs_reset(), "a reset helps");
        // Descriptors that lie outside of memory, lead in circles, or beyond the table.
        for (at, length, flags, next) in [
            (MEMORY - 1, 4096, VRING_DESC_F_WRITE, 0),
            (u64::MAX - 1, u32::MAX, VRING_DESC_F_WRITE, 0),
            (u64::MAX - 1, u32::MAX, 0, 0),
            (BUFFERS, 64, VRING_DESC_F_NEXT, 0),
            (BUFFERS, 64, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 0),
            (BUFFERS, 0, 0, 0),
            (BUFFERS, 16, VRING_DESC_F_NEXT, u16::MAX),
            (BUFFERS, 7, 4, 0),
        ] {
            driver.start_with_all();
            driver.descriptor(queue, 0, at, length, flags as u16, next);
            driver.put_avail(queue, 0, 0);
            driver.set_avail_index(queue, 1);
            driver.kick(queue);
            // Whatever it makes of them, it goes on answering its registers and can be reset and stopped.
            driver.bus.pause();
            driver.bus.resume();
        }
        // A head that no table has.
        driver.start_with_all();
        driver.put_avail(queue, 0, u16::MAX);
        driver.set_avail_index(queue, 1);
        driver.kick(queue);
        driver.bus.pause();
        driver.bus.resume();
        driver.start_with_all();
        assert!(!driver.needs_reset());
    }
    // Queues that lie nowhere.
    let driver = Driver::of(make());
    assert!(driver.takes(VERSION_1));
    if !make().queues().is_empty() {
        driver.write(0x30, 0);
        driver.write(0x80, 0xffff_0000);
        driver.write(0x90, 0xfffe_0000);
        driver.write(0xa0, 0xfffd_0000);
        driver.write(0x44, 1);
        driver.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(driver.needs_reset());
    }
}

fn does_nothing_while_paused(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    driver.start_with_all();
    driver.bus.pause();
    let before = driver.saved();
    let mut dirty = decamp_shared::pages::PageSet::new();
    driver.memory.take_own_writes(&mut dirty);
    for queue in 0..make().queues().len() {
        let offer = driver.offer(queue, &[&[0; 64]], &[512]);
        assert_eq!(offer.queue, queue);
        driver.kick(queue);
    }
    let mut own = decamp_shared::pages::PageSet::new();
    driver.memory.take_own_writes(&mut own);
    std::thread::sleep(std::time::Duration::from_millis(5));
    let mut later = decamp_shared::pages::PageSet::new();
    driver.memory.take_own_writes(&mut later);
    assert!(later.is_empty(), "it writes memory while it is paused: {later:?}");
    assert_eq!(before, driver.saved());
    driver.bus.resume();
}

/// Registers and configuration, read and written anywhere, in any length, with any value.
fn survives_any_access(make: &impl Fn() -> Box<dyn Device>) {
    let driver = Driver::of(make());
    driver.start_with_all();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..4000 {
        let offset = random() % 0x1000;
        let mut bytes = random().to_le_bytes();
        let length = [1, 2, 4, 4, 4, 8][(random() % 6) as usize];
        let address = driver.slot.address + offset;
        if random() % 2 == 0 {
            driver.bus.read(address, &mut bytes[..length]);
        } else {
            driver.bus.write(address, &bytes[..length]);
        }
    }
    driver.write(0x70, 0);
    driver.start_with_all();
    assert!(!driver.needs_reset());
}
