//! The console device (Virtual I/O Device 1.2, section 5.3) with its one port, `hvc0` to Linux. What is printed
//! goes where the serial port's output goes; what is typed comes from the same keyboard, while the guest printed
//! here last.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::EpollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::device::{Broken, Chain, Device, Io, Served};
use super::poller::Poller;
use crate::console::{Output, Voice};
use crate::error::{Result as VmResult, VmError};
use crate::memory::Map;
use crate::serial::MAX_QUEUE;

/// What is typed.
const RECEIVE: usize = 0;
/// What is printed.
const TRANSMIT: usize = 1;
const QUEUES: [u16; 2] = [64; 2];
/// The most bytes that are printed of one request; more are lost. Linux prints at most 32 KiB.
const MOST_PRINTED: usize = 1 << 20;

/// What is typed at the virtio console and waits for the guest. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Typing {
    waiting: Arc<Mutex<VecDeque<u8>>>,
    typed: Arc<EventFd>,
}

impl Typing {
    /// Nothing typed.
    ///
    /// # Errors
    /// When the kernel gives no event.
    pub(crate) fn new() -> VmResult<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let typed = EventFd::from_flags(flags)
            .map_err(|error| VmError::refused("make the event of the virtio console", error))?;
        Ok(Self { waiting: Arc::default(), typed: Arc::new(typed) })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody types; how many bytes were taken.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.lock();
        let taken = bytes.len().min(MAX_QUEUE - waiting.len());
        waiting.extend(&bytes[..taken]);
        drop(waiting);
        if let Err(error) = self.typed.write(1) {
            // Its counter is full: the device knows.
            tracing::debug!("What was typed was told once too often: {error}");
        }
        taken
    }
}

/// The console.
#[derive(Debug)]
pub(crate) struct VirtioConsole {
    output: Output,
    typing: Typing,
}

impl VirtioConsole {
    /// A console that prints to the places of `output` and reads from `typing`.
    pub(crate) fn new(output: &Output, typing: &Typing) -> Self {
        Self { output: output.of(Voice::Virtio), typing: typing.clone() }
    }

    fn print(&mut self, map: &Map, chain: Chain<'_>) -> Result<(), Broken> {
        let wrong = |reason: String| Broken::request(TRANSMIT, reason);
        let mut reader = chain.reader(map).map_err(|error| wrong(error.to_string()))?;
        let all = reader.available_bytes();
        let mut left = all.min(MOST_PRINTED);
        let mut bytes = [0; 4096];
        while left > 0 {
            let part = &mut bytes[..left.min(4096)];
            reader.read_exact(part).map_err(|error| wrong(error.to_string()))?;
            left -= part.len();
            // A place that cannot take it loses it, and says so itself.
            let _ = self.output.write_all(part);
        }
        self.output.lose(all.saturating_sub(MOST_PRINTED) as u64);
        Ok(())
    }

    /// Fills one buffer with what was typed.
    fn hand_over(&mut self, map: &Map, chain: Chain<'_>) -> Result<Served, Broken> {
        let wrong = |reason: String| Broken::request(RECEIVE, reason);
        let mut waiting = self.typing.lock();
        if waiting.is_empty() {
            return Ok(Served::Later);
        }
        let mut writer = chain.writer(map).map_err(|error| wrong(error.to_string()))?;
        let count = waiting.len().min(writer.available_bytes());
        let bytes = &waiting.make_contiguous()[..count];
        writer.write_all(bytes).map_err(|error| wrong(error.to_string()))?;
        waiting.drain(..count);
        Ok(Served::Done(count as u32))
    }
}

impl Device for VirtioConsole {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn version(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    /// All that the specification has there belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn attach(&mut self, poller: &Poller) -> VmResult<()> {
        let watched = poller.watch(&*self.typing.typed, EpollFlags::EPOLLIN, 0);
        watched
            .map_err(|error| VmError::refused("watch what is typed at the virtio console", error))
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.serve(queue, |memory, chain| {
            if queue == RECEIVE {
                self.hand_over(memory, chain)
            } else {
                self.print(memory, chain)?;
                Ok(Served::Done(0))
            }
        })
    }

    fn on_ready(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        // Before what was typed is looked at, so that nothing that comes later is missed.
        let _ = self.typing.typed.read();
        self.on_queue(RECEIVE, io)
    }

    /// Nobody is left who would read it: what is typed next is for whoever prints next.
    fn reset(&mut self) {
        self.typing.lock().clear();
        if self.output.heard() == Voice::Virtio {
            self.output.hear(Voice::Serial);
        }
    }

    /// Whether the guest printed here last, one byte; what was typed and waits.
    fn save(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.output.heard() == Voice::Virtio)];
        bytes.extend(&*self.typing.lock());
        bytes
    }

    fn load(&mut self, bytes: &[u8], _features: u64) -> Result<(), String> {
        let (last, typed) = match bytes {
            [last @ (0 | 1), typed @ ..] => (*last, typed),
            _ => return Err("it does not say whether the guest printed last".into()),
        };
        if typed.len() > MAX_QUEUE {
            return Err(format!("{} typed bytes wait, at most {MAX_QUEUE} can", typed.len()));
        }
        if last == 1 {
            self.output.hear(Voice::Virtio);
        }
        // Whoever typed here already typed before the guest came: that goes with what came with it.
        *self.typing.lock() = typed.iter().copied().collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::conformance::{Driver, conforms};
    use super::*;
    use crate::testing::wait_for;

    /// A console whose output is in a file.
    struct Bench {
        dir: tempfile::TempDir,
        output: Output,
        typing: Typing,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("directory");
            let output = Output::to_log(&dir.path().join("log")).expect("log");
            Self { dir, output, typing: Typing::new().expect("typing") }
        }

        fn device(&self) -> Box<VirtioConsole> {
            Box::new(VirtioConsole::new(&self.output, &self.typing))
        }

        fn log(&self) -> Vec<u8> {
            read(&self.dir.path().join("log"))
        }
    }

    fn read(path: &Path) -> Vec<u8> {
        std::fs::read(path).expect("log")
    }

    fn print(driver: &Driver, parts: &[&[u8]]) {
        driver.offer(TRANSMIT, parts, &[]);
        driver.kick(TRANSMIT);
        driver.take(TRANSMIT);
    }

    #[test]
    fn it_is_a_virtio_device() {
        let bench = Bench::new();
        conforms(|| {
            let typing = Typing::new().expect("typing");
            Box::new(VirtioConsole::new(&bench.output, &typing))
        });
    }

    #[test]
    fn what_is_printed_is_logged_and_what_is_typed_is_read() {
        let bench = Bench::new();
        let driver = Driver::of(bench.device());
        driver.start(0);
        assert_eq!(bench.output.heard(), Voice::Serial);
        print(&driver, &[b"hello, ", b"world\n"]);
        assert_eq!(bench.log(), b"hello, world\n");
        assert_eq!(bench.output.heard(), Voice::Virtio);
        // Buffers first, and then what is typed; and the other way round.
        let offers = [driver.offer(RECEIVE, &[], &[4]), driver.offer(RECEIVE, &[], &[4])];
        driver.kick(RECEIVE);
        assert_eq!(bench.typing.type_in(b"abcdef"), 6);
        let (_, length) = driver.take(RECEIVE);
        assert_eq!(driver.written(&offers[0], length), b"abcd");
        let (_, length) = driver.take(RECEIVE);
        assert_eq!(driver.written(&offers[1], length), b"ef");
        bench.typing.type_in(b"x");
        assert_eq!(driver.request(RECEIVE, &[], 16), b"x");
        let mut serial = bench.output.clone();
        serial.write_all(b"!").expect("print");
        assert_eq!(bench.output.heard(), Voice::Serial);
    }

    #[test]
    fn typed_bytes_are_bounded_and_travel() {
        let bench = Bench::new();
        let driver = Driver::of(bench.device());
        driver.start(0);
        print(&driver, &[b"login: "]);
        let typed: Vec<u8> = (0..MAX_QUEUE + 10).map(|at| at as u8).collect();
        assert_eq!(bench.typing.type_in(&typed), MAX_QUEUE);
        assert_eq!(bench.typing.type_in(&typed), 0);
        let other = Bench::new();
        let there = driver.moved_to(other.device()).expect("moved");
        assert_eq!(other.output.heard(), Voice::Virtio, "it answers where it was asked");
        there.bus.resume();
        assert_eq!(there.request(RECEIVE, &[], 2 * MAX_QUEUE), &typed[..MAX_QUEUE]);
        other.typing.type_in(b"more");
        assert_eq!(there.request(RECEIVE, &[], 64), b"more");
        driver.write(0x70, 0);
        assert_eq!(bench.output.heard(), Voice::Serial);
        assert!(bench.typing.lock().is_empty(), "the one who would have read it is gone");
    }

    #[test]
    fn output_without_end_is_cut_and_a_section_that_is_none_refused() {
        let bench = Bench::new();
        let driver = Driver::of(bench.device());
        driver.start(0);
        // The same megabyte again and again, as only a guest that means ill does.
        let part = (0x10_0000, 1 << 20, 0);
        driver.offer_at(TRANSMIT, &[part; 20]);
        driver.kick(TRANSMIT);
        driver.take(TRANSMIT);
        assert_eq!(bench.log().len(), MOST_PRINTED);
        wait_for("the rest to be counted", || bench.output.lost() == 19 << 20);
        let mut device = bench.device();
        assert!(device.load(&[], 0).is_err() && device.load(&[2], 0).is_err());
        assert!(device.load(&vec![0; MAX_QUEUE + 2], 0).is_err());
        assert!(device.load(&vec![0; MAX_QUEUE + 1], 0).is_ok());
    }
}
