//! `decamp inspect`: all that is known of one workload.

use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::ls::remark;
use super::{output, units, values};
use crate::messages::{WorkloadDetail, now_ms};

/// Show everything about a workload
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp inspect web --json")]
pub(crate) struct Inspect {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
}

impl Inspect {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let detail: WorkloadDetail = client.get(&format!("/v1/workloads/{}", self.name)).await?;
        if json {
            output::json(&detail);
        } else {
            output::line(text(&detail, now_ms()));
        }
        Ok(0)
    }
}

fn text(detail: &WorkloadDetail, now_ms: u64) -> String {
    let view = &detail.view;
    let mut lines = Vec::new();
    let mut tell =
        |key: &str, value: String| lines.push(format!("{key:<10}  {value}").trim_end().to_owned());
    tell("name", view.name.clone());
    tell("uuid", view.uuid.clone());
    tell("kind", view.kind.word().to_owned());
    let since = units::age(view.changed_ms, now_ms);
    tell("state", format!("{} for {since}  {}", view.state, remark(view)));
    for file in &view.files {
        tell(&file.role, file.path.display().to_string());
    }
    tell("log", detail.log.display().to_string());
    for (key, value) in [("spec", Some(&detail.spec)), ("keeper", detail.keeper.as_ref())] {
        let Some(mut value) = value.cloned() else { continue };
        // Every CPUID leaf that a guest sees is for machines: --json has it.
        if let Some(facts) = value.get_mut("facts").and_then(|facts| facts.as_object_mut()) {
            facts.remove("needs");
        }
        let pretty = serde_json::to_string_pretty(&value).unwrap_or_default();
        tell(key, pretty.replace('\n', "\n            "));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{FileEntry, State, WorkloadView};
    use decamp_shared::workload::Kind;
    use serde_json::json;

    #[test]
    fn details_are_aligned() {
        let detail = WorkloadDetail {
            view: WorkloadView {
                name: "web".into(),
                uuid: "1234".into(),
                kind: Kind::Vm,
                state: State::Running,
                created_ms: 0,
                changed_ms: 0,
                moved_to: None,
                migration: None,
                exit: None,
                files: vec![FileEntry {
                    role: "kernel".into(),
                    path: "/srv/k".into(),
                    shared: false,
                }],
            },
            spec: json!({"cpus": 1}),
            log: "/var/lib/decamp/workloads/web/console.log".into(),
            keeper: Some(json!({"facts": {"pid": 7, "needs": {"cpuid": []}}, "phase": "running"})),
        };
        let expected = "\
name        web
uuid        1234
kind        vm
state       running for 3 s
kernel      /srv/k
log         /var/lib/decamp/workloads/web/console.log
spec        {
              \"cpus\": 1
            }
keeper      {
              \"facts\": {
                \"pid\": 7
              },
              \"phase\": \"running\"
            }";
        assert_eq!(text(&detail, 3_000), expected);
    }
}
