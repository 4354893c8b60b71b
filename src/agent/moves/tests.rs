//! Moves as listeners, the registry and other clients of an agent see them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use decamp_shared::session::progress::Phase;
use decamp_shared::session::source::{Ending, Fate};
use decamp_shared::session::{MoveOptions, Progress, Report};
use decamp_shared::workload::{FileTree, Storage};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use super::beginning::{check_options, may_be_shared};
use super::settling::{NOTE_AGAIN, note_end_later};
use super::{Move, Moves};
use crate::agent::answer::Answer;
use crate::agent::registry::Workload;
use crate::agent::testing::{Bench, MIGRATION, keeper};
use crate::messages::{FileEntry, State};

fn moving(id: &str, workload: &str) -> Arc<Move> {
    Arc::new(Move {
        id: id.into(),
        workload: workload.into(),
        to: "beta".into(),
        files: Vec::new(),
        cancel: CancellationToken::new(),
        events: broadcast::Sender::new(4),
        told: Mutex::default(),
        over: watch::Sender::new(false),
    })
}

async fn collected(body: Body) -> Vec<Progress> {
    let bytes = axum::body::to_bytes(body, 1 << 20).await.expect("collected");
    bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).expect("a line of progress"))
        .collect()
}

pub(super) fn report(id: &str) -> Report {
    serde_json::from_value(serde_json::json!({
        "migration": id, "workload": "web", "kind": "vm", "from": "alpha", "to": "beta",
        "outcome": "completed", "reason": null, "mode": "pre-copy", "tracker": null,
        "total_ms": 1.0, "downtime_ms": 1.0,
        "downtime": {"pause_ms": 0.0, "memory_ms": 0.0, "state_ms": 0.0, "restore_ms": 0.0,
                     "switch_ms": 0.0},
        "rounds": [], "memory_bytes": 1, "wire_bytes": 1, "file_bytes": 0,
        "pages": {"zero": 0, "same": 0, "delta": 0, "lz4": 0, "zstd": 0, "raw": 0},
        "streams": 1, "encrypted": true,
        "predicted": {"total_ms": null, "downtime_ms": null}, "source_stall_ms": 0.0
    }))
    .expect("a report")
}

#[tokio::test]
async fn every_listener_hears_the_report_last() {
    let one = moving("1", "web");
    let early = one.lines();
    one.tell(Progress::Phase { phase: Phase::Prepare });
    let middle = one.lines();
    // More than a listener may be behind.
    for round in 0..10 {
        one.tell(Progress::Note { text: format!("{round}") });
    }
    one.tell(Progress::Report { report: Box::new(report("1")) });
    let late = one.lines();
    for body in [early, middle, late] {
        let events = collected(body).await;
        assert!(matches!(events.first(), Some(Progress::Started { .. })));
        assert!(matches!(events.last(), Some(Progress::Report { .. })));
        let reports = events.iter().filter(|event| matches!(event, Progress::Report { .. }));
        assert_eq!(reports.count(), 1);
    }
    let view = one.view();
    assert!(!view.active && view.phase == Some(Phase::Prepare));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_stay_as_long_as_the_old_copy_does() {
    let bench = Bench::new();
    let web = bench.enter(State::Moved);
    let keeper = keeper(&bench.agent.place(&web));
    let one = moving(MIGRATION, "web");
    let mut events = one.events.subscribe();
    bench.agent.remove_source(&web, &one).await;
    let Ok(Progress::Note { text }) = events.try_recv() else { panic!("nothing is told") };
    assert!(text.contains("decamp rm web"), "{text}");
    assert_eq!(bench.state(), Some(State::Moved));
    drop(keeper);
    bench.agent.remove_source(&web, &one).await;
    assert_eq!(bench.state(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_what_came_back_stay() {
    let bench = Bench::new();
    let web = bench.enter(State::Moved);
    let one = moving(MIGRATION, "web");
    let mut events = one.events.subscribe();
    bench.agent.registry.change("web", Workload::becomes_running).expect("written");
    bench.agent.remove_source(&web, &one).await;
    let Ok(Progress::Note { text }) = events.try_recv() else { panic!("nothing is told") };
    assert!(text.contains("its files stay"), "{text}");
    assert_eq!(bench.state(), Some(State::Running));
}

#[tokio::test(flavor = "multi_thread")]
async fn how_it_ended_is_not_noted_while_something_is_done_to_it() {
    let bench = Bench::new();
    bench.enter(State::Migrating);
    let claim = bench.agent.claims.take("web", "arriving").expect("free");
    let ending = Ending { report: report(MIGRATION), fate: Fate::Moved, trees: Vec::new() };
    let options = MoveOptions { remove_source: true, ..MoveOptions::default() };
    let agent = Arc::clone(&bench.agent);
    tokio::spawn(note_end_later(agent, ending, options, moving(MIGRATION, "web")));
    tokio::time::sleep(NOTE_AGAIN + Duration::from_millis(500)).await;
    assert_eq!(bench.state(), Some(State::Migrating));
    drop(claim);
    bench.until("another try", |bench| bench.state().is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn how_it_ended_is_noted_when_the_disk_has_room_again() {
    let bench = Bench::new();
    bench.enter(State::Migrating);
    bench.fill_disk(State::Running);
    let report = report(MIGRATION);
    let ending = Ending { report, fate: Fate::Here, trees: Vec::new() };
    let one = moving(MIGRATION, "web");
    bench.agent.settle(&ending, &MoveOptions::default(), &one).await;
    assert_eq!(bench.state(), Some(State::Migrating));
    bench.free_disk();
    bench.until("another try", |bench| bench.state() == Some(State::Running)).await;
}

#[test]
fn what_may_be_shared_is_noted_before_anything_can_go_wrong() {
    let tree = |path: &str, storage: Storage| FileTree {
        role: decamp_shared::workload::FileRole::Volume.into(),
        path: path.to_owned(),
        storage: storage.into(),
        ..FileTree::default()
    };
    let trees = [
        tree("/own", Storage::Copy),
        tree("/nas", Storage::Shared),
        tree("/unsaid", Storage::Unsaid),
        tree("/once", Storage::Copy),
    ];
    // A copy is made of what was shared with another host, which may still use it.
    let once = FileEntry { role: "volume".into(), path: "/once".into(), shared: true };
    let files = may_be_shared(&trees, &[once]);
    let shared: Vec<bool> = files.iter().map(|file| file.shared).collect();
    assert_eq!(shared, [false, true, true, true]);
}

#[test]
fn moves_are_found_by_id_its_beginning_or_workload() {
    let moves = Moves::default();
    let under_way =
        [("3f2a17-1", "web"), ("3f2a17-2", "mail"), ("3f2b18-3", "redis"), ("a", "3f2b18")];
    for (id, workload) in under_way {
        moves.held().insert(id.into(), moving(id, workload));
    }
    let found = |key: &str| moves.find(key).map(|one| one.id.clone());
    assert_eq!(found("3f2a17-1").as_deref(), Some("3f2a17-1"));
    assert_eq!(found("3f2b18-").as_deref(), Some("3f2b18-3"));
    assert_eq!(found("web").as_deref(), Some("3f2a17-1"));
    assert_eq!(found("3f2b18").as_deref(), Some("a"), "first of all it is a workload's name");
    assert_eq!(found("3f2a17"), None, "two begin so");
    assert_eq!(found("3f2b1"), None, "too little");
    assert_eq!(found("zzz"), None);
}

#[test]
fn options_of_other_clients_are_checked_too() {
    assert!(check_options(&MoveOptions::default()).is_ok());
    for bad in [
        MoveOptions { streams: 0, ..MoveOptions::default() },
        MoveOptions { streams: 65, ..MoveOptions::default() },
        MoveOptions { timeout_ms: 0, ..MoveOptions::default() },
        MoveOptions { max_downtime_ms: Some(0), ..MoveOptions::default() },
        MoveOptions { paths: vec![("/a".into(), "../b".into())], ..MoveOptions::default() },
        MoveOptions { storage: Some(Storage::Unsaid), ..MoveOptions::default() },
        MoveOptions { storage_of: vec![("a/..".into(), Storage::Copy)], ..MoveOptions::default() },
    ] {
        assert!(matches!(check_options(&bad), Err(Answer::Request(_))), "{bad:?}");
    }
}
