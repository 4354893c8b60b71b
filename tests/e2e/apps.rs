//! A whole application, there and back under load with its clients connected, and by its own word unharmed:
//! PostgreSQL under pgbench. Redis has a room of its own; `tests/bench container-apps` moves others, and more
//! often.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::hosts::{ALPHA, BETA, CLIENT, Hosts, hosts, other};
use crate::running::{Pending, run, until};
use crate::{Needs, Test};

/// What is awaited happens within this, on however slow a machine.
const SOON: Duration = Duration::from_secs(180);
const NAME: &str = "ledger";
const ADDRESS: &str = "10.77.1.70";
/// What pgbench's transactions leave equal.
const SUMS: &str = "select count(distinct total) from (\
    select sum(abalance) as total from pgbench_accounts union all \
    select sum(bbalance) from pgbench_branches union all \
    select sum(tbalance) from pgbench_tellers union all \
    select sum(delta) from pgbench_history) as sums";
/// Every index of the tables against its table (amcheck).
const INDEXES: &str = "create extension if not exists amcheck; \
    select count(*) > 2 from (select bt_index_parent_check(index.oid, true) from pg_class index \
    where relkind = 'i' and relnamespace = 'public'::regnamespace) as checked";

pub(crate) fn tests() -> Vec<Test> {
    vec![Test::new("apps::postgres", Needs::Postgres, postgres)]
}

/// One connection, and what it answers.
struct Session {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Session {
    fn open() -> Self {
        let mut child = client("psql", &["-AtqX", "-v", "ON_ERROR_STOP=1", "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("psql");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let (said, lines) = channel();
        std::thread::spawn(move || {
            output.map_while(Result::ok).all(|line| said.send(line).is_ok());
        });
        Self { child, input, lines }
    }

    /// What one query gives, in one line.
    #[track_caller]
    fn ask(&mut self, query: &str) -> String {
        writeln!(self.input, "{query};").expect("psql listens");
        self.lines.recv_timeout(SOON).expect("PostgreSQL answers on this connection")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of PostgreSQL's in the clients' network.
fn client(program: &str, words: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", CLIENT, program, "-h", ADDRESS, "-U", "postgres"]).args(words);
    command
}

/// Two moves under load. A session keeps its process and what only it knows; no transaction fails; and then sums,
/// indexes and, on the disk, the checksums of all pages are right.
fn postgres() {
    let hosts = hosts();
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/postgres-bundle");
    let bundle = format!("/srv/{NAME}");
    hosts.exec(ALPHA, &[maker, &bundle, "-c", "shared_buffers=32MB"]).expect(0);
    let net = format!("bridge=br0,ip={ADDRESS}/16");
    let words = ["run", "container", NAME, "--bundle", &bundle, "--net", &net];
    hosts.decamp(ALPHA, &words).expect(0);
    until("PostgreSQL to listen", SOON, || {
        run(&mut client("psql", &["-c", "select 1", "postgres"]), SOON).code == Some(0)
    });
    run(&mut client("pgbench", &["-i", "-q", "-s", "1", "postgres"]), SOON).expect(0);
    let mut session = Session::open();
    let process = session.ask("select pg_backend_pid()");
    let set = "create temporary table own as select 4711 as number; select number from own";
    assert_eq!(session.ask(set), "4711");
    let load = ["--no-vacuum", "-c", "4", "-j", "2", "-T", "3600", "postgres"];
    let mut load = Pending::start(&mut client("pgbench", &load));
    let mut from = ALPHA;
    for _ in 0..2 {
        until_served(&mut session);
        hosts.decamp(from, &["migrate", NAME, "--to", other(from)]).expect(0);
        from = other(from);
        assert_eq!(session.ask("select pg_backend_pid()"), process);
        assert_eq!(session.ask("select number from own"), "4711");
        until_served(&mut session);
        assert!(!load.has_ended(), "{}", load.ended(SOON));
    }
    load.interrupt();
    // It says nothing then, and before that only what went wrong.
    let said = load.ended(SOON).stderr.to_lowercase();
    assert!(!["error", "aborted", "fatal"].iter().any(|word| said.contains(word)), "{said}");
    assert_eq!(session.ask(SUMS), "1");
    assert_eq!(session.ask(INDEXES), "t");
    drop(session);
    assert_eq!(from, ALPHA);
    hosts.decamp(ALPHA, &["stop", NAME]).expect(0);
    check_pages(hosts);
    for host in [ALPHA, BETA] {
        hosts.decamp(host, &["rm", NAME, "--yes", "--keep-files"]);
        hosts.exec(host, &["rm", "-rf", &bundle]).expect(0);
    }
}

/// Waits until transactions of the load come through.
#[track_caller]
fn until_served(session: &mut Session) {
    let history = "select count(*) from pgbench_history";
    let before = session.ask(history);
    until("transactions to go on", SOON, || session.ask(history) != before);
}

/// The checksum of every page in the files. A server that was killed has to have been brought to order first.
fn check_pages(hosts: &Hosts) {
    let line = format!(
        "cd / && tools=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1) && \
         data=/srv/{NAME}/rootfs/var/lib/postgresql/data && \
         as='setpriv --reuid postgres --regid postgres --clear-groups' && \
         {{ echo checkpoint | $as $tools/postgres --single -D $data postgres >/dev/null; }} && \
         $as $tools/pg_checksums --check -D $data"
    );
    let said = hosts.exec(ALPHA, &["bash", "-c", &line]).expect(0).stdout;
    assert!(said.contains("Bad checksums:  0"), "{said}");
}
