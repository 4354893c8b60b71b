//! The witness's disk: a file that is rewritten all the time and verified from the disk before.
//!
//! What belongs here: the file and who writes it. What does not: questions, memory and clocks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::{watch, word, wrong};

/// Where the disk writer has its file.
const ON_DISK: &str = "/disk/written";
/// It writes so much at a time.
const BLOCK: usize = 64 << 10;
/// This much of the file, its beginning, is rewritten all the time; the rest slowly.
const HOT_BLOCKS: usize = (16 << 20) / BLOCK;
/// Of so many blocks that are written one is of the rest.
const RARELY: usize = 8;
/// Blocks after which what was written is synchronised.
const SYNC: usize = 16;
/// So that reading is from the disk, not from memory.
const O_DIRECT: i32 = 0o40000;
/// Between two looks of a writer that rests.
const WAIT: Duration = Duration::from_millis(20);

/// What O_DIRECT reads into.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    /// What block `number` holds in pass `pass`: words that no compressor makes smaller (SplitMix64).
    fn fill(&mut self, number: usize, pass: u64) {
        let mut at = word(number as u64, pass);
        for place in self.0.as_chunks_mut::<8>().0 {
            at = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = at;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            *place = (mixed ^ mixed >> 31).to_le_bytes();
        }
    }
}

/// A file on the disk, and in which pass each block of it was written last.
struct OnDisk {
    file: File,
    /// The same, past the guest's memory.
    direct: File,
    passes: Vec<u64>,
    read: Box<Block>,
    expected: Box<Block>,
    since_sync: usize,
}

static DISK: Mutex<Option<OnDisk>> = Mutex::new(None);
/// Whether the writer is to leave the disk alone.
static RESTING: AtomicBool = AtomicBool::new(false);

impl OnDisk {
    fn create(blocks: usize) -> io::Result<Self> {
        let file =
            File::options().create(true).truncate(true).read(true).write(true).open(ON_DISK)?;
        let direct =
            OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(ON_DISK)?;
        let block = || Box::new(Block([0; BLOCK]));
        let mut disk = Self {
            file,
            direct,
            passes: vec![0; blocks],
            read: block(),
            expected: block(),
            since_sync: 0,
        };
        for number in 0..blocks {
            disk.write(number)?;
        }
        disk.file.sync_all()?;
        Ok(disk)
    }

    fn write(&mut self, number: usize) -> io::Result<()> {
        let pass = self.passes[number] + 1;
        self.expected.fill(number, pass);
        // What is hot is written to memory first, as most programs do.
        let file = if number < HOT_BLOCKS { &self.file } else { &self.direct };
        file.write_all_at(&self.expected.0, (number * BLOCK) as u64)?;
        self.passes[number] = pass;
        watch().written.fetch_add(BLOCK as u64, Ordering::Relaxed);
        self.since_sync += 1;
        if self.since_sync == SYNC {
            self.since_sync = 0;
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Whether a block on the disk is what was written last.
    fn verify(&mut self, number: usize) -> io::Result<()> {
        let pass = self.passes[number];
        self.direct.read_exact_at(&mut self.read.0, (number * BLOCK) as u64)?;
        self.expected.fill(number, pass);
        if self.read.0 != self.expected.0 {
            wrong(format!("block {number} on the disk is not that of pass {pass}"));
        }
        watch().verified.fetch_add(BLOCK as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Rewrites a file again and again, synchronously; each block is read from the disk and verified before.
pub fn keep(mebibytes: usize) -> io::Result<()> {
    let blocks = (mebibytes << 20) / BLOCK;
    *DISK.lock().unwrap() = Some(OnDisk::create(blocks)?);
    watch().file.store((blocks * BLOCK) as u64, Ordering::Relaxed);
    let (mut hot, mut rest) = ((0..HOT_BLOCKS.min(blocks)).cycle(), (HOT_BLOCKS..blocks).cycle());
    for turn in 1usize.. {
        let number = if turn % RARELY == 0 { rest.next() } else { hot.next() };
        if let Some(number) = number {
            on_disk(|disk| disk.verify(number).and_then(|()| disk.write(number)))?;
        }
        thread::sleep(Duration::from_millis(5));
        while RESTING.load(Ordering::Acquire) {
            thread::sleep(WAIT);
        }
    }
    Ok(())
}

fn on_disk(work: impl FnOnce(&mut OnDisk) -> io::Result<()>) -> io::Result<()> {
    match DISK.lock().unwrap().as_mut() {
        Some(disk) => work(disk),
        None => Err(io::Error::other("there is no file yet")),
    }
}

/// The writer stops; returns once all it wrote is on the disk.
pub fn rest() -> String {
    RESTING.store(true, Ordering::Release);
    told("at rest", on_disk(|disk| disk.file.sync_all()))
}

/// Reads all of the file from the disk.
pub fn verify_all() -> String {
    let all = on_disk(|disk| (0..disk.passes.len()).try_for_each(|number| disk.verify(number)));
    told("verified", all)
}

fn told(done: &str, result: io::Result<()>) -> String {
    match result {
        Ok(()) => done.to_owned(),
        Err(error) => {
            wrong(format!("the disk: {error}"));
            format!("not {done}: {error}")
        }
    }
}

/// It goes on.
pub fn go() {
    RESTING.store(false, Ordering::Release);
}
