//! Standard output. A reader that went away (`| head`) ends the printing, not the program.

use std::io::{self, Write};

use serde::Serialize;

/// Prints `text` and a line feed.
pub(crate) fn line(text: impl AsRef<str>) {
    let mut out = io::stdout().lock();
    // The only error that matters here is a closed pipe, and nobody is left to be told.
    let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
}

/// Prints `text` as it is.
pub(crate) fn raw(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Prints `value` as indented JSON.
pub(crate) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(text),
        Err(error) => eprintln!("decamp: Cannot write the answer as JSON: {error}"),
    }
}

/// Prints rows of a table with its columns aligned; the last column is not padded.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) {
    line(columns(head, rows));
}

fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut lines = vec![head.iter().map(|&cell| cell.to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.iter().cloned());
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let width = |row: &Vec<String>| row.get(column).map_or(0, |cell| cell.chars().count());
            lines.iter().map(width).max().unwrap_or(0)
        })
        .collect();
    let padded = |row: &Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}", width = *width))
            .collect();
        cells.join("   ").trim_end().to_owned()
    };
    lines.iter().map(padded).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["web".into(), "running".into()], vec!["database".into(), "".into()]];
        assert_eq!(
            columns(&["NAME", "STATE"], &rows),
            "NAME       STATE\nweb        running\ndatabase"
        );
    }
}
