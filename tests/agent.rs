//! The guest agent's own tests, on the host's Python: `python3 -m unittest discover -s tests/guest`.

use std::process::Command;

#[test]
fn the_agent_passes_its_tests_on_the_hosts_python() {
    let output = Command::new("python3")
        .args(["-m", "unittest", "discover", "-s", "tests/guest"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("python3 can be started: the guest's wheel comes by pip");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    assert!(words.contains("\nOK"), "{words}");
    assert!(!words.contains("Ran 0 tests"), "{words}");
}
