//! The program on backends whose sessions are processes: `local` always, `docker` where there is an
//! engine, and snapshots where dill can be had.
//!
//! The failure guarded against: a flag or a command that means nothing on a backend and is ignored, and
//! a session that lost its state without a word.

#[path = "common/packages.rs"]
mod packages;
#[path = "common/program.rs"]
mod program;
#[path = "common/required.rs"]
mod required;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use program::{ANSWERS, Case, Place, fails, ok, text};
use serde_json::Value as Json;

const NOT_ISOLATED: &str = "kaa: local sessions are not isolated: ";
const NO_DILL: &str =
    "the local backend does not support snapshot: its Python has no dill; install";
/// The image that `.ci/image` makes of the default one.
const DILL_IMAGE: &str = "kaa-test:dill";
/// A cell that no soft stop ends.
const STUBBORN: &str = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun')\n\
                        while True: pass";
const SHORT: &str = "--compute 100ms --grace 100ms";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let local = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok::<_, Failed>(())
        })
    };
    let mut trials = vec![
        local("flags_are_refused_where_they_mean_nothing", flags_are_refused),
        local("local_says_once_that_it_is_not_isolated", local_says_what_it_is),
        local("local_runs_cells", || runs_cells(&Place::new("--backend local"))),
        local("local_says_what_was_lost", || says_what_was_lost(&Place::new("--backend local"))),
        local("sigterm_ends_a_run", sigterm_ends_a_run),
        local("local_repl_goes_on", || repl_goes_on(&Place::new("--backend local"))),
        local("local_answers_questions", || answers(&Place::new("--backend local"))),
        local("local_without_dill_says_so_first", without_dill),
        local("a_missing_interpreter_is_named", missing_interpreter),
        local("an_engine_that_is_not_there_is_named", missing_engine),
        local("a_token_that_is_not_there_is_named", missing_token),
        local("the_table_of_the_readme_is_what_the_backends_say", readme_table),
        trial("dill", "local_snapshots", dill, |packages| {
            let packages = packages.display();
            snapshots(&Place::new(format!("--backend local --env PYTHONPATH={packages}")));
        }),
    ];
    let docker = |name: &str, test: fn(&Place)| trial("docker", name, engine, test);
    trials.extend([
        docker("docker_runs_cells", runs_cells),
        docker("docker_says_what_was_lost", says_what_was_lost),
        docker("docker_repl_goes_on", repl_goes_on),
        docker("docker_answers_questions", answers),
        docker("docker_shows_its_walls", docker_flags),
        docker("docker_in_doctor", docker_doctor),
    ]);
    trials.push(trial("docker", "docker_snapshots", dill_image, snapshots));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test that panics when it fails.
fn trial<T: 'static>(
    suite: &'static str,
    name: &str,
    need: fn() -> &'static Result<T, String>,
    test: fn(&T),
) -> Trial {
    required::trial(suite, name, need, move |thing| {
        test(thing);
        Ok(())
    })
}

/// A place on the engine that the program finds by itself, if it has the image.
fn with_image(image: &str) -> Result<Place, String> {
    let place = Place::new(format!("--backend docker --docker-image {image} --docker-pull never"));
    let output = place.run("run", &["print(1)"], "");
    match output.status.code() {
        Some(0) => Ok(place),
        _ => Err(text(&output.stderr).trim().to_owned()),
    }
}

fn engine() -> &'static Result<Place, String> {
    static PLACE: OnceLock<Result<Place, String>> = OnceLock::new();
    PLACE.get_or_init(|| with_image("python:3.11-slim"))
}

fn dill_image() -> &'static Result<Place, String> {
    static PLACE: OnceLock<Result<Place, String>> = OnceLock::new();
    PLACE.get_or_init(|| with_image(DILL_IMAGE))
}

/// A directory with dill, installed unless an earlier run did.
fn dill() -> &'static Result<PathBuf, String> {
    static PACKAGES: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PACKAGES.get_or_init(|| packages::installed("python3", packages::DILL))
}

fn flags_are_refused() {
    let place = Place::new("");
    place.write("a.py", "");
    for (backend, flags, flag, help) in [
        ("local", "--fuel 5", "--fuel", "--compute limits"),
        ("local", "--fuel 1000000000000", "--fuel", "only wasm counts fuel"),
        ("local", "--seed 5", "--seed", "take --backend wasm"),
        ("local", "--fixed-clock 5", "--fixed-clock", "take --backend wasm"),
        ("local", "--image base", "--image", "--python names the interpreter"),
        ("local", "--wheel a.py", "--wheel", "setting up wasm"),
        ("local", "--mount .:/m", "--mount", "by their own paths"),
        ("local", "--docker-image a", "--docker-image", "add --backend docker"),
        ("local", "--docker-network bridge", "--docker-network", "add --backend docker"),
        (
            "local",
            "--docker-allow-missing-limits",
            "--docker-allow-missing-limits",
            "add --backend",
        ),
        ("local", "--cpus 1", "--cpus", "a limit of containers"),
        ("local", "--pids 99", "--pids", "ulimit -u"),
        ("docker", "--fuel 5", "--fuel", "only wasm counts fuel"),
        ("docker", "--seed 5", "--seed", "take --backend wasm"),
        ("docker", "--fixed-clock 5", "--fixed-clock", "take --backend wasm"),
        ("docker", "--image base", "--image", "--docker-image names"),
        ("docker", "--wheel a.py", "--wheel", "setting up wasm"),
        ("docker", "--modal-pip dill", "--modal-pip", "add --backend modal"),
        ("modal", "--fuel 5", "--fuel", "only wasm counts fuel"),
        ("modal", "--seed 5", "--seed", "take --backend wasm"),
        ("modal", "--fixed-clock 5", "--fixed-clock", "take --backend wasm"),
        ("modal", "--image base", "--image", "--modal-image names"),
        ("modal", "--wheel a.py", "--wheel", "setting up wasm"),
        ("modal", "--mount .:/m", "--mount", "the files of this machine are not where"),
        ("modal", "--docker-image a", "--docker-image", "add --backend docker"),
        ("modal", "--pids 99", "--pids", "Modal has none of this kind"),
        ("local", "--modal-image a", "--modal-image", "add --backend modal"),
        ("local", "--modal-timeout 1h", "--modal-timeout", "add --backend modal"),
        ("wasm", "--modal-network open", "--modal-network", "add --backend modal"),
        ("wasm", "--modal-secret a", "--modal-secret", "add --backend modal"),
        ("wasm", "--modal-tag a=b", "--modal-tag", "add --backend modal"),
        ("wasm", "--python python3", "--python", "part of the image"),
        ("wasm", "--setup-code a.py", "--setup-code", "kaa image build NAME --setup FILE"),
        ("wasm", "--docker-runtime runsc", "--docker-runtime", "add --backend docker"),
        ("wasm", "--cpus 1", "--cpus", "a limit of containers"),
    ] {
        let refused = format!("kaa: {flag}: the {backend} backend does not support it: ");
        for command in ["run -c 1", "repl", "complete question --lm-script none"] {
            let words = format!("{command} --backend {backend} {flags}");
            place.check(&[fails(&words, &[], 2, &[&refused, help])]);
        }
    }
    for (words, part) in [
        ("run --backend cloud", "invalid value 'cloud' for '--backend <BACKEND>'"),
        ("run --backend modal --cpus 0", "--cpus: must be 0.125 to 64"),
        ("run --backend modal --modal-app a/b", "--modal-app: \"a/b\" isn't"),
        ("run --backend modal --modal-timeout 1s", "--modal-timeout: must be 10 s to 24 h"),
        ("run --backend modal --modal-tag kaa-x=1", "--modal-tag: \"kaa-x\" is empty or one of"),
        ("run --backend modal --modal-tag a", "write NAME=VALUE"),
        ("run --backend modal --modal-network none", "\"none\" is no address; write blocked, open"),
        ("run --backend modal --modal-secret env:KAA_NONE", "--modal-secret: there is no variable"),
        ("run --backend local --setup-code none.py", "--setup-code: reading none.py: "),
        (
            "run --backend docker --docker-host ssh://me@engine",
            "--docker-host `ssh://me@engine`: SSH",
        ),
        (
            "run --backend docker --docker-host tcp://127.0.0.1:1 --cpus 0",
            "--cpus: must be at least",
        ),
        (
            "run --backend docker --docker-host tcp://127.0.0.1:1 --pids 2",
            "--pids: must be at least",
        ),
        (
            "run --backend docker --docker-host tcp://127.0.0.1:1 --docker-network host",
            "--docker-network: \"host\" isn't",
        ),
    ] {
        place.check(&[fails(words, &["1"], 2, &[part])]);
    }
}

fn local_says_what_it_is() {
    let place = Place::new("--backend local");
    place.write("rules.json", ANSWERS);
    place.write("hay.txt", "hay\nneedle kaa-42\n");
    let question = "complete Where? --context hay.txt --lm-script rules.json --json";
    for words in ["run --quiet", "run --json", "repl", question] {
        let cells: &[&str] = if words.starts_with("run") { &["1", "2"] } else { &[] };
        let output = place.run(words, cells, "1\n2\n");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{words}: {stderr}");
        assert_eq!(stderr.matches(NOT_ISOLATED).count(), 1, "{words}: {stderr}");
    }
}

/// What is the same wherever the process is.
fn runs_cells(place: &Place) {
    place.write("setup.py", "import math\nstart = math.factorial(5)\n");
    place.write("bad.py", "oops = 1 / 0\n");
    place.write("context.txt", "a\r\nb\n");
    place.write("cells.py", "# %% one\nx = 1\n# %% two\nprint(x + 1)\n");
    place.check(&[
        ok("run", &["x = 41", "print(x + 1)"], "42\n"),
        ok("run --cells cells.py", &[], "2\n"),
        ok("run --setup-code setup.py", &["print(start)"], "120\n"),
        ok(
            "run --context context.txt --var n=[1]",
            &["print(repr(context), n)"],
            "'a\\r\\nb\\n' [1]\n",
        ),
        ok(
            "run --env KAA_X=5",
            &["import os; print(os.environ['KAA_X'], 'KAA_CACHE' in os.environ)"],
            "5 False\n",
        ),
        ok("run --profile openenv", &["6 * 7"], "42\n"),
        Case { code: 7, ..ok("run", &["print('a'); import sys; sys.exit(7)"], "a\n") },
        fails("run", &["1 / 0"], 1, &["ZeroDivisionError: division by zero"]),
        fails(
            "run --setup-code bad.py",
            &["1"],
            2,
            &["--setup-code: it failed: ", "ZeroDivisionError"],
        ),
        fails(
            "run --wall 200ms",
            &["import time; time.sleep(60)"],
            124,
            &["the cell was stopped by the wall limit; --wall raises it"],
        ),
        fails("run --memory 128M", &["x = bytes(1 << 30)"], 1, &["MemoryError"]),
    ]);
    let output = place.run("run --json", &["print('a')\n5"], "");
    let record: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&record["stdout"], &record["value"]), (&"a\n".into(), &"5".into()));
    assert_eq!((&record["poisoned"], &record["usage"]["fuel"]), (&false.into(), &Json::Null));
}

fn says_what_was_lost(place: &Place) {
    let lost = "cost the session its state: ";
    let stubborn = format!("run {SHORT}");
    place.check(&[
        // The last cell's own code counts, when nothing was to come after it.
        Case {
            stderr: &["kaa: the cell cost the session its state: the interpreter exited with 7"],
            ..Case { code: 7, ..ok("run", &["print('a'); import os; os._exit(7)"], "a\n") }
        },
        // Cells that would have found another state are not run, and that is a failure.
        Case {
            code: 125,
            stderr: &["kaa: cell 1 cost", lost, "exited with 0; the cell after it was not run"],
            ..ok("run", &["print('a'); import os; os._exit(0)", "print('b')"], "a\n")
        },
        Case {
            code: 125,
            stderr: &["did not yield to the compute limit", "the 2 cells after it were not run"],
            ..ok(&stubborn, &[STUBBORN, "print('b')", "print('c')"], "begun\n")
        },
        Case {
            code: 124,
            stderr: &["stopped by the compute limit; --compute raises it", lost],
            ..ok(&stubborn, &[STUBBORN], "begun\n")
        },
    ]);
    let output = place.run("run --json", &["import os; os._exit(3)"], "");
    let record: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!((&record["poisoned"], &record["rolled_back"]), (&true.into(), &false.into()));
}

fn sigterm_ends_a_run() {
    let place = Place::new("--backend local");
    let mark = place.path("begun");
    let begin = format!("open({:?}, 'w').close()", mark.display().to_string());
    for cell in ["import time\ntime.sleep(600)", STUBBORN] {
        let cell = format!("{begin}\n{cell}");
        let child = place.spawn("run --grace 100ms", &[&cell, "print('more')"]);
        let since = Instant::now();
        while !mark.exists() {
            assert!(since.elapsed() < Duration::from_secs(60), "the cell does not begin");
            std::thread::sleep(Duration::from_millis(10));
        }
        fs::remove_file(&mark).unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        let output = place.ended(child);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(143), "{stdout}{stderr}");
        assert!(!stdout.contains("more"), "{stdout}");
    }
}

fn repl_goes_on(place: &Place) {
    let backend = place.backend.split_whitespace().nth(1).unwrap();
    let rewind = format!("kaa: the {backend} backend does not support rewind; :save FILE keeps");
    let stdin = "x = 5\n:rewind\nx\nimport os; os._exit(3)\nx\n:vars\n:reset\n'x' in globals()\nn\n:usage\n";
    let output = place.run("repl --var n=3", &[], stdin);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[..3], ["5", "False", "3"], "{stdout}");
    assert!(lines[3].starts_with("last cell: 0.") && !stdout.contains("fuel"), "{stdout}");
    for part in [
        rewind.as_str(),
        "kaa: the cell cost the session its state: the interpreter exited with 3; :reset begins anew",
        "kaa: the session has lost its state: the interpreter exited with 3; :reset begins anew",
    ] {
        assert!(stderr.contains(part), "{part:?} is not in {stderr}");
    }
    // The cell that lost it, the one after that, and the command.
    assert_eq!(stderr.matches("exited with 3; :reset begins anew").count(), 3, "{stderr}");
    assert!(!stderr.contains(":quit ends the session"), "{stderr}");
}

fn answers(place: &Place) {
    place.write("rules.json", ANSWERS);
    place.write("hay.txt", &("hay\n".repeat(1000) + "needle kaa-42\n"));
    place.write(
        "ends.json",
        r#"{"rules": [], "default": {"response": "```repl\nimport os; os._exit(4)\n```"}}"#,
    );
    place.check(&[
        ok("complete Where? --context hay.txt --lm-script rules.json", &[], "found kaa-42\n"),
        fails(
            "complete Where? --context hay.txt --lm-script ends.json",
            &[],
            125,
            &["kaa: the session has lost its state: the interpreter exited with 4"],
        ),
    ]);
}

fn without_dill() {
    // One that surely has none: of this interpreter only the standard library.
    let place = Place::new("--backend local --python ./python3");
    let script = "#!/bin/sh\nexec python3 -S \"$@\"\n";
    place.write("python3", script);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.directory.path().join("python3"), mode).unwrap();
    fs::write(place.directory.path().join("state"), [0x80, 4, b'}', b'.']).unwrap();
    place.check(&[
        // Before a cell runs whose state would be lost.
        fails("run --snapshot-out s", &["print(1)"], 2, &["kaa: --snapshot-out: ", NO_DILL]),
        fails(
            "run --snapshot-in state",
            &["print(1)"],
            2,
            &["kaa: --snapshot-in: ", "has no dill"],
        ),
        Case { stdin: "x = 5\n:fork\n:save s\nx\n", stderr: &[NO_DILL], ..ok("repl", &[], "5\n") },
        fails(
            "run --backend wasm --snapshot-in state",
            &["1"],
            2,
            &["--snapshot-in: it is of a session that isn't wasm's; add --backend local"],
        ),
        fails("snapshot inspect state", &[], 2, &["state: it is of a session that isn't wasm's"]),
    ]);
    assert!(!place.directory.path().join("s").exists());
}

fn snapshots(place: &Place) {
    let defined = "x = [1]\ndef f(n): return n + x[0]\ng = (n for n in range(3))";
    place.write("not", "no pickle");
    place.check(&[
        Case {
            stderr: &["kaa: saved the session to s, 0.0 MB", "kaa: s is without what has no saved form: g\n"],
            ..ok("run --snapshot-out s", &[defined], "")
        },
        ok("run --snapshot-in s --snapshot-out t", &["x.append(2); print(x, f(1), 'g' in globals())"], "[1, 2] 2 False\n"),
        ok("run --snapshot-in t --var y=5", &["print(x, f(2), y)"], "[1, 2] 3 5\n"),
        fails("run --snapshot-in not", &["1"], 2, &["--snapshot-in: ", "expected a pickle of dill"]),
        fails("run --snapshot-in none", &["1"], 2, &["--snapshot-in: ", "none: No such file"]),
        Case {
            stdin: "x.append(3)\nimport os; os._exit(1)\n:reset\nprint(x)\n:save u\ng = (n for n in x)\n:fork\nx.clear()\n:go 1\nx\n",
            stderr: &[":reset begins anew", "saved the session to u", "the copy is without g", "session 2, a copy of"],
            ..ok("repl --snapshot-in t", &[], "[1, 2]\n[1, 2]\n")
        },
        fails(
            "run --snapshot-out v",
            &["import os; os._exit(0)"],
            125,
            &["v is not written: no state is left (the interpreter exited with 0)"],
        ),
    ]);
    assert!(!place.directory.path().join("v").exists());
    // A loop's sessions begin with the snapshot, too.
    place.write(
        "rules.json",
        r#"{
            "rules": [{"contains": "3 [1]", "response": "FINAL(it is there)"}],
            "default": {"response": "```repl\nprint(f(2), x)\nx.append(9)\n```"}
        }"#,
    );
    let words = "complete question --lm-script rules.json --snapshot-in s --snapshot-out w";
    place.check(&[
        ok(words, &[], "it is there\n"),
        ok("run --snapshot-in w", &["print(x)"], "[1, 9]\n"),
    ]);
}

fn missing_interpreter() {
    let place = Place::new("");
    place.check(&[fails(
        "run --backend local --python /none/python3",
        &["1"],
        125,
        &[
            "kaa: `/none/python3` is not available: ",
            "install Python 3.9 or newer, or name another",
        ],
    )]);
    let output = place.run("doctor --python /none/python3", &[], "");
    let stdout = text(&output.stdout);
    assert!(
        stdout.contains("missing  local python    `/none/python3` is not available: "),
        "{stdout}"
    );
    assert!(stdout.contains("missing  backend local   see above"), "{stdout}");
}

fn missing_engine() {
    let place = Place::new("");
    let at =
        "the Docker engine at unix:///none/docker.sock is not available: there is no such socket";
    let words = "run --backend docker --docker-host unix:///none/docker.sock";
    place.check(&[fails(words, &["1"], 125, &[at])]);
    let output = place.run("doctor --docker-host unix:///none/docker.sock", &[], "");
    let stdout = text(&output.stdout);
    assert!(stdout.contains(&format!("missing  docker engine   {at}")), "{stdout}");
    assert!(stdout.contains("missing  backend docker  see above"), "{stdout}");
    assert!(
        stdout.contains("can      docker          yes       no    no        with dill"),
        "{stdout}"
    );
}

fn missing_token() {
    let place = Place::new("");
    let path = place.directory.path().join("no.toml");
    let why = format!("there is no file {}", path.display());
    let parts: &[&str] = &[
        "Modal is not available: there is no token: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set",
        &why,
        "make one with `modal token new`",
    ];
    for words in ["run -c 1 --backend modal", "modal list", "modal clean"] {
        place.check(&[fails(words, &[], 125, parts)]);
    }
    let secret = place.run("run --backend modal --modal-secret KEY=hunter2", &["1"], "");
    let stderr = text(&secret.stderr);
    assert_eq!(secret.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("write env:NAME") && !stderr.contains("hunter2"), "{stderr}");
    let stdout = text(&place.run("doctor", &[], "").stdout);
    assert!(stdout.contains("missing  modal token     Modal is not available: "), "{stdout}");
    assert!(stdout.contains("missing  backend modal   see above"), "{stdout}");
    assert!(
        stdout.contains("can      modal           yes       no    no        with dill"),
        "{stdout}"
    );
}

/// The table of capabilities in the README against the one that the doctor prints.
fn readme_table() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(readme).unwrap();
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().trim_matches('`').to_owned())
            .collect()
    };
    let output = Place::new("").run("doctor --docker-host unix:///none --python /none", &[], "");
    let stdout = text(&output.stdout);
    let mut rows = stdout.lines().filter_map(|line| line.strip_prefix("can "));
    let heads: Vec<&str> = rows.next().unwrap().split_whitespace().collect();
    let backends: Vec<Vec<String>> = rows
        .map(|row| {
            row.replace("with dill", "with-dill").split_whitespace().map(str::to_owned).collect()
        })
        .collect();
    assert_eq!(backends.len(), 4, "{stdout}");
    for (at, head) in heads.iter().enumerate() {
        let begin = format!("| `{head}` |");
        let line = readme.lines().find(|line| line.starts_with(&begin));
        let line = line.unwrap_or_else(|| panic!("the README has no row {begin}"));
        let said = backends.iter().map(|row| match row[at + 1].as_str() {
            "yes" => "●".to_owned(),
            "no" => "○".to_owned(),
            other => other.replace('-', " "),
        });
        let expected: Vec<String> = [(*head).to_owned()].into_iter().chain(said).collect();
        assert_eq!(cells(line)[..5], expected, "{line}");
    }
}

fn docker_flags(place: &Place) {
    place.write("data.txt", "inside");
    let mount = format!("run --mount {}:/data", place.directory.path().display());
    place.check(&[
        ok("run", &["import os; print(os.getuid(), os.listdir('/sys/class/net'))"], "65534 ['lo']\n"),
        ok("run --docker-user 1000:1001", &["import os; print(os.getuid(), os.getgid())"], "1000 1001\n"),
        ok("run --python /usr/bin/python3", &["import sys; print(sys.executable)"], "/usr/bin/python3\n"),
        ok(&mount, &["print(open('/data/data.txt').read())"], "inside\n"),
        fails(&mount, &["open('/data/more', 'w')"], 1, &["OSError: [Errno 30]"]),
        fails("run --pids 32", &["import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(9,)).start()"], 1, &["RuntimeError: can't start new thread"]),
        fails("run --docker-runtime none", &["1"], 125, &["expected the runtime `none`", "runc"]),
        fails("run --python none", &["1"], 125, &["Python 3.9 or newer at `none`"]),
        fails("run --docker-network none-such", &["1"], 125, &["none-such"]),
    ]);
    let missing = "run --backend docker --docker-image kaa-test:none --docker-pull never";
    place.check(&[fails(missing, &["1"], 125, &["the image `kaa-test:none` is not available"])]);
}

fn docker_doctor(place: &Place) {
    let output = place.run("doctor", &[], "");
    let stdout = text(&output.stdout);
    for part in [
        "ok       docker engine   ",
        ", API 1.",
        "ok       docker runtimes ",
        "ok       docker image    python:3.11-slim is there\n",
        "ok       docker python   cpython 3.",
        "ok       backend docker  ready\n",
    ] {
        assert!(stdout.contains(part), "{part:?} is not in\n{stdout}");
    }
    let output = place.run("doctor --docker-image kaa-test:none", &[], "");
    let stdout = text(&output.stdout);
    assert!(stdout.contains("note     docker image    kaa-test:none isn't there"), "{stdout}");
}
