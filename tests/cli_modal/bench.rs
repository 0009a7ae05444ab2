//! `kaa bench isolation` over sandboxes, which cost money.

use crate::Cloud;
use crate::program::text;

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
