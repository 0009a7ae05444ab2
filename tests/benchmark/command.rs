//! `kaa bench isolation`: what is typed, what is written, and what is said.

use kaa::benchmark::{Report, Workload};

use crate::common;
use crate::program::{Place, text};

fn place() -> Place {
    let mut place = Place::new("");
    place.set("KAA_CACHE", common::store_root().to_str().unwrap());
    // The first use of an image is another matter.
    common::image("base");
    common::image("sci");
    place
}

/// What a command line says, which ends with this code.
fn run(place: &Place, words: &str, code: i32) -> (String, String) {
    let output = place.run(&format!("bench isolation {words}"), &[], "");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{words}\n{stdout}{stderr}");
    (stdout, stderr)
}

#[test]
fn one_run_makes_the_table_the_figures_and_the_picture() {
    let place = place();
    place.write(
        "page.md",
        "# Mine\n<!-- kaa bench isolation -->\nold\n<!-- /kaa bench isolation -->\nend\n",
    );
    let words = "--backends in-process,wasm,docker,wasm --workloads cell,cold,context-1 --laps 1 \
                 --docker-host unix:///no/engine.sock --json r.json --plot r.svg --markdown page.md";
    let (stdout, _) = run(&place, words, 0);
    let read = |name: &str| std::fs::read_to_string(place.path(name)).unwrap();
    let report = Report::from_json(&read("r.json")).unwrap();
    let names: Vec<&str> = report.subjects.iter().map(|subject| &*subject.name).collect();
    assert_eq!(names, ["in-process", "wasm", "docker"]);
    for workload in [Workload::Cell, Workload::Cold, Workload::Context { megabytes: 1 }] {
        for name in ["in-process", "wasm"] {
            assert!(report.figure(name, workload).is_some(), "{name} {workload}\n{stdout}");
        }
    }
    let reason = report.subjects[2].absent.as_deref().unwrap();
    assert!(reason.contains("/no/engine.sock"), "{reason}");
    assert_eq!(stdout.trim_end(), report.markdown().trim_end());
    let page = format!(
        "# Mine\n<!-- kaa bench isolation -->\n\n{}\n<!-- /kaa bench isolation -->\nend\n",
        report.markdown()
    );
    assert_eq!(read("page.md"), page);
    assert_eq!(read("r.svg"), report.plot().unwrap());
    // The same again, of what was measured.
    let (again, _) = run(&place, "--from r.json --plot again.svg --markdown new.md", 0);
    assert_eq!((again, read("again.svg")), (stdout, read("r.svg")));
    assert!(read("new.md").starts_with("<!-- kaa bench isolation -->\n"));
    run(&place, "--from r.json --markdown new.md", 0);
    assert_eq!(read("new.md").matches("<!-- kaa").count(), 1);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_measured() {
    let place = place();
    place.write("page.md", "a page with something else in it\n");
    place.write("r.json", "{\"format\": 2}");
    for (words, part) in [
        ("--backends firecracker", "invalid value 'firecracker' for '--backends"),
        (
            "--workloads cell,lunch",
            "--workloads: \"lunch\" is no workload; there are cold, session",
        ),
        ("--laps 0", "0 is not in 1..=1000"),
        ("--json /no/such/directory/r.json", "--json: /no/such/directory/r.json: No such file"),
        ("--plot /", "--plot: /: "),
        ("--markdown page.md", "--markdown: page.md has something else in it; name a new file"),
        ("--from r.json", "--from: the report can't be used: expected one of format 1"),
        ("--from none.json", "--from: "),
        ("--from r.json --laps 2", "cannot be used with"),
        (
            "--backends wasm,docker --docker-host unix:///none --pids 1 --workloads cell",
            "--pids: must be at least 16, not 1",
        ),
    ] {
        let (stdout, stderr) = run(&place, words, 2);
        assert!(stdout.is_empty() && stderr.contains(part), "{words}: {stderr}");
    }
    let page = std::fs::read_to_string(place.path("page.md")).unwrap();
    assert_eq!(page, "a page with something else in it\n");
}

#[test]
fn a_run_without_a_figure_fails_and_has_the_reasons() {
    let place = place();
    let words = "--backends in-process,local --python /no/such/python --workloads cell --laps 1";
    let (stdout, stderr) = run(&place, words, 125);
    assert!(stderr.contains("nothing could be measured; the table has the reasons"), "{stderr}");
    for name in ["in-process", "local"] {
        let row = format!("| `{name}` | not measured: ");
        let row = stdout.lines().find(|line| line.starts_with(&row));
        assert!(row.is_some_and(|row| row.contains("/no/such/python")), "{stdout}");
    }
}

#[test]
fn all_are_measured_but_those_that_cost_money() {
    let place = place();
    let words = "--workloads cell --laps 1 --docker-host unix:///no/engine.sock";
    let (stdout, _) = run(&place, words, 0);
    for name in ["in-process", "local", "wasm"] {
        assert!(stdout.contains(&format!("\n| `{name}` |")), "{stdout}");
        assert!(!stdout.contains(&format!("\n| `{name}` | not measured")), "{stdout}");
    }
    for (name, reason) in [
        ("docker", "Docker engine at unix:///no/engine.sock"),
        ("docker+gvisor", "Docker engine at unix:///no/engine.sock"),
        ("modal", "not asked for: it costs money; name it in --backends"),
    ] {
        let row = format!("| `{name}` | not measured: ");
        let row = stdout.lines().find(|line| line.starts_with(&row));
        assert!(row.is_some_and(|row| row.contains(reason)), "{name}: {stdout}");
    }
}
