//! Moves that end without an answer, and what may be decided of them: with a destination that does not
//! say, does not know, or hangs up, and with disks that are full.

use std::time::Instant;

use rusqlite::Connection;

use super::super::commit::{Keep, Sight};
use super::super::journal::{SessionRow, boot_id};
use super::super::recovery::{OpenDeparture, Resolution};
use super::*;
use crate::protocol::control::Request;
use crate::transport::Control;

const MIGRATION: &str = "6d3d5d0e-0000-4000-8000-00000000000a";
/// Far more than anything here takes.
const SOON: Duration = Duration::from_secs(120);

impl Pair {
    /// A write of one of `records` to that host's journal fails until [`Pair::free_disk`].
    fn fill_disk(&self, host: &str, records: &str) {
        self.journal_says(
            host,
            &format!(
                "CREATE TRIGGER full BEFORE UPDATE ON sessions WHEN NEW.record IN ({records})
                 BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END;"
            ),
        );
    }

    fn free_disk(&self, host: &str) {
        self.journal_says(host, "DROP TRIGGER full;");
    }

    fn journal_says(&self, host: &str, statement: &str) {
        let path = self._directory.path().join(format!("{host}.db"));
        let database = Connection::open(path).expect("opens");
        database.execute_batch(statement).expect("is done");
    }

    /// Both journals as after a Commit that was never answered: FENCED, and COMMITTED.
    fn leave_open(&self) {
        let row = |role, record| SessionRow {
            migration: MIGRATION.to_owned(),
            role,
            workload: "web".to_owned(),
            uuid: "6d3d5d0e-0000-4000-8000-000000000001".to_owned(),
            peer: if role == End::Source { "beta" } else { "alpha" }.to_owned(),
            peer_address: self.context.peer.address.clone(),
            token: 1,
            record,
            boot_id: boot_id(),
            updated_ms: 0,
            manifest: Vec::new(),
        };
        self.journals.0.begin(&row(End::Source, Record::Fenced)).expect("written");
        self.journals.1.begin(&row(End::Destination, Record::Committed)).expect("written");
        self.copies.source_runs.store(false, Ordering::SeqCst);
    }

    fn source_workload(&self) -> Box<dyn SourceWorkload> {
        Box::new(Leaving {
            memory: self.here.clone(),
            copies: self.copies.clone(),
            tracked: self.tracked,
        })
    }

    /// As an agent takes it up that finds the keeper fenced.
    async fn take_up(&self, address: &str) -> OpenDeparture {
        let row =
            self.journals.0.session(MIGRATION, End::Source).expect("reads").expect("is there");
        let row = SessionRow { peer_address: address.to_owned(), ..row };
        let (open, fate) = OpenDeparture::take_up(
            self.journals.0.clone(),
            self.context.dialer.clone(),
            row,
            Sight::Stopped,
            Some(self.source_workload()),
        )
        .await;
        assert_eq!(fate, None, "only the destination or an operator can say");
        open.asking_every(Duration::from_millis(100))
    }

    fn destination_says(&self, record: Record) {
        self.journals.1.record(MIGRATION, End::Destination, record).expect("written");
    }
}

/// Accepts, takes the question, and hangs up.
async fn hangs_up(authority: &Authority) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let acceptor = Acceptor::new(authority.identity("beta"), Versions::OURS);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let connection = acceptor.accept(tcp).await.expect("a connection");
            let asked = Control::new(connection).recv::<Request>(SOON).await;
            assert!(asked.expect("a question").is_some());
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_does_not_say_yet_is_asked_on_whatever_the_operator_says() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.leave_open();
    pair.copies.recovers.store(true, Ordering::SeqCst);
    let open = Arc::new(pair.take_up(&pair.context.peer.address).await);
    let asking = {
        let open = open.clone();
        tokio::spawn(async move { open.settle().await })
    };
    for keep in [Keep::Source, Keep::Destination, Keep::Source] {
        let resolution = open.resolve(keep).await;
        assert!(matches!(resolution, Resolution::Open(_)), "{resolution:?}");
    }
    assert_eq!(pair.copies.running(), 0, "nothing is started on a guess");
    assert_eq!(pair.records(MIGRATION), (Some(Record::Fenced), Some(Record::Committed)));
    // It comes to run there after all: the same hold on the keeper is used to take the copy away.
    pair.destination_says(Record::Running);
    pair.copies.recovers.store(false, Ordering::SeqCst);
    let fate = tokio::time::timeout(SOON, asking).await.expect("is asked on").expect("no panic");
    assert_eq!(fate, Fate::Moved);
    assert!(pair.copies.released.load(Ordering::SeqCst));
    assert_eq!(open.resolve(Keep::Source).await, Resolution::Before(Fate::Moved));
    assert_eq!(pair.records(MIGRATION).0, Some(Record::Released));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_does_not_know_is_asked_again() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.leave_open();
    let open = Arc::new(pair.take_up(&pair.context.peer.address).await);
    let asking = {
        let open = open.clone();
        tokio::spawn(async move { open.settle().await })
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!asking.is_finished(), "nobody knows yet");
    // An operator gave it up there.
    pair.destination_says(Record::Aborted);
    let fate = tokio::time::timeout(SOON, asking).await.expect("is asked again").expect("no panic");
    assert_eq!(fate, Fate::Here);
    assert_eq!(pair.copies.running(), 1);
    assert_eq!(pair.records(MIGRATION).0, Some(Record::RolledBack));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_word_counts_where_nobody_knows_and_ends_the_asking() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.leave_open();
    let open = Arc::new(pair.take_up(&pair.context.peer.address).await);
    let asking = {
        let open = open.clone();
        tokio::spawn(async move { open.settle().await })
    };
    assert_eq!(open.resolve(Keep::Source).await, Resolution::Obeyed(Fate::Here));
    assert_eq!(open.resolve(Keep::Destination).await, Resolution::Before(Fate::Here));
    let fate = tokio::time::timeout(SOON, asking).await.expect("it ends").expect("no panic");
    assert_eq!(fate, Fate::Here);
    assert_eq!(pair.copies.running(), 1);
    assert!(!pair.copies.released.load(Ordering::SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_is_not_followed_when_the_question_may_have_arrived() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.leave_open();
    let open = pair.take_up(&hangs_up(&pair._authority).await).await;
    let resolution = open.resolve(Keep::Source).await;
    assert!(matches!(resolution, Resolution::Open(_)), "{resolution:?}");
    assert_eq!(pair.copies.running(), 0, "it may be starting there on our Commit");
    drop(open);
    // Where nobody listens nothing was said.
    let open = pair.take_up("127.0.0.1:1").await;
    assert_eq!(open.resolve(Keep::Source).await, Resolution::Obeyed(Fate::Here));
    assert_eq!(pair.copies.running(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_at_the_source_ends_the_move_and_the_destination_is_told_at_once() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.fill_disk("alpha", "'FENCED', 'ROLLED_BACK'");
    let discarded = {
        let copies = pair.copies.clone();
        tokio::spawn(async move {
            while !copies.discarded.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Instant::now()
        })
    };
    let moving = pair.migrate(MoveOptions::default(), CancellationToken::new());
    let ending = tokio::time::timeout(SOON, moving).await.expect("the move ends");
    let ended = Instant::now();
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Here, Outcome::Failed));
    let reason = ending.report.reason.clone().unwrap_or_default();
    assert!(reason.contains("runs on at alpha"), "{reason}");
    assert_eq!(pair.copies.running(), 1);
    let discarded = tokio::time::timeout(SOON, discarded).await.expect("it lets go");
    let earlier = ended.duration_since(discarded.expect("no panic"));
    assert!(earlier > Duration::from_secs(2), "told only {earlier:?} before the end");
    let migration = &ending.report.migration;
    assert_eq!(pair.records(migration), (Some(Record::Begun), Some(Record::Aborted)));
    // The next agent writes it down.
    pair.free_disk("alpha");
    let row = pair.journals.0.session(migration, End::Source).expect("reads").expect("is there");
    let (_, fate) = OpenDeparture::take_up(
        pair.journals.0.clone(),
        pair.context.dialer.clone(),
        row,
        Sight::Running,
        Some(pair.source_workload()),
    )
    .await;
    assert_eq!(fate, Some(Fate::Here));
    assert_eq!(pair.records(migration).0, Some(Record::RolledBack));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thread_that_dies_while_it_activates_leaves_the_end_open() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.die_activating.store(true, Ordering::SeqCst);
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Unresolved, Outcome::Unresolved));
    assert_eq!(pair.copies.running(), 1, "it was let run, and the source stays as it is");
    let records = pair.records(&ending.report.migration);
    assert_eq!(records, (Some(Record::Fenced), Some(Record::Committed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_ends_on_its_way_is_not_said_to_run_on() {
    let pair = Pair::new(true, Vec::new()).await;
    pair.copies.keeper_dies.store(true, Ordering::SeqCst);
    let ending = pair.migrate(MoveOptions::default(), CancellationToken::new()).await;
    assert_eq!((ending.fate, ending.report.outcome), (Fate::Here, Outcome::Failed));
    assert!(ending.report.lost);
    assert_eq!(ending.report.exit_code(), 1);
    let reason = ending.report.reason.unwrap_or_default();
    assert!(reason.contains("ended") && !reason.contains("runs on"), "{reason}");
}
