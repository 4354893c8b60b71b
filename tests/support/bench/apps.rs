//! Scenario `container-apps`: real applications moved there and back under load, each watched by a
//! client that checks every answer on one connection, and asked at the end whether all is consistent.
//!
//! There is no peer here and no target: a check that fails ends the benchmark, and the numbers are
//! the gaps that the client saw. Which checks an application has is in [`cases`].

mod cases;
mod observer;
mod postgres;
mod talks;
mod work;

use std::thread::sleep;
use std::time::Duration;

use crate::decamp::Decamp;
use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, Hosts, SOURCE, done};
use crate::load::OtherWork;
use crate::row::Row;
use crate::{Bench, ms, tell};
pub(crate) use cases::{ALL, App};
use observer::Observer;

/// Where the application is, on the workloads' network.
const ADDRESS: &str = "10.77.1.40";
/// How long client and load work on after a move before the gap is read.
const WATCH: Duration = Duration::from_secs(1);

/// All rows.
pub(crate) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let hosts = Hosts::up(&bench.work, &bench.root, true)?;
    let chosen = |app: &&App| bench.app.is_none_or(|only| only.name == app.name);
    ALL.iter().filter(chosen).map(|app| measure(bench, &hosts, app)).collect()
}

/// The names of all applications, for people.
pub(crate) fn names() -> String {
    ALL.each_ref().map(|app| app.name).join(", ")
}

/// Moves one application there and back, as often as there are to be pairs.
fn measure(bench: &Bench, hosts: &Hosts, app: &App) -> Result<Row> {
    let failed = |error| BenchError::App { app: app.name, source: Box::new(error) };
    let mut other = OtherWork::default();
    let gaps = moves(bench, hosts, app, &mut other).map_err(failed)?;
    let note = format!(
        "The longest that the checking client, on one connection, waited for an answer over each of \
         {} moves, every second one back; nothing was lost or changed: {}. {}",
        gaps.len(),
        app.checked,
        other.text()
    );
    Row::without_target(("container-apps", app.metric, "ms"), &gaps, note)
        .ok_or_else(|| BenchError::wrong("There are no moves to tell of"))
}

fn moves(bench: &Bench, hosts: &Hosts, app: &App, other: &mut OtherWork) -> Result<Vec<f64>> {
    let directory = format!("/srv/{}", app.name);
    let fixture = bench.root.join("tests/fixtures").join(app.fixture);
    done(hosts.command(SOURCE, &fixture.display().to_string()).arg(&directory))?;
    let net = format!("bridge=br0,ip={ADDRESS}/16");
    let (mut here, mut there) = (SOURCE, DESTINATION);
    Decamp::at(hosts, here)?.verb(&[
        "run",
        "container",
        app.name,
        "--bundle",
        &directory,
        "--net",
        &net,
    ])?;
    let bundle = |host: &str| hosts.srv(host).join(app.name);
    crate::redis::forget_neighbours()?;
    let mut case = (app.case)(&bundle(here))?;
    let mut observer = Observer::start((ADDRESS, app.port), case.talk())?;
    case.begin()?;
    let mut gaps = Vec::new();
    for number in 1..=2 * bench.pairs {
        observer.gap()?;
        let before = hosts.mark()?;
        let moved = Decamp::at(hosts, here)?.migrate(app.name, there)?;
        other.add(&before, &hosts.mark()?);
        bench.keep_report("container-apps", &moved.report);
        sleep(WATCH);
        gaps.push(ms(observer.gap()?));
        tell(format_args!(
            "container-apps, {}, move {number}: {:.0} ms, gap {:.0} ms",
            app.name,
            ms(moved.wall),
            gaps[gaps.len() - 1]
        ));
        Decamp::at(hosts, here)?.verb(&["rm", app.name, "--yes"])?;
        hosts.clear_srv(here)?;
        (here, there) = (there, here);
    }
    case.end()?;
    observer.stop()?;
    case.check()?;
    Decamp::at(hosts, here)?.verb(&["stop", app.name])?;
    case.check_files(&bundle(here))?;
    Decamp::at(hosts, here)?.verb(&["rm", app.name, "--yes"])?;
    hosts.clear_srv(here)?;
    Ok(gaps)
}
