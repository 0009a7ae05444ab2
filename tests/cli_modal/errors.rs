//! What is wrong is said in a sentence on stderr, with what to do about it, and nothing is made.

use tonic::Code;

use crate::Cloud;
use crate::cloud::Fault;
use crate::program::{fails, text};

/// What every command that needs Modal says when it can't have it.
fn refused(cloud: &Cloud, code: i32, parts: &[&str]) {
    for words in [
        "run -c 1",
        "repl",
        "complete question --lm-script rules.json",
        "modal list",
        "modal clean --all",
    ] {
        cloud.place.check(&[fails(words, &[], code, parts)]);
    }
    assert!(cloud.stand_in.sandboxes().is_empty());
}

#[test]
fn credentials_that_can_not_be_used_are_named_with_their_place() {
    let secret = crate::SECRET;
    let whole = format!("[default]\ntoken_id = \"ak-1\"\ntoken_secret = \"{secret}\"");
    let two = format!("[a]\ntoken_id = \"ak-1\"\ntoken_secret = \"{secret}\"\n[b]\n");
    for (variables, file, code, parts) in [
        (
            &[][..],
            None,
            125,
            &[
                "kaa: Modal is not available: there is no token: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set, and there is no file modal.toml",
                "`modal token new`",
            ][..],
        ),
        (
            &[],
            Some(format!("[default]\ntoken_secret = \"{secret}")),
            2,
            &["kaa: modal.toml: line 2 is not TOML: "],
        ),
        (
            &[],
            Some(format!("token_secret = \"{secret}\"")),
            2,
            &["kaa: modal.toml: `token_secret` is in no profile"],
        ),
        (
            &[],
            Some(format!("[default]\ntoken_secret = [\"{secret}\"]\n")),
            2,
            &[
                "kaa: token_secret of the profile `default` in modal.toml: it must be a text in quotes",
            ],
        ),
        (
            &[],
            Some(format!("[default]\ntoken_secret = \"{secret}\"\n")),
            2,
            &[
                "its id is missing: set MODAL_TOKEN_ID, or write token_id of the profile `default` in modal.toml",
            ],
        ),
        (&[], Some("[default]\n".into()), 125, &["the profile `default` of modal.toml has none"]),
        (&[], Some(two.clone()), 2, &["kaa: modal.toml: no profile is active, of `a`, `b`"]),
        (
            &[("MODAL_PROFILE", "c")],
            Some(two),
            2,
            &["kaa: MODAL_PROFILE: modal.toml has no profile `c`, but `a`, `b`"],
        ),
        (
            &[("MODAL_TOKEN_ID", "ak-1")],
            None,
            2,
            &[
                "kaa: MODAL_TOKEN_ID: it is the id of a token, and its secret is missing: set MODAL_TOKEN_SECRET",
            ],
        ),
        (
            &[("MODAL_TOKEN_ID", "ak-1"), ("MODAL_TOKEN_SECRET", "as-hunter2\u{e9}")],
            None,
            2,
            &["kaa: MODAL_TOKEN_SECRET: it has characters that no token has"],
        ),
        (
            &[("KAA_MODAL_ROOTS", "none.pem")],
            Some(whole.clone()),
            2,
            &["kaa: KAA_MODAL_ROOTS: none.pem is no file"],
        ),
        (
            &[("MODAL_SERVER_URL", "http://modal.example")],
            Some(whole.clone()),
            2,
            &["kaa: MODAL_SERVER_URL: \"http://modal.example\": http:// would show the token"],
        ),
        (
            &[("MODAL_MAX_THROTTLE_WAIT", "soon")],
            Some(whole),
            2,
            &["kaa: MODAL_MAX_THROTTLE_WAIT: \"soon\" is no whole number of seconds"],
        ),
    ] {
        let mut cloud = Cloud::new();
        cloud.place.write("rules.json", r#"{"rules": [], "default": {"response": "FINAL(1)"}}"#);
        cloud.place.variables.clear();
        cloud.place.set("MODAL_CONFIG_PATH", "modal.toml");
        for (name, value) in variables {
            cloud.place.set(name, *value);
        }
        if let Some(file) = file {
            cloud.place.write("modal.toml", &file);
        }
        refused(&cloud, code, parts);
    }
}

#[test]
fn a_server_that_refuses_or_is_not_there_is_named() {
    for (variable, value, parts) in [
        (
            "MODAL_TOKEN_SECRET",
            "as-hunter3",
            &[
                "kaa: Modal is not available: it refused the token `ak-public-half`",
                "modal token new",
                "MODAL_PROFILE",
            ][..],
        ),
        (
            "MODAL_SERVER_URL",
            "http://127.0.0.1:1",
            &[
                "kaa: Modal is not available: it can't be reached: ",
                "look at the network and MODAL_SERVER_URL",
            ],
        ),
    ] {
        let mut cloud = Cloud::new();
        cloud.place.write("rules.json", r#"{"rules": [], "default": {"response": "FINAL(1)"}}"#);
        cloud.place.set(variable, value);
        cloud.place.hidden.push("as-hunter3".into());
        refused(&cloud, 125, parts);
    }
}

#[test]
fn what_modal_does_not_have_or_can_not_build_is_named() {
    let cloud = Cloud::new();
    for (words, parts) in [
        (
            "--modal-image no-such-image:1",
            &[
                "the layer `FROM no-such-image:1` of the Modal image is not available: its build failed",
                "the end of its log:\n",
                "manifest for no-such-image:1 not found",
            ][..],
        ),
        ("--modal-image im-nobody --modal-apt git", &["im-nobody", "not found"]),
        ("--modal-image im-nobody", &["im-nobody", "not found"]),
        (
            "--modal-pip no-such-package-kaa==1 --env PIP_NO_INDEX=1",
            &[
                "`RUN python -m pip install no-such-package-kaa==1` of the Modal image",
                "the end of its log:\n",
                "No matching distribution",
            ],
        ),
        (
            "--modal-secret no-such-secret",
            &["the Modal secret `no-such-secret` is not available: it isn't there: "],
        ),
    ] {
        cloud.place.check(&[fails(&format!("run {words}"), &["1"], 125, parts)]);
    }
    assert!(cloud.stand_in.sandboxes().is_empty());
    cloud.stand_in.fault("SandboxCreateV2", Fault::Before(Code::ResourceExhausted));
    cloud.place.check(&[fails(
        "run",
        &["1"],
        125,
        &[
            "a sandbox of Modal is not available: the workspace is over one of its limits",
            "kaa modal clean",
        ],
    )]);
    cloud.stand_in.fault("SandboxCreateV2", Fault::Before(Code::InvalidArgument));
    cloud.place.check(&[fails("run", &["1"], 125, &["Modal refused it: injected"])]);
}

#[test]
fn the_log_of_a_build_is_shown_as_it_is_written() {
    let cloud = Cloud::new();
    let output = cloud.place.run("run --modal-apt git", &["print(1)"], "");
    let stderr = text(&output.stderr);
    assert_eq!(text(&output.stdout), "1\n", "{stderr}");
    for part in [
        "kaa: build … \n     => FROM python:3.11-slim\n",
        "     => RUN apt-get install -y git\n",
        "kaa: build … im-",
    ] {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
    // It's there now.
    let output = cloud.place.run("run --modal-apt git", &["print(1)"], "");
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("1\n", ""));
    let output = cloud.place.run("run --quiet --modal-apt gcc", &["print(1)"], "");
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("1\n", ""));
}

#[test]
fn flags_that_can_not_be_are_named_with_what_would_be_right() {
    let cloud = Cloud::new();
    for (flag, value, help) in [
        ("--modal-image", "", "is no name of an image"),
        ("--modal-app", "my/app", "isn't 1 to 64 letters, digits, dashes, dots or underscores"),
        ("--modal-timeout", "9s", "must be 10 s to 24 h, not 9s"),
        ("--modal-timeout", "25h", "must be 10 s to 24 h"),
        ("--modal-timeout", "soon", "invalid value 'soon'"),
        ("--modal-tag", "kaa-owner=me", "is empty or one of Kaa's own; name it otherwise"),
        ("--modal-tag", "=x", "is empty or one of Kaa's own; name it otherwise"),
        ("--modal-tag", "x", "write NAME=VALUE"),
        ("--modal-network", "", "is no address; write blocked, open"),
        ("--modal-network", "10.0.0.0/33", "is no address; write blocked, open"),
        ("--modal-carrier", "broker:0", "is neither stdio, broker nor broker:PORT"),
        ("--modal-carrier", "http", "is neither stdio, broker nor broker:PORT"),
        ("--modal-secret", "", "a secret has no name"),
        ("--modal-secret", "env:1A", "there is no variable \"1A\" of UTF-8 here to copy"),
        ("--modal-secret", "KEY=as-hunter2", "write env:NAME"),
        ("--modal-user", "root", "invalid value 'root'"),
        ("--modal-patience", "-1", "invalid value '-1'"),
        ("--modal-build-timeout", "x", "invalid value 'x'"),
        ("--cpus", "0.1", "must be 0.125 to 64"),
        ("--cpus", "nan", "must be 0.125 to 64"),
    ] {
        let words = format!("run {flag}={value}");
        cloud.place.check(&[fails(&words, &["1"], 2, &[flag, help])]);
    }
    for (words, parts) in [
        ("modal list --app my/app", &["--app", "isn't 1 to 64 letters"][..]),
        ("modal clean --app my/app", &["--app", "isn't 1 to 64 letters"]),
        ("modal end", &["unrecognized subcommand 'end'"]),
        ("modal", &["Usage: kaa modal <COMMAND>"]),
    ] {
        cloud.place.check(&[fails(words, &[], 2, parts)]);
    }
    assert_eq!(cloud.stand_in.calls("SandboxCreateV2"), 0);
}
