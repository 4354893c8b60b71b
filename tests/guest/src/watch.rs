//! The loop: rewrite hot pages at their rate, each checked before; sweep over all pages in the
//! background; report; obey. It never halts and never waits.

use core::fmt::Arguments;

use crate::arena::Arena;
use crate::clock::{Clock, Pace};
use crate::disk::{BadBlock, Disk};
use crate::hot::HotSet;
use crate::options::{Harm, Options, Sabotage};
use crate::pattern::{Fault, Pattern};
use crate::serial;
use crate::witness::Witness;

/// Lines about single bad pages that are printed; the rest is only counted.
const BAD_LINES: u64 = 20;

/// All that the guest does and knows.
pub(crate) struct Watch {
    arena: Arena,
    pattern: Pattern,
    hot: HotSet,
    clock: Clock,
    witness: Witness,
    disk: Option<Disk>,
    pages: u64,
    /// Whether pages that were never written are left alone by the sweep.
    sparse: bool,
    report_ms: u64,
    beat: Option<Pace>,
    rate: Pace,
    sweep: Sweep,
    bad: u64,
    sabotage: Option<Sabotage>,
}

struct Sweep {
    pace: Pace,
    next: u64,
    done: u64,
    told: u64,
    /// What `bad` was when the current one began, and what the last complete one added.
    bad_before: u64,
    bad_in_last: u64,
}

enum Command {
    GoOn,
    End,
}

impl Watch {
    /// Fills all pages. The arena must be laid out for them.
    pub(crate) fn begin(
        options: &Options,
        mut arena: Arena,
        disk: Option<Disk>,
        mut clock: Clock,
    ) -> Watch {
        let pattern = Pattern::new(options.seed, options.pattern);
        let base = u64::from(options.touch);
        if options.touch {
            for page in 0..options.fill {
                pattern.write(arena.page(page), page, base);
                arena.set_version(page, base);
                clock.tick();
            }
        }
        let witness = Witness::new(options.seed);
        witness.keep(&mut arena);
        let sweep = Sweep {
            pace: clock.pace(options.sweep),
            next: 0,
            done: 0,
            told: 0,
            bad_before: 0,
            bad_in_last: 0,
        };
        let rate = clock.pace(options.rate);
        let beat = 1000_u64.checked_div(options.beat).map(|rate| clock.pace(rate));
        Watch {
            arena,
            pattern,
            hot: HotSet::new(options.fill, options.hot, options.spread, options.seed, base),
            clock,
            witness,
            disk,
            pages: options.fill,
            sparse: !options.touch,
            report_ms: options.report,
            beat,
            rate,
            sweep,
            bad: 0,
            sabotage: options.sabotage,
        }
    }

    /// Runs until told to end; whether all was clean.
    pub(crate) fn run(mut self) -> bool {
        let (pages, first) = (self.pages, self.arena.address(0));
        self.say(format_args!("filled pages={pages} first={first:#x}"));
        self.clock.take_longest_gap();
        let mut next_report = self.clock.milliseconds() + self.report_ms;
        loop {
            let now = self.clock.tick();
            if !self.hot.is_empty() && self.rate.due(now) {
                self.rewrite_next();
            }
            if self.pages > 0 && self.sweep.pace.due(now) {
                self.sweep_next();
            }
            if let Some(Err(bad)) = self.disk.as_mut().map(|disk| disk.step(&self.pattern)) {
                self.found_on_disk(&bad);
            }
            if self.beat.as_mut().is_some_and(|beat| beat.due(now)) {
                self.say(format_args!("+"));
            }
            if self.clock.milliseconds() >= next_report {
                self.report();
                next_report = self.clock.milliseconds() + self.report_ms;
                if matches!(self.obey(), Command::End) {
                    return self.bad == 0;
                }
            }
            core::hint::spin_loop();
        }
    }

    fn rewrite_next(&mut self) {
        if let Err((place, got)) = self.witness.check(&mut self.arena) {
            let want = self.witness.count;
            self.found(format_args!("BAD witness={place} want={want} got={got}"));
        }
        let page = self.hot.next(self.witness.count);
        self.check(page);
        let version = self.hot.version(page, self.witness.count) + 1;
        let sum = self.pattern.write(self.arena.page(page), page, version);
        self.arena.set_version(page, version);
        self.witness.advance(page, version, sum);
        self.witness.keep(&mut self.arena);
    }

    fn sweep_next(&mut self) {
        let page = self.sweep.next;
        if !(self.sparse && self.arena.version(page) == 0) {
            self.check(page);
        }
        self.sweep.next += 1;
        if self.sweep.next < self.pages {
            return;
        }
        self.sweep.next = 0;
        self.sweep.done += 1;
        self.sweep.bad_in_last = self.bad - self.sweep.bad_before;
        self.sweep.bad_before = self.bad;
        if let Some(sabotage) = self.sabotage.take() {
            self.harm(sabotage);
        }
    }

    /// Checks one page and its entry in the table.
    fn check(&mut self, page: u64) {
        let want = self.hot.version(page, self.witness.count);
        let tabled = self.arena.version(page);
        if tabled != want {
            self.found(format_args!("BAD table page={page} want={want} got={tabled}"));
        }
        if let Err(Fault { kind, got, claims }) =
            self.pattern.check(self.arena.page(page), page, want)
        {
            self.found(format_args!(
                "BAD page={page} kind={kind} want={want} got={got} claims={claims:#x}"
            ));
        }
    }

    /// Checks everything at once, pages that were never written included.
    fn verify(&mut self) {
        let before = self.bad;
        if let Err((place, got)) = self.witness.check(&mut self.arena) {
            let want = self.witness.count;
            self.found(format_args!("BAD witness={place} want={want} got={got}"));
        }
        for page in 0..self.pages {
            self.check(page);
            self.clock.tick();
        }
        let (pages, bad, verdict) = (self.pages, self.bad - before, self.verdict());
        self.say(format_args!("verified pages={pages} bad={bad} verdict={verdict}"));
    }

    fn report(&mut self) {
        let Witness { count, chain } = self.witness;
        if self.sweep.done > self.sweep.told {
            self.sweep.told = self.sweep.done;
            let number = self.sweep.done;
            match self.sweep.bad_in_last {
                0 => self.say(format_args!("sweep {number} clean")),
                bad => self.say(format_args!("sweep {number} bad={bad}")),
            }
        }
        if let Some((passes, blocks)) = self.disk.as_ref().map(Disk::done) {
            self.say(format_args!("disk passes={passes} blocks={blocks}"));
        }
        if let Some((way, needs_reset)) = self.disk.as_ref().and_then(Disk::spoiled) {
            let (way, says) = (way.word(), if needs_reset { "needs_reset" } else { "works" });
            self.say(format_args!("disk spoiled={way} {says}"));
        }
        let (sweeps, bad, verdict) = (self.sweep.done, self.bad, self.verdict());
        let (gap, ms) = (self.clock.take_longest_gap(), self.clock.milliseconds());
        self.say(format_args!(
            "count={count} chain={chain:016x} sweeps={sweeps} bad={bad} gap_us={gap} verdict={verdict} ms={ms}"
        ));
    }

    fn obey(&mut self) -> Command {
        while let Some(byte) = serial::received() {
            match byte {
                b'v' => self.verify(),
                b's' => self.disk.iter_mut().for_each(Disk::spoil),
                b'm' => self.mend(),
                b'q' => {
                    self.verify();
                    self.report();
                    self.say(format_args!("end"));
                    return Command::End;
                }
                _ => {}
            }
        }
        Command::GoOn
    }

    /// Resets the disk, spoiled or not.
    fn mend(&mut self) {
        if let Some(Err(why)) = self.disk.as_mut().map(Disk::set_up) {
            self.found(format_args!("BAD disk: {why}"));
        }
    }

    /// Does to one page what a broken move would do.
    fn harm(&mut self, Sabotage { harm, page }: Sabotage) {
        let version = self.hot.version(page, self.witness.count);
        let older = version.saturating_sub(1);
        match harm {
            Harm::Stale => self.overwrite(page, page, older),
            Harm::Misplaced => self.overwrite(page, page ^ 1, version),
            Harm::Lost => self.arena.page(page).fill(0),
            Harm::Torn => {
                let mut whole = *self.arena.page(page);
                self.overwrite(page, page, older);
                let old = self.arena.page(page);
                whole[256..].copy_from_slice(&old[256..]);
                *old = whole;
            }
            Harm::Rolledback => {
                self.overwrite(page, page, older);
                self.arena.set_version(page, older);
            }
            Harm::Witness => self.witness.older().write(self.arena.witness(true)),
            Harm::Registers => self.witness.older().write_registers(),
        }
        self.say(format_args!("sabotage done page={page}"));
    }

    fn overwrite(&mut self, page: u64, content_of: u64, version: u64) {
        self.pattern.write(self.arena.page(page), content_of, version);
    }

    fn found_on_disk(&mut self, BadBlock { block, want, fault }: &BadBlock) {
        match fault {
            Some(Fault { kind, got, claims }) => self.found(format_args!(
                "BAD block={block} kind={kind} want={want} got={got} claims={claims:#x}"
            )),
            None => self.found(format_args!("BAD block={block} kind=failed want={want}")),
        }
    }

    fn found(&mut self, text: Arguments<'_>) {
        self.bad += 1;
        if self.bad <= BAD_LINES {
            self.say(text);
        }
    }

    fn verdict(&self) -> &'static str {
        if self.bad == 0 { "clean" } else { "BAD" }
    }

    fn say(&mut self, text: Arguments<'_>) {
        serial::line(&mut self.clock, text);
    }
}
