//! `kaa bench isolation` over sandboxes, which cost money.

use std::time::Duration;

use crate::cloud::Fault;
use crate::program::text;
use crate::run::send;
use crate::{Cloud, wait_for};

#[test]
fn sandboxes_are_measured_when_they_are_named_and_none_is_left() {
    let cloud = Cloud::new();
    let words = "bench isolation --laps 1 --workloads session,memory --backends modal";
    let output = cloud.place.run(words, &[], "");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    let has = |part: &str| assert!(stdout.contains(part), "{part:?} is not in {stdout}");
    has("| `modal` | `python3` in a sandbox of Modal, app `kaa` | 3.");
    has("| new session to its first cell | ");
    has("- `modal` at `memory`: its memory is on another machine\n");
    assert!(cloud.all_ended("the benchmark") >= 3);
}

/// What is measured when the signal comes: a session that runs, or one whose sandbox is being made.
#[test]
fn a_signal_ends_the_sandboxes_of_a_benchmark() {
    let cloud = Cloud::new();
    let words = "bench isolation --workloads session,batch --backends modal";
    for (signal, code, is_made) in [("INT", 130, true), ("TERM", 143, true), ("INT", 130, false)] {
        let before = cloud.stand_in.sandboxes().len();
        if !is_made {
            cloud.stand_in.fault("TaskExecStart", Fault::Delay(Duration::from_secs(1)));
        }
        let child = cloud.place.spawn(words, &[]);
        if is_made {
            // Past the look at what the backend is, so that samples are being taken.
            wait_for("sandboxes", || (cloud.stand_in.sandboxes().len() > before + 3).then_some(()));
            cloud.begun();
        } else {
            wait_for("sandbox", || (!cloud.running().is_empty()).then_some(()));
        }
        send(&child, signal);
        let output = cloud.place.ended(child);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{signal}: {stdout}{stderr}");
        assert_eq!(stdout, "", "{signal}: {stderr}");
        assert!(cloud.all_ended(signal) > before, "{signal}: {stderr}");
    }
}
