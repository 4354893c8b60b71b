//! A container whose keeper cannot tell what was written, and what its leaving end makes of that.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SPACE: SpaceId = SpaceId(9);

/// Memory of one process: the pages that exist, each filled with one byte.
type Memory = Arc<Mutex<BTreeMap<u64, u8>>>;

/// A container whose keeper cannot tell what was written.
struct Blind {
    memory: Memory,
    paused: bool,
    looked: bool,
}

struct Window(Memory);

impl PageReader for Window {
    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<()> {
        let memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (page, bytes) in (range.first..range.end()).zip(into.chunks_exact_mut(PAGE_SIZE)) {
            bytes.fill(memory.get(&page).copied().unwrap_or(0));
        }
        Ok(())
    }

    fn take_missed(&self) -> PageSet {
        PageSet::new()
    }
}

impl SourceWorkload for Blind {
    fn manifest(&mut self) -> Result<Manifest> {
        Ok(Manifest::default())
    }

    fn liveness(&self) -> Liveness {
        Liveness::Tracked { tracker: "page-hash".to_owned() }
    }

    fn spaces(&mut self) -> Result<Vec<SpaceInfo>> {
        Ok(Vec::new())
    }

    fn reader(&mut self) -> Result<Arc<dyn PageReader>> {
        Ok(Arc::new(Window(self.memory.clone())))
    }

    fn track(&mut self) -> Result<()> {
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        if self.paused && std::mem::replace(&mut self.looked, true) {
            return Ok(());
        }
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.keys().for_each(|page| dirty.insert(PageRange::new(SPACE, *page, 1)));
        Ok(())
    }

    fn stall(&self) -> Duration {
        Duration::ZERO
    }

    fn pause(&mut self) -> Result<()> {
        (self.paused, self.looked) = (true, false);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Section>> {
        Ok(Vec::new())
    }

    fn fence(&mut self, _token: u64) -> Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.paused = false;
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        Ok(())
    }
}

fn comparing(memory: &Memory) -> Comparing {
    Comparing::new(Box::new(Blind { memory: memory.clone(), paused: false, looked: false }))
}

/// Sends the pages of `dirty`; `there` is what the destination has.
fn send(source: &mut Comparing, dirty: &PageSet, there: &mut BTreeMap<u64, u8>) {
    let reader = source.reader().expect("a reader");
    for range in dirty.ranges() {
        let mut bytes = vec![0; range.bytes()];
        reader.read(range, &mut bytes).expect("read");
        for (page, bytes) in (range.first..range.end()).zip(bytes.chunks_exact(PAGE_SIZE)) {
            there.insert(page, bytes[0]);
        }
    }
}

fn set(memory: &Memory, page: u64, byte: u8) {
    memory.lock().unwrap_or_else(PoisonError::into_inner).insert(page, byte);
}

#[test]
fn a_page_that_changed_between_look_and_read_and_back_is_found() {
    let memory = Memory::default();
    set(&memory, 5, 1);
    let mut source = comparing(&memory);
    source.track().expect("tracks");
    let (mut dirty, mut there) = (PageSet::new(), BTreeMap::new());
    source.harvest(&mut dirty).expect("harvests");
    // Not what it was when it was named, nor what it will be.
    set(&memory, 5, 2);
    send(&mut source, &dirty, &mut there);
    set(&memory, 5, 1);
    source.pause().expect("pauses");
    let mut last = PageSet::new();
    source.harvest(&mut last).expect("harvests");
    assert!(last.contains(SPACE, 5), "the destination has {there:?}");
}

#[test]
fn what_is_held_goes_when_it_no_longer_exists() {
    let memory = Memory::default();
    set(&memory, 5, 1);
    set(&memory, 6, 1);
    let mut source = comparing(&memory);
    source.track().expect("tracks");
    let mut held = PageSet::new();
    source.harvest(&mut held).expect("harvests");
    assert_eq!(held.len(), 2);
    memory.lock().expect("no panic").remove(&5);
    source.pause().expect("pauses");
    source.harvest(&mut held).expect("harvests");
    assert_eq!(held.ranges().collect::<Vec<_>>(), [PageRange::new(SPACE, 6, 1)]);
    let mut more = PageSet::new();
    source.harvest(&mut more).expect("harvests");
    assert!(more.is_empty(), "nothing that stands still writes");
}

#[test]
fn a_second_stop_compares_again() {
    let memory = Memory::default();
    set(&memory, 5, 1);
    let mut source = comparing(&memory);
    let mut there = BTreeMap::new();
    for byte in [1, 2] {
        set(&memory, 5, byte);
        source.track().expect("tracks");
        source.pause().expect("pauses");
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvests");
        send(&mut source, &dirty, &mut there);
        assert_eq!(there.get(&5), Some(&byte));
        source.resume().expect("resumes");
    }
}

proptest! {
    /// Whatever happens between and during rounds, in the end the destination has all that exists.
    #[test]
    fn nothing_is_lost(
        rounds in prop::collection::vec(
            (prop::collection::vec((0u64..400, 0u8..4, any::<bool>()), 0..40),
             prop::collection::vec((0u64..400, 0u8..4), 0..40)),
            0..6,
        ),
    ) {
        let memory = Memory::default();
        let mut source = comparing(&memory);
        source.track().expect("tracks");
        let mut there = BTreeMap::new();
        for (before, during) in rounds {
            for (page, byte, exists) in before {
                if exists {
                    set(&memory, page, byte);
                } else {
                    memory.lock().expect("no panic").remove(&page);
                }
            }
            let mut dirty = PageSet::new();
            source.harvest(&mut dirty).expect("harvests");
            for (page, byte) in during {
                set(&memory, page, byte);
            }
            send(&mut source, &dirty, &mut there);
        }
        source.pause().expect("pauses");
        let mut last = PageSet::new();
        source.harvest(&mut last).expect("harvests");
        let before = there.clone();
        send(&mut source, &last, &mut there);
        let memory = memory.lock().expect("no panic").clone();
        for (page, byte) in &memory {
            prop_assert_eq!(there.get(page), Some(byte), "page {}", page);
            let same = before.get(page) == Some(byte);
            prop_assert_eq!(last.contains(SPACE, *page), !same, "page {} was sent for nothing", page);
        }
    }
}
