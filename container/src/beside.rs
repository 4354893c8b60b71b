//! Work on many things that have nothing to do with each other, on all processors: in the stop there is
//! nothing else to do meanwhile. And work apart from all else, on a thread that is elsewhere.
//!
//! A thread that cannot be started (no memory, too many tasks) is an error or does without: whoever panics here
//! takes a container with him.

use std::num::NonZero;
use std::sync::Mutex;
use std::thread::{self, Builder};

use crate::error::{ContainerError, Result};

/// So many at once, however many processors there are.
const MOST: usize = 4;

/// Does `work` on a thread of its own, for what a thread is not rid of again, and waits for it.
///
/// # Errors
/// When it cannot be started, panics, or what the work comes to.
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    apart_as(Builder::new(), work)
}

fn apart_as<T: Send>(thread: Builder, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let started = thread.spawn_scoped(scope, work);
        started.map_err(ContainerError::io("start a thread"))?.join().unwrap_or_else(|_| {
            Err(ContainerError::State("A thread of this container's keeper panicked".to_owned()))
        })
    })
}

/// Does `work` on each of `items`; gives what came of it in their order, or the first error in that order.
pub(crate) fn each<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    each_as(Builder::new, items, work)
}

fn each_as<T: Send, R: Send>(
    thread: impl Fn() -> Builder,
    items: Vec<T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get).min(MOST);
    if items.len() < 2 || workers < 2 {
        return items.into_iter().map(work).collect();
    }
    let count = items.len();
    let waiting = Mutex::new(items.into_iter().enumerate());
    let next = || waiting.lock().ok().and_then(|mut waiting| waiting.next());
    let worker = || {
        let mut done = Vec::new();
        while let Some((place, item)) = next() {
            let outcome = work(item);
            let failed = outcome.is_err();
            done.push((place, outcome));
            if failed {
                break;
            }
        }
        done
    };
    let mut done = thread::scope(|scope| {
        // Where there are no more we do it all.
        let others = (1..workers.min(count)).map(|_| thread().spawn_scoped(scope, worker));
        let others: Vec<_> = others.filter_map(std::result::Result::ok).collect();
        let mut done = worker();
        for other in others {
            let panicked =
                |_| ContainerError::State("A thread beside this one panicked".to_owned());
            done.extend(other.join().map_err(panicked)?);
        }
        Ok::<_, ContainerError>(done)
    })?;
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_once_and_comes_back_in_order() {
        for count in [0, 1, 2, 1000] {
            let doubled = each((0..count).collect(), |number: u32| Ok(number * 2)).expect("fine");
            assert_eq!(doubled, (0..count).map(|number| number * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_comes_back() {
        let bad = |number: u32| match number {
            17 | 40 => Err(ContainerError::State(format!("{number} is bad"))),
            _ => Ok(number),
        };
        let error = each((0..100).collect(), bad).expect_err("one is bad").to_string();
        assert!(error.contains("is bad"), "{error}");
    }

    /// No address space has room for its stack.
    fn impossible() -> Builder {
        Builder::new().stack_size(1 << 60)
    }

    #[test]
    fn without_threads_all_is_done_all_the_same() {
        let doubled = each_as(impossible, (0..100).collect(), |number: u32| Ok(number * 2));
        assert_eq!(doubled.expect("fine"), (0..100).map(|number| number * 2).collect::<Vec<_>>());
        let error = apart_as(impossible(), || Ok(())).expect_err("there is no such thread");
        assert!(error.to_string().contains("start a thread"), "{error}");
    }

    #[test]
    fn what_panics_apart_is_an_error() {
        assert_eq!(apart(|| Ok(7)).expect("fine"), 7);
        let error = apart(|| -> Result<()> { panic!("on purpose") }).expect_err("it panics");
        assert!(error.to_string().contains("panicked"), "{error}");
    }
}
