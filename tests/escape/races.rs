//! Races for a path: while it is looked at it becomes a link that leads out.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kaa::{EnvironmentOptions, Limits};
use serde_json::Value as Json;

use super::bait::{Bait, MARK};
use super::common::{open, print, run};

/// Goes through `/output/flip` in every way for two seconds, and counts what it meets.
const THROUGH: &str = r"
import errno, json, os, time
met = {'inside': 0, 'refused': 0, 'bait': 0, 'other': 0}
def attempt(function):
    try:
        found = function()
    except OSError as error:
        # A link that leads out is refused by these; other errors, such as that it isn't there, are of the race.
        met['refused' if error.errno in (errno.EPERM, errno.EXDEV, errno.EACCES) else 'other'] += 1
    else:
        text = repr(found)
        met['bait' if MARK in text or 'bait-only' in text else 'inside'] += 1
def write(path, flags):
    fd = os.open(path, flags | os.O_WRONLY)
    try: os.write(fd, b'guest was here')
    finally: os.close(fd)
end = time.monotonic() + 2
while time.monotonic() < end:
    attempt(lambda: open('/output/flip/secret').read())
    attempt(lambda: os.listdir('/output/flip'))
    attempt(lambda: write('/output/flip/made', os.O_CREAT))
    attempt(lambda: write('/output/flip/secret', 0))
    attempt(lambda: os.stat('/output/flip/secret').st_size == 999)
    attempt(lambda: os.utime('/output/flip/secret', (1, 1)))
    attempt(lambda: os.truncate('/output/flip/secret', 3))
    attempt(lambda: os.mkdir('/output/flip/dir'))
    attempt(lambda: os.rmdir('/output/flip/dir'))
    attempt(lambda: os.symlink('x', '/output/flip/link'))
    attempt(lambda: os.unlink('/output/flip/link'))
    attempt(lambda: os.rename('/output/flip/made', '/output/flip/renamed'))
    attempt(lambda: os.link('/output/flip/secret', '/output/got'))
    attempt(lambda: os.unlink('/output/got'))
    attempt(lambda: os.unlink('/output/flip/renamed'))
print(json.dumps(met))";

/// Bait with a name of its own in it, and a directory to flip with.
fn place() -> Bait {
    let bait = Bait::new();
    fs::write(bait.at("bait/bait-only"), MARK).unwrap();
    fs::create_dir(bait.at("write/flip")).unwrap();
    fs::write(bait.at("write/flip/secret"), "inside").unwrap();
    bait
}

/// With a disk that doesn't fill up meanwhile: what is made in a mount counts for good.
fn options(bait: &Bait) -> EnvironmentOptions {
    let limits = Limits { wall: Duration::from_secs(60), disk_bytes: 1 << 40, ..Limits::default() };
    EnvironmentOptions { limits, ..bait.options() }
}

fn check(met: &str, what: &str) {
    let met: Json = serde_json::from_str(met).unwrap();
    let count = |key: &str| met[key].as_u64().unwrap();
    assert_eq!(count("bait"), 0, "{what}: {met}");
    // Both kinds were met, or there was no race.
    assert!(count("inside") > 100 && count("refused") > 100, "{what}: {met}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_turns_into_a_link_leads_nowhere() {
    let bait = place();
    let before = bait.untouchable();
    let stop = Arc::new(AtomicBool::new(false));
    let flipper = std::thread::spawn({
        let (stop, write) = (Arc::clone(&stop), bait.at("write"));
        move || {
            let (flip, parked) = (write.join("flip"), write.join("parked"));
            let mut flips = 0;
            while !stop.load(Ordering::Acquire) {
                fs::rename(&flip, &parked).unwrap();
                symlink("../bait", &flip).unwrap();
                std::thread::yield_now();
                fs::remove_file(&flip).unwrap();
                fs::rename(&parked, &flip).unwrap();
                flips += 1;
                // As long one way as the other, about.
                std::thread::sleep(Duration::from_micros(flips % 7 * 20));
            }
            flips
        }
    });
    let mut session = open(options(&bait));
    let met = print(&mut session, &format!("MARK = '{MARK}'\n{THROUGH}")).await;
    stop.store(true, Ordering::Release);
    let flips = flipper.join().unwrap();
    check(&met, &format!("{flips} flips by the host"));
    assert!(bait.untouchable() == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sessions_with_one_mount_do_not_help_each_other_out() {
    let bait = place();
    let before = bait.untouchable();
    let options = options(&bait);
    let (mut one, mut other) = (open(options.clone()), open(options));
    let flips = r"
import os, time
end, flips = time.monotonic() + 2.2, 0
while time.monotonic() < end:
    os.rename('/output/flip', '/output/parked')
    os.symlink('../bait', '/output/flip')
    for _ in range(flips % 5 * 100): pass
    os.unlink('/output/flip')
    os.rename('/output/parked', '/output/flip')
    for _ in range(flips % 7 * 100): pass
    flips += 1
print(flips)";
    let through = format!("MARK = '{MARK}'\n{THROUGH}");
    let (flips, met) = tokio::join!(
        tokio::spawn(async move { print(&mut one, flips).await }),
        tokio::spawn(async move {
            run(&mut other, "pass").await;
            print(&mut other, &through).await
        })
    );
    check(&met.unwrap(), &format!("{} flips by a session", flips.unwrap().trim()));
    assert!(bait.untouchable() == before);
}
