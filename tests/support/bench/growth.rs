//! Scenarios `container-growth` and `container-shared`: does the stop grow with memory that is not
//! written? The same Redis with more and more values, or beside more and more memory that two processes
//! share, moved by us in turns.

use crate::error::{BenchError, Result};
use crate::hosts::Hosts;
use crate::load::OtherWork;
use crate::redis_move::{Burden, ours};
use crate::row::Row;
use crate::{Bench, median_of, ms, tell};

/// Memory that grows.
struct Growth {
    scenario: &'static str,
    /// MiB of it; the last is compared with the first.
    sizes: [u32; 3],
    burden: fn(u32) -> Burden,
    /// What it is.
    what: &'static str,
    /// What the downtime with the most is to be at most, beside that with the least.
    most: f64,
}

/// What Redis has beside memory that is shared.
const VALUES_MIB: u32 = 16;

/// All rows of the scenario `container-growth`.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    Growth {
        scenario: "container-growth",
        sizes: [256, 1024, 4096],
        burden: |fill_mib| Burden { fill_mib, ..Burden::default() },
        what: "values",
        most: 1.5,
    }
    .run(bench)
}

/// All rows of the scenario `container-shared`.
pub(crate) fn run_shared(bench: &Bench) -> Result<Vec<Row>> {
    Growth {
        scenario: "container-shared",
        sizes: [64, 256, 1024],
        burden: |shared_mib| Burden { fill_mib: VALUES_MIB, shared_mib, ..Burden::default() },
        what: "memory that two processes beside Redis share",
        most: 2.0,
    }
    .run(bench)
}

impl Growth {
    fn run(&self, bench: &Bench) -> Result<Vec<Row>> {
        let hosts = Hosts::up(&bench.work, &bench.root, false)?;
        let (mut turns, mut other) = (Vec::new(), OtherWork::default());
        for number in 0..=bench.pairs {
            let mut gaps = [0.0; 3];
            for (gap, mib) in gaps.iter_mut().zip(self.sizes) {
                let burden = (self.burden)(mib);
                let sample = ours(bench, &hosts, self.scenario, &burden, None, &mut other)?;
                self.check(mib, sample.memory)?;
                *gap = ms(sample.gap);
                tell(format_args!(
                    "{}, turn {number}: {mib} MiB in {:.0} ms, gap {gap:.0} ms",
                    self.scenario,
                    ms(sample.total)
                ));
            }
            // The first turn warms the machine up.
            if number > 0 {
                turns.push(gaps);
            }
        }
        let row = self.row(&turns, &other);
        Ok(vec![row.ok_or_else(|| BenchError::wrong("There are no turns to compare"))?])
    }

    /// That the memory was copied while the container ran: what CRIU takes along instead grows as well, and
    /// would be measured as ours.
    fn check(&self, mib: u32, memory: u64) -> Result<()> {
        if memory >> 20 >= u64::from(mib) {
            return Ok(());
        }
        let (scenario, copied) = (self.scenario, memory >> 20);
        let text = format!("{scenario}: the first round had {copied} MiB, and there are {mib}");
        Err(BenchError::wrong(text))
    }

    fn row(&self, turns: &[[f64; 3]], other: &OtherWork) -> Option<Row> {
        let [least, middle, most] = self.sizes;
        let pairs: Vec<(f64, f64)> = turns.iter().map(|gaps| (gaps[2], gaps[0])).collect();
        let note = format!(
            "The longest that the checking client waited for a reply, with {most} MiB and with {least} \
             MiB of {} that nobody writes; {:.0} ms in the median with {middle} MiB. Every key was \
             verified after every move. {}",
            self.what,
            median_of(turns.iter().map(|gaps| gaps[1])),
            other.text()
        );
        let name = (self.scenario, "downtime", "ms");
        Row::beside(name, &format!("itself with {least} MiB"), &pairs, Some(self.most), note)
    }
}
