//! The entropy device (Virtual I/O Device 1.2, section 5.4): gives the guest random bytes of this host's kernel.

use std::io::Write;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{Broken, Device, Io, Served};

const QUEUE: usize = 0;
const QUEUES: [u16; 1] = [64];
/// The most bytes that one request gets: who wants more asks again.
const AT_ONCE: usize = 64 * 1024;

/// Random bytes. It has no state.
#[derive(Debug, Default)]
pub(crate) struct Rng;

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
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

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn on_queue(&mut self, _queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.serve(QUEUE, |memory, chain| {
            let failed = |reason: String| Broken::request(QUEUE, reason);
            let mut writer = chain.writer(memory).map_err(|error| failed(error.to_string()))?;
            let mut bytes = vec![0; writer.available_bytes().min(AT_ONCE)];
            fill(&mut bytes)?;
            writer.write_all(&bytes).map_err(|error| failed(error.to_string()))?;
            Ok(Served::Done(bytes.len() as u32))
        })
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn load(&mut self, bytes: &[u8], _features: u64) -> Result<(), String> {
        if bytes.is_empty() {
            Ok(())
        } else {
            Err(format!("{} bytes that mean nothing", bytes.len()))
        }
    }
}

/// Fills `bytes` with randomness of the kernel's.
fn fill(bytes: &mut [u8]) -> Result<(), Broken> {
    rand::TryRngCore::try_fill_bytes(&mut rand::rngs::OsRng, bytes).map_err(|error| Broken::Host {
        what: "The host gives no random bytes".into(),
        source: std::io::Error::other(error),
    })
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{Driver, conforms};
    use super::*;

    #[test]
    fn it_is_a_virtio_device() {
        conforms(|| Box::new(Rng));
    }

    #[test]
    fn each_request_gets_other_bytes() {
        let driver = Driver::of(Box::new(Rng));
        driver.start(0);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let got = driver.request(QUEUE, &[], 32);
            assert_eq!(got.len(), 32);
            assert!(!seen.contains(&got) && got != [0; 32], "{got:?}");
            seen.push(got);
        }
        assert_eq!(driver.request(QUEUE, &[], AT_ONCE + 4096).len(), AT_ONCE);
    }
}
