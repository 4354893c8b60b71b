//! The keys that leave a console, as podman writes them: `ctrl-]`, `ctrl-p,ctrl-q`, `a`. Read from the
//! command line, and found in what is typed.

use std::fmt;

/// One key after another; none at all, and nothing detaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

impl DetachKeys {
    /// `ctrl-X`, X one of a-z, `@`, `[`, `\`, `]`, `^`, `_`, or a single character; several with commas
    /// between them. Nothing for no key.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let keys = text.split(',').map(|part| {
            key(part).ok_or_else(|| {
                format!("{part:?} is no key; write ctrl-], ctrl-p,ctrl-q, or a single letter")
            })
        });
        if text.is_empty() {
            Ok(Self(Vec::new()))
        } else {
            keys.collect::<Result<_, _>>().map(Self)
        }
    }
}

fn key(text: &str) -> Option<u8> {
    match *text.as_bytes() {
        [key] if key.is_ascii_graphic() => Some(key),
        [b'c', b't', b'r', b'l', b'-', key] => match key.to_ascii_uppercase() {
            // As a terminal does: the sixth and seventh bit are gone.
            key @ b'@'..=b'_' => Some(key & 0x1f),
            _ => None,
        },
        _ => None,
    }
}

impl fmt::Display for DetachKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, &key) in self.0.iter().enumerate() {
            let space = if index > 0 { " " } else { "" };
            match key {
                ..0x20 => write!(formatter, "{space}Ctrl-{}", char::from(key | 0x40))?,
                _ => write!(formatter, "{space}{}", char::from(key))?,
            }
        }
        Ok(())
    }
}

/// Looks for the keys in what is typed. What may be their beginning is held back until it is known.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    keys: DetachKeys,
    held: Vec<u8>,
}

impl Watch {
    /// Looks for `keys`.
    pub(crate) fn new(keys: DetachKeys) -> Self {
        Self { keys, held: Vec::new() }
    }

    /// What of it is for the workload, and whether the keys have been typed: what follows is for nobody.
    pub(crate) fn typed(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let keys = &self.keys.0[..];
        if keys.is_empty() {
            return (bytes.to_vec(), false);
        }
        let mut passed = Vec::new();
        for &byte in bytes {
            self.held.push(byte);
            while !keys.starts_with(&self.held) {
                passed.push(self.held.remove(0));
            }
            if self.held.len() == keys.len() {
                return (passed, true);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(keys: &str) -> Watch {
        Watch::new(DetachKeys::parse(keys).expect("keys"))
    }

    #[test]
    fn keys_are_written_as_podman_does() {
        for (text, bytes, shown) in [
            ("ctrl-]", &[0x1d][..], "Ctrl-]"),
            ("ctrl-p,ctrl-q", &[0x10, 0x11], "Ctrl-P Ctrl-Q"),
            ("ctrl-@", &[0], "Ctrl-@"),
            ("ctrl-P", &[0x10], "Ctrl-P"),
            ("ctrl-\\,q", &[0x1c, b'q'], "Ctrl-\\ q"),
            ("", &[], ""),
        ] {
            let keys = DetachKeys::parse(text).expect(text);
            assert_eq!((&keys.0[..], keys.to_string().as_str()), (bytes, shown), "{text}");
        }
        for bad in
            [",", "ctrl-", "ctrl-1", "ctrl-]]", "ctrl-p,", "alt-x", "ctrl p", " ", "ä", "ctrl-ä"]
        {
            assert!(DetachKeys::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn all_but_the_keys_passes() {
        let mut one = watch("ctrl-]");
        assert_eq!(one.typed(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(one.typed(b"ab\x1dcd"), (b"ab".to_vec(), true));
        assert_eq!(watch("").typed(b"\x1d\x10\x11"), (b"\x1d\x10\x11".to_vec(), false));
    }

    #[test]
    fn a_beginning_that_does_not_go_on_is_typed_after_all() {
        let mut two = watch("ctrl-p,ctrl-q");
        assert_eq!(two.typed(b"x\x10"), (b"x".to_vec(), false));
        assert_eq!(two.typed(b"y"), (b"\x10y".to_vec(), false));
        assert_eq!(two.typed(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(two.typed(b"\x11"), (Vec::new(), true));
        // One that holds its own beginning.
        let mut three = watch("a,a,b");
        assert_eq!(three.typed(b"aaa"), (b"a".to_vec(), false));
        assert_eq!(three.typed(b"b"), (Vec::new(), true));
    }
}
