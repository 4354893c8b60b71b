//! The steps of a move without a wire, and what it was like.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use decamp_shared::methods::Ways;
use decamp_shared::pages::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use decamp_shared::workload::{
    Backend, DestinationWorkload, FileTree, Liveness, PlacedTree, Section, SourceWorkload,
};

use super::spot::Spot;

/// What a move was like: milliseconds by step.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) times: BTreeMap<&'static str, f64>,
    /// Milliseconds from the beginning of the pause to the end of the activation, with what lies between the steps.
    pub(crate) stop: f64,
    /// In the stop.
    pub(crate) pages: u64,
    /// In all.
    pub(crate) sent: u64,
    /// By which tracker, or why by none.
    pub(crate) tracker: String,
    /// How it left.
    pub(crate) left: Ways,
    /// How it was restored.
    pub(crate) arrived: Ways,
}

impl Moved {
    /// Milliseconds of all steps of the stop.
    pub(crate) fn downtime(&self) -> f64 {
        ["pause", "harvest", "copy", "save", "load", "activate"]
            .iter()
            .map(|step| self.times[step])
            .sum()
    }
}

impl Spot<'_> {
    /// The empty shell for what comes from `source`.
    pub(crate) fn prepare(&self, source: &mut dyn SourceWorkload) -> Box<dyn DestinationWorkload> {
        self.prepare_at(source, |tree| self.placed(tree))
    }

    /// The same with its files elsewhere.
    pub(crate) fn prepare_at(
        &self,
        source: &mut dyn SourceWorkload,
        place: impl Fn(&FileTree) -> PathBuf,
    ) -> Box<dyn DestinationWorkload> {
        let mut manifest = source.manifest().expect("a manifest");
        manifest.name = self.place.name.clone();
        let trees: Vec<_> = manifest
            .files
            .iter()
            .map(|tree| PlacedTree { tree: tree.clone(), path: place(tree) })
            .collect();
        let backend = self.backend();
        assert_eq!(backend.preflight(&manifest, &trees), []);
        let spec = backend.respec(&manifest, &trees).expect("a spec");
        backend.prepare(&manifest, &spec, &self.place).expect("prepare")
    }

    /// Where a tree stands here: at the same path, or as a copy where it would go elsewhere.
    fn placed(&self, tree: &FileTree) -> PathBuf {
        if tree.place.is_empty() {
            return PathBuf::from(&tree.path);
        }
        let path = self.place.dir.with_extension("files");
        let _ = fs::remove_dir_all(&path);
        let there = path.to_str().expect("UTF-8");
        let copied = Command::new("cp").args(["-a", &tree.path, there]).status();
        assert!(copied.expect("cp").success());
        path
    }

    pub(crate) fn move_to(&self, there: &Self) -> Moved {
        let mut times = BTreeMap::new();
        let mut step = |name, begun: Instant| {
            times.insert(name, begun.elapsed().as_secs_f64() * 1000.0);
        };
        let mut source = self.source();
        let begun = Instant::now();
        let mut destination = there.prepare(&mut *source);
        step("prepare", begun);
        let begun = Instant::now();
        let stopped = begun;
        source.pause().expect("pause");
        step("pause", begun);
        let begun = Instant::now();
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        step("harvest", begun);
        let begun = Instant::now();
        copy(&dirty, &mut *source, &mut *destination);
        step("copy", begun);
        let begun = Instant::now();
        let sections = source.save().expect("save");
        step("save", begun);
        let mut again = PageSet::new();
        source.harvest(&mut again).expect("harvest");
        assert!(again.is_empty(), "what stands still was dirty twice");
        let begun = Instant::now();
        destination.load(sections).expect("load");
        step("load", begun);
        let (left, arrived) = (source.ways(), destination.ways());
        let tracker = tracker_of(&*source);
        source.fence(1).expect("fence");
        let begun = Instant::now();
        destination.activate(1).expect("activate");
        step("activate", begun);
        let stop = stopped.elapsed().as_secs_f64() * 1000.0;
        let begun = Instant::now();
        source.release().expect("release");
        step("release", begun);
        let pages = dirty.len();
        Moved { times, stop, pages, sent: pages, tracker, left, arrived }
    }

    /// Moves it to a twin that has files of its own: they are copied, as between two hosts. Its memory is copied
    /// in so many `rounds` while it runs, and in the stop.
    pub(crate) fn move_with_files(&self, there: &Self, rounds: u32) {
        let (from, to) = (self.bundle(), there.bundle());
        let copy = || {
            let _ = fs::remove_dir_all(&to);
            let copied = Command::new("cp").arg("-aT").args([&from, &to]).status();
            assert!(copied.expect("cp").success());
        };
        let mut source = self.source();
        let mut destination = there.prepare_at(&mut *source, |_| {
            copy();
            to.clone()
        });
        let mut dirty = PageSet::new();
        if rounds > 0 {
            source.track().expect("track");
        }
        for _ in 0..rounds {
            source.harvest(&mut dirty).expect("harvest");
            dirty = self::copy(&dirty, &mut *source, &mut *destination);
        }
        source.pause().expect("pause");
        copy();
        source.harvest(&mut dirty).expect("harvest");
        self::copy(&dirty, &mut *source, &mut *destination);
        destination.load(source.save().expect("save")).expect("load");
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        source.release().expect("release");
    }

    /// Has it run at `there` without the pages that `withheld` chooses of its largest stretch, by space, until
    /// something there has `noticed`; and then here again.
    pub(crate) fn run_without(
        &self,
        there: &Self,
        space: SpaceId,
        withheld: impl FnOnce(PageRange) -> PageRange,
        noticed: impl FnOnce(),
    ) {
        let mut source = self.source();
        let mut destination = there.prepare(&mut *source);
        source.pause().expect("pause");
        let mut dirty = PageSet::new();
        source.harvest(&mut dirty).expect("harvest");
        let ours = dirty.ranges().filter(|range| range.space == space);
        dirty.remove(withheld(ours.max_by_key(|range| range.count).expect("pages")));
        copy(&dirty, &mut *source, &mut *destination);
        destination.load(source.save().expect("save")).expect("load");
        destination.activate(1).expect("activate");
        noticed();
        source.resume().expect("resume");
        // A keeper serves one connection at a time.
        drop((source, destination));
        there.stop();
    }

    /// The same in rounds while it runs, `rounds` of them, before the stop.
    pub(crate) fn move_live(&self, there: &Self, rounds: u32) -> Moved {
        let mut times = BTreeMap::new();
        let mut source = self.source();
        assert!(matches!(source.liveness(), Liveness::Tracked { .. }), "{:?}", source.liveness());
        let mut destination = there.prepare(&mut *source);
        source.track().expect("track");
        let (mut dirty, mut pages) = (PageSet::new(), 0);
        for _ in 0..rounds {
            source.harvest(&mut dirty).expect("harvest");
            pages += dirty.len();
            dirty = copy(&dirty, &mut *source, &mut *destination);
        }
        let mut begun = Instant::now();
        let stopped = begun;
        let mut step = |name| {
            times.insert(name, begun.elapsed().as_secs_f64() * 1000.0);
            begun = Instant::now();
        };
        source.pause().expect("pause");
        step("pause");
        source.harvest(&mut dirty).expect("harvest");
        step("harvest");
        let missed = copy(&dirty, &mut *source, &mut *destination);
        assert!(missed.is_empty(), "what stands still went away: {missed:?}");
        step("copy");
        let sections = source.save().expect("save");
        step("save");
        destination.load(sections).expect("load");
        step("load");
        let (left, arrived) = (source.ways(), destination.ways());
        let tracker = tracker_of(&*source);
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        step("activate");
        let stop = stopped.elapsed().as_secs_f64() * 1000.0;
        source.release().expect("release");
        eprintln!("    {} pages in the stop after {pages}: {times:.1?}", dirty.len());
        let (sent, pages) = (pages + dirty.len(), dirty.len());
        Moved { times, stop, pages, sent, tracker, left, arrived }
    }
}

pub(crate) fn tracker_of(source: &dyn SourceWorkload) -> String {
    match source.liveness() {
        Liveness::Tracked { tracker } => tracker,
        Liveness::StopOnly { reason } => reason,
    }
}

/// Every page that exists at the source goes to the destination.
pub(crate) fn copy_pages(
    source: &mut dyn SourceWorkload,
    destination: &mut dyn DestinationWorkload,
) {
    let mut dirty = PageSet::new();
    source.harvest(&mut dirty).expect("harvest");
    copy(&dirty, source, destination);
}

/// The pages of `dirty` go to the destination. Gives those that went away meanwhile.
pub(crate) fn copy(
    dirty: &PageSet,
    source: &mut dyn SourceWorkload,
    destination: &mut dyn DestinationWorkload,
) -> PageSet {
    let spaces = source.spaces().expect("spaces");
    let mut dirty = dirty.clone();
    dirty.retain_spaces(|space| spaces.iter().any(|info| info.id == space.0));
    let writer = destination.writer(&spaces).expect("a writer");
    let reader = source.reader().expect("a reader");
    let mut buffer = vec![0; 256 * PAGE_SIZE];
    for range in dirty.ranges() {
        let mut first = range.first;
        while first < range.end() {
            let part = PageRange::new(range.space, first, (range.end() - first).min(256));
            let bytes = &mut buffer[..part.bytes()];
            reader.read(part, bytes).expect("read");
            if bytes.iter().all(|byte| *byte == 0) {
                writer.zero(part).expect("zero");
            } else {
                writer.write(part, bytes).expect("write");
            }
            first = part.end();
        }
    }
    reader.take_missed()
}

/// The same sections, each image of CRIU's in one of its own, as they may come too: to damage one of them. They
/// come first.
pub(crate) fn apart(sections: Vec<Section>) -> Vec<Section> {
    let (packs, others): (Vec<_>, Vec<_>) =
        sections.into_iter().partition(|section| section.kind == "container/images");
    assert!(!packs.is_empty(), "small images travel together");
    let mut found = Vec::new();
    for pack in packs {
        let plain = zstd::stream::decode_all(&pack.bytes[4..]).expect("a frame");
        let mut rest = &plain[..];
        while let [length, after @ ..] = rest {
            let (name, after) = after.split_at(usize::from(*length));
            let (length, after) = after.split_first_chunk::<4>().expect("a length");
            let (bytes, after) = after.split_at(u32::from_le_bytes(*length) as usize);
            let kind = format!("criu/{}", std::str::from_utf8(name).expect("a name"));
            found.push(Section { kind, version: 1, bytes: bytes.to_vec() });
            rest = after;
        }
    }
    found.into_iter().chain(others).collect()
}
