//! Reading a mapping of a file that others may cut short. The kernel sends a signal (SIGBUS) to whoever touches
//! a page that is gone, and that would be the end of the process. Here it puts a page of zeros in its place,
//! and the reader is told.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};

const PAGE: usize = 4096;

/// What a thread reads just now. The signal comes to the thread that touched the page.
struct Reading {
    start: AtomicUsize,
    end: AtomicUsize,
    cut: AtomicBool,
}

thread_local! {
    // Made at compile time and without a destructor: touching it from the handler makes nothing.
    static READING: Reading = const {
        Reading { start: AtomicUsize::new(0), end: AtomicUsize::new(0), cut: AtomicBool::new(false) }
    };
}

/// Who was told of the signal before us.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Has `read` touch the addresses of `range`, which are all of one mapping, and which nobody else reads just
/// now.
///
/// # Errors
/// When a page of it was gone. From then on there are zeros in its place: the mapping is of no more use.
pub(super) fn guarded<R>(range: Range<usize>, read: impl FnOnce() -> R) -> io::Result<R> {
    /// Takes the range back, also when `read` panics.
    struct Guard;
    impl Drop for Guard {
        fn drop(&mut self) {
            set(0..0);
        }
    }
    install()?;
    READING.with(|reading| reading.cut.store(false, Ordering::Relaxed));
    set(range);
    let guard = Guard;
    let result = read();
    drop(guard);
    match READING.with(|reading| reading.cut.load(Ordering::Relaxed)) {
        true => Err(io::Error::other("somebody cut the file short while it was read")),
        false => Ok(result),
    }
}

fn set(range: Range<usize>) {
    compiler_fence(Ordering::SeqCst);
    READING.with(|reading| {
        reading.start.store(range.start, Ordering::Relaxed);
        reading.end.store(range.end, Ordering::Relaxed);
    });
    compiler_fence(Ordering::SeqCst);
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: all-zero is a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { zeroed() };
        action.sa_sigaction = on_bus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut before = MaybeUninit::uninit();
        // SAFETY: the kernel reads one action and writes another; the handler calls nothing that a handler
        // may not call.
        let done = unsafe { libc::sigaction(libc::SIGBUS, &action, before.as_mut_ptr()) };
        if done < 0 {
            return io::Error::last_os_error().raw_os_error();
        }
        // SAFETY: the call succeeded, and so has written it.
        let _ = BEFORE.set(unsafe { before.assume_init() });
        None
    });
    failed.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
}

extern "C" fn on_bus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a filled siginfo_t with this signal.
    let address = unsafe { (*info).si_addr() } as usize;
    let is_ours = READING.with(|reading| {
        let range = reading.start.load(Ordering::Relaxed)..reading.end.load(Ordering::Relaxed);
        let ours = range.contains(&address);
        if ours {
            reading.cut.store(true, Ordering::Relaxed);
        }
        ours
    });
    if is_ours && put_zeros(address) {
        return;
    }
    pass_on(signal, info, context);
}

/// A page of zeros where `address` is.
fn put_zeros(address: usize) -> bool {
    // SAFETY: `errno` is this thread's own; what the signal interrupted may be about to look at it.
    let errno = unsafe { *libc::__errno_location() };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page is one of a mapping that is only read, by this thread, which said so; its contents
    // are gone already.
    let placed = unsafe {
        libc::mmap(
            (address & !(PAGE - 1)) as *mut libc::c_void,
            PAGE,
            libc::PROT_READ,
            flags,
            -1,
            0,
        )
    };
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    placed != libc::MAP_FAILED
}

/// It is somebody else's business, as it would be without us.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let handler = BEFORE.get().map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    let takes_all = BEFORE.get().is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    match (handler, takes_all) {
        (libc::SIG_DFL | libc::SIG_IGN, _) => {
            // SAFETY: takes integers; the instruction is tried again, and ends the process as it should.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        (handler, true) => {
            type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: it was installed as a handler of this kind.
            let handler: Handler = unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        (handler, false) => {
            // SAFETY: it was installed as a handler of this kind.
            let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
