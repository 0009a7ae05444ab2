//! What counts of variables and files, and what is said of those that can't be used.

use std::fs;
use std::path::Path;

use super::ModalConfig;
use crate::error::{Error, Result};

const BOTH: &str = "token_id = \"ak-f\"\ntoken_secret = \"as-f\"\n";
const SET: [(&str, &str); 2] = [("MODAL_TOKEN_ID", "ak-v"), ("MODAL_TOKEN_SECRET", "as-v")];

/// Loads with these variables and this text in the home directory's file, which `@` stands for.
fn find(variables: &[(&str, &str)], file: Option<&str>) -> Result<(ModalConfig, String)> {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(".modal.toml");
    if let Some(text) = file {
        fs::write(&path, text).unwrap();
    }
    let shorten = |text: String| text.replace(&path.display().to_string(), "@");
    let found = ModalConfig::find(|name| match name {
        "HOME" => Some(home.path().display().to_string()),
        _ => variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
    });
    match found {
        Ok((config, place)) => Ok((config, shorten(place))),
        Err(Error::Invalid { what, reason }) => Err(Error::invalid(shorten(what), shorten(reason))),
        Err(Error::Unavailable { what, reason }) => Err(Error::unavailable(what, shorten(reason))),
        Err(other) => Err(other),
    }
}

#[test]
fn the_token_is_the_one_that_the_official_client_takes() {
    let two =
        format!("[a]\n{BOTH}[b]\ntoken_id = \"ak-b\"\ntoken_secret = \"as-b\"\nactive = true\n");
    let one = format!("[default]\n{BOTH}");
    let other = format!("[work]\n{BOTH}active = true");
    let id = &SET[..1];
    for (variables, file, token, place) in [
        (&SET[..], None, "ak-v as-v", "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"),
        (&SET, Some(one.as_str()), "ak-v as-v", "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"),
        (&[], Some(&one), "ak-f as-f", "the profile `default` in @"),
        (&[], Some(&other), "ak-f as-f", "the profile `work` in @"),
        (&[], Some(&two), "ak-b as-b", "the profile `b` in @"),
        (&[("MODAL_PROFILE", "a")], Some(&two), "ak-f as-f", "the profile `a` in @"),
        (&[("MODAL_PROFILE", "")], Some(&two), "ak-b as-b", "the profile `b` in @"),
        (&[("MODAL_TOKEN_ID", "")], Some(&one), "ak-f as-f", "the profile `default` in @"),
        (
            &[("MODAL_TOKEN_ID", " ak-v\n")],
            Some(&one),
            "ak-v as-f",
            "MODAL_TOKEN_ID and the profile `default` in @",
        ),
        (id, Some(&one), "ak-v as-f", "MODAL_TOKEN_ID and the profile `default` in @"),
        (&SET[1..], Some(&one), "ak-f as-v", "the profile `default` in @ and MODAL_TOKEN_SECRET"),
        (
            &[("MODAL_CONFIG_PATH", "/none"), SET[0], SET[1]],
            Some("not read"),
            "ak-v as-v",
            "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET",
        ),
    ] {
        let (config, found) = find(variables, file).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        assert_eq!(format!("{} {}", config.token_id, config.token_secret), token, "{file:?}");
        assert_eq!(found, place, "{variables:?} {file:?}");
    }
}

#[test]
fn every_setting_has_a_variable_and_a_key() {
    let (config, _) = find(&SET, None).unwrap();
    let defaults = ModalConfig {
        server_urls: vec!["https://api.modal.com".into(), "https://api.modal2.com".into()],
        token_id: "ak-v".into(),
        token_secret: "as-v".into(),
        environment: String::new(),
        image_builder_version: None,
        max_throttle_wait: None,
        root_certificates: None,
    };
    assert_eq!(config, defaults);
    let roots = tempfile::NamedTempFile::new().unwrap();
    let expected = ModalConfig {
        server_urls: vec!["http://[::1]:9".into(), "https://modal.example:8443".into()],
        token_id: "ak-f".into(),
        token_secret: "as-f".into(),
        environment: "dev".into(),
        image_builder_version: Some("2025.06".into()),
        max_throttle_wait: Some(7),
        root_certificates: Some(roots.path().to_owned()),
    };
    let file = format!(
        "[default]\n{BOTH}environment = \"dev\"\nimage_builder_version = \"2025.06\"\n\
         max_throttle_wait = 7\nserver_url = \"http://[::1]:9, ,https://modal.example:8443/\"\n\
         sandbox_v2 = false\nloglevel = \"DEBUG\"\n"
    );
    let roots = ("KAA_MODAL_ROOTS", roots.path().to_str().unwrap());
    assert_eq!(find(&[roots], Some(&file)).unwrap().0, expected);
    let variables = [
        roots,
        ("MODAL_TOKEN_ID", "ak-f"),
        ("MODAL_TOKEN_SECRET", "as-f"),
        ("MODAL_SERVER_URL", "http://[::1]:9,https://modal.example:8443"),
        ("MODAL_ENVIRONMENT", "dev"),
        ("MODAL_IMAGE_BUILDER_VERSION", "2025.06"),
        ("MODAL_MAX_THROTTLE_WAIT", "7"),
    ];
    let file =
        "[default]\nserver_url = \"https://other\"\nenvironment = \"x\"\nmax_throttle_wait = \"1\"";
    assert_eq!(find(&variables, Some(file)).unwrap().0, expected);
    assert!(!format!("{expected:?}").contains("as-f"));
}

#[test]
fn without_a_token_it_is_said_where_one_was_looked_for() {
    let only_other = format!("[work]\n{BOTH}");
    for (file, part) in [
        (None, "there is no file @; make one with `modal token new`"),
        (Some(""), "@ has no profiles; make"),
        (Some("[default]\nenvironment = \"dev\""), "the profile `default` of @ has none; make"),
        (Some("[default]\ntoken_id = \"\"\ntoken_secret = \" \""), "`default` of @ has none; make"),
        (
            Some(only_other.as_str()),
            "@ has no profile `default`, but `work` (`modal profile activate`",
        ),
    ] {
        let error = find(&[], file).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        let text = error.to_string();
        let start = "Modal is not available: there is no token: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set, and ";
        assert!(text.starts_with(start) && text.contains(part), "{text}");
        assert!(text.contains("https://modal.com/settings/tokens"), "{text}");
    }
    let error = ModalConfig::load(|_| None).unwrap_err().to_string();
    assert!(error.contains("there is no home directory"), "{error}");
}

#[test]
fn variables_that_cannot_be_used_are_named() {
    let url = |url| ("MODAL_SERVER_URL", url);
    for (variable, start) in [
        (("MODAL_PROFILE", "x"), "MODAL_PROFILE: there is no file @; leave it out"),
        (
            ("MODAL_OAUTH_CLIENT_ID", "x"),
            "MODAL_OAUTH_CLIENT_ID: signing in by OAuth isn't supported",
        ),
        (("MODAL_OAUTH_JWT_KEY", "x"), "MODAL_OAUTH_JWT_KEY: signing in by OAuth isn't supported"),
        (("MODAL_MAX_THROTTLE_WAIT", "-1"), "MODAL_MAX_THROTTLE_WAIT: \"-1\" is no whole number"),
        (("MODAL_MAX_THROTTLE_WAIT", "1m"), "MODAL_MAX_THROTTLE_WAIT: \"1m\" is no whole number"),
        (("KAA_MODAL_ROOTS", "/none.pem"), "KAA_MODAL_ROOTS: /none.pem is no file"),
        (url(","), "MODAL_SERVER_URL: there is no address in it"),
        (
            url("http://modal.example"),
            "MODAL_SERVER_URL: \"http://modal.example\": http:// would show",
        ),
        (
            url("https://a,http://localhost.example"),
            "MODAL_SERVER_URL: \"http://localhost.example\": http:// would",
        ),
        (
            url("http://127.0.0.1.example:9"),
            "MODAL_SERVER_URL: \"http://127.0.0.1.example:9\": http:// would",
        ),
        (
            url("unix:///run/modal"),
            "MODAL_SERVER_URL: \"unix:///run/modal\": sockets of this machine",
        ),
        (url("api.modal.com"), "MODAL_SERVER_URL: \"api.modal.com\": write it as"),
        (url("ftp://modal.example"), "MODAL_SERVER_URL: \"ftp://modal.example\": write it as"),
        (
            url("https://modal.example/v1"),
            "MODAL_SERVER_URL: \"https://modal.example/v1\": write it as",
        ),
        (
            url("https://modal.example/?a=b"),
            "MODAL_SERVER_URL: \"https://modal.example/?a=b\": write it as",
        ),
        (url("https://a b"), "MODAL_SERVER_URL: \"https://a b\": it is no address"),
        (url("https://me:hunter2@modal.example"), "MODAL_SERVER_URL: an address has no user name"),
        (
            ("MODAL_TOKEN_SECRET", "hunter\u{2}"),
            "MODAL_TOKEN_SECRET: it has characters that no token has",
        ),
        (("MODAL_TOKEN_ID", "ak-é"), "MODAL_TOKEN_ID: it has characters that no token has"),
    ] {
        let error = find(&[variable, SET[0], SET[1]], None).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(start), "{text}");
        assert!(!text.contains("hunter"), "{text}");
    }
}

#[test]
fn half_a_token_is_refused_with_the_name_of_the_other_half() {
    for (variables, file, expected) in [
        (
            &SET[..1],
            None,
            "MODAL_TOKEN_ID: it is the id of a token, and its secret is missing: set MODAL_TOKEN_SECRET, or write token_secret of the profile `default` in @",
        ),
        (
            &SET[1..],
            None,
            "MODAL_TOKEN_SECRET: it is the secret of a token, and its id is missing: set MODAL_TOKEN_ID, or write token_id of the profile `default` in @",
        ),
        (
            &[],
            Some("[w]\nactive = true\ntoken_id = \"ak-f\""),
            "token_id of the profile `w` in @: it is the id of a token, and its secret is missing: set MODAL_TOKEN_SECRET, or write token_secret of the profile `w` in @",
        ),
    ] {
        assert_eq!(find(variables, file).unwrap_err().to_string(), expected);
    }
}

#[test]
fn files_that_cannot_be_used_are_named_and_no_secret_is_shown() {
    let large = "#".repeat((1 << 20) + 1);
    for (profile, file, start) in [
        ("", "[a]\n[b]\n", "@: no profile is active, of `a`, `b`; choose one"),
        (
            "",
            "[a]\nactive = true\n[b]\nactive = true",
            "@: more than one profile is active: `a`, `b`",
        ),
        (
            "a",
            "[a]\nactive = true\n[b]\nactive = true",
            "@: more than one profile is active: `a`, `b`",
        ),
        ("c", "[a]\n[b]\n", "MODAL_PROFILE: @ has no profile `c`, but `a`, `b`"),
        ("", "[a]\nactive = \"yes\"", "@: `active` of the profile `a` must be true or false"),
        ("", "token_secret = \"hunter2\"", "@: `token_secret` is in no profile"),
        (
            "",
            "[default]\ntoken_id = 5",
            "token_id of the profile `default` in @: it must be a text in quotes, and is of the type integer",
        ),
        (
            "",
            "[default]\nserver_url = [\"https://a\"]",
            "server_url of the profile `default` in @: it must be a text",
        ),
        (
            "",
            "[default]\nmax_throttle_wait = -5",
            "max_throttle_wait of the profile `default` in @: \"-5\" is no whole",
        ),
        (
            "",
            "[default]\nmax_throttle_wait = 1.5",
            "max_throttle_wait of the profile `default` in @: it must be a text",
        ),
        (
            "",
            "[default]\nserver_url = \"http://modal.example\"",
            "server_url of the profile `default` in @: \"http://modal.example\"",
        ),
        (
            "",
            "[default]\noauth_client_id = \"x\"",
            "oauth_client_id of the profile `default` in @: signing in by OAuth",
        ),
        ("", "[default]\ntoken_secret = hunter2\n", "@: line 2 is not TOML: "),
        ("", "[default]\ntoken_secret = \"hunter2\n", "@: line 2 is not TOML: "),
        ("", "[default]\n[default]\n", "@: line 2 is not TOML: "),
        ("", &large, "@: settings of Modal have at most 1048576 bytes"),
    ] {
        let variables = [("MODAL_PROFILE", profile)];
        // A token in variables doesn't make a wrong file right.
        let with_token = [variables[0], SET[0], SET[1]];
        let is_overruled = start.starts_with("token_id");
        let found =
            if is_overruled { find(&variables, Some(file)) } else { find(&with_token, Some(file)) };
        let error = found.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with(start), "{text}");
        assert!(!text.contains("hunter"), "{text}");
    }
}

#[test]
fn a_file_that_is_none_is_refused() {
    let load = |path: &Path| {
        ModalConfig::load(|name| (name == "MODAL_CONFIG_PATH").then(|| path.display().to_string()))
    };
    let directory = tempfile::tempdir().unwrap();
    let error = load(directory.path()).unwrap_err().to_string();
    assert!(error.contains("reading Modal's settings: "), "{error}");
    let path = directory.path().join("modal.toml");
    fs::write(&path, [0xff, 0xfe]).unwrap();
    let error = load(&path).unwrap_err().to_string();
    assert!(error.ends_with("this is not UTF-8"), "{error}");
    fs::write(&path, format!("[default]\n{BOTH}")).unwrap();
    assert_eq!(load(&path).unwrap().token_id, "ak-f");
}
