//! What is said of obstacles: who, what, why not, remedy. Names come from processes that nobody trusts, and
//! are written so that they cannot be anything but names.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// At most so many are said; the rest is counted.
const CAP: usize = 40;
/// A name longer than this is cut.
const NAME_CAP: usize = 100;

/// Obstacles as they are found, each once.
#[derive(Debug, Default)]
pub(crate) struct Found {
    said: Vec<String>,
    known: BTreeSet<String>,
    /// Whether all of them may be gone in a moment.
    lasting: bool,
}

impl Found {
    /// Says one: "WHO: WHAT; REMEDY".
    pub(crate) fn say(&mut self, who: &str, what: &str, remedy: &str) {
        self.lasting = true;
        self.add(format!("{who}: {what}; {remedy}"));
    }

    /// The same of one that may well be gone in a moment.
    pub(crate) fn say_passing(&mut self, who: &str, what: &str, remedy: &str) {
        self.add(format!("{who}: {what}; {remedy}"));
    }

    fn add(&mut self, text: String) {
        if self.known.insert(text.clone()) {
            self.said.push(text);
        }
    }

    /// Whether there is one at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// Whether there are some, and each may be gone in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        !self.said.is_empty() && !self.lasting
    }

    /// All of them, or as many as anybody reads and how many more there are.
    pub(crate) fn into_texts(mut self) -> Vec<String> {
        let more = self.said.len().saturating_sub(CAP);
        self.said.truncate(CAP);
        if more > 0 {
            self.said.push(format!("And {more} more of this kind"));
        }
        self.said
    }
}

/// A name out of the hands of strangers: nothing in it steers a terminal or looks like another line.
pub(crate) fn plain(name: &[u8]) -> String {
    let mut text = String::new();
    for part in String::from_utf8_lossy(name).chars() {
        if text.len() >= NAME_CAP {
            text.push('…');
            break;
        }
        match part {
            // The kernel writes these so itself in some files.
            '\\' => text.push('\\'),
            part if part.is_control() || is_invisible(part) => {
                let _ = write!(text, "\\u{{{:x}}}", u32::from(part));
            }
            part => text.push(part),
        }
    }
    text
}

/// Whether a character changes how others are shown, without being seen itself.
fn is_invisible(part: char) -> bool {
    matches!(part, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_nothing_but_names() {
        assert_eq!(plain(b"redis-server"), "redis-server");
        assert_eq!(plain(b"a\nb \x1b[31m"), "a\\u{a}b \\u{1b}[31m");
        assert_eq!(plain("x\u{202e}y".as_bytes()), "x\\u{202e}y");
        assert!(plain(&[b'x'; 4096]).len() < 110);
        assert!(plain(&[0xff, 0xfe]).chars().all(|part| !part.is_control()));
    }

    #[test]
    fn nobody_has_to_read_thousands() {
        let mut found = Found::default();
        assert!(!found.may_pass());
        found.say_passing("a", "b", "c");
        assert!(found.may_pass());
        for number in 0..100 {
            found.say(&format!("Process {number}"), "what", "remedy");
            found.say(&format!("Process {number}"), "what", "remedy");
        }
        assert!(!found.may_pass());
        let texts = found.into_texts();
        assert_eq!(texts.len(), 41);
        assert_eq!(texts[1], "Process 0: what; remedy");
        assert_eq!(texts[40], "And 61 more of this kind");
    }
}
