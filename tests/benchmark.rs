//! The benchmark: that it times what it says, in turns, counts no wrong answers, and says what it
//! could not measure.

#[path = "benchmark/command.rs"]
mod command;
mod common;
#[path = "common/program.rs"]
mod program;
#[path = "benchmark/published.rs"]
mod published;
#[path = "benchmark/turns.rs"]
mod turns;

use std::sync::Arc;

use kaa::benchmark::{
    Block, CpuPart, InProcess, Missed, Report, Sessions, Subject, Suite, Unit, Workload,
};
use kaa::{LocalBackend, LocalOptions, WasmBackend};

/// The path with which this process finds its `python3`, which may not be one of the system's.
fn local() -> Arc<LocalBackend> {
    let path = std::env::var("PATH").unwrap_or_default();
    Arc::new(LocalBackend::new(LocalOptions { path, ..LocalOptions::default() }))
}

fn wasm() -> Sessions {
    let backend =
        |image| Arc::new(WasmBackend::new(Arc::clone(common::runtime()), common::image(image)));
    Sessions::new("wasm", "WebAssembly", backend("base")).cpu(backend("sci"))
}

/// All but what takes seconds, and what takes a process of the command line.
fn quick(workload: &Workload) -> bool {
    !matches!(workload, Workload::Cold | Workload::Context { megabytes: 100 })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backend_does_every_workload_and_answers_right() {
    let suite = Suite::default()
        .subject(InProcess::new("python3"))
        .subject(Sessions::new("local", "a process", local()))
        .subject(wasm())
        .workloads(Workload::all().into_iter().filter(quick))
        .laps(1);
    let report = suite.run(&|_| {}).await;
    for name in ["in-process", "local", "wasm"] {
        for workload in report.workloads.iter().copied() {
            let cell = report.cells.iter().find(|c| c.subject == name && c.workload == workload);
            let cell = cell.unwrap_or_else(|| panic!("{name} was not asked for {workload}"));
            // Whether there is numpy beside the tests is this machine's matter; Kaa's image has it.
            if workload == Workload::Cpu(CpuPart::Numpy) && cell.missed.is_some() && name != "wasm"
            {
                let reason = cell.missed.as_deref().unwrap();
                assert_eq!(reason, "there is no numpy in its Python", "{name}");
                continue;
            }
            let Some(figure) = cell.figure else {
                panic!("{name} at {workload}: {:?}", cell.missed);
            };
            assert!(figure.samples >= 1 && figure.least >= 0.0, "{name} at {workload}: {figure:?}");
            let (least, median, most) = (figure.least, figure.median, figure.most);
            assert!(least <= median && median <= most, "{name} at {workload}: {figure:?}");
            if workload.unit() != Unit::Bytes {
                assert!(least > 0.0, "{name} at {workload}: {figure:?}");
            }
        }
    }
    // Nothing answers sooner than the model, nor one prompt after the other.
    let batch = report.figure("wasm", Workload::Batch).unwrap();
    assert!(batch.least >= Workload::MODEL_TIME.as_secs_f64());
    assert!(batch.least < Workload::MODEL_TIME.as_secs_f64() * Workload::BATCH as f64);
    assert_eq!(Report::from_json(&report.to_json()).unwrap(), report);
    let facts = |name: &str| report.subjects.iter().find(|s| s.name == name)?.facts.clone();
    assert!(facts("wasm").unwrap().isolated && !facts("local").unwrap().isolated);
    assert!(facts("wasm").unwrap().python.starts_with("3."));
}

/// How a subject's samples of a workload end.
async fn missed(mut subject: impl Subject, workload: Workload) -> String {
    let block = Block { samples: 1, time: std::time::Duration::ZERO };
    let Missed(reason) = match subject.describe().await {
        Ok(_) => subject.measure(workload, &block).await.expect_err("there is nothing right"),
        Err(missed) => missed,
    };
    reason
}

#[tokio::test]
async fn a_wrong_answer_is_no_sample() {
    let process = |program: &str, arguments: &[&str]| {
        Sessions::new("x", "x", local()).cold(program, arguments.iter().map(ToString::to_string))
    };
    for (subject, expected) in [
        (process("/bin/echo", &["3"]), "it says \"3\\n\" instead of \"2\\n\""),
        (
            process("/bin/sh", &["-c", "echo why >&2; exit 1"]),
            "it says \"\" instead of \"2\\n\"; why",
        ),
        (process("/bin/sh", &["-c", "echo 2; echo 3"]), "it says \"2\\n3\\n\" instead of"),
        (process("/bin/sh", &["-c", "yes | head -c 1000000"]), "it says \"y\\ny\\n"),
        (process("/no/such/program", &[]), "/no/such/program: No such file"),
        (Sessions::new("x", "x", local()), "it has no process of its own"),
        (Sessions::new("x", "x", local()).elsewhere(), "it has no process of its own"),
    ] {
        let reason = missed(subject, Workload::Cold).await;
        assert!(reason.contains(expected), "{reason}");
    }
    let elsewhere = Sessions::new("x", "x", local()).elsewhere();
    let reason = missed(elsewhere, Workload::Memory).await;
    assert_eq!(reason, "its memory is on another machine");
}

#[tokio::test]
async fn an_interpreter_that_is_none_is_said_to_be_none() {
    for (python, expected) in [
        ("/no/such/python", "/no/such/python: No such file"),
        // It ends at once, and prints nothing.
        ("/bin/true", "its process"),
    ] {
        let reason = missed(InProcess::new(python), Workload::Cell).await;
        assert!(reason.contains(expected), "{python}: {reason}");
    }
}
