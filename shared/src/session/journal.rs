//! The durable memory of sessions: SQLite with `synchronous=FULL`, written before it is acted on.
//!
//! One row a session and end. The fencing tokens of every workload that was ever here are kept
//! beside them and only grow. Reports of finished moves are kept too.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::commit::Record;
use super::report::{Outcome, Report};
use crate::workload::Kind;

/// Version of the tables; a journal of a newer one is refused.
const TABLES: i64 = 1;
/// Fewer moves than this tell nothing about the next.
const TELLING: usize = 3;
/// How many of the newest moves say what the next will cost.
const REMEMBERED: usize = 20;

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The database said no.
    #[error("Cannot {what} the journal {}", path.display())]
    Database {
        /// What was tried.
        what: &'static str,
        /// Where the journal is.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// Written by a newer decamp.
    #[error("The journal {} has tables of version {found}; this decamp knows {TABLES}: install the newer decamp again", path.display())]
    Newer {
        /// Where the journal is.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
}

/// Which end of a session a row speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The workload leaves this host.
    Source,
    /// It comes here.
    Destination,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
        }
    }
}

/// One session as one end remembers it.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRow {
    /// Id of the migration.
    pub migration: String,
    /// Which end this is.
    pub role: Role,
    /// Name of the workload.
    pub workload: String,
    /// Its identity.
    pub uuid: String,
    /// The other host's name.
    pub peer: String,
    /// Where the other host was reached (empty at the destination).
    pub peer_address: String,
    /// Fencing token of this change of ownership.
    pub token: u64,
    /// What is known.
    pub record: Record,
    /// Boot of this host in which the session began.
    pub boot_id: String,
    /// Milliseconds since 1970 of the last change.
    pub updated_ms: u64,
    /// The manifest as it was offered (destination), encoded; none once the record is final.
    pub manifest: Vec<u8>,
}

/// An open journal, shared by all sessions of an agent.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    database: Mutex<Connection>,
}

impl Journal {
    /// Opens the journal at `path`, making it when there is none.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or was written by a newer decamp.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed =
            |what| move |source| JournalError::Database { what, path: path.to_owned(), source };
        let database = Connection::open(path).map_err(failed("open"))?;
        let found: i64 = database
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(failed("read"))?;
        if found > TABLES {
            return Err(JournalError::Newer { path: path.to_owned(), found });
        }
        database
            .execute_batch(
                "PRAGMA journal_mode=WAL;
                 PRAGMA synchronous=FULL;
                 CREATE TABLE IF NOT EXISTS sessions (
                    migration TEXT NOT NULL, role TEXT NOT NULL, workload TEXT NOT NULL,
                    uuid TEXT NOT NULL, peer TEXT NOT NULL, peer_address TEXT NOT NULL,
                    token INTEGER NOT NULL, record TEXT NOT NULL, boot_id TEXT NOT NULL,
                    updated_ms INTEGER NOT NULL, manifest BLOB NOT NULL,
                    PRIMARY KEY (migration, role)) STRICT;
                 CREATE TABLE IF NOT EXISTS tokens (
                    uuid TEXT PRIMARY KEY, token INTEGER NOT NULL) STRICT;
                 CREATE TABLE IF NOT EXISTS reports (
                    id INTEGER PRIMARY KEY, migration TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
                    report TEXT NOT NULL) STRICT;",
            )
            .map_err(failed("prepare"))?;
        // Earlier versions kept them.
        database
            .execute(
                "UPDATE sessions SET manifest=x'' WHERE length(manifest) > 0
                 AND record IN ('ROLLED_BACK', 'RELEASED', 'RUNNING', 'ABORTED')",
                [],
            )
            .map_err(failed("prepare"))?;
        database.pragma_update(None, "user_version", TABLES).map_err(failed("prepare"))?;
        Ok(Self { path: path.to_owned(), database: Mutex::new(database) })
    }

    /// Begins a session: its first record, and its token as the newest of its workload.
    ///
    /// # Errors
    /// When the row exists already or cannot be written.
    pub fn begin(&self, row: &SessionRow) -> Result<(), JournalError> {
        let mut database = self.lock();
        let write = |database: &mut Connection| {
            let change = database.transaction()?;
            change.execute(
                "INSERT INTO sessions VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11)",
                params![
                    row.migration,
                    row.role.word(),
                    row.workload,
                    row.uuid,
                    row.peer,
                    row.peer_address,
                    row.token as i64,
                    row.record.word(),
                    row.boot_id,
                    now_ms(),
                    row.manifest,
                ],
            )?;
            witness(&change, &row.uuid, row.token)?;
            change.commit()
        };
        write(&mut database).map_err(|error| self.failed("write", error))
    }

    /// Writes what is now known of a session. On disk when this returns. What is final needs no manifest any
    /// more: sessions stay for good, and a manifest may be megabytes.
    ///
    /// # Errors
    /// When it could not be written, there is no such session, or what it says is final already.
    pub fn record(&self, migration: &str, role: Role, record: Record) -> Result<(), JournalError> {
        let changed = self
            .lock()
            .execute(
                "UPDATE sessions SET record=?3, updated_ms=?4,
                    manifest=CASE WHEN ?3 IN ('ROLLED_BACK', 'RELEASED', 'RUNNING', 'ABORTED')
                             THEN x'' ELSE manifest END
                 WHERE migration=?1 AND role=?2
                 AND (record=?3
                      OR record NOT IN ('ROLLED_BACK', 'RELEASED', 'RUNNING', 'ABORTED'))",
                params![migration, role.word(), record.word(), now_ms()],
            )
            .map_err(|error| self.failed("write", error))?;
        match changed {
            0 => Err(self.failed("write", rusqlite::Error::QueryReturnedNoRows)),
            _ => Ok(()),
        }
    }

    /// One session's row.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn session(&self, migration: &str, role: Role) -> Result<Option<SessionRow>, JournalError> {
        self.lock()
            .query_row(
                "SELECT * FROM sessions WHERE migration=?1 AND role=?2",
                params![migration, role.word()],
                read_row,
            )
            .optional()
            .map_err(|error| self.failed("read", error))
    }

    /// Every session, the newest change first.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn sessions(&self) -> Result<Vec<SessionRow>, JournalError> {
        let database = self.lock();
        let read = || -> rusqlite::Result<Vec<SessionRow>> {
            database
                .prepare("SELECT * FROM sessions ORDER BY updated_ms DESC, migration")?
                .query_map([], read_row)?
                .collect()
        };
        read().map_err(|error| self.failed("read", error))
    }

    /// Where it is noted, beside the journal, what an arrival makes on this host's disk while it lasts.
    pub fn landing_record(&self, migration: &str) -> PathBuf {
        self.path.with_file_name(format!("landing-{migration}"))
    }

    /// A token for the next change of ownership of a workload: larger than any seen here.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn next_token(&self, uuid: &str) -> Result<u64, JournalError> {
        Ok(self.newest_token(uuid)?.saturating_add(1))
    }

    /// The newest token that this host has seen of a workload, 0 when none.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn newest_token(&self, uuid: &str) -> Result<u64, JournalError> {
        let token: Option<i64> = self
            .lock()
            .query_row("SELECT token FROM tokens WHERE uuid=?1", params![uuid], |row| row.get(0))
            .optional()
            .map_err(|error| self.failed("read", error))?;
        Ok(token.unwrap_or(0) as u64)
    }

    /// Keeps a report.
    ///
    /// # Errors
    /// When it could not be written.
    pub fn save_report(&self, report: &Report) -> Result<(), JournalError> {
        let text = serde_json::to_string(report).unwrap_or_default();
        self.lock()
            .execute(
                "INSERT OR REPLACE INTO reports (migration, kind, report) VALUES (?1,?2,?3)",
                params![report.migration, report.kind.word(), text],
            )
            .map_err(|error| self.failed("write", error))
            .map(|_| ())
    }

    /// Reports of moves that began here, the newest first, at most `limit`.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn reports(&self, limit: u32) -> Result<Vec<Report>, JournalError> {
        let database = self.lock();
        let read = || -> rusqlite::Result<Vec<String>> {
            database
                .prepare("SELECT report FROM reports ORDER BY id DESC LIMIT ?1")?
                .query_map(params![limit], |row| row.get(0))?
                .collect()
        };
        let texts = read().map_err(|error| self.failed("read", error))?;
        // A report of a newer build that does not parse is history that we cannot tell.
        Ok(texts.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }

    /// What the stop of this workload cost lately beyond its memory, in milliseconds: the median over
    /// its own last completed moves, or over those of its kind while its own are too few to tell. A
    /// database says little of a cache. `None` while both are: one stop that was long for reasons of
    /// its own, as when an agent was lost in it, must not forbid all later moves.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn fixed_stop_ms(&self, kind: Kind, workload: &str) -> Result<Option<f64>, JournalError> {
        let reports = self.reports(60)?;
        // Of disks that moved within this host no stop is told.
        let mut all = reports.iter().filter(|report| {
            report.kind == kind && report.outcome == Outcome::Completed && report.from != report.to
        });
        let own = all.clone().filter(|report| report.workload == workload);
        Ok(median_cost(own).or_else(|| median_cost(&mut all)))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere leaves SQLite itself consistent.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &'static str, source: rusqlite::Error) -> JournalError {
        JournalError::Database { what, path: self.path.clone(), source }
    }
}

/// The median of what the stops of the newest of these cost beyond the memory, if there are enough.
fn median_cost<'a>(reports: impl Iterator<Item = &'a Report>) -> Option<f64> {
    let mut costs: Vec<f64> = reports
        .take(REMEMBERED)
        // CRIU dumps and devices are saved while the last pages travel: what of that takes longer
        // than the pages counts.
        .filter_map(|report| {
            Some(report.downtime_ms? - report.rounds.last()?.ms - report.compare_ms)
        })
        .filter(|cost| *cost > 0.0)
        .collect();
    if costs.len() < TELLING {
        return None;
    }
    costs.sort_by(f64::total_cmp);
    costs.get(costs.len() / 2).copied()
}

/// Identity of this boot of the host.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

fn witness(database: &Connection, uuid: &str, token: u64) -> rusqlite::Result<()> {
    database
        .execute(
            "INSERT INTO tokens VALUES (?1, ?2)
             ON CONFLICT (uuid) DO UPDATE SET token = max(token, excluded.token)",
            params![uuid, token as i64],
        )
        .map(|_| ())
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<SessionRow> {
    let role: String = row.get("role")?;
    let record: String = row.get("record")?;
    Ok(SessionRow {
        migration: row.get("migration")?,
        role: if role == "source" { Role::Source } else { Role::Destination },
        workload: row.get("workload")?,
        uuid: row.get("uuid")?,
        peer: row.get("peer")?,
        peer_address: row.get("peer_address")?,
        token: row.get::<_, i64>("token")? as u64,
        record: Record::from_word(&record).ok_or_else(|| {
            rusqlite::Error::InvalidColumnName(format!("record {record} is not known"))
        })?,
        boot_id: row.get("boot_id")?,
        updated_ms: row.get::<_, i64>("updated_ms")? as u64,
        manifest: row.get("manifest")?,
    })
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(migration: &str, token: u64) -> SessionRow {
        SessionRow {
            migration: migration.to_owned(),
            role: Role::Source,
            workload: "web".to_owned(),
            uuid: "u-1".to_owned(),
            peer: "beta".to_owned(),
            peer_address: "10.77.0.2:7420".to_owned(),
            token,
            record: Record::Begun,
            boot_id: boot_id(),
            updated_ms: 0,
            manifest: vec![1, 2],
        }
    }

    fn moved(number: u32, downtime_ms: f64) -> Report {
        let text = serde_json::json!({
            "migration": format!("m-{number}"), "workload": "web", "kind": "vm",
            "from": "alpha", "to": "beta", "outcome": "completed", "reason": null,
            "mode": "pre-copy", "tracker": null, "total_ms": 0.0, "downtime_ms": downtime_ms,
            "downtime": {
                "pause_ms": 0.0, "memory_ms": 5.0, "state_ms": 0.0, "restore_ms": 0.0,
                "switch_ms": 0.0
            },
            "rounds": [{ "round": 1, "dirty_pages": 1, "wire_bytes": 1, "ms": 5.0 }],
            "memory_bytes": 0, "wire_bytes": 0, "file_bytes": 0,
            "pages": { "zero": 0, "same": 0, "delta": 0, "lz4": 0, "zstd": 0, "raw": 0 },
            "streams": 2, "encrypted": true,
            "predicted": { "total_ms": null, "downtime_ms": null }, "source_stall_ms": 0.0
        });
        serde_json::from_value(text).expect("a report")
    }

    #[test]
    fn one_long_stop_does_not_forbid_the_next() {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(&dir.path().join("journal.db")).expect("opens");
        let cost = |number, downtime| {
            journal.save_report(&moved(number, downtime)).expect("writes");
            journal.fixed_stop_ms(Kind::Vm, "web").expect("reads")
        };
        assert_eq!(cost(1, 3_000.0), None);
        assert_eq!(cost(2, 15.0), None);
        assert_eq!(cost(3, 17.0), Some(12.0));
        assert_eq!(journal.fixed_stop_ms(Kind::Container, "web").expect("reads"), None);
        for number in 4..12 {
            let within = moved(number, 9_000.0);
            let within = Report { to: within.from.clone(), ..within };
            journal.save_report(&within).expect("writes");
        }
        assert_eq!(journal.fixed_stop_ms(Kind::Vm, "web").expect("reads"), Some(12.0));
    }

    #[test]
    fn a_workload_is_judged_by_its_own_moves_where_there_are_enough() {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(&dir.path().join("journal.db")).expect("opens");
        let cost = |workload: &str| journal.fixed_stop_ms(Kind::Vm, workload).expect("reads");
        let save = |number, name: &str, downtime| {
            let report = Report { workload: name.to_owned(), ..moved(number, downtime) };
            journal.save_report(&report).expect("writes");
        };
        for number in 0..5 {
            save(number, "database", 4_005.0);
        }
        assert_eq!(cost("cache"), Some(4_000.0));
        for number in 5..8 {
            save(number, "cache", 105.0);
        }
        assert_eq!((cost("cache"), cost("database")), (Some(100.0), Some(4_000.0)));
        assert_eq!(cost("another"), Some(4_000.0));
    }

    #[test]
    fn remembers_across_a_reopen_and_tokens_only_grow() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("journal.db");
        let journal = Journal::open(&path).expect("opens");
        let token = journal.next_token("u-1").expect("reads");
        assert_eq!(token, 1);
        journal.begin(&row("m-1", token)).expect("writes");
        journal.record("m-1", Role::Source, Record::Fenced).expect("writes");
        drop(journal);
        let journal = Journal::open(&path).expect("opens again");
        let found = journal.session("m-1", Role::Source).expect("reads").expect("is there");
        assert_eq!((found.record, found.token), (Record::Fenced, 1));
        assert_eq!(journal.next_token("u-1").expect("reads"), 2);
        journal.begin(&row("m-0", 1)).expect("an older token is kept as a row");
        assert_eq!(journal.next_token("u-1").expect("reads"), 2, "and never lowers the newest");
        assert!(journal.begin(&row("m-1", 3)).is_err(), "a session begins once");
        assert!(journal.record("m-9", Role::Source, Record::Fenced).is_err());
        assert_eq!(found.manifest, [1, 2], "as long as it is open");
        journal.record("m-1", Role::Source, Record::Released).expect("writes");
        journal.record("m-1", Role::Source, Record::Released).expect("says the same again");
        let found = journal.session("m-1", Role::Source).expect("reads").expect("is there");
        assert_eq!((found.record, found.manifest.len()), (Record::Released, 0));
        assert!(journal.record("m-1", Role::Source, Record::RolledBack).is_err(), "final");
    }

    #[test]
    fn a_newer_or_damaged_journal_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("journal.db");
        Journal::open(&path).expect("opens");
        let database = Connection::open(&path).expect("opens");
        database.pragma_update(None, "user_version", TABLES + 1).expect("writes");
        drop(database);
        assert!(matches!(Journal::open(&path), Err(JournalError::Newer { .. })));
        std::fs::write(&path, b"this is not a database, and long enough to be read as one")
            .expect("writes");
        assert!(matches!(Journal::open(&path), Err(JournalError::Database { .. })));
    }
}
