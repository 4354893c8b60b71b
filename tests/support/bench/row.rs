//! A benchmark's rows: minimum, median and maximum of both sides, their ratios, and whether the
//! target was met. Arithmetic and drawing; nothing here measures anything.

use std::fmt::Write;

use serde_json::{Value, json};

/// Minimum, median and maximum of some measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// One line of the result, as the benchmark contract has it.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    scenario: &'static str,
    metric: &'static str,
    unit: &'static str,
    peer: Option<String>,
    ours: Spread,
    theirs: Option<Spread>,
    ratio: Option<Spread>,
    target: Option<f64>,
    met: bool,
    note: Option<String>,
}

impl Spread {
    /// Of at least one value; the median of an even number of values is the mean of the middle two.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let half = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[half],
            _ => (sorted[half - 1] + sorted[half]) / 2.0,
        };
        Some(Self { min, median, max })
    }

    fn json(self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        json!({"min": round(self.min), "median": round(self.median), "max": round(self.max)})
    }

    fn text(self) -> String {
        format!("{:.1} {:.1} {:.1}", self.min, self.median, self.max)
    }
}

impl Row {
    /// A comparison: one (ours, theirs) for each pair. A ratio is ours over theirs within one pair.
    /// `target` is the most that the median ratio may be.
    pub(crate) fn beside(
        name: (&'static str, &'static str, &'static str),
        peer: &str,
        pairs: &[(f64, f64)],
        target: Option<f64>,
        note: String,
    ) -> Option<Self> {
        let (scenario, metric, unit) = name;
        let ratio = Spread::of(pairs.iter().map(|(ours, theirs)| ours / theirs))?;
        Some(Self {
            scenario,
            metric,
            unit,
            peer: Some(peer.to_owned()),
            ours: Spread::of(pairs.iter().map(|pair| pair.0))?,
            theirs: Spread::of(pairs.iter().map(|pair| pair.1)),
            ratio: Some(ratio),
            target,
            met: target.is_none_or(|most| ratio.median <= most),
            note: Some(note),
        })
    }

    /// A figure without a peer. `target` is the most that any of the values may be, in the row's
    /// unit.
    pub(crate) fn alone(
        name: (&'static str, &'static str, &'static str),
        values: &[f64],
        target: f64,
        note: String,
    ) -> Option<Self> {
        let (scenario, metric, unit) = name;
        let ours = Spread::of(values.iter().copied())?;
        Some(Self {
            scenario,
            metric,
            unit,
            peer: None,
            ours,
            theirs: None,
            ratio: None,
            target: Some(target),
            met: ours.max <= target,
            note: Some(note),
        })
    }

    /// A figure without a peer that is measured to be known.
    pub(crate) fn without_target(
        name: (&'static str, &'static str, &'static str),
        values: &[f64],
        note: String,
    ) -> Option<Self> {
        Some(Self { target: None, ..Self::alone(name, values, f64::INFINITY, note)? })
    }

    fn json(&self) -> Value {
        json!({
            "scenario": self.scenario, "metric": self.metric, "unit": self.unit, "peer": self.peer,
            "ours": self.ours.json(), "theirs": self.theirs.map(Spread::json),
            "ratio": self.ratio.map(Spread::json), "target": self.target, "met": self.met,
            "note": self.note,
        })
    }

    fn cells(&self) -> [String; 7] {
        let ratio =
            |ratio: Spread| format!("{:.2} {:.2} {:.2}", ratio.min, ratio.median, ratio.max);
        let target = match (self.target, self.ratio) {
            (Some(target), Some(_)) => format!("ratio {target:.2}"),
            (Some(target), None) => format!("{target:.1} {}", self.unit),
            (None, _) => "-".to_owned(),
        };
        let met = match (self.target, self.met) {
            (None, _) => "-",
            (Some(_), true) => "met",
            (Some(_), false) => "MISSED",
        };
        [
            self.scenario.to_owned(),
            format!("{} ({})", self.metric, self.unit),
            self.ours.text(),
            self.theirs.map_or("-".to_owned(), Spread::text),
            self.ratio.map_or("-".to_owned(), ratio),
            target,
            met.to_owned(),
        ]
    }
}

/// All rows as one JSON array, on one line.
pub(crate) fn array(rows: &[Row]) -> String {
    Value::from(rows.iter().map(Row::json).collect::<Vec<_>>()).to_string()
}

/// All rows as a table, the notes below it.
pub(crate) fn table(rows: &[Row]) -> String {
    let head = ["scenario", "metric", "ours", "theirs", "ratio", "target", ""].map(str::to_owned);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| lines.iter().map(|cells| cells[column].len()).max().unwrap_or(0);
    let mut text =
        "Minimum, median and maximum; a ratio is ours / theirs within one pair.\n\n".to_owned();
    for cells in &lines {
        let line: Vec<String> =
            cells.iter().enumerate().map(|(at, cell)| format!("{cell:<0$}", width(at))).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    for row in rows {
        let peer = row.peer.as_ref().map(|peer| format!(" beside {peer}")).unwrap_or_default();
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n{} {}{peer}: {}",
            row.scenario,
            row.metric,
            row.note.as_deref().unwrap_or("-")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_the_middle_in_the_middle() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn met_is_what_the_numbers_say() {
        let row = |pairs: &[(f64, f64)], target| {
            Row::beside(("vm", "total", "ms"), "peer", pairs, target, String::new()).expect("a row")
        };
        assert!(row(&[(8.0, 10.0), (7.0, 10.0), (30.0, 10.0)], Some(0.8)).met);
        assert!(!row(&[(8.1, 10.0), (7.0, 10.0), (30.0, 10.0)], Some(0.8)).met);
        assert!(row(&[(9.0, 1.0)], None).met);
        let alone = |values: &[f64]| {
            Row::alone(("vm", "memory", "MiB"), values, 68.0, String::new()).expect("a row")
        };
        assert!(alone(&[1.0, 68.0]).met);
        assert!(!alone(&[1.0, 68.1]).met);
    }

    #[test]
    fn ratios_are_taken_within_pairs() {
        let row = Row::beside(
            ("vm", "total", "ms"),
            "peer",
            &[(1.0, 2.0), (10.0, 5.0)],
            None,
            String::new(),
        )
        .expect("a row");
        assert_eq!(row.ratio, Some(Spread { min: 0.5, median: 1.25, max: 2.0 }));
    }

    #[test]
    fn a_row_has_every_key_of_the_contract() {
        let row = Row::alone(("vm", "memory", "MiB"), &[1.0], 2.0, "note".into()).expect("a row");
        let Value::Object(object) = row.json() else { panic!("not an object") };
        let keys: Vec<_> = object.keys().map(String::as_str).collect();
        let mut wanted = vec![
            "scenario", "metric", "unit", "peer", "ours", "theirs", "ratio", "target", "met",
            "note",
        ];
        wanted.sort_unstable();
        let mut keys = keys;
        keys.sort_unstable();
        assert_eq!(keys, wanted);
        assert!(object["theirs"].is_null() && object["peer"].is_null());
    }
}
