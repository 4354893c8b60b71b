//! Containers that a runtime's hook speaks of: taken charge of once they run, and forgotten once they have
//! ended. A hook holds its container up, so it is answered at once and the work is done beside it: when a
//! hook is called the container may not run yet, and its runtime may hold locks that are in the way.
//!
//! Nothing here ends a container, and nothing decides whose it is: what a move has to do with is left
//! to the move.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use decamp_shared::workload::Kind;
use tokio_util::sync::CancellationToken;

use super::Agent;
use super::answer::{Answer, Result};
use super::registry::Workload;
use super::workloads::blocking;
use crate::backend::is_adopted_as;
use crate::messages::{AdoptRequest, HookAnswer, HookEvent, HookRequest, State};

/// So many containers at most are waited for.
const AWAITED_CAP: usize = 256;
/// No name of a container is longer, with its runtime's.
const WHAT_CAP: usize = 300;
/// What speaks against a container that has just started may go within this: its runtime is still there.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);
/// That a container has ended is noted within this, whatever was being done to it.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks, at first and at last.
const LOOKS: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(800)];

/// Containers that are waited for, by their names.
#[derive(Debug, Default)]
pub(crate) struct Awaited(Mutex<BTreeMap<String, CancellationToken>>);

impl Awaited {
    /// Notes that `what` is waited for; nothing when it is already.
    fn enter(&self, what: &str) -> Result<Option<CancellationToken>> {
        let mut held = self.held();
        if held.contains_key(what) {
            return Ok(None);
        }
        if held.len() >= AWAITED_CAP {
            return Err(Answer::Conflict(format!(
                "{AWAITED_CAP} containers are waited for already: adopt {what} yourself"
            )));
        }
        let token = CancellationToken::new();
        held.insert(what.to_owned(), token.clone());
        Ok(Some(token))
    }

    /// Nobody waits for `what` any more.
    fn leave(&self, what: &str) {
        if let Some(token) = self.held().remove(what) {
            token.cancel();
        }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes note of what a hook says, and returns at once.
///
/// # Errors
/// When that makes no sense, or too many are waited for.
pub(crate) fn called(agent: &Arc<Agent>, request: HookRequest) -> Result<HookAnswer> {
    let HookRequest { what, event } = request;
    if what.len() > WHAT_CAP || !what.contains(':') {
        return Err(Answer::Request("This is no name of a container with its runtime".into()));
    }
    let said = match event {
        HookEvent::Started => started(agent, what)?,
        HookEvent::Stopped => stopped(agent, what)?,
    };
    Ok(HookAnswer { said })
}

fn started(agent: &Arc<Agent>, what: String) -> Result<String> {
    let Some(token) = agent.awaited.enter(&what)? else {
        return Ok(format!("{what} is waited for already"));
    };
    let said =
        format!("{what} is adopted as soon as it runs; the agent's log says if it cannot be");
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        tokio::select! {
            () = token.cancelled() => return,
            () = agent.stopping.cancelled() => return,
            () = take_charge(&agent, &what) => {}
        }
        agent.awaited.leave(&what);
    });
    Ok(said)
}

/// Waits until the container runs and adopts it then.
async fn take_charge(agent: &Arc<Agent>, what: &str) {
    let (mut since, mut wait) = (Instant::now(), LOOKS[0]);
    loop {
        if awaits_start(agent, what).await {
            // It may be made today and started tomorrow.
            since = Instant::now();
        } else {
            match adopt(agent, what).await {
                Ok(name) => return tracing::info!(workload = name, "A hook had {what} adopted"),
                Err(Answer::Refused { .. } | Answer::Conflict(_))
                    if since.elapsed() < SETTLED_WITHIN => {}
                Err(answer) => return not_adopted(agent, what, &answer),
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LOOKS[1]);
    }
}

/// Tells why, unless it was adopted before.
fn not_adopted(agent: &Agent, what: &str, answer: &Answer) {
    let entry = adopted(agent, what).ok().flatten();
    if entry.is_some_and(|entry| entry.state == State::Running) {
        return tracing::info!("A hook asked for {what}, which is adopted already");
    }
    let reasons: Vec<_> = answer.body().refusals.into_iter().map(|reason| reason.text).collect();
    tracing::warn!(
        "A hook asked for {what}, which is not in the charge of decamp: {answer} {}",
        reasons.join("; ")
    );
}

async fn awaits_start(agent: &Agent, what: &str) -> bool {
    let (backend, what) = (agent.backends.of(Kind::Container), what.to_owned());
    let Ok(backend) = backend else { return false };
    blocking(move || backend.awaits_start(&what)).await.unwrap_or(false)
}

async fn adopt(agent: &Arc<Agent>, what: &str) -> Result<String> {
    // The one before, whose end nobody told us of. One that is noted as running may be too: then its end
    // is noted in a moment.
    if let Some(entry) = adopted(agent, what)?
        && entry.state == State::Stopped
    {
        agent.remove(&entry.name, true).await?;
    }
    // What was begun is brought to its end even when nobody waits any more.
    let (agent, request) = (Arc::clone(agent), AdoptRequest { what: what.to_owned() });
    let adopting = tokio::spawn(async move { agent.adopt_new(request).await });
    let view = adopting.await.unwrap_or_else(|error| {
        Err(Answer::Failed(format!("The agent's own work broke off: {error}")))
    });
    view.map(|view| view.name)
}

fn stopped(agent: &Arc<Agent>, what: String) -> Result<String> {
    agent.awaited.leave(&what);
    let Some(entry) = adopted(agent, &what)? else {
        return Ok(format!("{what} is not in the charge of this agent"));
    };
    if is_elsewhere(entry.state) {
        return Ok(format!("{} is {}, and stays so", entry.name, entry.state));
    }
    let said = format!("{} is forgotten as soon as its end is noted", entry.name);
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let stopping = agent.stopping.clone();
        tokio::select! {
            () = stopping.cancelled() => {}
            () = forget(&agent, &entry) => {}
        }
    });
    Ok(said)
}

/// Forgets a workload once it is noted as stopped. One that runs, or has moved away, is left alone, whatever
/// its runtime says: that may have been told to let go of it.
async fn forget(agent: &Arc<Agent>, entry: &Workload) {
    let (begun, mut wait) = (Instant::now(), LOOKS[0]);
    let name = &entry.name;
    while begun.elapsed() < ENDED_WITHIN {
        let now = agent.registry.get(name).ok().flatten().filter(|now| now.uuid == entry.uuid);
        match now.map(|now| now.state) {
            Some(State::Stopped) => match agent.remove(name, true).await {
                Ok(_) => return tracing::info!(workload = name, "A hook had it forgotten"),
                Err(answer) => tracing::debug!(workload = name, "Cannot forget it yet: {answer}"),
            },
            Some(state) if !is_elsewhere(state) => {}
            _ => return,
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LOOKS[1]);
    }
    tracing::warn!(
        workload = name,
        "Its runtime says that it has stopped, and its keeper does not: left as it is"
    );
}

/// Whether what its runtime does here says nothing about it any more.
fn is_elsewhere(state: State) -> bool {
    matches!(state, State::Moved | State::Unresolved | State::Incoming)
}

/// The workload that `what` was adopted as.
fn adopted(agent: &Agent, what: &str) -> Result<Option<Workload>> {
    let found = agent.registry.list()?.into_iter();
    Ok(found
        .filter(|entry| entry.kind == Kind::Container)
        .find(|entry| is_adopted_as(&entry.spec, what)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Bench, UUID};
    use super::*;

    fn enter(bench: &Bench, state: State) {
        let spec = json!({"bundle": "/srv/web", "runtime": "runc", "adopted": "web"});
        let web = Workload::new("web", UUID, Kind::Container, spec, state);
        bench.agent.registry.create(&web).expect("entered");
        bench.agent.state_dir.make_place(&bench.agent.place(&web)).expect("a place");
    }

    fn call(bench: &Bench, what: &str, event: HookEvent) -> Result<HookAnswer> {
        called(&bench.agent, HookRequest { what: what.to_owned(), event })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_has_ended_is_forgotten_and_what_has_moved_is_not() {
        for (state, forgotten) in [(State::Stopped, true), (State::Moved, false)] {
            let bench = Bench::new();
            enter(&bench, state);
            call(&bench, "crun:web", HookEvent::Stopped).expect("another runtime's");
            assert_eq!(bench.state(), Some(state));
            call(&bench, "runc:web", HookEvent::Stopped).expect("heard");
            if forgotten {
                bench.until("it to be forgotten", |bench| bench.state().is_none()).await;
            } else {
                tokio::time::sleep(Duration::from_millis(200)).await;
                assert_eq!(bench.state(), Some(state));
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_that_runs_is_only_forgotten_once_its_end_is_noted() {
        let bench = Bench::new();
        enter(&bench, State::Running);
        call(&bench, "runc:web", HookEvent::Stopped).expect("heard");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(bench.state(), Some(State::Running), "its keeper has not said so");
        bench.agent.registry.change("web", |web| web.state = State::Stopped).expect("noted");
        bench.until("it to be forgotten", |bench| bench.state().is_none()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn waiting_is_given_up_when_the_container_ends() {
        let bench = Bench::new();
        call(&bench, "runc:web", HookEvent::Started).expect("heard");
        let again = call(&bench, "runc:web", HookEvent::Started).expect("heard");
        assert!(again.said.contains("already"), "{}", again.said);
        call(&bench, "runc:web", HookEvent::Stopped).expect("heard");
        assert!(bench.agent.awaited.held().is_empty());
        assert!(matches!(call(&bench, "web", HookEvent::Started), Err(Answer::Request(_))));
    }

    #[test]
    fn only_so_many_are_waited_for() {
        let awaited = Awaited::default();
        for number in 0..AWAITED_CAP {
            assert!(awaited.enter(&format!("runc:{number}")).expect("room").is_some());
        }
        assert!(matches!(awaited.enter("runc:one-more"), Err(Answer::Conflict(_))));
        awaited.leave("runc:0");
        assert!(awaited.enter("runc:one-more").expect("room").is_some());
    }
}
