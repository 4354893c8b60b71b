//! Breaking a move at a named place: hold it there, break something, see how it ends.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::guest::Guest;
use crate::hosts::{Hosts, other};
use crate::redis::Client;
use crate::running::{Pending, Ran, find, until};

/// A move is held as long as this file is there, as its host sees it: however long it takes to break something.
pub(crate) const HOLDS: &str = "/run/decamp-host/holds";
/// How long a move may take to get to a fail point.
const ARRIVES_WITHIN: Duration = Duration::from_secs(120);
/// How long a broken move may take to end. A silent peer is given up after 15 s; a fenced source asks for a
/// minute.
pub(crate) const ENDS_WITHIN: Duration = Duration::from_secs(300);

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Packets between the agents vanish.
    Cut,
    /// Connections between the agents are reset, and no new ones come about.
    Reset,
    /// The destination's agent is killed.
    KillDestination,
    /// The source's agent is killed.
    KillSource,
    /// The user calls it off.
    Cancel,
    /// The step itself fails, once.
    Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Failure::Cut => "cut",
            Failure::Reset => "reset",
            Failure::KillDestination => "destination's agent killed",
            Failure::KillSource => "source's agent killed",
            Failure::Cancel => "cancelled",
            Failure::Error => "error",
        })
    }
}

/// Something that moves, and can be asked whether it lives.
pub(crate) trait Living {
    /// Its name.
    fn name(&self) -> &str;
    /// Panics unless it runs on `host`, with nothing lost so far.
    fn lives(&mut self, host: &str);
}

impl Living for Guest {
    fn name(&self) -> &str {
        Guest::name(self)
    }

    fn lives(&mut self, host: &str) {
        self.runs_clean(host);
    }
}

/// A container and the client that is connected to it.
pub(crate) struct Served {
    pub(crate) name: &'static str,
    pub(crate) client: Client,
}

impl Living for Served {
    fn name(&self) -> &str {
        self.name
    }

    fn lives(&mut self, _: &str) {
        self.client.is_served();
    }
}

/// A move that stands at a fail point.
pub(crate) struct Held {
    pub(crate) hosts: &'static Hosts,
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
    /// Length of the source's log when the move began.
    pub(crate) mark: usize,
    moving: Option<Pending>,
    name: String,
    /// What holds it, as seen from outside.
    holds: PathBuf,
}

/// Gives both agents the fail points that a failure at `point` needs.
#[track_caller]
pub(crate) fn arm(hosts: &'static Hosts, from: &'static str, point: &str, failure: Failure) {
    let holder = holder(from, point);
    let action = match failure {
        Failure::Error => "1*return".to_owned(),
        _ => format!("1*return({HOLDS})"),
    };
    hosts.with_failpoints(holder, &format!("{point}={action}"));
    hosts.with_failpoints(other(holder), "");
}

/// Begins a move and waits until it stands at `point`. The agents are armed.
#[track_caller]
pub(crate) fn hold(
    hosts: &'static Hosts,
    from: &'static str,
    name: &str,
    point: &str,
    options: &[&str],
) -> Held {
    hold_to(hosts, from, other(from), name, point, options)
}

/// The same of a move to a host that is said: the same one, for disks that move alone.
#[track_caller]
pub(crate) fn hold_to(
    hosts: &'static Hosts,
    from: &'static str,
    to: &'static str,
    name: &str,
    point: &str,
    options: &[&str],
) -> Held {
    let holder = holder(from, point);
    let (mark, begun) = (hosts.log_mark(holder), hosts.log_mark(from));
    let holds = hosts.path(holder, "conf").join(HOLDS.rsplit('/').next().expect("a name"));
    fs::write(&holds, "").expect("written");
    let mut held =
        Held { hosts, from, to, mark: begun, moving: None, name: name.to_owned(), holds };
    // Moves that were held teach the agents that a stop takes seconds; that is not the subject here.
    let words = ["migrate", name, "--to", to, "--json", "--max-downtime", "60s"];
    let mut moving = hosts.begin(from, &[&words[..], options].concat());
    let word = format!("At {point}");
    find(&format!("the move to come to {point}"), ARRIVES_WITHIN, || {
        let has_ended = moving.has_ended();
        let is_there = hosts.log_since(holder, mark).contains(&word);
        (is_there || has_ended).then_some(())
    });
    if !hosts.log_since(holder, mark).contains(&word) {
        panic!("the move never came to {point}\n{}", moving.ended(ENDS_WITHIN));
    }
    held.moving = Some(moving);
    held
}

/// The host on which a fail point is.
fn holder(from: &'static str, point: &str) -> &'static str {
    let is_here = ["source.", "relocate."].iter().any(|begins| point.starts_with(begins));
    if is_here { from } else { other(from) }
}

impl Held {
    /// Breaks something, and lets the move go on.
    #[track_caller]
    pub(crate) fn inflict(&self, failure: Failure) {
        let Self { hosts, from, to, .. } = self;
        let _broken = match failure {
            Failure::Cut => hosts.hosts(&["cut", to]).expect(0),
            Failure::Reset => hosts.hosts(&["cut", to, "--reset"]).expect(0),
            Failure::KillDestination => hosts.hosts(&["agent", to, "kill"]).expect(0),
            Failure::KillSource => hosts.hosts(&["agent", from, "kill"]).expect(0),
            Failure::Cancel => return self.cancel(),
            Failure::Error => return self.let_go(),
        };
        self.let_go();
    }

    /// Has the move called off. Whoever asks for that is answered once it has ended, and it does not end while it is
    /// held.
    #[track_caller]
    fn cancel(&self) {
        let Self { hosts, from, name, .. } = self;
        let mark = hosts.log_mark(from);
        let cancelling = hosts.begin(from, &["cancel", name]);
        until("the agent to be told", ARRIVES_WITHIN, || {
            hosts.log_since(from, mark).contains("Called off on request")
        });
        self.let_go();
        cancelling.ended(ENDS_WITHIN).expect(0);
    }

    /// Lets the move go on.
    pub(crate) fn let_go(&self) {
        let _ = fs::remove_file(&self.holds);
    }

    /// Waits for the end of the move, which goes on if it is still held.
    #[track_caller]
    pub(crate) fn ended(mut self) -> Ran {
        self.let_go();
        self.moving.take().expect("taken only here").ended(ENDS_WITHIN)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// The report of a move from its standard output, if it printed one.
pub(crate) fn report(ran: &Ran) -> Option<Value> {
    serde_json::from_str(&ran.stdout).ok()
}
