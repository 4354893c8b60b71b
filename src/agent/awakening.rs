//! The last step of a restore: what came out of a file is let run. What may have run is not taken away,
//! whatever happened; what did not run leaves nothing.

use std::sync::Arc;

use decamp_shared::files::Landing;
use decamp_shared::keeper::ExitRecord;
use decamp_shared::session::commit::Sight;
use decamp_shared::workload::{DestinationWorkload, Manifest, Result as Done, WorkloadError};

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::recovery::see;
use super::registry::Workload;
use super::supervise::{discard, end_noted, exit_record};
use crate::messages::{State, WorkloadView};

/// Where it was fenced from: nowhere. Nobody else has a say in a workload that comes from a file.
const TOKEN: u64 = 1;

/// A workload whose entry says that it is incoming, and what of it is on the disk.
pub(super) struct Awakening {
    pub(super) agent: Arc<Agent>,
    /// Of the restore, in the place of a session's.
    pub(super) id: String,
    pub(super) manifest: Manifest,
    pub(super) landing: Landing,
}

impl Awakening {
    /// Lets it run. Blocks.
    ///
    /// # Errors
    /// Says what became of it.
    pub(super) fn wake(&self, mut workload: Box<dyn DestinationWorkload>) -> Result<WorkloadView> {
        // On the disk before it can run: an agent that finds this takes nothing away that may have run.
        if let Err(why) = self.change(|entry| entry.state = State::Starting) {
            return Err(self.give_up(&why, || workload.discard()));
        }
        match workload.activate(TOKEN) {
            Ok(()) => self.runs(),
            Err(error @ WorkloadError::Uncertain { .. }) => {
                // The keeper serves one at a time.
                drop(workload);
                self.look_after(&chain(&error))
            }
            Err(error) => Err(self.take_back(&chain(&error), || workload.discard())),
        }
    }

    /// It never ran, and its entry says so: it goes, and its files after it.
    pub(super) fn give_up(&self, why: &str, discard: impl FnOnce() -> Done<()>) -> Answer {
        let name = &self.manifest.name;
        if let Err(error) = discard() {
            tracing::warn!(workload = name, "Its keeper: {}", chain(&error));
        }
        self.landing.remove();
        Answer::Failed(match self.agent.forget_arrival(&self.id, name) {
            Ok(()) => format!("{why}. {name} did not run, and nothing is left of it here"),
            Err(answer) => format!(
                "{why}. {name} did not run, and what is left of it could not be taken away \
                 ({answer}): restart the agent, which tries again"
            ),
        })
    }

    /// It did not run after all.
    fn take_back(&self, why: &str, discard: impl FnOnce() -> Done<()>) -> Answer {
        let name = &self.manifest.name;
        let Err(error) = self.change(|entry| entry.state = State::Incoming) else {
            return self.give_up(why, discard);
        };
        if let Err(error) = discard() {
            tracing::warn!(workload = name, "Its keeper: {}", chain(&error));
        }
        Answer::Failed(format!(
            "{why}. {name} did not run, but that could not be written down ({error}): its files stay, and \
             it is noted as starting. Restart the agent and look with `decamp ls`"
        ))
    }

    fn runs(&self) -> Result<WorkloadView> {
        let name = &self.manifest.name;
        // Before the entry says that it runs: nobody looks for what has landed any more then.
        self.landing.keep();
        let noted = self.change(|entry| {
            entry.becomes_running();
            entry.migration = None;
        });
        match noted {
            Ok(workload) => {
                tracing::info!(workload = name, "Runs here now");
                Ok(workload.view())
            }
            Err(error) => Err(Answer::Failed(format!(
                "{name} runs, but that could not be written down: {error}. Restart the agent, which finds \
                 it"
            ))),
        }
    }

    /// Nobody could say whether it began to run: its keeper, or what that left, can.
    fn look_after(&self, why: &str) -> Result<WorkloadView> {
        let name = &self.manifest.name;
        let place = self.agent.state_dir.place(name, &self.manifest.uuid);
        tracing::warn!(workload = name, "Looks after it: {why}");
        match see(&place) {
            Ok(Sight::Running | Sight::Stopped) => self.runs(),
            Ok(Sight::NeverStarted) => Err(self.take_back(why, || discard(&place))),
            Ok(Sight::Ended | Sight::Gone) => Err(self.ended(why, exit_record(&place))),
            Err(answer) => Err(Answer::Failed(format!(
                "{why}, and its keeper does not say either ({answer}). {name} may run: nothing was taken \
                 away, and it is noted as starting. Do not restore it again before that is known: restart \
                 the agent, which asks the keeper again; `decamp logs {name}` shows what it said"
            ))),
        }
    }

    /// It runs no more, if it ever did, and may have written to its files.
    fn ended(&self, why: &str, exit: Option<ExitRecord>) -> Answer {
        let name = &self.manifest.name;
        let exit = exit.unwrap_or_else(|| ExitRecord {
            status: 1,
            text: "its keeper died while it was being let run".to_owned(),
        });
        let text = exit.text.clone();
        self.landing.keep();
        let noted = self.agent.find(name).and_then(|entry| end_noted(&self.agent, &entry, exit));
        Answer::Failed(match noted {
            Ok(()) => format!(
                "{why}. It does not run any more ({text}). It may have run: its files stay, and it is \
                 noted as stopped. `decamp start {name}` starts it afresh; to restore it again, `decamp \
                 rm {name}` and remove its files first"
            ),
            Err(answer) => format!(
                "{why}. It does not run any more ({text}), but that could not be written down \
                 ({answer}): its files stay. Restart the agent and look with `decamp ls`"
            ),
        })
    }

    /// Changes the entry, if it is still the restore's.
    fn change(&self, edit: impl FnOnce(&mut Workload)) -> std::result::Result<Workload, String> {
        let name = &self.manifest.name;
        let mut is_ours = false;
        let changed = self.agent.registry.change(name, |entry| {
            is_ours = entry.migration.as_deref() == Some(&self.id);
            if is_ours {
                edit(entry);
            }
        });
        match changed {
            Ok(workload) if is_ours => Ok(workload),
            Ok(_) => Err(format!("The entry of {name} is not this restore's any more")),
            Err(error) => Err(chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Mutex;

    use decamp_shared::pages::PageWriter;
    use decamp_shared::workload::{Section, SpaceInfo};

    use super::super::restores::landing_record;
    use super::super::testing::{Bench, MIGRATION, UUID, deaf, landed};
    use super::*;

    type Said = Arc<Mutex<Vec<String>>>;

    /// Says what it was told, and in what state everything was then.
    struct Comes {
        activated: Option<Done<()>>,
        agent: Arc<Agent>,
        tree: PathBuf,
        said: Said,
    }

    impl Comes {
        fn say(&self, what: &str) {
            let entry = self.agent.find("web").expect("an entry");
            let files = if self.tree.exists() { "files" } else { "no files" };
            self.said.lock().expect("no panic").push(format!("{what}, {}, {files}", entry.state));
        }
    }

    impl DestinationWorkload for Comes {
        fn writer(&mut self, _: &[SpaceInfo]) -> Done<Arc<dyn PageWriter>> {
            Err(WorkloadError::Unsupported("Memory"))
        }

        fn load(&mut self, _: Vec<Section>) -> Done<()> {
            Err(WorkloadError::Unsupported("State"))
        }

        fn activate(&mut self, _: u64) -> Done<()> {
            self.say("activate");
            self.activated.take().expect("once")
        }

        fn discard(&mut self) -> Done<()> {
            self.say("discard");
            Ok(())
        }
    }

    fn uncertain() -> Done<()> {
        Err(WorkloadError::Uncertain { source: "its keeper hung up".into() })
    }

    struct Case {
        bench: Bench,
        tree: PathBuf,
        said: Said,
    }

    impl Case {
        fn new() -> Self {
            let bench = Bench::new();
            let web = bench.enter(State::Incoming);
            let tree = landed(&bench.agent.place(&web));
            Self { bench, tree, said: Said::default() }
        }

        fn wake(&self, activated: Done<()>) -> Result<WorkloadView> {
            let agent = Arc::clone(&self.bench.agent);
            let record = landing_record(&agent.state_dir.place("web", UUID));
            let landing = Landing::recover(&record).expect("a record");
            let manifest =
                Manifest { name: "web".into(), uuid: UUID.into(), ..Manifest::default() };
            let comes = Comes {
                activated: Some(activated),
                agent: Arc::clone(&agent),
                tree: self.tree.clone(),
                said: Arc::clone(&self.said),
            };
            Awakening { agent, id: MIGRATION.to_owned(), manifest, landing }.wake(Box::new(comes))
        }

        fn said(&self) -> Vec<String> {
            self.said.lock().expect("no panic").clone()
        }
    }

    fn text(answer: Result<WorkloadView>) -> String {
        answer.expect_err("does not run").to_string()
    }

    #[test]
    fn what_runs_is_entered_and_its_files_stay() {
        let case = Case::new();
        let view = case.wake(Ok(())).expect("runs");
        assert_eq!((view.state, view.migration), (State::Running, None));
        assert_eq!(case.said(), ["activate, starting, files"]);
        let place = case.bench.agent.state_dir.place("web", UUID);
        assert!(case.tree.exists() && !landing_record(&place).exists());
    }

    #[test]
    fn what_did_not_run_goes_before_its_files() {
        let case = Case::new();
        let text = text(case.wake(Err(WorkloadError::plain("No"))));
        assert!(text.contains("nothing is left"), "{text}");
        assert_eq!(case.said(), ["activate, starting, files", "discard, incoming, files"]);
        assert_eq!(case.bench.state(), None);
        assert!(!case.tree.exists());
    }

    #[test]
    fn what_cannot_be_entered_is_not_let_run() {
        let case = Case::new();
        case.bench.fill_disk(State::Starting);
        let text = text(case.wake(Ok(())));
        assert!(text.contains("did not run"), "{text}");
        assert_eq!(case.said(), ["discard, incoming, files"]);
        assert_eq!(case.bench.state(), None);
        assert!(!case.tree.exists());
    }

    #[test]
    fn what_runs_and_cannot_be_entered_is_left_for_the_next_agent() {
        let case = Case::new();
        case.bench.fill_disk(State::Running);
        let text = text(case.wake(Ok(())));
        assert!(text.contains("web runs"), "{text}");
        assert_eq!(case.bench.state(), Some(State::Starting));
        assert!(case.tree.exists());
    }

    #[test]
    fn what_may_run_is_left_alone() {
        let case = Case::new();
        let place = case.bench.agent.state_dir.place("web", UUID);
        let deaf = deaf(&place);
        let text = text(case.wake(uncertain()));
        assert!(text.contains("web may run"), "{text}");
        assert_eq!(case.said(), ["activate, starting, files"]);
        assert_eq!(case.bench.state(), Some(State::Starting));
        assert!(case.tree.exists() && landing_record(&place).exists());
        deaf.join().expect("ends");
    }

    #[test]
    fn what_may_have_run_keeps_its_files() {
        for record in [None, Some(r#"{"status":0,"text":"powered off"}"#)] {
            let case = Case::new();
            let place = case.bench.agent.state_dir.place("web", UUID);
            if let Some(record) = record {
                std::fs::write(place.exit_record(), record).expect("written");
            }
            let text = text(case.wake(uncertain()));
            assert!(text.contains("noted as stopped"), "{text}");
            assert_eq!(text.contains("powered off"), record.is_some(), "{text}");
            assert_eq!(case.bench.state(), Some(State::Stopped));
            assert!(case.tree.exists() && !landing_record(&place).exists());
        }
    }

    #[test]
    fn an_entry_of_somebody_else_is_not_touched() {
        let case = Case::new();
        let change = |web: &mut Workload| web.migration = Some("another".into());
        let other = case.bench.agent.registry.change("web", change).expect("written");
        let text = text(case.wake(Ok(())));
        assert!(text.contains("not this restore's"), "{text}");
        assert_eq!(case.bench.agent.find("web"), Ok(other));
    }
}
