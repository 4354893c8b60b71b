//! `decamp ls`: the workloads of this host.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::{output, units};
use crate::messages::{State, WorkloadView, now_ms};

/// List workloads
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp ls --all")]
pub(crate) struct Ls {
    /// Those too that moved away and left their files here
    #[arg(long, short)]
    all: bool,
}

impl Ls {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let path = if self.all { "/v1/workloads?all=1" } else { "/v1/workloads" };
        let workloads: Vec<WorkloadView> = client.get(path).await?;
        if json {
            output::json(&workloads);
            return Ok(0);
        }
        if workloads.is_empty() {
            output::line("No workloads here. Start one with `decamp run`.");
            return Ok(0);
        }
        let now = now_ms();
        let rows: Vec<Vec<String>> = workloads.iter().map(|one| row(one, now)).collect();
        output::table(&["NAME", "KIND", "STATE", "SINCE", ""], &rows);
        Ok(0)
    }
}

fn row(workload: &WorkloadView, now_ms: u64) -> Vec<String> {
    vec![
        workload.name.clone(),
        workload.kind.word().to_owned(),
        workload.state.to_string(),
        units::age(workload.changed_ms, now_ms),
        remark(workload),
    ]
}

/// What there is to say beside the state.
pub(crate) fn remark(workload: &WorkloadView) -> String {
    let host = workload.moved_to.as_deref().unwrap_or("another host");
    let migration = workload.migration.as_deref().unwrap_or("MIGRATION");
    match workload.state {
        State::Moved => format!("to {host}; its files stay until `decamp rm {}`", workload.name),
        State::Migrating => format!("to {host} ({migration})"),
        State::Incoming => format!("({migration})"),
        State::Unresolved => {
            format!("not known whether it runs here or on {host}: `decamp resolve {migration}`")
        }
        State::Stopped => match &workload.exit {
            Some(exit) if exit.text != "stopped" => exit.text.clone(),
            _ => String::new(),
        },
        State::Starting | State::Running => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::keeper::ExitRecord;
    use decamp_shared::workload::Kind;

    fn workload(state: State) -> WorkloadView {
        WorkloadView {
            name: "web".into(),
            uuid: "u".into(),
            kind: Kind::Vm,
            state,
            created_ms: 0,
            changed_ms: 0,
            moved_to: Some("beta".into()),
            migration: Some("m1".into()),
            exit: Some(ExitRecord { status: 1, text: "exited with 1".into() }),
            files: Vec::new(),
        }
    }

    #[test]
    fn remarks_say_what_to_do() {
        assert!(remark(&workload(State::Moved)).contains("decamp rm web"));
        assert!(remark(&workload(State::Unresolved)).contains("decamp resolve m1"));
        assert_eq!(remark(&workload(State::Stopped)), "exited with 1");
        assert_eq!(remark(&workload(State::Running)), "");
        assert_eq!(row(&workload(State::Migrating), 5_000)[3..], ["5 s", "to beta (m1)"]);
    }
}
