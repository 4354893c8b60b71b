//! How long the tail's scan takes; run by hand: `cargo test -p decamp-shared tail_scan -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::trees::Room;
use super::*;

#[test]
#[ignore = "a measurement"]
fn tail_scan_of_unchanged_files() {
    for files in [5_000_u64, 20_000] {
        let room = Room::new();
        for number in 0..files {
            let path = format!("source/usr/lib/dir{}/file{number}", number % (files / 20));
            room.write(&path, &noise(number, 300 + number as usize % 3000));
        }
        settle();
        let tree = bundle(&room.path("source"));
        let landing = Landing::new();
        stream(vec![incoming(&tree, &room.path("destination"), false)], &landing, |sender| {
            let begun = Instant::now();
            sender.send(&tree)?;
            println!("{files} files: first pass {:?}", begun.elapsed());
            for _ in 0..3 {
                let (begun, cpu) = (Instant::now(), thread_cpu());
                sender.send_changes(&tree)?;
                let cpu = thread_cpu() - cpu;
                println!(
                    "{files} files: unchanged tail {:?}, {cpu:?} of it on the CPU",
                    begun.elapsed()
                );
            }
            room.write("source/usr/lib/dir1/log", b"one line more");
            let begun = Instant::now();
            sender.send_changes(&tree)?;
            println!("{files} files: tail with one new file {:?}", begun.elapsed());
            Ok(())
        })
        .well();
        landing.keep();
        let back = bundle(&room.path("destination"));
        let begun = Instant::now();
        stream(vec![incoming(&back, &room.path("source"), true)], &Landing::new(), |sender| {
            sender.send(&back)
        })
        .well();
        println!("{files} files: way back, nothing changed {:?}", begun.elapsed());
    }
}

#[test]
#[ignore = "a measurement"]
fn way_back_of_a_bundle() {
    // 17 MiB in 500 files, as a small root file system, and one large file.
    let room = Room::new();
    for number in 0..500 {
        room.write(&format!("source/usr/lib/{number}"), &noise(number, 17 << 20 >> 10 << 1));
    }
    room.write("source/large", &noise(1000, 256 << 20));
    for (what, bytes) in [("17 MiB and 256 MiB", 0), ("17 MiB", 1)] {
        if bytes == 1 {
            std::fs::remove_file(room.path("source/large")).expect("removed");
        }
        let tree = bundle(&room.path("source"));
        for _ in 0..4 {
            let landing = Landing::new();
            let begun = Instant::now();
            let to = incoming(&tree, &room.path("destination"), true);
            let counters = stream(vec![to], &landing, |sender| sender.send(&tree)).well();
            println!("{what}: {:?}, {} bytes sent", begun.elapsed(), sent_bytes(&counters));
            landing.keep();
        }
    }
}

/// Processor time of this thread: what a measurement means on a machine that does other things too.
fn thread_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock").into()
}
