//! A model of processes that fork, write and end, and of a destination that gets what is told: each page is
//! there as it was, and none is sent without need.

use proptest::prelude::*;

use super::*;

/// Pages of a process in the model, over several blocks.
const PAGES: u64 = 14;

fn page(index: u64) -> u64 {
    index * 97
}

/// What happens to processes that run. Processes are picked by their place in order.
#[derive(Clone, Debug)]
enum Event {
    /// Untracked: the tracker tells all of its pages each time.
    Fork(usize, bool),
    Write(usize, u64),
    Unmap(usize, u64),
    /// Other memory, with this many pages.
    Exec(usize, u64),
    Exit(usize),
    /// The kernel moves a page to another frame, for all that have it.
    Migrate(usize, u64),
}

#[derive(Clone, Debug)]
enum Step {
    Event(Event),
    /// What was told is sent.
    Send,
    /// A round, and what happens after the tracker was asked and before places are looked at.
    Round(Vec<Event>),
}

#[derive(Default)]
struct Running {
    /// By page: frame and content.
    pages: BTreeMap<u64, (u64, u64)>,
    written: BTreeSet<u64>,
    untracked: bool,
}

/// Processes, and what a destination has of them.
#[derive(Default)]
struct Model {
    running: BTreeMap<SpaceId, Running>,
    next: u64,
    /// Told and not sent yet.
    pending: PageSet,
    stored: BTreeMap<(SpaceId, u64), u64>,
    sent: u64,
}

/// Where pages lie cannot be read.
struct Failing;

impl Places for Failing {
    fn read(&mut self, _: SpaceId, _: u64, _: &mut [u64; BLOCK]) -> Result<()> {
        Err(crate::error::ContainerError::State("no".to_owned()))
    }
}

impl Places for &Model {
    fn read(&mut self, space: SpaceId, block: u64, into: &mut [u64; BLOCK]) -> Result<()> {
        into.fill(0);
        for (page, (frame, _)) in self.running.get(&space).iter().flat_map(|one| &one.pages) {
            if page / BLOCK as u64 == block {
                into[(page % BLOCK as u64) as usize] = *frame;
            }
        }
        Ok(())
    }
}

impl Model {
    fn begun() -> Self {
        let mut model = Self::default();
        model.running.insert(SpaceId(1), Running::default());
        (0..PAGES).for_each(|index| model.write(SpaceId(1), page(index)));
        model
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn write(&mut self, space: SpaceId, page: u64) {
        let (frame, content) = (self.fresh(), self.fresh());
        if let Some(one) = self.running.get_mut(&space) {
            one.pages.insert(page, (frame, content));
            one.written.insert(page);
        }
    }

    fn pick(&self, which: usize) -> Option<SpaceId> {
        self.running.keys().nth(which % self.running.len().max(1)).copied()
    }

    fn happen(&mut self, event: &Event) {
        let (Event::Fork(which, _)
        | Event::Write(which, _)
        | Event::Unmap(which, _)
        | Event::Exec(which, _)
        | Event::Exit(which)
        | Event::Migrate(which, _)) = event;
        let Some(space) = self.pick(*which) else { return };
        match event {
            Event::Fork(_, untracked) if self.running.len() < 6 => {
                // A number that is free again is taken again.
                let free = (1..).map(SpaceId).find(|id| !self.running.contains_key(id));
                let pages = self.running[&space].pages.clone();
                let written = pages.keys().copied().collect();
                let child = Running { pages, written, untracked: *untracked };
                self.running.insert(free.expect("a number"), child);
            }
            Event::Write(_, index) => self.write(space, page(*index)),
            Event::Unmap(_, index) => {
                let one = self.running.get_mut(&space).expect("it runs");
                one.pages.remove(&page(*index));
                one.written.remove(&page(*index));
            }
            Event::Exec(_, count) => {
                let one = self.running.get_mut(&space).expect("it runs");
                (one.pages, one.written) = Default::default();
                (0..*count).for_each(|index| self.write(space, page(index)));
            }
            Event::Exit(_) if self.running.len() > 1 => {
                self.running.remove(&space);
            }
            Event::Migrate(_, index) => {
                let to = self.fresh();
                let place = self.running[&space].pages.get(&page(*index)).copied();
                let all = self.running.values_mut().flat_map(|one| one.pages.values_mut());
                all.filter(|one| Some(**one) == place).for_each(|one| one.0 = to);
            }
            Event::Fork(..) | Event::Exit(_) => {}
        }
    }

    /// As a tracker tells it.
    fn harvest(&mut self) -> PageSet {
        let mut dirty = PageSet::new();
        for (space, one) in &mut self.running {
            let written = std::mem::take(&mut one.written);
            let told = if one.untracked { one.pages.keys().copied().collect() } else { written };
            told.iter().for_each(|page| dirty.insert(PageRange::new(*space, *page, 1)));
        }
        dirty
    }

    fn memories(&self, exact: bool) -> Vec<Memory> {
        let of = |one: &Running| match exact {
            true => one.pages.keys().map(|page| *page..page + 1).collect(),
            false => std::iter::once(0..page(PAGES)).collect(),
        };
        self.running.iter().map(|(space, one)| Memory { space: *space, pages: of(one) }).collect()
    }

    fn send(&mut self) {
        for range in std::mem::take(&mut self.pending).ranges() {
            for page in range.first..range.end() {
                let one = self.running.get(&range.space);
                let content = one.and_then(|one| one.pages.get(&page)).map_or(0, |one| one.1);
                self.stored.insert((range.space, page), content);
                self.sent += 1;
            }
        }
    }

    fn round(&mut self, unsent: &mut Unsent, meanwhile: &[Event]) {
        self.send();
        let mut dirty = self.harvest();
        meanwhile.iter().for_each(|event| self.happen(event));
        let mapped = |space| {
            let one = self.running.get(&space);
            Ok(one.map_or_else(Vec::new, |one| {
                one.pages.keys().map(|page| *page..page + 1).collect()
            }))
        };
        unsent.forget_unmapped(mapped).expect("told");
        let memories = self.memories(false);
        // One that fails takes nothing away.
        let mut told = dirty.clone();
        if unsent.round(&memories, &mut Failing, &mut told).is_err() {
            unsent.round(&memories, &mut &*self, &mut dirty).expect("told");
            told = dirty;
        }
        self.pending = told;
    }

    /// The stop; gives what the destination has to know.
    fn stop(&mut self, unsent: &mut Unsent) -> Aliases {
        let mut dirty = self.harvest();
        let memories = self.memories(true);
        let mut exists = PageSet::new();
        memories.iter().for_each(|memory| exists.union(&memory.set()));
        let mut told = dirty.clone();
        if unsent.last(&memories, &mut Failing, &mut told).is_err() {
            unsent.last(&memories, &mut &*self, &mut dirty).expect("told");
            told = dirty;
        }
        exists.subtract(&unsent.set());
        self.pending.union(&told);
        self.pending.intersect(&exists);
        self.send();
        unsent.aliases()
    }

    /// Each page reads at the destination as it does here.
    fn check(&self, aliases: &Aliases) {
        for (space, one) in &self.running {
            let ours = aliases.get(&(space.0 as i32)).map_or(&[][..], Vec::as_slice);
            for (page, (_, content)) in &one.pages {
                let alias = ours.iter().find(|alias| alias.pages.contains(page));
                let of = alias.map_or(*space, |alias| SpaceId(alias.of as u32));
                assert_eq!(self.stored.get(&(of, *page)), Some(content), "{page} of {space}");
            }
        }
        let hidden = self.memories(true).into_iter();
        let hidden = hidden.map(|memory| (memory.space.0 as i32, memory.pages)).collect();
        if let Some(section) = super::super::section(aliases) {
            super::super::read_section(&section, &hidden).expect("the destination takes it");
        }
    }
}

fn events() -> impl Strategy<Value = Event> {
    let which = 0usize..6;
    prop_oneof![
        3 => (which.clone(), prop::bool::weighted(0.2)).prop_map(|(one, un)| Event::Fork(one, un)),
        5 => (which.clone(), 0..PAGES).prop_map(|(one, page)| Event::Write(one, page)),
        2 => (which.clone(), 0..PAGES).prop_map(|(one, page)| Event::Unmap(one, page)),
        1 => (which.clone(), 0..PAGES).prop_map(|(one, pages)| Event::Exec(one, pages)),
        1 => which.clone().prop_map(Event::Exit),
        2 => (which, 0..PAGES).prop_map(|(one, page)| Event::Migrate(one, page)),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => events().prop_map(Step::Event),
        1 => Just(Step::Send),
        2 => prop::collection::vec(events(), 0..3).prop_map(Step::Round),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn nothing_that_is_held_back_is_missed(steps in steps(), tracked in any::<bool>()) {
        let (mut model, mut unsent) = (Model::begun(), Unsent::default());
        for step in &steps {
            match step {
                Step::Event(event) => model.happen(event),
                Step::Send => model.send(),
                Step::Round(meanwhile) if tracked => model.round(&mut unsent, meanwhile),
                Step::Round(meanwhile) => meanwhile.iter().for_each(|event| model.happen(event)),
            }
        }
        if !tracked {
            // Copied while it stands still: all of it counts as written.
            for one in model.running.values_mut() {
                one.written = one.pages.keys().copied().collect();
            }
        }
        let aliases = model.stop(&mut unsent);
        model.check(&aliases);
    }
}

/// Two processes that share nothing, of which the second's page is moved to where the first's was between
/// a look at the one and a look at the other.
#[derive(Default)]
struct Moving(BTreeMap<SpaceId, u64>);

impl Places for Moving {
    fn read(&mut self, space: SpaceId, _: u64, into: &mut [u64; BLOCK]) -> Result<()> {
        let looks = self.0.entry(space).or_default();
        *looks += 1;
        into.fill(0);
        into[7] = match (space.0, *looks) {
            (1, 1) => 50,
            (1, _) => 60,
            _ => 50,
        };
        Ok(())
    }
}

#[test]
fn pages_that_the_kernel_moves_are_not_mistaken_for_one() {
    let pages = || std::iter::once(0..20).collect();
    let memories = [1, 2].map(|id| Memory { space: SpaceId(id), pages: pages() });
    let mut dirty: PageSet =
        [1, 2].map(|id| PageRange::new(SpaceId(id), 7, 1)).into_iter().collect();
    let mut unsent = Unsent::default();
    unsent.round(&memories, &mut Moving::default(), &mut dirty).expect("told");
    assert_eq!((dirty.len(), unsent.set().len()), (2, 0));
}

#[test]
fn what_is_gone_is_not_sent() {
    let (mut model, mut unsent) = (Model::begun(), Unsent::default());
    (0..2).for_each(|_| model.happen(&Event::Fork(0, false)));
    model.round(&mut unsent, &[]);
    model.send();
    model.happen(&Event::Unmap(1, 3));
    model.happen(&Event::Exit(2));
    model.round(&mut unsent, &[]);
    model.send();
    assert_eq!((model.sent, unsent.set().len()), (PAGES, PAGES - 1));
}

#[test]
fn what_is_shared_is_sent_once_and_what_is_written_is_sent_again() {
    let (mut model, mut unsent) = (Model::begun(), Unsent::default());
    (0..3).for_each(|_| model.happen(&Event::Fork(0, false)));
    model.round(&mut unsent, &[]);
    model.send();
    assert_eq!((model.sent, unsent.set().len()), (PAGES, 3 * PAGES));
    // The first one of four writes: its page and one for the three others.
    model.happen(&Event::Write(0, 3));
    // And the last one another: that one alone.
    model.happen(&Event::Write(3, 5));
    model.round(&mut unsent, &[]);
    model.send();
    assert_eq!(model.sent, PAGES + 3);
    // Nobody wrote: nothing is looked at, and nothing sent. One that was forked since costs nothing.
    model.happen(&Event::Fork(3, false));
    let aliases = model.stop(&mut unsent);
    assert_eq!(model.sent, PAGES + 3);
    model.check(&aliases);
    assert_eq!(super::super::count(&aliases), 4 * PAGES - 2);
}
