//! The commit under every interleaving: stateright drives the product's own state machines
//! (`decamp_shared::session::commit`) while messages are lost, doubled and reordered, and while
//! either agent or either host restarts between any two actions.
//!
//! Two properties hold in every reachable state: never two running; and once both hosts are up and
//! connected, the state settles with exactly one running, or, where a host restart took the only
//! copy with it, with no silent loss: final journals, or an undecided session that `resolve` ends.

use std::collections::{BTreeSet, VecDeque};
use std::hash::Hash;

use decamp_shared::session::commit::{
    Answer, Destination, DestinationAction, DestinationInput, Keep, Record, Sight, Source,
    SourceAction, SourceInput,
};
use stateright::{Checker, Model, Property};

/// A keeper as both machines' actions and a lost agent move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Keeper {
    Gone,
    /// Runs.
    Running,
    /// Paused for the final round: resumes by itself when its agent is lost.
    Paused,
    /// Paused and fenced.
    Fenced,
    /// Never started.
    Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Commit,
    Abort,
    AnswerRunning,
    AnswerAborted,
    AnswerUndecided,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Leaving {
    up: bool,
    machine: Source,
    todo: VecDeque<SourceAction>,
    record: Record,
    keeper: Keeper,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Arriving {
    up: bool,
    machine: Destination,
    todo: VecDeque<DestinationAction>,
    record: Option<Record>,
    keeper: Keeper,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Leaving,
    destination: Arriving,
    /// In flight, in no order. Delivery may leave a message in flight (doubled); it may be lost.
    network: BTreeSet<Message>,
    agent_restarts: u8,
    host_restarts: u8,
    /// A restart of a host took a copy that was the workload.
    copy_lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Event {
    Pause,
    Loaded,
    HandOver,
    SourceGivesUp,
    DestinationGivesUp,
    SourceActs,
    /// The first action fails where the code says that it may: fencing, or activating.
    SourceFails,
    /// ROLLED_BACK could not be written, and no more is tried: the workload runs on.
    RolledBackFails,
    DestinationActs,
    DestinationFails,
    /// The keeper is lost while it lets the workload run, before or after it did.
    DestinationKeeperLost,
    /// COMMITTED could not be written, or was and the write still failed.
    CommittedFails,
    AskAgain,
    Deliver(Message, Fate),
    Lose(Message),
    /// Its agent lost, the source's keeper resumes what is paused and not fenced.
    KeeperDeadline,
    SourceAgentDies,
    SourceAgentStarts,
    SourceHostRestarts,
    DestinationAgentDies,
    DestinationAgentStarts,
    DestinationHostRestarts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    Once,
    Again,
}

/// How the ends are driven.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Driving {
    /// As the product does.
    AsBuilt,
    /// Commit leaves before the fence is on disk. The model must catch it.
    CommitBeforeFence,
    /// The journal says FENCED, but the keeper was never told. The model must catch it.
    KeeperNotTold,
}

struct Commit {
    driving: Driving,
    agent_restarts: u8,
    host_restarts: u8,
}

impl Commit {
    fn feed_source(&self, world: &mut World, input: SourceInput) {
        let (machine, mut actions) = world.source.machine.step(input);
        if self.driving == Driving::CommitBeforeFence
            && actions == [SourceAction::Journal(Record::Fenced)]
        {
            actions.insert(0, SourceAction::SendCommit);
        }
        world.source.machine = machine;
        world.source.todo.extend(actions);
    }

    fn feed_destination(&self, world: &mut World, input: DestinationInput) {
        let (machine, actions) = world.destination.machine.step(input);
        world.destination.machine = machine;
        world.destination.todo.extend(actions);
    }

    fn source_acts(&self, world: &mut World) {
        let Some(action) = world.source.todo.pop_front() else { return };
        match action {
            SourceAction::FenceKeeper => {
                if world.source.keeper == Keeper::Paused {
                    if self.driving != Driving::KeeperNotTold {
                        world.source.keeper = Keeper::Fenced;
                    }
                    self.feed_source(world, SourceInput::KeeperFenced);
                } else {
                    self.feed_source(world, SourceInput::GiveUp);
                }
            }
            SourceAction::Journal(record) => {
                world.source.record = record;
                self.feed_source(world, SourceInput::Journaled(record));
            }
            SourceAction::SendCommit => {
                world.network.insert(Message::Commit);
            }
            SourceAction::SendAbort => {
                world.network.insert(Message::Abort);
            }
            SourceAction::Resume => {
                if world.source.keeper != Keeper::Gone {
                    world.source.keeper = Keeper::Running;
                }
                self.feed_source(world, SourceInput::Resumed);
            }
            SourceAction::Release => world.source.keeper = Keeper::Gone,
        }
    }

    fn destination_acts(&self, world: &mut World) {
        let Some(action) = world.destination.todo.pop_front() else { return };
        match action {
            DestinationAction::Journal(record) => {
                world.destination.record = Some(record);
                self.feed_destination(world, DestinationInput::Journaled(record));
            }
            DestinationAction::Activate => {
                let input = if world.destination.keeper == Keeper::Shell {
                    world.destination.keeper = Keeper::Running;
                    DestinationInput::Activated
                } else {
                    DestinationInput::ActivateFailed
                };
                self.feed_destination(world, input);
            }
            DestinationAction::Discard => {
                // A keeper refuses to discard what ran.
                if world.destination.keeper == Keeper::Shell {
                    world.destination.keeper = Keeper::Gone;
                }
            }
            DestinationAction::Answer(answer) => {
                world.network.insert(match answer {
                    Answer::Running => Message::AnswerRunning,
                    Answer::Aborted => Message::AnswerAborted,
                    Answer::Undecided => Message::AnswerUndecided,
                });
            }
        }
    }

    /// The first action of the source fails, where the code lets it fail.
    fn source_fails(&self, world: &mut World) {
        match world.source.todo.pop_front() {
            Some(SourceAction::FenceKeeper) => self.feed_source(world, SourceInput::GiveUp),
            Some(SourceAction::Journal(Record::Fenced)) => {
                // Whether it reached the disk is not known: both are explored, this is the worse.
                world.source.record = Record::Fenced;
                self.feed_source(world, SourceInput::GiveUp);
            }
            _ => {}
        }
    }

    /// The disk stays full: the driver ends, and the workload runs on under a record that is not final.
    fn rolled_back_fails(&self, world: &mut World) {
        world.source.todo.pop_front();
    }

    fn destination_fails(&self, world: &mut World) {
        if let Some(DestinationAction::Activate) = world.destination.todo.pop_front() {
            self.feed_destination(world, DestinationInput::ActivateFailed);
        }
    }

    /// The keeper dies with the copy in it while it lets the workload run.
    fn destination_keeper_lost(&self, world: &mut World) {
        if let Some(DestinationAction::Activate) = world.destination.todo.pop_front() {
            world.destination.keeper = Keeper::Gone;
            world.copy_lost = true;
            self.feed_destination(world, DestinationInput::ActivateLost);
        }
    }

    /// What the driver does when COMMITTED cannot be written: the machine stays as it was, nothing is
    /// answered. Here the record reached the disk all the same, which is the worse case.
    fn committed_fails(&self, world: &mut World) {
        world.destination.todo.clear();
        world.destination.record = Some(Record::Committed);
        world.destination.machine = Destination::Prepared;
    }

    fn deliver(&self, world: &mut World, message: Message) {
        match message {
            Message::Commit if world.destination.up => {
                self.feed_destination(world, DestinationInput::Commit);
            }
            Message::Abort if world.destination.up => {
                self.feed_destination(world, DestinationInput::GiveUp);
            }
            Message::AnswerRunning if world.source.up => {
                self.feed_source(world, SourceInput::Answered(Answer::Running));
            }
            Message::AnswerAborted if world.source.up => {
                self.feed_source(world, SourceInput::Answered(Answer::Aborted));
            }
            Message::AnswerUndecided if world.source.up => {
                self.feed_source(world, SourceInput::Answered(Answer::Undecided));
            }
            _ => {}
        }
    }

    fn start_source(&self, world: &mut World) {
        let sight = match world.source.keeper {
            Keeper::Gone => Sight::Gone,
            Keeper::Running => Sight::Running,
            Keeper::Paused | Keeper::Fenced => Sight::Stopped,
            Keeper::Shell => Sight::NeverStarted,
        };
        let (machine, todo) = Source::restart(world.source.record, sight);
        world.source.up = true;
        world.source.machine = machine;
        world.source.todo = todo.into();
    }

    fn start_destination(&self, world: &mut World) {
        let sight = match world.destination.keeper {
            Keeper::Gone => Sight::Gone,
            Keeper::Running => Sight::Running,
            Keeper::Paused | Keeper::Fenced => Sight::Stopped,
            Keeper::Shell => Sight::NeverStarted,
        };
        let (machine, todo) = Destination::restart(world.destination.record, sight);
        world.destination.up = true;
        world.destination.machine = machine;
        world.destination.todo = todo.into();
    }

    /// Both hosts up and connected from here on, nothing lost any more: where does it end?
    fn settle(&self, world: &World) -> World {
        let mut world = world.clone();
        if !world.source.up {
            self.start_source(&mut world);
        }
        if !world.destination.up {
            self.start_destination(&mut world);
        }
        for _ in 0..200 {
            if !world.source.todo.is_empty() {
                self.source_acts(&mut world);
            } else if !world.destination.todo.is_empty() {
                self.destination_acts(&mut world);
            } else if let Some(message) = world.network.pop_first() {
                self.deliver(&mut world, message);
            } else if world.source.machine == Source::Fenced {
                self.feed_source(&mut world, SourceInput::AskAgain);
            } else if world.source.machine == Source::Resuming && !world.source.record.is_final() {
                // Written down by the next agent, whenever that comes.
                self.start_source(&mut world);
            } else if world.source.machine == Source::Open {
                // Connected, and still nothing handed over: the session's deadline ends it.
                self.feed_source(&mut world, SourceInput::GiveUp);
            } else if matches!(
                world.destination.machine,
                Destination::Building | Destination::Prepared
            ) {
                // The source said Abort, or its connection ended.
                self.feed_destination(&mut world, DestinationInput::GiveUp);
            } else {
                break;
            }
        }
        world
    }

    fn resolve(&self, world: &World, keep: Keep) -> World {
        let mut world = world.clone();
        self.feed_source(&mut world, SourceInput::Resolve(keep));
        self.feed_destination(&mut world, DestinationInput::Resolve(keep));
        self.settle(&world)
    }

    fn settles_well(&self, world: &World) -> bool {
        let end = self.settle(world);
        if running(&end) == 1 {
            return end.source.record.is_final()
                && end.destination.record.is_none_or(Record::is_final);
        }
        if end.source.machine == Source::Undecided {
            let here = self.resolve(&end, Keep::Source);
            let there = self.resolve(&end, Keep::Destination);
            let kept = running(&here) == 1 || end.source.keeper == Keeper::Gone;
            return kept && here.source.record.is_final() && there.source.record.is_final();
        }
        running(&end) == 0 && end.copy_lost && end.source.record.is_final()
    }
}

fn running(world: &World) -> usize {
    [world.source.keeper, world.destination.keeper]
        .iter()
        .filter(|keeper| **keeper == Keeper::Running)
        .count()
}

impl Model for Commit {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            source: Leaving {
                up: true,
                machine: Source::Open,
                todo: VecDeque::new(),
                record: Record::Begun,
                keeper: Keeper::Running,
            },
            destination: Arriving {
                up: true,
                machine: Destination::Building,
                todo: VecDeque::new(),
                record: Some(Record::Building),
                keeper: Keeper::Shell,
            },
            network: BTreeSet::new(),
            agent_restarts: 0,
            host_restarts: 0,
            copy_lost: false,
        }]
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        let source = &world.source;
        let destination = &world.destination;
        if source.up && source.todo.is_empty() {
            if source.machine == Source::Open {
                events.push(Event::SourceGivesUp);
                match source.keeper {
                    Keeper::Running => events.push(Event::Pause),
                    // The destination said Prepared; it may have given up since.
                    Keeper::Paused if destination.machine != Destination::Building => {
                        events.push(Event::HandOver);
                    }
                    _ => {}
                }
            }
            if matches!(source.machine, Source::Fenced | Source::Undecided)
                && !world.network.contains(&Message::Commit)
            {
                events.push(Event::AskAgain);
            }
        }
        if source.up && !source.todo.is_empty() {
            events.push(Event::SourceActs);
            if matches!(
                source.todo[0],
                SourceAction::FenceKeeper | SourceAction::Journal(Record::Fenced)
            ) {
                events.push(Event::SourceFails);
            }
            if source.todo[0] == SourceAction::Journal(Record::RolledBack) {
                events.push(Event::RolledBackFails);
            }
        }
        if destination.up && destination.todo.is_empty() {
            match destination.machine {
                Destination::Building => {
                    events.extend([Event::Loaded, Event::DestinationGivesUp]);
                }
                Destination::Prepared => events.push(Event::DestinationGivesUp),
                _ => {}
            }
        }
        if destination.up && !destination.todo.is_empty() {
            events.push(Event::DestinationActs);
            match destination.todo[0] {
                DestinationAction::Activate => {
                    events.extend([Event::DestinationFails, Event::DestinationKeeperLost]);
                }
                DestinationAction::Journal(Record::Committed) => {
                    events.push(Event::CommittedFails);
                }
                _ => {}
            }
        }
        for message in &world.network {
            // One request of a session at a time: an agent reads the next when it has acted.
            let idle = match message {
                Message::Commit | Message::Abort => destination.up && destination.todo.is_empty(),
                _ => source.up && source.todo.is_empty(),
            };
            if idle {
                events.push(Event::Deliver(*message, Fate::Once));
                events.push(Event::Deliver(*message, Fate::Again));
            }
            events.push(Event::Lose(*message));
        }
        if !source.up && source.keeper == Keeper::Paused {
            events.push(Event::KeeperDeadline);
        }
        if !source.up {
            events.push(Event::SourceAgentStarts);
        }
        if !destination.up {
            events.push(Event::DestinationAgentStarts);
        }
        if world.agent_restarts < self.agent_restarts {
            if source.up {
                events.push(Event::SourceAgentDies);
            }
            if destination.up {
                events.push(Event::DestinationAgentDies);
            }
        }
        if world.host_restarts < self.host_restarts {
            events.extend([Event::SourceHostRestarts, Event::DestinationHostRestarts]);
        }
    }

    fn next_state(&self, last: &World, event: Event) -> Option<World> {
        let mut world = last.clone();
        match event {
            Event::Pause => world.source.keeper = Keeper::Paused,
            Event::Loaded => self.feed_destination(&mut world, DestinationInput::Loaded),
            Event::HandOver => self.feed_source(&mut world, SourceInput::HandOver),
            Event::SourceGivesUp => self.feed_source(&mut world, SourceInput::GiveUp),
            Event::DestinationGivesUp => {
                self.feed_destination(&mut world, DestinationInput::GiveUp);
            }
            Event::SourceActs => self.source_acts(&mut world),
            Event::SourceFails => self.source_fails(&mut world),
            Event::RolledBackFails => self.rolled_back_fails(&mut world),
            Event::DestinationActs => self.destination_acts(&mut world),
            Event::DestinationFails => self.destination_fails(&mut world),
            Event::DestinationKeeperLost => self.destination_keeper_lost(&mut world),
            Event::CommittedFails => self.committed_fails(&mut world),
            Event::AskAgain => self.feed_source(&mut world, SourceInput::AskAgain),
            Event::Deliver(message, fate) => {
                if fate == Fate::Once {
                    world.network.remove(&message);
                }
                self.deliver(&mut world, message);
            }
            Event::Lose(message) => {
                world.network.remove(&message);
            }
            Event::KeeperDeadline => world.source.keeper = Keeper::Running,
            Event::SourceAgentDies => {
                world.agent_restarts += 1;
                world.source.up = false;
                world.source.todo.clear();
            }
            Event::DestinationAgentDies => {
                world.agent_restarts += 1;
                world.destination.up = false;
                world.destination.todo.clear();
            }
            Event::SourceAgentStarts => self.start_source(&mut world),
            Event::DestinationAgentStarts => self.start_destination(&mut world),
            Event::SourceHostRestarts => {
                world.host_restarts += 1;
                world.copy_lost |= world.source.keeper != Keeper::Gone;
                world.source.up = false;
                world.source.todo.clear();
                world.source.keeper = Keeper::Gone;
            }
            Event::DestinationHostRestarts => {
                world.host_restarts += 1;
                world.copy_lost |= world.destination.keeper == Keeper::Running;
                world.destination.up = false;
                world.destination.todo.clear();
                world.destination.keeper = Keeper::Gone;
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("never two running", |_, world| running(world) < 2),
            Property::<Self>::always(
                "both up and connected: exactly one running",
                |model, world| model.settles_well(world),
            ),
            Property::<Self>::sometimes("it moves", |_, world| {
                world.source.machine == Source::Released
                    && world.destination.keeper == Keeper::Running
            }),
            Property::<Self>::sometimes("it rolls back after the fence", |_, world| {
                world.source.machine == Source::RolledBack
                    && world.destination.record == Some(Record::Aborted)
                    && world.source.keeper == Keeper::Running
            }),
        ]
    }
}

fn explore(driving: Driving, agent_restarts: u8, host_restarts: u8) -> impl Checker<Commit> {
    Commit { driving, agent_restarts, host_restarts }.checker().threads(2).spawn_bfs().join()
}

#[test]
fn holds_under_every_interleaving() {
    let checker = explore(Driving::AsBuilt, 4, 2);
    println!(
        "commit model: {} states explored ({} unique), depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    assert!(checker.unique_state_count() > 1_000, "the model explores too little to mean anything");
    checker.assert_properties();
}

#[test]
fn restarts_of_both_hosts_are_survived() {
    let checker = explore(Driving::AsBuilt, 2, 3);
    println!(
        "commit model, two host restarts: {} states explored ({} unique)",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker.assert_no_discovery("never two running");
    checker.assert_no_discovery("both up and connected: exactly one running");
}

#[test]
fn a_commit_before_the_fence_is_on_disk_is_caught() {
    let checker = explore(Driving::CommitBeforeFence, 1, 0);
    let path = checker
        .discovery("never two running")
        .expect("the model must find two running when Commit leaves before the fence is on disk");
    println!("caught after {} events", path.into_actions().len());
}

#[test]
fn a_keeper_that_was_not_told_of_the_fence_is_caught() {
    let checker = explore(Driving::KeeperNotTold, 1, 0);
    assert!(
        checker.discovery("never two running").is_some(),
        "the model must find two running when a keeper resumes although the journal says FENCED"
    );
}
