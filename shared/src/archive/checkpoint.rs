//! A workload into a file. It stands still from the first page to the last byte on the disk; until the
//! file is complete any failure means that it runs on.

use std::io::BufWriter;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::error::{ArchiveError, Result};
use super::header::{Described, FORMAT, HEADER, Header, PartInfo, VERSION};
use super::memory::without_zeros;
use super::output::Output;
use super::parcel::{Frozen, Parcel};
use super::write::ArchiveWriter;
use crate::pages::PageSet;
use crate::session::error::chain;
use crate::workload::{Backend, Liveness, SourceWorkload, WorkloadError};

/// Bytes that are gathered before they go to the file.
const GATHER: usize = 1 << 20;

/// How often, and how far apart, a workload is taken away that does not go at once.
const RELEASES: u32 = 4;
const BETWEEN_RELEASES: Duration = Duration::from_millis(500);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Where the file is to be.
    pub output: PathBuf,
    /// Whether the workload runs on afterwards.
    pub leave_running: bool,
    /// Name of this host.
    pub host: String,
    /// Milliseconds since 1970.
    pub now_ms: u64,
    /// The token that the workload is fenced with before it is taken away.
    pub token: u64,
    /// Calls it off, as long as the file is not complete.
    pub stop: CancellationToken,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of all parts in it.
    pub bytes: u64,
    /// How long the workload stood still, in milliseconds; of one that was taken away, until it was.
    pub stopped_ms: f64,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is being stopped and its state saved.
    Pausing,
    /// So many bytes are written of so many.
    Writing(u64, u64),
    /// The file is complete.
    Written,
}

/// How far a failed one got.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: ArchiveError,
    /// Whether the workload was touched at all.
    pub touched: bool,
    /// Whether the file is there, complete, all the same.
    pub written: bool,
    /// Why it could not be resumed, when it could not.
    pub stuck: Option<String>,
    /// Whether it was being taken away, and so never runs here again: the file is all there is of it.
    pub leaving: bool,
}

/// Writes the workload `source` of `backend` into a file. When it is not left running, `leaves` writes
/// down durably that the file is all there is of it: after it was fenced, and before any of it is taken
/// away. Whoever finds it fenced goes by that.
///
/// # Errors
/// When it fails; the workload was resumed then, unless [`Failed::stuck`] says otherwise.
pub fn checkpoint(
    source: &mut dyn SourceWorkload,
    backend: &dyn Backend,
    asked: &Asked,
    leaves: &dyn Fn() -> std::result::Result<(), WorkloadError>,
    tell: &dyn Fn(Step),
) -> std::result::Result<Done, Failed> {
    let failed =
        |error, written, stuck, leaving| Failed { error, touched: true, written, stuck, leaving };
    let untouched = |error| Failed { touched: false, ..failed(error, false, None, false) };
    let output = Output::begin(&asked.output).map_err(untouched)?;
    let begun = Instant::now();
    let written = stop_and_write(source, backend, asked, output, tell);
    let (file_bytes, bytes) = match written {
        Ok(written) => written,
        Err(error) => {
            let stuck = source.resume().err().map(|error| chain(&error));
            return Err(failed(error, false, stuck, false));
        }
    };
    tell(Step::Written);
    // The file is complete from here on, whatever becomes of the workload.
    if asked.leave_running {
        let resumed = source.resume();
        resumed.map_err(|error| {
            let stuck = Some(chain(&error));
            failed(error.into(), true, stuck, false)
        })?;
    } else {
        source.fence(asked.token).and_then(|()| leaves()).map_err(|error| {
            let stuck = source.resume().err().map(|error| chain(&error));
            failed(error.into(), true, stuck, false)
        })?;
        release(source).map_err(|error| {
            let stuck = Some(chain(&error));
            failed(error.into(), true, stuck, true)
        })?;
    }
    let stopped_ms = begun.elapsed().as_secs_f64() * 1000.0;
    Ok(Done { file_bytes, bytes, stopped_ms })
}

/// Takes the workload away. It may be half gone after the first attempt, so it is never resumed.
fn release(source: &mut dyn SourceWorkload) -> std::result::Result<(), WorkloadError> {
    let mut left = RELEASES;
    loop {
        left -= 1;
        match source.release() {
            // Nobody holds it any more.
            Ok(()) | Err(WorkloadError::KeeperGone { .. }) => return Ok(()),
            Err(error) if left == 0 => return Err(error),
            Err(error) => tracing::warn!(%error, "Cannot take the workload away yet"),
        }
        thread::sleep(BETWEEN_RELEASES);
    }
}

fn stop_and_write(
    source: &mut dyn SourceWorkload,
    backend: &dyn Backend,
    asked: &Asked,
    output: Output,
    tell: &dyn Fn(Step),
) -> Result<(u64, u64)> {
    tell(Step::Pausing);
    // Whatever an earlier attempt left of its tracking: all that exists counts from here on.
    if let Liveness::Tracked { .. } = source.liveness() {
        source.track()?;
    }
    source.pause()?;
    fail::fail_point!("checkpoint-paused", |_| Err(failed_on_purpose("checkpoint-paused")));
    let mut pages = PageSet::new();
    source.harvest(&mut pages)?;
    let mut manifest = source.manifest()?;
    manifest.spaces = source.spaces()?;
    let reader = source.reader()?;
    let sections = source.save()?;
    // Saving may have written memory.
    source.harvest(&mut pages)?;
    let pages = without_zeros(&*reader, &pages)?;
    let described = Described::of(&manifest)
        .map_err(|error| ArchiveError::part("decamp/header.json", error.to_string()))?;
    let parcels = backend.pack(Frozen { manifest, sections, pages, reader })?;
    write(parcels, described, asked, output, tell)
}

fn write(
    parcels: Vec<Parcel>,
    workload: Described,
    asked: &Asked,
    output: Output,
    tell: &dyn Fn(Step),
) -> Result<(u64, u64)> {
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        decamp: env!("CARGO_PKG_VERSION").to_owned(),
        host: asked.host.clone(),
        created_ms: asked.now_ms,
        workload,
        parts: parcels.iter().map(|parcel| parcel.info.clone()).collect(),
    };
    // What no reader would take is not written.
    header.check().map_err(|what| ArchiveError::part(HEADER, what))?;
    let total = header.bytes();
    let file = BufWriter::with_capacity(GATHER, output.file());
    let mut archive = ArchiveWriter::begin(file, &header)?;
    let mut before = 0;
    for Parcel { info: PartInfo { name, size }, fill } in parcels {
        archive
            .part(&name, size, |to| {
                fill(&mut Counted { to, written: before, total, told: before, asked, tell })
            })
            .map_err(|error| if asked.stop.is_cancelled() { called_off() } else { error })?;
        before += size;
        tell(Step::Writing(before, total));
        if asked.stop.is_cancelled() {
            return Err(called_off());
        }
        fail::fail_point!("checkpoint-part", |_| Err(failed_on_purpose("checkpoint-part")));
    }
    let file = archive.finish()?;
    let failed = |source| ArchiveError::Io { what: "write", path: asked.output.clone(), source };
    file.into_inner().map_err(|error| failed(error.into_error()))?;
    Ok((output.finish()?, total))
}

/// Tells how far a part is, now and then.
struct Counted<'a> {
    to: &'a mut dyn std::io::Write,
    written: u64,
    total: u64,
    told: u64,
    asked: &'a Asked,
    tell: &'a dyn Fn(Step),
}

fn called_off() -> ArchiveError {
    WorkloadError::plain("It was called off, because the agent is told to end").into()
}

impl std::io::Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.asked.stop.is_cancelled() {
            return Err(std::io::Error::other("it was called off"));
        }
        let taken = self.to.write(bytes)?;
        self.written += taken as u64;
        if self.written - self.told >= 16 << 20 {
            self.told = self.written;
            (self.tell)(Step::Writing(self.written, self.total));
        }
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

#[cfg(feature = "failpoints")]
fn failed_on_purpose(name: &str) -> ArchiveError {
    crate::workload::WorkloadError::plain(format!("Failed on purpose ({name})")).into()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use super::*;
    use crate::archive::Result as Packed;
    use crate::pages::{PageRange, PageReader};
    use crate::workload::{
        DestinationWorkload, Kind, Manifest, Place, PlacedTree, Refusal, Result as Did, Section,
        SpaceInfo,
    };

    /// A workload without memory, and its backend. Says what was done to it.
    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<Vec<String>>>);

    impl Told {
        fn tell(&self, what: &str) -> Did<()> {
            self.0.lock().expect("no panic").push(what.to_owned());
            Ok(())
        }

        fn told(&self) -> String {
            self.0.lock().expect("no panic").join(", ")
        }
    }

    impl PageReader for Told {
        fn read(&self, range: PageRange, _: &mut [u8]) -> Did<()> {
            Err(WorkloadError::plain(format!("There are no {range}")))
        }

        fn take_missed(&self) -> PageSet {
            PageSet::new()
        }
    }

    impl SourceWorkload for Told {
        fn manifest(&mut self) -> Did<Manifest> {
            let (spec, needs) = (b"{}".to_vec(), b"{}".to_vec());
            Ok(Manifest { kind: Kind::Vm.into(), spec, needs, ..Manifest::default() })
        }

        fn liveness(&self) -> Liveness {
            Liveness::StopOnly { reason: "the test says so".to_owned() }
        }

        fn spaces(&mut self) -> Did<Vec<SpaceInfo>> {
            Ok(Vec::new())
        }

        fn reader(&mut self) -> Did<Arc<dyn PageReader>> {
            Ok(Arc::new(self.clone()))
        }

        fn track(&mut self) -> Did<()> {
            self.tell("track")
        }

        fn harvest(&mut self, _: &mut PageSet) -> Did<()> {
            Ok(())
        }

        fn stall(&self) -> Duration {
            Duration::ZERO
        }

        fn pause(&mut self) -> Did<()> {
            self.tell("pause")
        }

        fn save(&mut self) -> Did<Vec<Section>> {
            Ok(Vec::new())
        }

        fn fence(&mut self, token: u64) -> Did<()> {
            self.tell(&format!("fence {token}"))
        }

        fn resume(&mut self) -> Did<()> {
            self.tell("resume")
        }

        fn release(&mut self) -> Did<()> {
            self.tell("release")
        }
    }

    impl Backend for Told {
        fn kind(&self) -> Kind {
            Kind::Vm
        }

        fn check(&self, _: &Value) -> Vec<Refusal> {
            Vec::new()
        }

        fn run(&self, _: &Value, _: &Place) -> Did<()> {
            Err(WorkloadError::Unsupported("Running"))
        }

        fn source(&self, _: &Value, _: &Place) -> Did<Box<dyn SourceWorkload>> {
            Err(WorkloadError::Unsupported("Leaving"))
        }

        fn preflight(&self, _: &Manifest, _: &[PlacedTree]) -> Vec<Refusal> {
            Vec::new()
        }

        fn respec(&self, _: &Manifest, _: &[PlacedTree]) -> Did<Value> {
            Err(WorkloadError::Unsupported("Arriving"))
        }

        fn prepare(&self, _: &Manifest, _: &Value, _: &Place) -> Did<Box<dyn DestinationWorkload>> {
            Err(WorkloadError::Unsupported("Arriving"))
        }

        fn pack(&self, _: Frozen) -> Packed<Vec<Parcel>> {
            Ok(vec![Parcel::bytes("checkpoint/state", b"state".to_vec())])
        }

        fn stop(&self, _: &Value, _: &Place, _: Option<Duration>) -> Did<()> {
            Err(WorkloadError::Unsupported("Stopping"))
        }

        fn sweep(&self, _: &Value, _: &Place) -> Did<()> {
            Err(WorkloadError::Unsupported("Sweeping"))
        }
    }

    struct Case {
        told: Told,
        asked: Asked,
        _directory: tempfile::TempDir,
    }

    impl Case {
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            let asked = Asked {
                output: directory.path().join("web.tar.zst"),
                leave_running: false,
                host: "alpha".to_owned(),
                now_ms: 0,
                token: 5,
                stop: CancellationToken::new(),
            };
            Self { told: Told::default(), asked, _directory: directory }
        }

        fn make(&self, leaves: Did<()>) -> std::result::Result<Done, Failed> {
            let leaves = Mutex::new(Some(leaves));
            let leave = || {
                let _ = self.told.tell("leaves");
                leaves.lock().expect("no panic").take().expect("once")
            };
            checkpoint(&mut self.told.clone(), &self.told, &self.asked, &leave, &|_| {})
        }

        fn files(&self) -> usize {
            let directory = self.asked.output.parent().expect("a directory");
            std::fs::read_dir(directory).expect("reads").count()
        }
    }

    #[test]
    fn that_it_leaves_is_written_down_before_any_of_it_goes() {
        let case = Case::new();
        case.make(Ok(())).expect("is made");
        assert_eq!(case.told.told(), "pause, fence 5, leaves, release");
        assert!(case.asked.output.exists());
    }

    #[test]
    fn what_cannot_be_written_down_as_leaving_runs_on() {
        let case = Case::new();
        let failed = case.make(Err(WorkloadError::plain("No"))).expect_err("stays");
        assert_eq!(case.told.told(), "pause, fence 5, leaves, resume");
        assert!(failed.written && !failed.leaving && failed.stuck.is_none());
    }

    #[test]
    fn one_that_is_called_off_leaves_nothing() {
        let case = Case::new();
        case.asked.stop.cancel();
        let failed = case.make(Ok(())).expect_err("is called off");
        assert!(failed.error.to_string().contains("called off"), "{}", failed.error);
        assert_eq!(case.told.told(), "pause, resume");
        assert!(!failed.written && failed.stuck.is_none());
        assert_eq!(case.files(), 0);
    }
}
