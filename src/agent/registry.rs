//! The registry: which workloads are on this host, and in what state. SQLite with
//! `synchronous=FULL`: what it says survives the agent and the host. What is decided between two hosts
//! stands in the session journal, not here.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use decamp_shared::keeper::ExitRecord;
use decamp_shared::session::journal::boot_id;
use decamp_shared::workload::Kind;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::messages::{FileEntry, State, WorkloadView, now_ms};

/// Version of the tables; a registry of a newer one is refused.
const TABLES: i64 = 1;

/// What can go wrong with the registry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    /// The database said no.
    #[error("Cannot {what} the registry {}", path.display())]
    Database { what: &'static str, path: PathBuf, source: rusqlite::Error },
    /// Written by a newer decamp.
    #[error(
        "The registry {} has tables of version {found}; this decamp knows {TABLES}: install the \
         newer decamp again", path.display()
    )]
    Newer { path: PathBuf, found: i64 },
    /// The name is in use.
    #[error("The name {0} is taken")]
    Taken(String),
    /// There is no such workload.
    #[error("There is no workload {0} here")]
    Unknown(String),
}

/// Result of the registry's work.
pub(crate) type Result<T> = std::result::Result<T, RegistryError>;

/// One workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Workload {
    /// Unique on this host.
    pub(crate) name: String,
    /// The same on every host that it visits.
    pub(crate) uuid: String,
    /// Which backend it belongs to.
    pub(crate) kind: Kind,
    /// In the backend's own words, with this host's paths.
    pub(crate) spec: Value,
    /// On this host.
    pub(crate) state: State,
    /// When it was first run or arrived here, in milliseconds since 1970.
    pub(crate) created_ms: u64,
    /// When its state last changed, in milliseconds since 1970.
    pub(crate) changed_ms: u64,
    /// The host that it moved to, or is moving to.
    pub(crate) moved_to: Option<String>,
    /// The move that concerns it now, or the last one.
    pub(crate) migration: Option<String>,
    /// How it ended.
    pub(crate) exit: Option<ExitRecord>,
    /// Its files on this host.
    pub(crate) files: Vec<FileEntry>,
    /// The boot of this host in which it last ran or was being built.
    pub(crate) boot_id: String,
    /// What the entry was before the workload began to come back: restored when it does not.
    pub(crate) earlier: Option<Box<Workload>>,
}

impl Workload {
    /// An entry for a workload that begins to be here now.
    pub(crate) fn new(name: &str, uuid: &str, kind: Kind, spec: Value, state: State) -> Self {
        let now = now_ms();
        Self {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            kind,
            files: crate::backend::files_of(kind, &spec),
            spec,
            state,
            created_ms: now,
            changed_ms: now,
            moved_to: None,
            migration: None,
            exit: None,
            boot_id: boot_id(),
            earlier: None,
        }
    }

    /// As the API shows it.
    pub(crate) fn view(&self) -> WorkloadView {
        WorkloadView {
            name: self.name.clone(),
            uuid: self.uuid.clone(),
            kind: self.kind,
            state: self.state,
            created_ms: self.created_ms,
            changed_ms: self.changed_ms,
            moved_to: self.moved_to.clone(),
            migration: self.migration.clone(),
            exit: self.exit.clone(),
            files: self.files.clone(),
        }
    }

    /// It runs here now.
    pub(crate) fn becomes_running(&mut self) {
        self.state = State::Running;
        self.moved_to = None;
        self.exit = None;
        self.earlier = None;
        self.boot_id = boot_id();
    }

    /// It ended.
    pub(crate) fn becomes_stopped(&mut self, exit: ExitRecord) {
        self.state = State::Stopped;
        self.moved_to = None;
        self.exit = Some(exit);
    }

    /// It runs on `host` now; its files stay.
    pub(crate) fn becomes_moved(&mut self, host: &str) {
        self.state = State::Moved;
        self.moved_to = Some(host.to_owned());
        self.earlier = None;
    }
}

/// An open registry, shared by everything in the agent.
#[derive(Debug)]
pub(crate) struct Registry {
    path: PathBuf,
    database: Mutex<Connection>,
}

impl Registry {
    /// Opens the registry at `path`, making it when there is none.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or was written by a newer decamp.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed =
            |what| move |source| RegistryError::Database { what, path: path.to_owned(), source };
        let database = Connection::open(path).map_err(failed("open"))?;
        let found: i64 = database
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(failed("read"))?;
        if found > TABLES {
            return Err(RegistryError::Newer { path: path.to_owned(), found });
        }
        database
            .execute_batch(
                "PRAGMA journal_mode=WAL;
                 PRAGMA synchronous=FULL;
                 CREATE TABLE IF NOT EXISTS workloads (
                    name TEXT PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
                    spec TEXT NOT NULL, state TEXT NOT NULL, created_ms INTEGER NOT NULL,
                    changed_ms INTEGER NOT NULL, moved_to TEXT, migration TEXT, exit TEXT,
                    files TEXT NOT NULL, boot_id TEXT NOT NULL, earlier TEXT) STRICT;",
            )
            .map_err(failed("prepare"))?;
        database.pragma_update(None, "user_version", TABLES).map_err(failed("prepare"))?;
        Ok(Self { path: path.to_owned(), database: Mutex::new(database) })
    }

    /// Every workload, by name.
    pub(crate) fn list(&self) -> Result<Vec<Workload>> {
        let database = self.lock();
        let read = || -> rusqlite::Result<Vec<Workload>> {
            database
                .prepare("SELECT * FROM workloads ORDER BY name")?
                .query_map([], read_row)?
                .collect()
        };
        read().map_err(|error| self.failed("read", error))
    }

    /// The workload of that name.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Workload>> {
        find(&self.lock(), "name", name).map_err(|error| self.failed("read", error))
    }

    /// The workload of that identity.
    pub(crate) fn by_uuid(&self, uuid: &str) -> Result<Option<Workload>> {
        find(&self.lock(), "uuid", uuid).map_err(|error| self.failed("read", error))
    }

    /// Enters a workload. On disk when this returns.
    ///
    /// # Errors
    /// [`RegistryError::Taken`] when name or identity are in use.
    pub(crate) fn create(&self, workload: &Workload) -> Result<()> {
        match insert(&self.lock(), workload) {
            Err(rusqlite::Error::SqliteFailure(error, _))
                if error.code == rusqlite::ErrorCode::ConstraintViolation =>
            {
                Err(RegistryError::Taken(workload.name.clone()))
            }
            other => other.map_err(|error| self.failed("write", error)),
        }
    }

    /// Changes the entry of `name` and gives it as it is now. On disk when this returns.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`] when there is none.
    pub(crate) fn change(&self, name: &str, edit: impl FnOnce(&mut Workload)) -> Result<Workload> {
        let mut database = self.lock();
        let write = |change: Transaction<'_>| {
            let Some(mut workload) = find(&change, "name", name)? else { return Ok(None) };
            let before = workload.state;
            edit(&mut workload);
            if workload.state != before {
                workload.changed_ms = now_ms();
            }
            change.execute("DELETE FROM workloads WHERE name=?1", params![name])?;
            insert(&change, &workload)?;
            change.commit()?;
            Ok(Some(workload))
        };
        database
            .transaction()
            .and_then(write)
            .map_err(|error| self.failed("write", error))?
            .ok_or_else(|| RegistryError::Unknown(name.to_owned()))
    }

    /// Forgets a workload; it does not matter whether it was there.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        self.lock()
            .execute("DELETE FROM workloads WHERE name=?1", params![name])
            .map(|_| ())
            .map_err(|error| self.failed("write", error))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere leaves SQLite itself consistent.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &'static str, source: rusqlite::Error) -> RegistryError {
        RegistryError::Database { what, path: self.path.clone(), source }
    }
}

fn find(database: &Connection, column: &str, value: &str) -> rusqlite::Result<Option<Workload>> {
    database
        .query_row(&format!("SELECT * FROM workloads WHERE {column}=?1"), params![value], read_row)
        .optional()
}

fn insert(database: &Connection, workload: &Workload) -> rusqlite::Result<()> {
    let exit = workload.exit.as_ref().map(json).transpose()?;
    let earlier = workload.earlier.as_ref().map(json).transpose()?;
    database
        .execute(
            "INSERT INTO workloads VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13)",
            params![
                workload.name,
                workload.uuid,
                workload.kind.word(),
                json(&workload.spec)?,
                workload.state.word(),
                workload.created_ms as i64,
                workload.changed_ms as i64,
                workload.moved_to,
                workload.migration,
                exit,
                json(&workload.files)?,
                workload.boot_id,
                earlier,
            ],
        )
        .map(|_| ())
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<Workload> {
    let kind: String = row.get("kind")?;
    let state: String = row.get("state")?;
    let optional = |column: &str| row.get::<_, Option<String>>(column);
    Ok(Workload {
        name: row.get("name")?,
        uuid: row.get("uuid")?,
        kind: match kind.as_str() {
            "vm" => Kind::Vm,
            "container" => Kind::Container,
            _ => return Err(damaged(format!("there is no kind {kind}"))),
        },
        spec: parsed(&row.get::<_, String>("spec")?)?,
        state: State::from_word(&state)
            .ok_or_else(|| damaged(format!("there is no state {state}")))?,
        created_ms: row.get::<_, i64>("created_ms")? as u64,
        changed_ms: row.get::<_, i64>("changed_ms")? as u64,
        moved_to: row.get("moved_to")?,
        migration: row.get("migration")?,
        exit: optional("exit")?.map(|text| parsed(&text)).transpose()?,
        files: parsed(&row.get::<_, String>("files")?)?,
        boot_id: row.get("boot_id")?,
        earlier: optional("earlier")?.map(|text| parsed(&text)).transpose()?,
    })
}

fn json(value: &impl Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

fn parsed<T: serde::de::DeserializeOwned>(text: &str) -> rusqlite::Result<T> {
    serde_json::from_str(text).map_err(|error| damaged(error.to_string()))
}

fn damaged(what: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn open() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(&dir.path().join("registry.db")).expect("opens");
        (dir, registry)
    }

    fn web() -> Workload {
        let spec = json!({"kernel": "/srv/guest.elf", "cpus": 1});
        Workload::new("web", "u-1", Kind::Vm, spec, State::Starting)
    }

    #[test]
    fn entries_survive_a_restart() {
        let (dir, registry) = open();
        let mut web = web();
        web.earlier = Some(Box::new(web.clone()));
        web.exit = Some(ExitRecord { status: 137, text: "killed by SIGKILL".into() });
        registry.create(&web).expect("entered");
        drop(registry);
        let registry = Registry::open(&dir.path().join("registry.db")).expect("opens again");
        assert_eq!(registry.get("web").expect("reads"), Some(web.clone()));
        assert_eq!(registry.by_uuid("u-1").expect("reads"), Some(web.clone()));
        assert_eq!(registry.list().expect("reads"), [web]);
        assert_eq!(registry.get("other").expect("reads"), None);
    }

    #[test]
    fn names_and_identities_are_taken_once() {
        let (_dir, registry) = open();
        registry.create(&web()).expect("entered");
        assert!(matches!(registry.create(&web()), Err(RegistryError::Taken(_))));
        let other = Workload { name: "other".into(), ..web() };
        assert!(matches!(registry.create(&other), Err(RegistryError::Taken(_))));
        registry.remove("web").expect("removed");
        registry.create(&other).expect("free again");
    }

    #[test]
    fn a_change_of_state_is_dated() {
        let (_dir, registry) = open();
        registry.create(&Workload { changed_ms: 1, ..web() }).expect("entered");
        let same = registry.change("web", |web| web.migration = Some("m".into())).expect("written");
        assert_eq!(same.changed_ms, 1);
        let moved = registry.change("web", |web| web.becomes_moved("beta")).expect("written");
        assert!(moved.changed_ms > 1);
        assert_eq!((moved.state, moved.moved_to.as_deref()), (State::Moved, Some("beta")));
        let unknown = registry.change("other", |_| {});
        assert!(matches!(unknown, Err(RegistryError::Unknown(_))));
    }

    #[test]
    fn a_newer_or_damaged_registry_is_refused() {
        let (dir, registry) = open();
        let path = dir.path().join("registry.db");
        registry.create(&web()).expect("entered");
        registry.lock().execute("UPDATE workloads SET state='dancing'", []).expect("written");
        assert!(matches!(registry.list(), Err(RegistryError::Database { .. })));
        registry.lock().pragma_update(None, "user_version", TABLES + 1).expect("written");
        drop(registry);
        assert!(matches!(Registry::open(&path), Err(RegistryError::Newer { .. })));
        std::fs::write(&path, b"not a database, but long enough to be read as one")
            .expect("written");
        assert!(matches!(Registry::open(&path), Err(RegistryError::Database { .. })));
    }
}
