//! What a virtio device is to everything else, and what it works with. Registers, threads and the state of
//! queues are not a device's business.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::interrupt::Interrupt;
use super::poller::Poller;
use crate::error::Result as VmResult;
use crate::memory::Map;
use crate::sandbox::Allowed;

/// A chain of descriptors that the driver gave.
pub(crate) type Chain<'a> = DescriptorChain<&'a Map>;

/// Why a device cannot go on. It stands still until its driver resets it; the guest runs on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The driver's ring is none.
    #[error("Queue {queue} is not as a driver has it")]
    Queue {
        /// Number of the queue.
        queue: usize,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request is none.
    #[error("A request in queue {queue} is none: {reason}")]
    Request {
        /// Number of the queue.
        queue: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// What the device stands on failed.
    #[error("{what}")]
    Host {
        /// What was tried, and on what.
        what: String,
        /// Why it did not work.
        #[source]
        source: std::io::Error,
    },
}

impl Broken {
    /// A request in `queue` is none because of `reason`.
    pub(crate) fn request(queue: usize, reason: impl Into<String>) -> Self {
        Self::Request { queue, reason: reason.into() }
    }
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Done, with so many bytes written into it: the driver gets it back.
    Done(u32),
    /// It stays in the queue, and so does what is behind it, until [`Io::serve`] is called again.
    Later,
    /// The device keeps it, and gives it back with [`Io::give_back`]. It must have given back all of them when
    /// [`Device::settle`] returns: a chain that a device holds does not travel.
    Kept,
}

/// Who waits for a device that works, beside its own thread.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// How many.
    pub(super) any: AtomicUsize,
    /// Whether one of them is about to pause it.
    pub(super) to_pause: AtomicBool,
}

impl Waiting {
    pub(super) fn is_wanted(&self) -> bool {
        self.any.load(Ordering::SeqCst) > 0
    }

    pub(super) fn is_pausing(&self) -> bool {
        self.to_pause.load(Ordering::SeqCst)
    }
}

/// What a device works with while it works: guest memory, its queues, its interrupt.
pub(crate) struct Io<'a> {
    /// Guest memory. What is written into it counts as dirty.
    pub(crate) memory: &'a Map,
    /// The features that the driver took.
    pub(crate) features: u64,
    pub(super) queues: &'a mut [Queue],
    pub(super) interrupt: &'a Interrupt,
    pub(super) poller: &'a Poller,
    pub(super) waiting: &'a Waiting,
}

impl<'a> Io<'a> {
    /// Hands every chain in `queue` to `each`, until there is none or one has to wait; tells the driver of
    /// those that are done. Where somebody waits for the device the others come after that: a driver that never ends
    /// adding to a queue keeps nobody from it.
    ///
    /// # Errors
    /// When the ring is none, or `each` says so.
    pub(crate) fn serve(
        &mut self,
        queue: usize,
        mut each: impl FnMut(&Map, Chain<'_>) -> Result<Served, Broken>,
    ) -> Result<(), Broken> {
        let memory = self.memory;
        let wrong = |source| Broken::Queue { queue, source };
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else {
            return Ok(());
        };
        let (mut done, mut left) = (false, false);
        'again: loop {
            ring.disable_notification(memory).map_err(wrong)?;
            while let Some(chain) = ring.iter(memory).map_err(wrong)?.next() {
                let head = chain.head_index();
                match each(memory, chain)? {
                    Served::Done(length) => {
                        ring.add_used(memory, head, length).map_err(wrong)?;
                        done = true;
                    }
                    Served::Kept => {}
                    Served::Later => {
                        ring.go_to_previous_position();
                        break 'again;
                    }
                }
                left = self.waiting.is_wanted();
                if left {
                    break 'again;
                }
            }
            // What came before the driver was told to speak up again is looked at once more.
            if !ring.enable_notification(memory).map_err(wrong)? {
                break;
            }
        }
        if left {
            self.again(queue);
        }
        if done { self.tell(queue) } else { Ok(()) }
    }

    /// Whether somebody waits for the device: a vCPU that reads a register, and cannot be stopped before it has, or
    /// who wants to pause it. What can be put back then is done later.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.is_wanted()
    }

    /// Has `queue` looked at once more, after everybody who waits.
    pub(crate) fn again(&self, queue: usize) {
        self.poller.kick(queue);
    }

    /// Asks the driver to speak up when it adds to `queue`; true when it has done so already.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn listen(&mut self, queue: usize) -> Result<bool, Broken> {
        let wrong = |source| Broken::Queue { queue, source };
        match self.queues.get_mut(queue).filter(|ring| ring.ready()) {
            Some(ring) => ring.enable_notification(self.memory).map_err(wrong),
            None => Ok(false),
        }
    }

    /// Gives chain `head` of `queue`, which was kept, back with `length` bytes written. The driver is not told.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn give_back(&mut self, queue: usize, head: u16, length: u32) -> Result<(), Broken> {
        let ring = self
            .queues
            .get_mut(queue)
            .ok_or_else(|| Broken::request(queue, "there is no such queue"))?;
        ring.add_used(self.memory, head, length).map_err(|source| Broken::Queue { queue, source })
    }

    /// Takes the next chain of `queue`, which the device keeps until it gives it back or puts it back.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn take(&mut self, queue: usize) -> Result<Option<Chain<'a>>, Broken> {
        let memory = self.memory;
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else {
            return Ok(None);
        };
        let chains = ring.iter(memory).map(|mut chains| chains.next());
        chains.map_err(|source| Broken::Queue { queue, source })
    }

    /// The `count` chains of `queue` that were taken last, and not given back, are as if they had not been.
    pub(crate) fn put_back(&mut self, queue: usize, count: usize) {
        if let Some(ring) = self.queues.get_mut(queue) {
            ring.set_next_avail(ring.next_avail().wrapping_sub(count as u16));
        }
    }

    /// Gives `chains` of `queue`, which were kept, back all at once: each by its first descriptor, with so many
    /// bytes written. The driver sees all of them or none, and is not told.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn give_back_together(
        &mut self,
        queue: usize,
        chains: &[(u16, u32)],
    ) -> Result<(), Broken> {
        /// Where the rows of a used ring begin, and their size.
        const ROWS: u64 = 4;
        const ROW: u64 = 8;
        let Some((last, before)) = chains.split_last() else { return Ok(()) };
        let memory = self.memory;
        let wrong = |source| Broken::Queue { queue, source };
        let ring = self
            .queues
            .get_mut(queue)
            .ok_or_else(|| Broken::request(queue, "there is no such queue"))?;
        // Rows that the index does not cover yet are nobody's; the last one brings the index with it.
        for (head, length) in before {
            let place = ROWS + u64::from(ring.next_used() % ring.size().max(1)) * ROW;
            let row = u64::from(*head) | u64::from(*length) << 32;
            let at = GuestAddress(ring.used_ring().saturating_add(place));
            memory
                .write_obj(row.to_le(), at)
                .map_err(|error| wrong(virtio_queue::Error::GuestMemory(error)))?;
            ring.set_next_used(ring.next_used().wrapping_add(1));
        }
        ring.add_used(memory, last.0, last.1).map_err(wrong)
    }

    /// Tells the driver that chains of `queue` came back, whether it wants to know or not: where some came back
    /// together, the ring's own count of them is short.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn tell_in_any_case(&mut self, queue: usize) -> Result<(), Broken> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        let asked = ring.needs_notification(self.memory);
        asked.map_err(|source| Broken::Queue { queue, source })?;
        self.interrupt.used();
        Ok(())
    }

    /// Tells the driver that chains of `queue` came back, if it wants to know.
    ///
    /// # Errors
    /// When the ring is none.
    pub(crate) fn tell(&mut self, queue: usize) -> Result<(), Broken> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        let wanted = ring.needs_notification(self.memory);
        if wanted.map_err(|source| Broken::Queue { queue, source })? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Tells the driver that the configuration has changed.
    pub(crate) fn config_changed(&self) {
        self.interrupt.config_changed();
    }
}

/// A virtio device. Every call is made with the device's lock held, by its own thread or by a vCPU that
/// accesses its registers.
pub(crate) trait Device: Send + fmt::Debug {
    /// Its type (Virtual I/O Device 1.2, section 5).
    fn id(&self) -> u32;
    /// Version of [`Device::save`]'s bytes and of what they mean.
    fn version(&self) -> u32;
    /// Features that it offers, besides those of rings and transport.
    fn features(&self) -> u64;
    /// The most entries that each of its queues may have, powers of two.
    fn queues(&self) -> &[u16];
    /// Its configuration as a driver reads it now.
    fn config(&self) -> Vec<u8>;
    /// The driver writes `data` at `offset` of the configuration, which may be anywhere.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        tracing::debug!("Nothing can be written at {offset} ({} bytes)", data.len());
    }
    /// What its thread asks of the kernel, beside what every device's does.
    fn allowed(&self) -> Allowed {
        Allowed::default()
    }
    /// Called once, before anything else: what it has to watch besides its queues goes to `poller`.
    ///
    /// # Errors
    /// When the kernel refuses that.
    fn attach(&mut self, poller: &Poller) -> VmResult<()> {
        let _ = poller;
        Ok(())
    }
    /// The driver set it up and took `io.features`.
    ///
    /// # Errors
    /// When it cannot work.
    fn start(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let _ = io;
        Ok(())
    }
    /// The driver added to `queue`, or may have.
    ///
    /// # Errors
    /// When it cannot go on.
    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken>;
    /// What it watches as `token` is ready.
    ///
    /// # Errors
    /// When it cannot go on.
    fn on_ready(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        let _ = (token, io);
        Ok(())
    }
    /// Ends all that is under way: no chain is kept, and nothing that this device does reaches guest memory or
    /// the host once it returns. Called before every pause.
    ///
    /// # Errors
    /// When it cannot.
    fn settle(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let _ = io;
        Ok(())
    }
    /// It came from another host, or out of a file, and works from here on.
    ///
    /// # Errors
    /// When it cannot.
    fn arrived(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let _ = io;
        Ok(())
    }
    /// As when it was made: its driver is gone.
    fn reset(&mut self);
    /// What of it has to travel, besides registers and queues.
    fn save(&self) -> Vec<u8>;
    /// Takes over what [`Device::save`] of another build or host gave. `features` is what the driver took.
    ///
    /// # Errors
    /// When it is not that, in words.
    fn load(&mut self, bytes: &[u8], features: u64) -> Result<(), String>;
}
