//! The command line: `key=value` words. An unknown key or a bad value is an error, so that a test
//! that mistypes one does not pass by accident.

use crate::pattern::Kind;

/// Room for a command line; what is longer is refused.
pub(crate) const LENGTH: usize = 1024;

/// What the command line asked for.
pub(crate) struct Options {
    /// Pages to fill.
    pub(crate) fill: u64,
    /// Pages to keep dirty.
    pub(crate) hot: u64,
    /// Hot pages a second; 0: as fast as it can.
    pub(crate) rate: u64,
    /// Pages a second that the background check looks at; 0: as fast as it can.
    pub(crate) sweep: u64,
    /// Where every page's content comes from.
    pub(crate) seed: u64,
    /// What pages look like.
    pub(crate) pattern: Kind,
    /// Whether the hot pages lie scattered over everything, or side by side in the middle.
    pub(crate) spread: bool,
    /// Milliseconds between reports.
    pub(crate) report: u64,
    /// Milliseconds between heartbeats, lines of one `+`; 0: none.
    pub(crate) beat: u64,
    /// Whether all pages are written at the start.
    pub(crate) touch: bool,
    /// Blocks of 4 KiB of the first disk, which are rewritten all the time; 0: none.
    pub(crate) disk: u64,
    /// The counter's kHz, when told.
    pub(crate) tsc: Option<u64>,
    /// Damage to do by itself, once, after the first clean sweep.
    pub(crate) sabotage: Option<Sabotage>,
}

/// Damage done on purpose to one page, to show that it is found.
#[derive(Clone, Copy)]
pub(crate) struct Sabotage {
    /// What happens to it.
    pub(crate) harm: Harm,
    /// The page.
    pub(crate) page: u64,
}

/// The ways in which a move can go wrong.
#[derive(Clone, Copy)]
pub(crate) enum Harm {
    /// The page holds an older version, whole.
    Stale,
    /// Half of the page holds an older version.
    Torn,
    /// The page holds zeros.
    Lost,
    /// The page holds another page's content.
    Misplaced,
    /// The page and its entry in the version table are both older, and agree.
    Rolledback,
    /// One copy of count and chain in memory is older.
    Witness,
    /// The CPU is older than memory.
    Registers,
}

/// A word of the command line that makes no sense.
pub(crate) struct BadWord<'a>(pub(crate) &'a str);

impl Options {
    /// Reads the command line.
    pub(crate) fn parse(text: &str) -> Result<Options, BadWord<'_>> {
        let mut options = Options {
            fill: pages(64),
            hot: pages(4),
            rate: 10_000,
            sweep: 131_072,
            seed: 1,
            pattern: Kind::Random,
            spread: false,
            report: 1000,
            beat: 0,
            touch: true,
            disk: 0,
            tsc: None,
            sabotage: None,
        };
        for word in text.split_ascii_whitespace() {
            // QEMU's multiboot puts the image's path in front.
            if let Some((key, value)) = word.split_once('=') {
                options.set(key, value).ok_or(BadWord(word))?;
            }
        }
        if options.hot > options.fill {
            return Err(BadWord("hot: more than fill"));
        }
        if options.sabotage.is_some_and(|sabotage| sabotage.page >= options.fill) {
            return Err(BadWord("sabotage: beyond fill"));
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "fill" => self.fill = mebibytes(value)?,
            "hot" => self.hot = mebibytes(value)?,
            "rate" => self.rate = number(value, 1 << 30)?,
            "sweep" => self.sweep = number(value, 1 << 30)?,
            "seed" => self.seed = number(value, u64::MAX)?,
            "report" => self.report = number(value, 1 << 30)?.max(1),
            "beat" => self.beat = number(value, 1000)?,
            "disk" => self.disk = mebibytes(value)?,
            "tsc" => self.tsc = Some(number(value, 20_000_000)?.max(1)),
            "pattern" => {
                self.pattern = match value {
                    "random" => Kind::Random,
                    "compressible" => Kind::Compressible,
                    "zero" => Kind::Zero,
                    _ => return None,
                }
            }
            "place" => self.spread = choice(value, "spread", "middle")?,
            "touch" => self.touch = choice(value, "all", "none")?,
            "sabotage" => self.sabotage = Some(sabotage(value)?),
            _ => return None,
        }
        Some(())
    }
}

fn pages(mebibytes: u64) -> u64 {
    mebibytes * 256
}

fn mebibytes(value: &str) -> Option<u64> {
    number(value, 1 << 20).map(pages)
}

fn number(value: &str, most: u64) -> Option<u64> {
    value.parse().ok().filter(|&number| number <= most)
}

fn choice(value: &str, yes: &str, no: &str) -> Option<bool> {
    (value == yes || value == no).then_some(value == yes)
}

fn sabotage(value: &str) -> Option<Sabotage> {
    let (harm, page) = value.split_once(':')?;
    let harm = match harm {
        "stale" => Harm::Stale,
        "torn" => Harm::Torn,
        "lost" => Harm::Lost,
        "misplaced" => Harm::Misplaced,
        "rolledback" => Harm::Rolledback,
        "witness" => Harm::Witness,
        "registers" => Harm::Registers,
        _ => return None,
    };
    Some(Sabotage { harm, page: number(page, u64::MAX)? })
}
