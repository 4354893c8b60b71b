//! Standard input and output of whoever is at a console, each on a thread of its own: neither can be read
//! or written without waiting, and nobody here may wait.

use std::io::{self, Read, Write};
use std::time::Duration;

use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use super::keys::Watch;

/// Pieces of a file that are read ahead, and of output that wait to be written.
const AHEAD: usize = 16;
/// How long what is still to be written is waited for at the end.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);

/// What came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// For the workload.
    Bytes(Vec<u8>),
    /// The keys that detach.
    Detach,
    /// Nothing more will come.
    End,
}

/// What is typed at a terminal. However much of it waits, the keys are found.
pub(crate) fn keyboard(watch: Watch) -> mpsc::UnboundedReceiver<Typed> {
    let (sender, typed) = mpsc::unbounded_channel();
    let mut watch = watch;
    std::thread::spawn(move || {
        read_all(|bytes| {
            let (passed, detaches) = watch.typed(bytes);
            let is_taken = passed.is_empty() || sender.send(Typed::Bytes(passed)).is_ok();
            if detaches {
                let _ = sender.send(Typed::Detach);
            }
            is_taken && !detaches
        });
        let _ = sender.send(Typed::End);
    });
    typed
}

/// What a file or a pipe holds, no faster than it is taken.
pub(crate) fn file() -> mpsc::Receiver<Typed> {
    let (sender, typed) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        read_all(|bytes| sender.blocking_send(Typed::Bytes(bytes.to_vec())).is_ok());
        let _ = sender.blocking_send(Typed::End);
    });
    typed
}

/// Reads standard input to its end, or until `take` has enough.
fn read_all(mut take: impl FnMut(&[u8]) -> bool) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match io::stdin().read(&mut buffer) {
            Ok(count @ 1..) if take(&buffer[..count]) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    pub(crate) pieces: mpsc::Sender<Vec<u8>>,
    written: oneshot::Receiver<()>,
}

impl Screen {
    /// Writes what it is given as it is, or as lines of JSON.
    pub(crate) fn open(json: bool) -> Self {
        let (pieces, mut waiting) = mpsc::channel::<Vec<u8>>(AHEAD);
        let (done, written) = oneshot::channel();
        std::thread::spawn(move || {
            let mut text = Text::default();
            while let Some(piece) = waiting.blocking_recv() {
                let mut out = io::stdout().lock();
                let piece = if json { lines(&text.push(&piece)) } else { piece };
                // Nobody reads any more: the others see that nothing is taken.
                if out.write_all(&piece).and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
            let _ = done.send(());
        });
        Self { pieces, written }
    }

    /// Returns when all is written, as far as somebody reads it.
    pub(crate) async fn close(self) {
        drop(self.pieces);
        let _ = tokio::time::timeout(WRITTEN_WITHIN, self.written).await;
    }
}

fn lines(text: &str) -> Vec<u8> {
    if text.is_empty() {
        return Vec::new();
    }
    format!("{}\n", json!({ "output": text })).into_bytes()
}

/// Bytes as text, in which no letter is cut.
#[derive(Debug, Default)]
struct Text(Vec<u8>);

impl Text {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.0.extend_from_slice(bytes);
        let whole = match self.0.utf8_chunks().last() {
            // Up to three bytes of a letter that may still be completed.
            Some(last)
                if std::str::from_utf8(last.invalid()).is_err_and(|e| e.error_len().is_none()) =>
            {
                self.0.len() - last.invalid().len()
            }
            _ => self.0.len(),
        };
        let text = String::from_utf8_lossy(&self.0[..whole]).into_owned();
        self.0.drain(..whole);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_letter_is_cut() {
        let mut text = Text::default();
        let bytes = "aä€𝄞z".as_bytes();
        let cut: Vec<String> = bytes.chunks(1).map(|byte| text.push(byte)).collect();
        assert_eq!(cut.concat(), "aä€𝄞z");
        // What will never be one is not waited for.
        assert_eq!(text.push(b"\xff"), "\u{fffd}");
        assert_eq!(text.push(b"a\xe2\x82"), "a");
        assert_eq!(text.push(b"!"), "\u{fffd}!");
        assert_eq!(lines("a\"b"), b"{\"output\":\"a\\\"b\"}\n");
        assert!(lines("").is_empty());
    }
}
