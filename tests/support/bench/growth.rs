//! Scenario `container-growth`: does the stop grow with the memory that is not written? The same Redis
//! with more and more values, moved by us in turns.

use crate::error::{BenchError, Result};
use crate::hosts::Hosts;
use crate::load::OtherWork;
use crate::redis_move::{Burden, ours};
use crate::row::Row;
use crate::{Bench, median_of, ms, tell};

/// MiB of random values; the last is compared with the first.
const SIZES: [u32; 3] = [256, 1024, 4096];
/// What the downtime with the most is to be at most, beside that with the least.
const MOST: f64 = 1.5;

/// All rows of the scenario.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, false)?;
    let (mut turns, mut other) = (Vec::new(), OtherWork::default());
    for number in 0..=bench.pairs {
        let mut gaps = [0.0; SIZES.len()];
        for (gap, fill_mib) in gaps.iter_mut().zip(SIZES) {
            let burden = Burden { fill_mib, children: 0 };
            let sample = ours(bench, &hosts, "container-growth", &burden, None, &mut other)?;
            *gap = ms(sample.gap);
            tell(format_args!(
                "container-growth, turn {number}: {fill_mib} MiB in {:.0} ms, gap {gap:.0} ms",
                ms(sample.total)
            ));
        }
        // The first turn warms the machine up.
        if number > 0 {
            turns.push(gaps);
        }
    }
    let pairs: Vec<(f64, f64)> = turns.iter().map(|[least, _, most]| (*most, *least)).collect();
    let note = format!(
        "The longest that the checking client waited for a reply, with {} MiB and with {} MiB of \
         values that nobody writes; {:.0} ms in the median with {} MiB. Every key was verified after \
         every move. {}",
        SIZES[2],
        SIZES[0],
        median_of(turns.iter().map(|gaps| gaps[1])),
        SIZES[1],
        other.text()
    );
    let name = ("container-growth", "downtime", "ms");
    let row = Row::beside(name, "itself with 256 MiB", &pairs, Some(MOST), note);
    Ok(vec![row.ok_or_else(|| BenchError::wrong("There are no turns to compare"))?])
}
