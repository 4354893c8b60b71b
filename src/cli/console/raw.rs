//! The terminal of whoever is at a console: every key goes through as it is, and whatever happens the
//! terminal is as before when this ends, also when the program panics.

use std::io;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use decamp_shared::console::Size;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::session::Signals;

/// The settings to go back to, while they are others.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
static AT_PANIC: Once = Once::new();

/// Standard input as a raw terminal, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Whether standard input is a terminal at all.
    pub(crate) fn is_terminal() -> bool {
        isatty(io::stdin())
    }

    /// Every key goes through from now on. What may end the program is waited for by then.
    pub(crate) fn enter(_: &Signals) -> io::Result<Self> {
        AT_PANIC.call_once(|| {
            let others = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                // First, so that what is said about it can be read.
                restore();
                others(panic);
            }));
        });
        let raw = Self(());
        raw.again()?;
        Ok(raw)
    }

    /// The terminal is as before for now, as when the program is stopped.
    pub(crate) fn rest(&self) {
        restore();
    }

    /// And raw again. Whoever continued the program may have set it as he likes in between.
    pub(crate) fn again(&self) -> io::Result<()> {
        let mut before = before();
        let found = tcgetattr(io::stdin())?;
        let mut raw = before.get_or_insert(found).clone();
        raw.make_raw();
        Ok(tcsetattr(io::stdin(), OptionalActions::Now, &raw)?)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// How large the terminal's window is; nothing for one that does not know.
pub(crate) fn size() -> Option<Size> {
    let found = tcgetwinsize(io::stdin()).ok()?;
    Some(Size { columns: found.ws_col, rows: found.ws_row })
        .filter(|size| size.columns > 0 && size.rows > 0)
}

fn before() -> MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn restore() {
    if let Some(before) = before().take() {
        // A terminal that is gone has no settings.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}
