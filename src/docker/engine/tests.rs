//! What is checked before an engine is used, and how its answers are read.

use std::collections::HashMap;

use bollard::models::{EventActor, Runtime, SystemVersionComponents};

use super::*;

fn info() -> SystemInfo {
    let runtimes = ["runc", "runsc"].map(|name| (name.to_owned(), Runtime::default()));
    SystemInfo {
        os_type: Some("linux".into()),
        memory_limit: Some(true),
        pids_limit: Some(true),
        cpu_cfs_quota: Some(true),
        runtimes: Some(HashMap::from(runtimes)),
        ncpu: Some(2),
        ..SystemInfo::default()
    }
}

#[test]
fn an_engine_that_cannot_do_what_is_asked_is_refused_by_what_it_lacks() {
    let check = |info: SystemInfo, options: DockerOptions| {
        check_info(&info, "unix:///run/d.sock", &options).map_err(|error| error.to_string())
    };
    let runtime = |name: &str| DockerOptions { runtime: Some(name.into()), ..Default::default() };
    let poor = || SystemInfo { memory_limit: Some(false), pids_limit: Some(false), ..info() };
    check(info(), DockerOptions::default()).unwrap();
    check(info(), runtime("runsc")).unwrap();
    check(poor(), DockerOptions { allow_missing_limits: true, ..Default::default() }).unwrap();
    // An engine that doesn't say isn't taken for one that can't.
    check(SystemInfo::default(), DockerOptions::default()).unwrap();
    for (info, options, parts) in [
        (poor(), DockerOptions::default(), ["no limits of memory, processes", "cgroups"]),
        (info(), runtime("kata"), ["the runtime `kata`", "runc, runsc"]),
        (info(), DockerOptions { cpus: 2.5, ..Default::default() }, ["docker.cpus", "has 2"]),
        (
            SystemInfo { os_type: Some("windows".into()), ..info() },
            DockerOptions::default(),
            ["Linux containers", "windows"],
        ),
    ] {
        let error = check(info, options).unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

/// Podman 4.3 answered that it has `runsc`, and started a container of it on the host's kernel.
#[test]
fn a_runtime_that_podman_would_leave_out_is_refused() {
    let component = SystemVersionComponents { name: "Podman Engine".into(), ..Default::default() };
    let podman = SystemVersion { components: Some(vec![component]), ..Default::default() };
    assert!(is_podman(&podman) && !is_podman(&SystemVersion::default()));
    let plain = DockerOptions::default();
    let gvisor = DockerOptions { runtime: Some("runsc".into()), ..Default::default() };
    let check = |is_podman, options| check_runtime(is_podman, "unix:///run/p.sock", options);
    check(true, &plain).unwrap();
    check(false, &gvisor).unwrap();
    let error = check(true, &gvisor).unwrap_err().to_string();
    assert!(error.contains("`runsc`") && error.contains("Podman"), "{error}");
}

#[test]
fn events_are_read_up_to_the_end() {
    let event = |action: &str, attribute: Option<(&str, &str)>| EventMessage {
        action: Some(action.into()),
        actor: Some(EventActor {
            attributes: attribute.map(|(name, value)| HashMap::from([(name.into(), value.into())])),
            ..EventActor::default()
        }),
        ..EventMessage::default()
    };
    let mut evidence = Evidence::default();
    for (event, is_last) in [
        (event("start", None), false),
        (event("kill", Some(("signal", "9"))), false),
        (event("oom", None), false),
        (event("die", Some(("exitCode", "137"))), true),
    ] {
        assert_eq!(is_end(&event, &mut evidence), is_last, "{event:?}");
    }
    let expected = Evidence {
        is_known: true,
        has_oom: true,
        signal: Some("9".into()),
        exit_code: Some(137),
        is_running: false,
    };
    assert_eq!(evidence, expected);
}

#[test]
fn names_and_versions_are_read() {
    for (image, full) in [
        ("python", "python:latest"),
        ("python:3.11-slim", "python:3.11-slim"),
        ("registry:5000/python", "registry:5000/python:latest"),
        ("registry:5000/python:3", "registry:5000/python:3"),
        ("python@sha256:00", "python@sha256:00"),
    ] {
        assert_eq!(with_tag(image), full);
    }
    assert_eq!(numbers("1.41"), Some((1, 41)));
    assert!(numbers("1.9") < Some(API_MIN) && numbers("2.0") > Some(API_MIN));
    assert_eq!(["", "1", "one.two", "1.41.2"].map(numbers), [None; 4]);
}
