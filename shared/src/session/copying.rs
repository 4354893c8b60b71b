//! What the source sends: files, rounds of pages, the final stop's rest and the state sections.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::interval;

use super::departure::Departure;
use super::error::{Result, SessionError, chain};
use super::policy::{Decision, Policy, Remaining, has_time_to_give_way};
use super::progress::Progress;
use super::report::{PageCounts, Report, Round};
use super::sections::{send_load, send_parts};
use super::source::{Wire, millis};
use super::{Compress, MaxDowntime, MoveOptions};
use crate::files::{FileCounters, TreeSender, settle};
use crate::pages::{
    Compression, PAGE_SIZE, PageReader, PageSet, SendCounters, SendOptions, SendPool, SpaceId,
};
use crate::protocol::control::{self, reply, request};
use crate::transport::{Canceller, DataStream};
use crate::workload::{FileRole, FileTree, Kind, Section, SpaceInfo, Storage};

/// How long the destination may take to install a round whose last byte has left.
const ROUND_WITHIN: Duration = Duration::from_secs(120);
/// How long the files that changed may take while the workload stands still.
const FILES_WITHIN: Duration = Duration::from_secs(600);
/// How long a destination whose streams broke is given to say why.
const REASON_WITHIN: Duration = Duration::from_secs(1);
/// Progress lines a second.
const TICKS: u32 = 10;
/// Wire bytes of a round below which its rate says nothing about the link.
const MEASURABLE: u64 = 4 << 20;

/// Everything that leaves over page and file streams, and how far it has come.
pub(super) struct Copying {
    pool: Option<SendPool>,
    cancellers: Vec<Canceller>,
    counters: Arc<SendCounters>,
    files: Option<TreeSender<DataStream>>,
    file_canceller: Canceller,
    file_counters: Arc<FileCounters>,
    /// Disks that travel as pages.
    disks: Vec<SpaceId>,
    /// Those that are copied as files.
    trees: Vec<FileTree>,
    /// Where the shared ones are, and whether the workload has stored each itself when it is saved.
    shared: Vec<(String, bool)>,
    max_downtime: MaxDowntime,
    timeout: Duration,
    /// Whether a workload that runs has the processors before those that copy it.
    gives_way: bool,
    /// Whether the workload stands still.
    stopped: bool,
    started: Instant,
    announced: BTreeSet<u32>,
    round: u32,
    /// Wire bytes a second, from the last round that was long enough to tell; `None` before.
    rate: Option<f64>,
}

impl Copying {
    pub(super) fn new(
        pages: Vec<DataStream>,
        files: DataStream,
        trees: Vec<FileTree>,
        kind: Kind,
        options: &MoveOptions,
        started: Instant,
    ) -> Result<Self> {
        let compression = match options.compress {
            Compress::Auto => Compression::Auto,
            Compress::None => Compression::None,
            Compress::Lz4 => Compression::Lz4,
            Compress::Zstd => Compression::Zstd,
        };
        let (shared, mut trees): (Vec<_>, Vec<_>) =
            trees.into_iter().partition(|tree| tree.storage() == Storage::Shared);
        let paged = trees.extract_if(.., |tree| tree.is_paged());
        let disks: Vec<_> = paged.map(|tree| SpaceId(tree.space)).collect();
        let cancellers = pages.iter().map(DataStream::canceller).collect();
        let pool = SendPool::start(pages, SendOptions { compression })
            .map_err(|error| SessionError::Pages { round: 0, source: Box::new(error) })?;
        let file_counters = Arc::new(FileCounters::default());
        Ok(Self {
            counters: pool.counters(),
            pool: Some(pool),
            cancellers,
            file_canceller: files.canceller(),
            files: Some(TreeSender::new(files, file_counters.clone())),
            file_counters,
            disks,
            trees,
            shared: shared
                .into_iter()
                .map(|tree| (tree.path.clone(), tree.role() == FileRole::Disk))
                .collect(),
            max_downtime: options.max_downtime(),
            timeout: options.timeout(),
            gives_way: kind == Kind::Container,
            stopped: false,
            started,
            announced: BTreeSet::new(),
            round: 0,
            rate: None,
        })
    }

    /// Sends every file tree while the workload runs.
    pub(super) async fn send_files(&mut self, wire: &mut Wire<'_>) -> Result<()> {
        // Most of it, so that the stop is short.
        wire.halt.or(self.settle_shared(true)).await?;
        if self.trees.is_empty() {
            return Ok(());
        }
        let sending = self.on_files(|sender, tree| sender.send(tree), |_| true)?;
        let mut ticks = interval(Duration::from_secs(1) / TICKS);
        tokio::pin!(sending);
        loop {
            tokio::select! {
                sent = &mut sending => {
                    self.files = Some(sent??);
                    self.tell_files(wire);
                    return Ok(());
                }
                _ = ticks.tick() => self.tell_files(wire),
                error = wire.halt.halted() => {
                    self.file_canceller.cancel();
                    return Err(error);
                }
                body = wire.link.reply(Duration::MAX, "sending the files") => {
                    // Only a failure comes unasked; it says more than the stream's own end.
                    self.file_canceller.cancel();
                    return Err(match body {
                        Ok(other) => wire.link.unexpected(&other, "sending the files"),
                        Err(error) => error,
                    });
                }
            }
        }
    }

    /// Has what was written to shared trees stored where the other host sees it: what is only in this
    /// host's memory may never come there. Without `all`, what the workload stores itself is left out.
    fn settle_shared(&self, all: bool) -> impl Future<Output = Result<()>> + use<> {
        let wanted = |(_, itself): &&(String, bool)| all || !itself;
        let paths: Vec<_> = self.shared.iter().filter(wanted).cloned().collect();
        let settling = spawn_blocking(move || {
            paths.iter().try_for_each(|(path, _)| {
                settle(Path::new(path)).map_err(|source| SessionError::Files {
                    path: path.clone(),
                    source: Box::new(source),
                })
            })
        });
        async { settling.await? }
    }

    fn tell_files(&self, wire: &Wire<'_>) {
        wire.progress.tell(Progress::Files {
            sent_bytes: self.file_counters.sent_bytes.load(Ordering::Relaxed),
            total_bytes: self.file_counters.total_bytes.load(Ordering::Relaxed),
        });
    }

    /// Runs `send` over the trees that `wanted` picks, on a thread that may block.
    #[allow(clippy::type_complexity)]
    fn on_files(
        &mut self,
        send: impl Fn(&mut TreeSender<DataStream>, &FileTree) -> crate::files::Result<()>
        + Send
        + 'static,
        wanted: impl Fn(&FileTree) -> bool,
    ) -> Result<JoinHandle<Result<TreeSender<DataStream>>>> {
        let trees: Vec<_> = self.trees.iter().filter(|tree| wanted(tree)).cloned().collect();
        let mut sender = self.files.take().ok_or_else(|| gone("file"))?;
        Ok(spawn_blocking(move || {
            for tree in &trees {
                send(&mut sender, tree).map_err(|error| SessionError::Files {
                    path: tree.path.clone(),
                    source: Box::new(error),
                })?;
            }
            Ok(sender)
        }))
    }

    /// Rounds while the workload runs, until the policy says stop. Gives what the last harvest took
    /// and no round sent, for [`Copying::final_stop`].
    pub(super) async fn pre_copy(
        &mut self,
        departure: &mut Departure,
        wire: &mut Wire<'_>,
        report: &mut Report,
    ) -> Result<PageSet> {
        departure.with(|workload| workload.track()).await?;
        let fixed = Duration::from_secs_f64(wire.fixed_stop_ms.max(0.0) / 1e3);
        let mut policy = Policy::new(self.max_downtime, self.timeout, fixed);
        if let MaxDowntime::Aimed(aim) = self.max_downtime
            && fixed > aim
        {
            let text = format!(
                "A stop costs about {} ms on these hosts before any memory is sent, more than the {} ms \
                 that are aimed at; --max-downtime makes it a promise",
                fixed.as_millis(),
                aim.as_millis()
            );
            wire.progress.tell(Progress::Note { text });
        }
        let mut dirty = harvest(departure, PageSet::new()).await?;
        loop {
            wire.halt.check()?;
            // After the harvest, so that every page of it is read from the memory that it is of: spaces
            // come and go, and one whose process ended in between needs not travel.
            let (spaces, reader) = departure.with(|it| Ok((it.spaces()?, it.reader()?))).await?;
            let known: BTreeSet<u32> = spaces.iter().map(|space| space.id).collect();
            dirty.retain_spaces(|space| known.contains(&space.0));
            let sent = self.send_round(reader.clone(), dirty, &spaces, wire, report).await?;
            dirty = harvest(departure, reader.take_missed()).await?;
            let (stall, look, restoring) = departure
                .with(|workload| Ok((workload.stall(), workload.look(), workload.restoring())))
                .await?;
            report.source_stall_ms = millis(stall);
            let remaining = Remaining {
                dirty_pages: dirty.len(),
                wire_ratio: sent.wire_ratio,
                wire_rate: self.rate.unwrap_or(sent.wire_rate),
                look: look + restoring.needed,
                wished: restoring.wished,
                elapsed: self.started.elapsed(),
            };
            let predicted = millis(policy.predict(&remaining));
            let dirty_rate = remaining.dirty_pages as f64 / (sent.took.as_secs_f64().max(1e-3));
            let rate = remaining.wire_rate;
            let written = Some(dirty_rate);
            self.tell_pages(wire, 0, remaining.dirty_pages, rate, written, Some(predicted));
            match policy.decide(&remaining) {
                Decision::Another => {}
                Decision::Throttle { percent } => {
                    // Worse for it than what it was spared.
                    self.gives_way = false;
                    let text = format!(
                        "It writes faster than the link: taking {percent} % of its processor time"
                    );
                    wire.progress.tell(Progress::Note { text });
                    let throttled =
                        departure.with(move |workload| workload.throttle(percent)).await;
                    if let Err(error) = throttled {
                        // It is no less whole for that; the timeout ends what does not get there.
                        policy.cannot_throttle();
                        let text = format!("It cannot be slowed down here: {}", chain(&error));
                        wire.progress.tell(Progress::Note { text });
                    }
                }
                Decision::Stop => {
                    if policy.misses(&remaining) {
                        let tried = if policy.spares(&remaining) {
                            "Further rounds do not"
                        } else {
                            "Neither further rounds nor less processor time for it"
                        };
                        let text = format!(
                            "{tried} make a stop of about {predicted:.0} ms shorter, which is more than is aimed at; \
                             --max-downtime makes it a promise"
                        );
                        wire.progress.tell(Progress::Note { text });
                    }
                    let spare = policy.spare(&remaining);
                    departure
                        .with(move |workload| {
                            workload.spare(spare);
                            Ok(())
                        })
                        .await?;
                    report.predicted.downtime_ms = Some(predicted);
                    return Ok(dirty);
                }
                Decision::GiveUp { reason } => return Err(SessionError::NotConverging(reason)),
            }
        }
    }

    /// While the workload stands still: the last pages on all streams, and beside them the state
    /// and what changed in the files. `held` is what pre-copy harvested and did not send.
    pub(super) async fn final_stop(
        &mut self,
        departure: &mut Departure,
        held: PageSet,
        tracked: bool,
        wire: &mut Wire<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let begun = Instant::now();
        self.stopped = true;
        let (spaces, reader) = departure.with(|it| Ok((it.spaces()?, it.reader()?))).await?;
        let files = self.on_files(|sender, tree| sender.send_changes(tree), |tree| tree.live)?;
        // A VM's disk is stored with its state, and nothing else that anybody wrote beside it has to be.
        let settled = self.settle_shared(false);
        let last = harvest(departure, held).await?;
        report.compare_ms = millis(departure.with(|workload| Ok(workload.look())).await?);
        // Before the state, so that whoever is asked to load knows of it.
        let round = self.begin_round(&spaces, wire).await;
        let outbox = wire.link.outbox();
        let ending = self.end_files(files, settled, wire);
        let (pages, file_stream) = (self.cancellers.clone(), self.file_canceller.clone());
        // Whichever fails first has the reason; it ends the other, whose failure says only that.
        let first = OnceLock::new();
        let saving_failed = |_: &SessionError| {
            let _ = first.set(Failed::Saving);
            pages.iter().for_each(Canceller::cancel);
        };
        let saving = async {
            // It stands still for nothing while its pages still travel.
            let (sections, more) = save(departure, tracked).await.inspect_err(saving_failed)?;
            let count = send_parts(sections, &outbox).await;
            ending.await.inspect_err(saving_failed)?;
            if more.is_empty() {
                // Nothing comes after the round that is under way: no need to wait for that to be over.
                send_load(count, round, &outbox).await;
            }
            Ok::<_, SessionError>((count, more))
        };
        let sending = async {
            let sent = self.send_pages(reader.clone(), last, wire, report).await;
            sent.inspect_err(|_| {
                let _ = first.set(Failed::Sending);
                file_stream.cancel();
            })
        };
        let (count, more) = match tokio::join!(saving, sending) {
            (Ok(saved), Ok(_)) => saved,
            (Err(_), Err(error)) if first.get() == Some(&Failed::Sending) => return Err(error),
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        report.downtime.memory_ms = millis(begun.elapsed());
        let rest = Instant::now();
        if !more.is_empty() {
            self.send_round(reader, more, &spaces, wire, report).await?;
            send_load(count, self.round, &outbox).await;
        }
        report.downtime.state_ms = millis(rest.elapsed());
        Ok(())
    }

    /// Waits for the changed files, and for what is shared to be stored, and ends the files' stream.
    fn end_files<S: Future<Output = Result<()>>>(
        &self,
        files: JoinHandle<Result<TreeSender<DataStream>>>,
        settled: S,
        wire: &Wire<'_>,
    ) -> impl Future<Output = Result<()>> + use<S> {
        let ending = async {
            settled.await?;
            let sender = files.await??;
            spawn_blocking(move || sender.finish()).await?.map_err(|error| SessionError::Files {
                path: "the end of the file stream".to_owned(),
                source: Box::new(error),
            })
        };
        let (canceller, halt) = (self.file_canceller.clone(), wire.halt.clone());
        let host = wire.link.host().to_owned();
        let late = async {
            tokio::time::sleep(FILES_WITHIN).await;
            Err(SessionError::Protocol {
                host,
                what: format!(
                    "it did not take the changed files within {} s",
                    FILES_WITHIN.as_secs()
                ),
            })
        };
        async move {
            let ended = tokio::select! {
                ended = halt.or(ending) => ended,
                late = late => late,
            };
            ended.inspect_err(|_| canceller.cancel())
        }
    }

    /// Sends one round and waits until every page of it is in its place.
    async fn send_round(
        &mut self,
        reader: Arc<dyn PageReader>,
        pages: PageSet,
        spaces: &[SpaceInfo],
        wire: &mut Wire<'_>,
        report: &mut Report,
    ) -> Result<Sent> {
        self.begin_round(spaces, wire).await;
        self.send_pages(reader, pages, wire, report).await
    }

    /// Says that a round begins, and which spaces are new in it; its number.
    async fn begin_round(&mut self, spaces: &[SpaceInfo], wire: &Wire<'_>) -> u32 {
        self.round += 1;
        let round = self.round;
        let fresh =
            spaces.iter().filter(|space| self.announced.insert(space.id)).cloned().collect();
        wire.link.send(request::Body::Round(control::Round { round, spaces: fresh })).await;
        round
    }

    /// Sends the pages of the round that has begun, and waits until all of them are in their places.
    async fn send_pages(
        &mut self,
        reader: Arc<dyn PageReader>,
        pages: PageSet,
        wire: &mut Wire<'_>,
        report: &mut Report,
    ) -> Result<Sent> {
        let round = self.round;
        let begun = Instant::now();
        let before = self.counters.wire_bytes.load(Ordering::Relaxed);
        let read_before = self.counters.read_bytes.load(Ordering::Relaxed);
        let dirty_pages = pages.len();
        let mut pool = self.pool.take().ok_or_else(|| gone("page"))?;
        let gives_way = self.gives_way && !self.stopped;
        pool.give_way(gives_way && has_time_to_give_way(self.started.elapsed(), self.timeout));
        let mut sending = spawn_blocking(move || {
            let sent = pool.round(round, reader, &pages);
            (pool, sent)
        });
        let mut ticks = interval(Duration::from_secs(1) / TICKS);
        let (mut sent, mut installed) = (false, false);
        let mut until = None;
        while !(sent && installed) {
            let late = tokio::time::sleep_until(until.unwrap_or_else(far));
            tokio::select! {
                done = &mut sending, if !sent => {
                    let (pool, result) = done?;
                    self.pool = Some(pool);
                    if let Err(error) = result {
                        let broken = SessionError::Pages { round, source: Box::new(error) };
                        return Err(told_reason(wire, broken).await);
                    }
                    sent = true;
                    until = Some(tokio::time::Instant::now() + ROUND_WITHIN);
                }
                () = late, if until.is_some() => {
                    self.cancel();
                    return Err(SessionError::Protocol {
                        host: wire.link.host().to_owned(),
                        what: format!(
                            "it did not put the pages of round {round} in their places within {} s",
                            ROUND_WITHIN.as_secs()
                        ),
                    });
                }
                // Whatever comes after that answers something else.
                body = wire.link.reply(Duration::MAX, "sending pages"), if !installed => match body {
                    Ok(reply::Body::RoundDone(done)) if done.round == round => installed = true,
                    Ok(other) => {
                        self.cancel();
                        return Err(wire.link.unexpected(&other, "sending pages"));
                    }
                    Err(error) => {
                        self.cancel();
                        return Err(error);
                    }
                },
                error = wire.halt.halted() => {
                    self.cancel();
                    return Err(error);
                }
                _ = ticks.tick() => {
                    let read = self.counters.read_bytes.load(Ordering::Relaxed) - read_before;
                    let sent = self.counters.wire_bytes.load(Ordering::Relaxed) - before;
                    let rate = sent as f64 / begun.elapsed().as_secs_f64().max(1e-3);
                    let done = read / PAGE_SIZE as u64;
                    self.tell_pages(wire, done, dirty_pages, rate, None, None);
                }
            }
        }
        let took = begun.elapsed();
        let wire_bytes = self.counters.wire_bytes.load(Ordering::Relaxed) - before;
        let wire_rate = wire_bytes as f64 / took.as_secs_f64().max(1e-6);
        if wire_bytes >= MEASURABLE {
            self.rate = Some(wire_rate);
        }
        report.rounds.push(Round { round, dirty_pages, wire_bytes, ms: millis(took) });
        let memory = (dirty_pages.max(1) * PAGE_SIZE as u64) as f64;
        Ok(Sent { took, wire_rate, wire_ratio: (wire_bytes as f64 / memory).min(1.05) })
    }

    fn cancel(&self) {
        self.cancellers.iter().for_each(Canceller::cancel);
    }

    fn tell_pages(
        &self,
        wire: &Wire<'_>,
        done: u64,
        of: u64,
        rate: f64,
        dirty_rate: Option<f64>,
        predicted_downtime_ms: Option<f64>,
    ) {
        wire.progress.tell(Progress::Pages {
            round: self.round,
            done_pages: done,
            round_pages: of,
            wire_bytes: self.counters.wire_bytes.load(Ordering::Relaxed),
            rate,
            dirty_rate,
            predicted_downtime_ms,
        });
    }

    /// How far it has come, in all.
    pub(super) fn fill_report(&self, report: &mut Report) {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        report.pages = PageCounts {
            zero: count(&counters.zero),
            same: 0,
            delta: 0,
            lz4: count(&counters.lz4),
            zstd: count(&counters.zstd),
            raw: count(&counters.raw),
        };
        report.wire_bytes = count(&counters.wire_bytes);
        report.disk_bytes = counters.wire_bytes_of(&self.disks);
        report.file_bytes = count(&self.file_counters.wire_bytes);
    }
}

/// What one round measured.
struct Sent {
    took: Duration,
    /// Bytes on the wire a second.
    wire_rate: f64,
    /// Bytes on the wire for each byte of memory.
    wire_ratio: f64,
}

/// The destination says why it gives up on the control connection, and a broken page stream is only the
/// echo of that. What it said, if it did; else what is known here.
async fn told_reason(wire: &mut Wire<'_>, broken: SessionError) -> SessionError {
    match wire.link.reply(REASON_WITHIN, "sending pages").await {
        Err(told @ SessionError::Peer { .. }) => told,
        _ => broken,
    }
}

async fn harvest(departure: &mut Departure, mut into: PageSet) -> Result<PageSet> {
    departure
        .with(move |workload| {
            workload.harvest(&mut into)?;
            Ok(into)
        })
        .await
}

/// What of the stop failed.
#[derive(PartialEq, Eq)]
enum Failed {
    Saving,
    Sending,
}

/// Saves a workload that stands still; its state, and what was written meanwhile.
async fn save(departure: &mut Departure, tracked: bool) -> Result<(Vec<Section>, PageSet)> {
    let sections = departure.with(|workload| workload.save()).await?;
    // Devices may write memory while they are saved. What is not tracked has none.
    let more = PageSet::new();
    Ok((sections, if tracked { harvest(departure, more).await? } else { more }))
}

fn far() -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs(86_400)
}

fn gone(what: &str) -> SessionError {
    SessionError::Workload(crate::workload::WorkloadError::plain(format!(
        "The {what} streams of this move are gone"
    )))
}
