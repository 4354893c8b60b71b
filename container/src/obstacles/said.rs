//! What is said of obstacles: who, what, why not, remedy. Names come from processes that nobody trusts, and
//! are written so that they cannot be anything but names.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::process::Who;

/// At most so many are said; the rest is counted.
const CAP: usize = 40;
/// A name longer than this is cut.
const NAME_CAP: usize = 100;

/// Obstacles as they are found, each once.
#[derive(Debug, Default)]
pub(crate) struct Found {
    said: Vec<Said>,
    known: BTreeSet<String>,
}

/// One of them.
#[derive(Debug)]
struct Said {
    /// Who it is, whatever the name.
    who: String,
    /// What to do about it; the same for all of its kind.
    remedy: String,
    text: String,
    how: How,
}

/// How one was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// In one look, which may have seen half of this and half of that.
    Seen,
    /// The same, and it may be gone in a moment.
    Passing,
    /// It was in our hands, or was looked at twice.
    Certain,
}

impl Found {
    /// Says one: "WHO: WHAT; REMEDY".
    pub(crate) fn say(&mut self, who: &Who<'_>, what: &str, remedy: &str) {
        self.add(who, what, remedy, How::Seen);
    }

    /// The same of one that may well be gone in a moment.
    pub(crate) fn say_passing(&mut self, who: &Who<'_>, what: &str, remedy: &str) {
        self.add(who, what, remedy, How::Passing);
    }

    /// The same of one that needs no second look, whoever has it then.
    pub(crate) fn say_certain(&mut self, who: &Who<'_>, what: &str, remedy: &str) {
        self.add(who, what, remedy, How::Certain);
    }

    fn add(&mut self, who: &Who<'_>, what: &str, remedy: &str, how: How) {
        let text = format!("{who}: {what}; {remedy}");
        if self.known.insert(text.clone()) {
            self.said.push(Said { who: who.key(), remedy: remedy.to_owned(), text, how });
        }
    }

    /// Whether there is one at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// Whether there are some, and each may be gone in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        !self.said.is_empty() && self.said.iter().all(|said| said.how == How::Passing)
    }

    /// Those that an `earlier` look found as well, of the same and of the same kind: how large something is, or
    /// how many there are of it, may have changed. And those that are certain.
    pub(crate) fn found_before(mut self, earlier: &Self) -> Self {
        let known: BTreeSet<_> =
            earlier.said.iter().map(|said| (&*said.who, &*said.remedy)).collect();
        self.said.retain(|said| {
            said.how == How::Certain || known.contains(&(&*said.who, &*said.remedy))
        });
        self
    }

    /// All of them, or as many as anybody reads and how many more there are.
    pub(crate) fn into_texts(self) -> Vec<String> {
        let more = self.said.len().saturating_sub(CAP);
        let mut texts: Vec<String> =
            self.said.into_iter().take(CAP).map(|said| said.text).collect();
        if more > 0 {
            texts.push(format!("And {more} more of this kind"));
        }
        texts
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

    fn named(name: impl Into<String>) -> Who<'static> {
        Who::named(name)
    }

    #[test]
    fn names_are_nothing_but_names() {
        assert_eq!(plain(b"redis-server"), "redis-server");
        assert_eq!(plain(b"a\nb \x1b[31m"), "a\\u{a}b \\u{1b}[31m");
        assert_eq!(plain("x\u{202e}y".as_bytes()), "x\\u{202e}y");
        assert!(plain(&[b'x'; 4096]).len() < 110);
        assert!(plain(&[0xff, 0xfe]).chars().all(|part| !part.is_control()));
    }

    #[test]
    fn what_is_seen_once_is_not_said() {
        let mut first = Found::default();
        first.say(&named("Process 7 (a)"), "70 MiB", "close it");
        first.say(&named("Process 8 (b)"), "x", "close it");
        first.say(&named("Process 9 (c)"), "x", "close it");
        let mut second = Found::default();
        second.say(&named("Process 7 (a)"), "71 MiB", "close it");
        second.say(&named("Process 9 (c)"), "x", "end it");
        second.say(&named("Process 10 (d)"), "x", "close it");
        second.say_certain(&named("Process 11 (e)"), "y", "close it");
        let texts = second.found_before(&first).into_texts();
        assert_eq!(texts, ["Process 7 (a): 71 MiB; close it", "Process 11 (e): y; close it"]);
    }

    #[test]
    fn nobody_has_to_read_thousands() {
        let mut found = Found::default();
        assert!(!found.may_pass());
        found.say_passing(&named("a"), "b", "c");
        assert!(found.may_pass());
        for number in 0..100 {
            found.say(&named(format!("Process {number}")), "what", "remedy");
            found.say(&named(format!("Process {number}")), "what", "remedy");
        }
        assert!(!found.may_pass());
        let texts = found.into_texts();
        assert_eq!(texts.len(), 41);
        assert_eq!(texts[1], "Process 0: what; remedy");
        assert_eq!(texts[40], "And 61 more of this kind");
    }
}
