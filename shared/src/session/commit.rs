//! Who owns the workload: the commit as two pure state machines, one an end.
//!
//! No I/O, no time, no threads. Each machine takes an input, moves to its next state and says which
//! actions to carry out, in order; whoever drives it carries them out one by one and feeds back
//! what came of them. [`super::source`], [`super::destination`] and [`super::recovery`] drive them
//! for real; `shared/tests/commit_model.rs` drives the same code through every interleaving of
//! lost, doubled and reordered messages and of restarts.
//!
//! The order that keeps the promise: the keeper is fenced, then the journal says FENCED, then
//! Commit is sent. The destination journals COMMITTED, activates, journals RUNNING, then answers;
//! it journals ABORTED before it says so.

use serde::{Deserialize, Serialize};

/// What a journal durably says of a session. One end writes only its own records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// Source: a move began; nothing was given away.
    Begun,
    /// Source: from here it never resumes by itself.
    Fenced,
    /// Source, final: the workload runs on here.
    RolledBack,
    /// Source, final: it runs elsewhere.
    Released,
    /// Destination: a copy is being built, nothing has run.
    Building,
    /// Destination: it is about to run here.
    Committed,
    /// Destination, final: it runs here.
    Running,
    /// Destination, final: it never ran here and never will under this session.
    Aborted,
}

impl Record {
    /// Whether nothing can follow it.
    pub fn is_final(self) -> bool {
        matches!(self, Self::RolledBack | Self::Released | Self::Running | Self::Aborted)
    }

    /// As the journal stores it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Begun => "BEGUN",
            Self::Fenced => "FENCED",
            Self::RolledBack => "ROLLED_BACK",
            Self::Released => "RELEASED",
            Self::Building => "BUILDING",
            Self::Committed => "COMMITTED",
            Self::Running => "RUNNING",
            Self::Aborted => "ABORTED",
        }
    }

    /// The record that [`Record::word`] wrote.
    pub fn from_word(word: &str) -> Option<Self> {
        [
            Self::Begun,
            Self::Fenced,
            Self::RolledBack,
            Self::Released,
            Self::Building,
            Self::Committed,
            Self::Running,
            Self::Aborted,
        ]
        .into_iter()
        .find(|record| record.word() == word)
    }
}

/// What a destination answers to Commit. Only a final journal record is ever told as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Answer {
    /// It runs here: release.
    Running,
    /// It never ran here and never will under this session: resume.
    Aborted,
    /// The host restarted in between and nobody knows: an operator must say.
    Undecided,
}

/// Which copy an operator keeps when nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// The source's.
    Source,
    /// The destination's.
    Destination,
}

/// What an agent finds of its keeper after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sight {
    /// The keeper lives and its workload runs.
    Running,
    /// The keeper lives and its workload stands still, having run here before.
    Stopped,
    /// The keeper lives and no instruction has run here.
    NeverStarted,
    /// The workload ran here and ended by itself; the keeper left a record of it.
    Ended,
    /// There is no keeper, and no word of what became of it.
    Gone,
}

/// The leaving end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The workload is here, running or paused, and the journal says BEGUN.
    Open,
    /// The keeper is being told that it must not resume by itself.
    FencingKeeper,
    /// The journal is being told FENCED.
    FencingJournal,
    /// Fenced: Commit is sent, and sent again, until an answer comes.
    Fenced,
    /// The destination does not know; an operator must say.
    Undecided,
    /// Rolling back: the workload is being resumed, then the journal told.
    Resuming,
    /// The journal is being told RELEASED, then the copy is taken away.
    Releasing,
    /// Final: it runs on here.
    RolledBack,
    /// Final: it runs elsewhere.
    Released,
}

/// What happens to the leaving end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// The destination is prepared: hand over.
    HandOver,
    /// The keeper acknowledged the fence.
    KeeperFenced,
    /// This record is on disk.
    Journaled(Record),
    /// A failure or a cancellation. Has no effect once FENCED may be on disk and Commit sent.
    GiveUp,
    /// The destination answered.
    Answered(Answer),
    /// The workload was resumed, or died with a host restart and has nothing to resume.
    Resumed,
    /// The operator's word, when the destination's cannot be had. `Keep::Source` while a copy runs
    /// at the destination is the one thing that no machine can make safe.
    Resolve(Keep),
    /// Nothing new: ask again.
    AskAgain,
}

/// What the leaving end has to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Tell the keeper; then [`SourceInput::KeeperFenced`], or [`SourceInput::GiveUp`].
    FenceKeeper,
    /// Write the record; then [`SourceInput::Journaled`]. A FENCED that cannot be written is
    /// [`SourceInput::GiveUp`]; a ROLLED_BACK that cannot be written is left to the next agent, which
    /// finds the workload running; RELEASED is tried again.
    Journal(Record),
    /// Send Commit, now or as soon as the destination can be reached.
    SendCommit,
    /// Tell the destination that nothing will come. Best effort.
    SendAbort,
    /// Let the workload run on; then [`SourceInput::Resumed`].
    Resume,
    /// Take the copy away, quietly.
    Release,
}

impl Source {
    /// The state of an agent that restarts, from its journal and what it sees of the keeper, and
    /// what to do first.
    pub fn restart(record: Record, sight: Sight) -> (Self, Vec<SourceAction>) {
        match (record, sight) {
            // The workload runs, so no Commit can be under way: either it was never fenced, or the
            // resume after a durable Aborted had been done already.
            (Record::Fenced, Sight::Running) => Self::Open.step(SourceInput::GiveUp),
            (Record::Fenced, _) => (Self::Fenced, vec![SourceAction::SendCommit]),
            (Record::Released, Sight::Stopped) => (Self::Released, vec![SourceAction::Release]),
            (Record::Released, _) => (Self::Released, vec![]),
            (Record::RolledBack, _) => (Self::RolledBack, vec![]),
            _ => Self::Open.step(SourceInput::GiveUp),
        }
    }

    /// Takes one input. An input that makes no sense in a state changes nothing.
    #[must_use]
    pub fn step(self, input: SourceInput) -> (Self, Vec<SourceAction>) {
        use SourceAction as Do;
        use SourceInput as On;
        match (self, input) {
            (Self::Open, On::HandOver) => (Self::FencingKeeper, vec![Do::FenceKeeper]),
            (Self::FencingKeeper, On::KeeperFenced) => {
                (Self::FencingJournal, vec![Do::Journal(Record::Fenced)])
            }
            (Self::FencingJournal, On::Journaled(Record::Fenced)) => {
                (Self::Fenced, vec![Do::SendCommit])
            }
            // Commit was not sent yet, so nothing can run elsewhere.
            (Self::Open | Self::FencingKeeper | Self::FencingJournal, On::GiveUp) => {
                (Self::Resuming, vec![Do::SendAbort, Do::Resume])
            }
            (Self::Fenced | Self::Undecided, On::Answered(Answer::Running))
            | (Self::Fenced | Self::Undecided, On::Resolve(Keep::Destination)) => {
                (Self::Releasing, vec![Do::Journal(Record::Released)])
            }
            (Self::Fenced | Self::Undecided, On::Answered(Answer::Aborted))
            | (Self::Fenced | Self::Undecided, On::Resolve(Keep::Source)) => {
                (Self::Resuming, vec![Do::Resume])
            }
            (Self::Fenced, On::Answered(Answer::Undecided)) => (Self::Undecided, vec![]),
            (Self::Fenced | Self::Undecided, On::AskAgain) => (self, vec![Do::SendCommit]),
            (Self::Resuming, On::Resumed) => (self, vec![Do::Journal(Record::RolledBack)]),
            (Self::Resuming, On::Journaled(Record::RolledBack)) => (Self::RolledBack, vec![]),
            (Self::Releasing, On::Journaled(Record::Released)) => {
                (Self::Released, vec![Do::Release])
            }
            (state, _) => (state, vec![]),
        }
    }

    /// Whether a failure from here on still rolls back without asking anybody.
    pub fn may_give_up(self) -> bool {
        matches!(self, Self::Open | Self::FencingKeeper | Self::FencingJournal)
    }
}

/// The arriving end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// A copy is being built; the journal says BUILDING.
    Building,
    /// Everything is loaded, nothing has run.
    Prepared,
    /// The journal is being told COMMITTED.
    Committing,
    /// The workload is being let run.
    Activating,
    /// It runs; the journal is being told RUNNING.
    Confirming,
    /// The journal is being told ABORTED.
    Aborting {
        /// Whether a Commit waits for the answer.
        asked: bool,
    },
    /// Committed, then its keeper was lost, with the host or alone: nobody knows.
    Undecided,
    /// Final: it runs here.
    Running,
    /// Final: it never ran here under this session and never will.
    Aborted,
}

/// What happens to the arriving end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationInput {
    /// Everything is loaded.
    Loaded,
    /// The source sent Commit with the session's token.
    Commit,
    /// The connection was lost, something failed, or the source sent Abort.
    GiveUp,
    /// This record is on disk.
    Journaled(Record),
    /// It runs.
    Activated,
    /// It could not be let run, and no instruction has run.
    ActivateFailed,
    /// Its keeper was lost while it was being let run: nobody can say whether it ran.
    ActivateLost,
    /// The operator's word.
    Resolve(Keep),
}

/// What the arriving end has to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Write the record; then [`DestinationInput::Journaled`]. When it cannot be written, nothing
    /// is answered and the machine stays as it was before the input.
    Journal(Record),
    /// Let it run; then [`DestinationInput::Activated`], [`DestinationInput::ActivateFailed`] or
    /// [`DestinationInput::ActivateLost`].
    Activate,
    /// Take the copy away.
    Discard,
    /// Answer the source.
    Answer(Answer),
}

impl Destination {
    /// The state of an agent that restarts, from its journal (`None`: the session is not in it)
    /// and what it sees of the keeper, and what to do first.
    pub fn restart(record: Option<Record>, sight: Sight) -> (Self, Vec<DestinationAction>) {
        use DestinationAction as Do;
        let abort = vec![Do::Journal(Record::Aborted)];
        match (record, sight) {
            (Some(Record::Running), _) => (Self::Running, vec![]),
            (Some(Record::Aborted), Sight::NeverStarted) => (Self::Aborted, vec![Do::Discard]),
            (Some(Record::Aborted), _) => (Self::Aborted, vec![]),
            (Some(Record::Committed), Sight::Running | Sight::Stopped | Sight::Ended) => {
                (Self::Confirming, vec![Do::Journal(Record::Running)])
            }
            (Some(Record::Committed), Sight::Gone) => (Self::Undecided, vec![]),
            _ => (Self::Aborting { asked: false }, abort),
        }
    }

    /// Takes one input. An input that makes no sense in a state changes nothing.
    #[must_use]
    pub fn step(self, input: DestinationInput) -> (Self, Vec<DestinationAction>) {
        use DestinationAction as Do;
        use DestinationInput as On;
        match (self, input) {
            (Self::Building, On::Loaded) => (Self::Prepared, vec![]),
            (Self::Building, On::Commit) | (Self::Activating, On::ActivateFailed) => {
                (Self::Aborting { asked: true }, vec![Do::Journal(Record::Aborted)])
            }
            (Self::Building | Self::Prepared, On::GiveUp) => {
                (Self::Aborting { asked: false }, vec![Do::Journal(Record::Aborted)])
            }
            (Self::Prepared, On::Commit) => {
                (Self::Committing, vec![Do::Journal(Record::Committed)])
            }
            (Self::Committing, On::Journaled(Record::Committed)) => {
                (Self::Activating, vec![Do::Activate])
            }
            (Self::Activating, On::Activated) => {
                (Self::Confirming, vec![Do::Journal(Record::Running)])
            }
            (Self::Activating, On::ActivateLost) => {
                (Self::Undecided, vec![Do::Answer(Answer::Undecided)])
            }
            (Self::Confirming, On::Journaled(Record::Running)) => {
                (Self::Running, vec![Do::Answer(Answer::Running)])
            }
            (Self::Aborting { asked }, On::Journaled(Record::Aborted)) => {
                let answer = asked.then_some(Do::Answer(Answer::Aborted));
                (Self::Aborted, [Do::Discard].into_iter().chain(answer).collect())
            }
            (Self::Aborting { .. }, On::Commit) => (Self::Aborting { asked: true }, vec![]),
            (Self::Undecided, On::Resolve(Keep::Source)) => {
                (Self::Aborting { asked: false }, vec![Do::Journal(Record::Aborted)])
            }
            (Self::Undecided, On::Resolve(Keep::Destination)) => {
                (Self::Confirming, vec![Do::Journal(Record::Running)])
            }
            (Self::Undecided, On::Commit) => (self, vec![Do::Answer(Answer::Undecided)]),
            (Self::Running, On::Commit) => (self, vec![Do::Answer(Answer::Running)]),
            (Self::Aborted, On::Commit) => (self, vec![Do::Answer(Answer::Aborted)]),
            (state, _) => (state, vec![]),
        }
    }
}
