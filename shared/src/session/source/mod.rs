//! The leaving end of a move, phase by phase.
//!
//! `run` lists the phases in order; each is in a file of its own. Before the fence there is one way out for
//! every failure: the workload resumes, the peer is told, nothing is left behind. After it only the
//! destination's durable answer counts.

mod ending;
mod halt;
mod handing_over;
mod negotiating;
mod preparing;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::network::need;
use crate::pages::PageSet;
use crate::session::copying::Copying;
use crate::session::departure::Departure;
use crate::session::error::{Result, SessionError, chain, fail_here};
use crate::session::journal::Journal;
use crate::session::link::Link;
use crate::session::progress::{Phase, Progress, ProgressSender};
use crate::session::report::Report;
use crate::session::{MoveOptions, storage};
use crate::transport::{Dialer, PeerAddress};
use crate::workload::{Kind, Liveness, Manifest, Refusal, SourceWorkload, WorkloadError};

use ending::{empty_report, nothing_moved};

pub use ending::{Ending, Fate};
pub(in crate::session) use halt::Halt;

/// How long connecting and the first answers may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What all moves away from a host share.
#[derive(Clone)]
pub struct SourceContext {
    /// Name of this host.
    pub host: String,
    /// Opens connections to peers.
    pub dialer: Dialer,
    /// Where the workload goes.
    pub peer: PeerAddress,
    /// Whether this host's configuration wants pages encrypted.
    pub page_encryption: bool,
    /// This host's journal.
    pub journal: Arc<Journal>,
}

/// One move.
pub struct SourceMove {
    /// Its id, a UUID.
    pub migration: String,
    /// The workload, running.
    pub workload: Box<dyn SourceWorkload>,
    /// What the user asked for.
    pub options: MoveOptions,
    /// Where progress is told; the report is its last event.
    pub progress: ProgressSender,
    /// Cancelled when the user gives up. Without effect after the fence.
    pub cancel: CancellationToken,
}

/// Moves one workload. Tells [`Progress::Report`] last.
pub async fn migrate(context: &SourceContext, request: SourceMove) -> Ending {
    let SourceMove { migration, mut workload, options, progress, cancel } = request;
    progress.phase(Phase::Negotiate);
    let asked = options.clone();
    let described = tokio::task::spawn_blocking(move || {
        let manifest = workload.manifest().map(|manifest| described(manifest, &asked));
        let liveness = workload.liveness();
        (workload, manifest, liveness)
    })
    .await;
    let ending = match described {
        Ok((workload, Ok((manifest, fits)), liveness)) => {
            let mut departing = Departing::new(
                context,
                &migration,
                options,
                progress.clone(),
                cancel,
                workload,
                manifest,
                liveness,
            );
            let result = match fits {
                Ok(()) => departing.run().await,
                Err(refusals) => Err(SessionError::Refused(refusals)),
            };
            departing.end(result).await
        }
        Ok((_, Err(error), _)) => nothing_moved(context, &migration, chain(&error)),
        Err(error) => nothing_moved(context, &migration, chain(&error)),
    };
    if let Err(error) = context.journal.save_report(&ending.report) {
        tracing::warn!(error = %chain(&error), "Cannot keep the report");
    }
    progress.tell(Progress::Report { report: Box::new(ending.report.clone()) });
    ending
}

/// The manifest with what the user said of its trees, and what of that does not fit.
fn described(
    mut manifest: Manifest,
    options: &MoveOptions,
) -> (Manifest, std::result::Result<(), Vec<Refusal>>) {
    let said = storage::said(manifest.files.clone(), options).and_then(|mut trees| {
        storage::measure(&mut trees)?;
        Ok(trees)
    });
    let fits = said.map(|trees| manifest.files = trees);
    if options.no_network_check {
        need::do_not_check(&mut manifest.networks);
    }
    (manifest, fits)
}

/// A move under way at the source.
struct Departing<'a> {
    context: &'a SourceContext,
    halt: Halt,
    /// Ends a look at memory that is under way.
    call_off: Option<Arc<AtomicBool>>,
    departure: Departure,
    manifest: Manifest,
    liveness: Liveness,
    options: MoveOptions,
    progress: ProgressSender,
    report: Report,
    started: Instant,
    stopped: Option<Instant>,
    token: u64,
    link: Option<Link>,
}

impl<'a> Departing<'a> {
    #[allow(clippy::too_many_arguments)]
    fn new(
        context: &'a SourceContext,
        migration: &str,
        options: MoveOptions,
        progress: ProgressSender,
        cancel: CancellationToken,
        workload: Box<dyn SourceWorkload>,
        manifest: Manifest,
        liveness: Liveness,
    ) -> Self {
        let halt = Halt {
            cancel,
            deadline: tokio::time::Instant::now() + options.timeout(),
            timeout: options.timeout(),
            phase: Phase::Negotiate,
        };
        let mut report = empty_report(context, migration);
        report.workload = manifest.name.clone();
        report.kind = manifest.kind();
        report.memory_bytes = manifest.memory_bytes;
        report.notes = need::notes(&manifest.networks, options.no_network_check);
        let (ways, call_off) = (workload.ways(), workload.call_off());
        report.dump = ways.dump;
        report.fallbacks = ways.fallbacks;
        report.tracker = Some(match &liveness {
            Liveness::Tracked { tracker } => tracker.clone(),
            Liveness::StopOnly { reason } => format!("none: {reason}"),
        });
        Self {
            context,
            halt,
            call_off,
            departure: Departure::new(migration, 0, context.journal.clone(), workload),
            manifest,
            liveness,
            options,
            progress,
            report,
            started: Instant::now(),
            stopped: None,
            token: 0,
            link: None,
        }
    }

    /// The phases in order.
    async fn run(&mut self) -> Result<()> {
        let live = self.choose_mode()?;
        let verdict = self.negotiate().await?;
        if self.options.dry_run {
            return Ok(());
        }
        let trees = self.manifest.files.clone();
        self.departure.with(move |workload| workload.carry(&trees)).await?;
        let mut copying = self.prepare(&verdict).await?;
        let copied = self.copy_or_call_off(&mut copying, live).await;
        // Also of a move that failed: how far it had come.
        copying.fill_report(&mut self.report);
        copied?;
        self.hand_over().await
    }

    /// Copies. Who cancels the move does not wait for a look at memory that is under way.
    async fn copy_or_call_off(&mut self, copying: &mut Copying, live: bool) -> Result<()> {
        let (halt, called_off) = (self.halt.clone(), self.call_off.clone());
        let cancelled = async {
            halt.cancel.cancelled().await;
            if let Some(called_off) = called_off {
                called_off.store(true, Ordering::Relaxed);
            }
            std::future::pending::<Result<()>>().await
        };
        let copied = tokio::select! {
            copied = self.copy(copying, live) => copied,
            never = cancelled => never,
        };
        copied.map_err(|error| match error {
            // What was called off failed for that.
            SessionError::Workload(WorkloadError::Failed { .. }) => {
                halt.check().err().unwrap_or(error)
            }
            error => error,
        })
    }

    /// From the files to a workload that is loaded at the destination.
    async fn copy(&mut self, copying: &mut Copying, live: bool) -> Result<()> {
        copying.send_files(&mut self.parts()?.1).await?;
        let mut held = PageSet::new();
        if live {
            self.enter(Phase::PreCopy);
            fail_here!("source.pre-copy");
            let (departure, mut wire, report) = self.parts()?;
            held = copying.pre_copy(departure, &mut wire, report).await?;
        }
        if !live && matches!(self.liveness, Liveness::Tracked { .. }) {
            // What devices write while they are saved must still be seen.
            self.departure.with(|workload| workload.track()).await?;
        }
        self.stop_and_send(copying, held).await
    }

    fn enter(&mut self, phase: Phase) {
        self.halt.phase = phase;
        self.progress.phase(phase);
    }

    fn link(&mut self) -> Result<&mut Link> {
        self.link.as_mut().ok_or_else(|| SessionError::Protocol {
            host: self.context.peer.name.clone(),
            what: "there is no connection".to_owned(),
        })
    }

    /// What the copying phases need, borrowed apart.
    fn parts(&mut self) -> Result<(&mut Departure, Wire<'_>, &mut Report)> {
        let link = self.link.as_mut().ok_or_else(|| SessionError::Protocol {
            host: self.context.peer.name.clone(),
            what: "there is no connection".to_owned(),
        })?;
        let kind = self.manifest.kind();
        let fixed = self.context.journal.fixed_stop_ms(kind, &self.report.workload).ok().flatten();
        let wire = Wire {
            link,
            halt: self.halt.clone(),
            progress: self.progress.clone(),
            fixed_stop_ms: fixed.unwrap_or(first_guess(kind)),
        };
        Ok((&mut self.departure, wire, &mut self.report))
    }
}

/// What the copying phases use of a session.
pub(super) struct Wire<'a> {
    /// The control connection.
    pub(super) link: &'a mut Link,
    /// What may end the waiting.
    pub(super) halt: Halt,
    /// Where progress is told.
    pub(super) progress: ProgressSender,
    /// What a stop is thought to cost beyond its memory.
    pub(super) fixed_stop_ms: f64,
}

/// Before any move of a kind was measured on this host, in milliseconds.
fn first_guess(kind: Kind) -> f64 {
    match kind {
        Kind::Container => 250.0,
        _ => 20.0,
    }
}

/// Milliseconds with their fraction.
pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
