//! `kaa doctor`: what it says about Modal.

use tonic::Code;

use crate::Cloud;
use crate::cloud::Fault;
use crate::program::text;

const NONE_REACHED: &str = "missing  backend modal   see above\n";

/// What the doctor says; it isn't well only when wasm isn't.
fn says(cloud: &Cloud, words: &str, parts: &[&str]) {
    let words = format!("doctor --docker-host unix:///none --python python3 {words}");
    let output = cloud.place.run(&words, &[], "");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{words}: {stdout}{stderr}");
    for part in parts {
        assert!(stdout.contains(part), "{part:?} is not in {words}:\n{stdout}");
    }
    let table = "can      modal           yes       no    no        ";
    assert!(stdout.contains(table), "{words}:\n{stdout}");
}

#[test]
fn a_token_that_is_taken_is_enough() {
    let cloud = Cloud::new();
    says(
        &cloud,
        "",
        &[
            "ok       modal token     of MODAL_TOKEN_ID and MODAL_TOKEN_SECRET\n",
            "ok       modal server    it takes the token\n",
            "ok       backend modal   reached; no sandbox was made, which costs money: --modal-sandbox",
            "no        with dill  no\n",
        ],
    );
    assert!(cloud.stand_in.sandboxes().is_empty());
}

#[test]
fn the_profile_is_named_that_the_token_is_of() {
    let mut cloud = Cloud::new();
    let url = cloud.stand_in.url();
    cloud.place.variables.clear();
    cloud.place.set("MODAL_CONFIG_PATH", "modal.toml");
    let file = format!(
        "[work]\ntoken_id = \"{}\"\ntoken_secret = \"{}\"\nserver_url = \"{url}\"\n[home]\nactive = true\n",
        crate::TOKEN,
        crate::SECRET
    );
    cloud.place.write("modal.toml", &file);
    says(
        &cloud,
        "",
        &[
            "missing  modal token     Modal is not available: there is no token: ",
            "the profile `home` of modal.toml has none",
            NONE_REACHED,
        ],
    );
    cloud.place.set("MODAL_PROFILE", "work");
    says(
        &cloud,
        "",
        &["ok       modal token     of the profile `work` in modal.toml\n", "it takes the token"],
    );
}

#[test]
fn a_sandbox_is_made_only_when_that_is_wanted_and_ended() {
    let cloud = Cloud::new();
    says(
        &cloud,
        "--modal-sandbox",
        &[
            "ok       modal python    cpython 3.",
            "note     modal dill      not installed: sessions can't be saved or forked; --modal-pip dill\n",
            "ok       backend modal   ready\n",
            "dill: no",
        ],
    );
    assert_eq!(cloud.all_ended("doctor --modal-sandbox"), 1);
    says(
        &cloud,
        "--modal-sandbox --modal-image no-such-image",
        &[
            "missing  modal python    ",
            "its build failed",
            "manifest for no-such-image not found",
            NONE_REACHED,
        ],
    );
    cloud.stand_in.fault("SandboxCreateV2", Fault::Before(Code::ResourceExhausted));
    says(
        &cloud,
        "--modal-sandbox",
        &["missing  modal python    ", "over one of its limits", NONE_REACHED],
    );
    assert_eq!(cloud.all_ended("doctor --modal-sandbox"), 1);
}

#[test]
fn what_is_missing_is_a_finding_and_no_failure() {
    for (variable, value, parts) in [
        (
            "MODAL_TOKEN_SECRET",
            "as-hunter3",
            &[
                "missing  modal server    Modal is not available: it refused the token `ak-public-half`",
                NONE_REACHED,
            ][..],
        ),
        (
            "MODAL_SERVER_URL",
            "http://127.0.0.1:1",
            &[
                "missing  modal server    Modal is not available: it can't be reached: ",
                "look at the network and MODAL_SERVER_URL",
                NONE_REACHED,
            ],
        ),
        (
            "MODAL_SERVER_URL",
            "http://modal.example",
            &[
                "missing  modal token     MODAL_SERVER_URL",
                "only taken for localhost",
                NONE_REACHED,
            ],
        ),
        (
            "MODAL_TOKEN_ID",
            "",
            &[
                "missing  modal token     MODAL_TOKEN_SECRET",
                "its id is missing: set MODAL_TOKEN_ID",
                NONE_REACHED,
            ],
        ),
    ] {
        let mut cloud = Cloud::new();
        cloud.place.set(variable, value);
        cloud.place.hidden.push("as-hunter3".into());
        says(&cloud, "", parts);
        assert!(cloud.stand_in.sandboxes().is_empty());
    }
}

#[test]
fn flags_that_can_not_be_are_refused_here_too() {
    let cloud = Cloud::new();
    let output = cloud.place.run("doctor --docker-host unix:///none --modal-timeout 1s", &[], "");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--modal-timeout: must be 10 s to 24 h"), "{stderr}");
}
