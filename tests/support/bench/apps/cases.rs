//! The applications: how each is started, talked to, loaded, and asked whether it is consistent. How
//! they are moved is known elsewhere.

use std::path::Path;

use super::postgres::{self, Postgres};
use super::talks::{Files, Lines, Memcached, Talk};
use super::work::Work;
use crate::error::{BenchError, Result};

/// An application.
pub(crate) struct App {
    /// Its name, and that of its container.
    pub(crate) name: &'static str,
    /// The row's metric.
    pub(crate) metric: &'static str,
    /// What makes its bundle.
    pub(crate) fixture: &'static str,
    /// Where it listens.
    pub(crate) port: u16,
    /// Its checks in words.
    pub(crate) checked: &'static str,
    /// Gets ready for its bundle, which is not running yet or has just been started.
    pub(crate) case: fn(&Path) -> Result<Box<dyn Case>>,
}

/// An application that runs.
pub(crate) trait Case {
    /// The checking client's words.
    fn talk(&mut self) -> Box<dyn Talk>;
    /// Puts load on it, once the client is connected.
    fn begin(&mut self) -> Result<()>;
    /// Takes the load off; an error if it met any.
    fn end(&mut self) -> Result<()>;
    /// Asks for its consistency while it runs.
    fn check(&mut self) -> Result<()>;
    /// Looks at the files that it left when it was stopped.
    fn check_files(&mut self, bundle: &Path) -> Result<()>;
}

/// All of them.
pub(crate) static ALL: [App; 5] = [
    App {
        name: "postgres",
        metric: "postgres_gap",
        fixture: "postgres-bundle",
        port: postgres::PORT,
        checked: "a counter that the client raised and read, sums of pgbench's balances under its load, \
                  pg_amcheck with indexes against their tables, checksums of all blocks after a clean stop",
        case: |_| Ok(Box::new(Postgres::default())),
    },
    App {
        name: "nginx",
        metric: "nginx_gap",
        fixture: "nginx-bundle",
        port: 80,
        checked: "every byte of every file that the client fetched, and under wrk's load no request failed",
        case: |bundle| {
            Ok(Box::new(Nginx { files: Files::of(&bundle.join("rootfs/data"))?, wrk: None }))
        },
    },
    App {
        name: "memcached",
        metric: "memcached_gap",
        fixture: "memcached-bundle",
        port: 11211,
        checked: "64 MiB of values and those that the client wrote over and over, all read again at the end",
        case: |_| Ok(Box::new(Alone(|| Box::new(Memcached::new())))),
    },
    App {
        name: "python",
        metric: "python_gap",
        fixture: "python-bundle",
        port: 7000,
        checked: "the program's own checks of threads, locks, files, sockets, pipes, memory and clock",
        case: |_| Ok(Box::new(Alone(|| Box::new(Lines::new())))),
    },
    App {
        name: "node",
        metric: "node_gap",
        fixture: "node-bundle",
        port: 7000,
        checked: "the program's own checks of workers, shared memory, files, sockets, heap and timers",
        case: |_| Ok(Box::new(Alone(|| Box::new(Lines::new())))),
    },
];

/// An application whose load is its own, or the client's, and whose client notices all.
struct Alone(fn() -> Box<dyn Talk>);

impl Case for Alone {
    fn talk(&mut self) -> Box<dyn Talk> {
        (self.0)()
    }

    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    fn check_files(&mut self, _bundle: &Path) -> Result<()> {
        Ok(())
    }
}

/// nginx under wrk.
struct Nginx {
    files: Files,
    wrk: Option<Work>,
}

impl Case for Nginx {
    fn talk(&mut self) -> Box<dyn Talk> {
        Box::new(self.files.clone())
    }

    fn begin(&mut self) -> Result<()> {
        let url = format!("http://{}/file-3", super::ADDRESS);
        let words = ["-t", "2", "-c", "8", "-d", "1h", "--timeout", "60s", &url];
        self.wrk = Some(Work::start("wrk", &words)?);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let wrk = self.wrk.take().ok_or_else(|| BenchError::wrong("There is no wrk to end"))?;
        let said = wrk.interrupt()?;
        let requests =
            said.lines().find_map(|line| line.split_once(" requests in ")?.0.trim().parse().ok());
        let complains =
            ["Socket errors", "Non-2xx", "unable"].iter().any(|word| said.contains(word));
        match requests {
            Some(1u64..) if !complains => Ok(()),
            _ => Err(BenchError::wrong(format!("Requests of wrk failed: {said}"))),
        }
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    fn check_files(&mut self, bundle: &Path) -> Result<()> {
        let now = Files::of(&bundle.join("rootfs/data"))?;
        if now == self.files {
            Ok(())
        } else {
            Err(BenchError::wrong("The files of nginx are not what they were"))
        }
    }
}
