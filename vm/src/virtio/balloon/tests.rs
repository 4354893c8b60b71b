//! The balloon as drivers use it, and as hostile ones do.

use std::io::Write as _;

use decamp_shared::pages::{PageReader, PageSet};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress};

use super::super::conformance::{Driver, MEMORY, conforms};
use super::*;
use crate::memory::GUEST_MEMORY;
use crate::reader::GuestReader;
use crate::testing::wait_for;

/// Pages that the tests use: between the rings and the buffers of the driver.
const USED: u64 = 0x10_0000;
const PAGE: u64 = 4096;
/// Where drivers report, that of Linux first.
const REPORTS: [usize; 2] = [2, 4];
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

fn started(features: u64) -> Driver {
    let driver = Driver::of(Box::<Balloon>::default());
    driver.start(features);
    driver
}

fn fill(driver: &Driver, first: u64, count: u64) {
    for page in first..first + count {
        let at = GuestAddress(USED + page * PAGE);
        driver.memory.map().write_slice(&[0xa5; PAGE as usize], at).expect("write");
    }
}

/// Those of the pages from [`USED`] that are held, by number.
fn held(driver: &Driver, count: u64) -> Vec<u64> {
    let mut populated = PageSet::new();
    driver.memory.populated(&mut populated).expect("populated");
    (0..count).filter(|page| populated.contains(GUEST_MEMORY, USED / PAGE + page)).collect()
}

fn report(driver: &Driver, queue: usize, buffers: &[(u64, usize)]) {
    let buffers: Vec<_> = buffers.iter().map(|(at, length)| (*at, *length, WRITE)).collect();
    driver.offer_at(queue, &buffers);
    driver.kick(queue);
}

fn inflate(driver: &Driver, queue: usize, frames: &[u32]) {
    let mut numbers = Vec::new();
    for frame in frames {
        numbers.write_all(&frame.to_le_bytes()).expect("memory");
    }
    driver.offer(queue, &[&numbers], &[]);
    driver.kick(queue);
}

#[test]
fn it_is_a_virtio_device() {
    conforms(|| Box::<Balloon>::default());
}

#[test]
fn reported_pages_are_given_back_and_not_sent() {
    for queue in REPORTS {
        let driver = started(REPORTING);
        fill(&driver, 0, 600);
        // Two runs, with bytes at their ends that are no whole pages.
        report(&driver, queue, &[(USED + 16 * PAGE, 256 << 12), (USED + 399 * PAGE + 1, 8191)]);
        assert_eq!(driver.take(queue).1, 0, "nothing was written into them");
        let left: Vec<u64> = (0..16).chain(272..400).chain(401..600).collect();
        assert_eq!(held(&driver, 600), left);
        // What a move reads of it.
        let mut set = PageSet::new();
        driver.memory.populated(&mut set).expect("populated");
        let descriptor = driver.memory.descriptor(false).expect("descriptor");
        let reader = GuestReader::new(descriptor, driver.memory.page_limit());
        let mut contents = 0;
        for range in set.ranges() {
            let mut bytes = vec![0; range.bytes()];
            reader.read(range, &mut bytes).expect("read");
            contents += bytes.chunks(4096).filter(|page| **page == [0xa5; 4096]).count();
        }
        assert_eq!(contents, 600 - 257);
        // A page that is used again is there again, and counts as any other.
        fill(&driver, 20, 2);
        assert!(held(&driver, 600).contains(&20));
        assert!(!driver.needs_reset());
    }
}

#[test]
fn inflated_pages_are_given_back_and_what_the_driver_says_is_kept() {
    let driver = started(0);
    fill(&driver, 0, 64);
    let frame = |page: u64| (USED / PAGE + page) as u32;
    inflate(&driver, INFLATE, &[frame(9), frame(3), frame(2), frame(4), frame(3), frame(63)]);
    driver.take(INFLATE);
    let left: Vec<u64> = (0..63).filter(|page| ![2, 3, 4, 9].contains(page)).collect();
    assert_eq!(held(&driver, 64), left);
    inflate(&driver, DEFLATE, &[frame(9)]);
    driver.take(DEFLATE);
    driver.write(0x104, 5);
    assert_eq!(driver.config(0, 16), [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Its target is not the driver's to write.
    driver.write(0x100, 77);
    driver.write(0x108, 77);
    assert_eq!((driver.read(0x100), driver.read(0x108)), (0, 0));
    let there = driver.moved_to(Box::<Balloon>::default()).expect("moved");
    assert_eq!(there.read(0x104), 5);
    there.write(0x70, 0);
    assert_eq!(there.read(0x104), 0, "a new driver has no balloon");
}

#[test]
fn free_pages_that_hold_something_stay_what_they_are() {
    let driver = started(REPORTING | PAGE_POISON);
    fill(&driver, 0, 32);
    driver.write(0x10c, 0xaaaa_aaaa);
    report(&driver, 2, &[(USED, 8 << 12)]);
    driver.take(2);
    assert_eq!(held(&driver, 32).len(), 32);
    driver.write(0x10c, 0);
    report(&driver, 2, &[(USED, 8 << 12)]);
    driver.take(2);
    assert_eq!(held(&driver, 32).len(), 24, "zeros are what holes hold");
}

#[test]
fn what_is_no_memory_breaks_the_balloon_alone() {
    let breaks = |what: &str, features: u64, act: &dyn Fn(&Driver)| {
        let driver = started(features);
        fill(&driver, 0, 8);
        act(&driver);
        wait_for(what, || driver.needs_reset());
        assert_eq!(held(&driver, 8).len(), 8, "{what}");
        driver.start(features);
        assert!(!driver.needs_reset());
    };
    breaks("a report beyond memory", REPORTING, &|driver| {
        report(driver, 2, &[(MEMORY - PAGE, 8192)]);
    });
    breaks("a report beyond addresses", REPORTING, &|driver| {
        report(driver, 4, &[(u64::MAX - 100, 4096)]);
    });
    breaks("a report that can be read", REPORTING, &|driver| {
        driver.offer_at(2, &[(USED, 4096, 0)]);
        driver.kick(2);
    });
    let indirect = 1 << VIRTIO_RING_F_INDIRECT_DESC;
    breaks("a report that is longer than its queue", REPORTING | indirect, &|driver| {
        let mut table = Vec::new();
        for next in 1..=129u16 {
            table.extend((USED + 100 * PAGE).to_le_bytes());
            table.extend(4096u32.to_le_bytes());
            let more = if next < 129 { VRING_DESC_F_NEXT as u16 } else { 0 };
            table.extend([WRITE | more, next].map(u16::to_le_bytes).concat());
        }
        let at = USED + 200 * PAGE;
        driver.memory.map().write_slice(&table, GuestAddress(at)).expect("a table");
        driver.offer_at(2, &[(at, table.len(), VRING_DESC_F_INDIRECT as u16)]);
        driver.kick(2);
    });
    breaks("a report of who reports nothing", 0, &|driver| report(driver, 4, &[(USED, 4096)]));
    breaks("a frame beyond memory", 0, &|driver| inflate(driver, INFLATE, &[u32::MAX]));
    breaks("half a number", 0, &|driver| {
        driver.offer(INFLATE, &[&[0; 6]], &[]);
        driver.kick(INFLATE);
    });
    breaks("too many numbers", 0, &|driver| inflate(driver, INFLATE, &[256; MOST_NUMBERS / 4 + 1]));
}
