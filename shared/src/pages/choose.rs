//! Whether to compress, and how: decided for each stream from what it measures.
//!
//! Pure arithmetic on times and byte counts that [`super::encode`] and [`super::send`] report.
//! A method's throughput is the slower of its own speed and the link's rate times its ratio; it
//! is used only when that clearly beats sending the pages as they are.

use std::time::Duration;

use super::batch::Encoding;

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Whatever is fastest over this link.
    #[default]
    Auto,
    /// Never.
    None,
    /// LZ4 wherever it saves anything.
    Lz4,
    /// zstd wherever it saves anything.
    Zstd,
}

/// How much faster compressed must be before it is used.
const CLEARLY: f64 = 1.15;
/// Weight of the newest figure in a running mean.
const NEWEST: f64 = 0.25;
/// Page bytes between two samples. A sample is 16 KiB, so that probing costs about a percent of a
/// stream that cannot be compressed.
const SAMPLE_EVERY: u64 = 8 << 20;
/// The link is measured over windows of at least this length.
const WINDOW: Duration = Duration::from_millis(50);
/// Above this share of a window spent in writing, the link is what limits a compressing stream.
const LINK_BOUND: f64 = 0.5;
/// How fast a link that does not limit is thought to be faster than it was seen to be, a window.
const DRIFT: f64 = 1.05;

/// What is known of one method: bytes in a second, and compressed bytes for each byte.
#[derive(Clone, Copy, Debug)]
struct Gauge {
    speed: f64,
    remains: f64,
}

/// Decides for one stream.
#[derive(Debug)]
pub(super) struct Chooser {
    setting: Compression,
    current: Encoding,
    lz4: Option<Gauge>,
    zstd: Option<Gauge>,
    /// Bytes in a second that the stream carries.
    link: Option<f64>,
    until_sample: u64,
    window: Window,
}

/// What was written since the link's rate was last reckoned.
#[derive(Debug, Default)]
struct Window {
    bytes: u64,
    total: Duration,
    writing: Duration,
}

impl Chooser {
    pub(super) fn new(setting: Compression) -> Self {
        let current = match setting {
            Compression::Auto | Compression::None => Encoding::Raw,
            Compression::Lz4 => Encoding::Lz4,
            Compression::Zstd => Encoding::Zstd,
        };
        let (lz4, zstd, link) = (None, None, None);
        Self { setting, current, lz4, zstd, link, until_sample: 0, window: Window::default() }
    }

    /// How the next block should be tried: raw, LZ4 or zstd.
    pub(super) fn method(&self) -> Encoding {
        self.current
    }

    /// Counts a block of `bytes`, and says whether a sample of it is wanted.
    pub(super) fn wants_sample(&mut self, bytes: u64) -> bool {
        if self.setting != Compression::Auto {
            return false;
        }
        let due = self.until_sample < bytes;
        self.until_sample = if due { SAMPLE_EVERY } else { self.until_sample - bytes };
        due
    }

    /// `bytes` became `compressed` bytes within `time`.
    pub(super) fn compressed(
        &mut self,
        method: Encoding,
        bytes: usize,
        compressed: usize,
        time: Duration,
    ) {
        let gauge = match method {
            Encoding::Lz4 => &mut self.lz4,
            Encoding::Zstd => &mut self.zstd,
            Encoding::Raw | Encoding::Zero => return,
        };
        let new = Gauge {
            speed: bytes as f64 / time.as_secs_f64().max(1e-9),
            remains: compressed as f64 / bytes as f64,
        };
        *gauge = Some(gauge.map_or(new, |old| Gauge {
            speed: mean(old.speed, new.speed),
            remains: mean(old.remains, new.remains),
        }));
    }

    /// `bytes` went out in `writing`, which was part of `total` since the call before.
    pub(super) fn written(&mut self, bytes: u64, writing: Duration, total: Duration) {
        self.window.bytes += bytes;
        self.window.writing += writing;
        self.window.total += total;
        if self.window.total < WINDOW {
            return;
        }
        let Window { bytes, total, writing } = std::mem::take(&mut self.window);
        let rate = bytes as f64 / total.as_secs_f64();
        let bound = writing.as_secs_f64() > LINK_BOUND * total.as_secs_f64();
        self.link = Some(match self.link {
            None => rate,
            Some(old) if self.current == Encoding::Raw || bound => mean(old, rate),
            Some(old) => (old * DRIFT).max(rate),
        });
        self.decide();
    }

    fn decide(&mut self) {
        let (Compression::Auto, Some(link)) = (self.setting, self.link) else { return };
        let through =
            |gauge: Option<Gauge>| gauge.map_or(0.0, |g| g.speed.min(link / g.remains.max(0.001)));
        let (lz4, zstd) = (through(self.lz4), through(self.zstd));
        let (method, best) = if zstd > lz4 { (Encoding::Zstd, zstd) } else { (Encoding::Lz4, lz4) };
        self.current = if best > CLEARLY * link { method } else { Encoding::Raw };
    }
}

fn mean(old: f64, new: f64) -> f64 {
    old + NEWEST * (new - old)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;

    /// Feeds a chooser `seconds` of a link of `link` MiB/s and methods of the given (MiB/s,
    /// remaining share); gives the page bytes a second that went through.
    fn simulate(link: f64, lz4: (f64, f64), zstd: (f64, f64), seconds: f64) -> (f64, Encoding) {
        let mut chooser = Chooser::new(Compression::Auto);
        let block = 256 << 10;
        let (mut now, mut pages, mut queued) = (0.0, 0.0, 0.0f64);
        while now < seconds {
            let start = now;
            if chooser.wants_sample(block as u64) {
                for (method, (speed, remains)) in [(Encoding::Lz4, lz4), (Encoding::Zstd, zstd)] {
                    let time = Duration::from_secs_f64(16384.0 / (speed * MIB));
                    chooser.compressed(method, 16384, (16384.0 * remains) as usize, time);
                    now += time.as_secs_f64();
                }
            }
            let (speed, remains) = match chooser.method() {
                Encoding::Lz4 => lz4,
                Encoding::Zstd => zstd,
                Encoding::Raw | Encoding::Zero => (f64::INFINITY, 1.0),
            };
            let spent = block as f64 / (speed * MIB);
            now += spent;
            let wire = block as f64 * remains;
            chooser.compressed(
                chooser.method(),
                block,
                wire as usize,
                Duration::from_secs_f64(spent),
            );
            // A socket buffer of 1 MiB that drains at the link's rate; copying into it costs too.
            let copying = wire / (6000.0 * MIB);
            now += copying;
            queued = (queued + wire - (now - start) * link * MIB).max(0.0);
            let blocked = ((queued - MIB) / (link * MIB)).max(0.0);
            queued -= blocked * link * MIB;
            now += blocked;
            let writing = copying + blocked;
            pages += block as f64;
            chooser.written(
                wire as u64,
                Duration::from_secs_f64(writing),
                Duration::from_secs_f64(now - start),
            );
        }
        (pages / now / MIB, chooser.method())
    }

    #[test]
    fn a_slow_link_gets_zstd_and_nearly_all_of_its_worth() {
        let (rate, _) = simulate(100.0, (700.0, 0.5), (350.0, 0.3), 20.0);
        assert!(rate > 0.85 * 100.0 / 0.3, "{rate}");
    }

    #[test]
    fn a_middling_link_gets_lz4() {
        let (rate, method) = simulate(300.0, (700.0, 0.5), (250.0, 0.4), 20.0);
        assert!(rate > 0.85 * 600.0, "{rate} with {method:?}");
    }

    #[test]
    fn a_fast_link_gets_raw_pages() {
        let (rate, method) = simulate(2500.0, (700.0, 0.5), (350.0, 0.3), 5.0);
        assert!(rate > 0.97 * 2500.0, "{rate} with {method:?}");
    }

    #[test]
    fn what_cannot_be_compressed_costs_little() {
        for link in [20.0, 100.0, 1000.0, 3000.0] {
            let (rate, method) = simulate(link, (900.0, 1.0), (600.0, 1.0), 5.0);
            assert!(rate > 0.96 * link, "{rate} of {link}");
            assert_eq!(method, Encoding::Raw);
        }
    }

    #[test]
    fn what_the_user_asks_for_is_not_second_guessed() {
        for (setting, method) in [
            (Compression::None, Encoding::Raw),
            (Compression::Lz4, Encoding::Lz4),
            (Compression::Zstd, Encoding::Zstd),
        ] {
            let mut chooser = Chooser::new(setting);
            chooser.compressed(Encoding::Lz4, 1000, 10, Duration::from_nanos(1));
            chooser.written(1000, Duration::from_secs(1), Duration::from_secs(1));
            assert!(!chooser.wants_sample(1 << 30));
            assert_eq!(chooser.method(), method);
        }
    }
}
