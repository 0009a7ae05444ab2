//! The program as a user meets it: every command in a directory of its own.
//!
//! The tests need the image `base` in a store: that of `KAA_TEST_CACHE` if it is set, otherwise the
//! user's. The first test that runs makes it, which takes minutes on a machine that never did.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use regex::Regex;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// What one command line must do. `stdout` is all of it, `stderr` a part.
struct Case<'a> {
    args: Vec<String>,
    stdin: &'a str,
    code: i32,
    stdout: &'a str,
    stderr: &'a str,
}

/// A command line of words, with the code of each cell after them, that succeeds.
fn ok<'a>(words: &str, cells: &[&str], stdout: &'a str) -> Case<'a> {
    let words = words.split_whitespace().map(str::to_owned);
    let cells = cells.iter().flat_map(|cell| ["-c".to_owned(), (*cell).to_owned()]);
    Case { args: words.chain(cells).collect(), stdin: "", code: 0, stdout, stderr: "" }
}

/// One that ends with `code`, prints nothing, and says why.
fn fails<'a>(words: &str, cells: &[&str], code: i32, stderr: &'a str) -> Case<'a> {
    Case { code, stderr, ..ok(words, cells, "") }
}

impl<'a> Case<'a> {
    fn stdin(self, stdin: &'a str) -> Self {
        Self { stdin, ..self }
    }

    fn prints(self, stdout: &'a str) -> Self {
        Self { stdout, ..self }
    }

    fn says(self, stderr: &'a str) -> Self {
        Self { stderr, ..self }
    }
}

/// `kaa` without an image made sure of.
fn bare(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kaa"));
    command.current_dir(directory).env("KAA_CLI_TEST", "from the host");
    // Nobody's account at Modal is used.
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("MODAL_") {
            command.env_remove(variable);
        }
    }
    command.env("MODAL_CONFIG_PATH", directory.join("no.toml"));
    if let Some(cache) = std::env::var_os("KAA_TEST_CACHE") {
        command.env("KAA_CACHE", cache);
    }
    command
}

/// `kaa` with an image to run from.
fn kaa(directory: &Path) -> Command {
    static READY: OnceLock<()> = OnceLock::new();
    READY.get_or_init(|| {
        let here = std::env::temp_dir();
        // Its progress is seen by whoever waits for it.
        let status = bare(&here).args(["image", "build", "base"]).stdout(Stdio::null()).status();
        assert!(status.unwrap().success(), "`kaa image build base` failed");
    });
    bare(directory)
}

fn store() -> PathBuf {
    let set = std::env::var_os("KAA_TEST_CACHE").or_else(|| std::env::var_os("KAA_CACHE"));
    set.map_or_else(|| dirs::cache_dir().unwrap().join("kaa"), PathBuf::from)
}

fn start(directory: &Path, args: &[&str]) -> Child {
    kaa(directory)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(directory: &Path, args: &[&str], stdin: &[u8]) -> Output {
    let mut child = start(directory, args);
    let mut pipe = child.stdin.take().unwrap();
    let stdin = stdin.to_vec();
    // A program that doesn't read closes the pipe.
    let writer = std::thread::spawn(move || {
        let _ = pipe.write_all(&stdin);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn check(directory: &Path, cases: &[Case<'_>]) {
    for case in cases {
        let args: Vec<&str> = case.args.iter().map(String::as_str).collect();
        let output = run(directory, &args, case.stdin.as_bytes());
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let seen = format!("{:?}\nstdout: {stdout}\nstderr: {stderr}", case.args);
        assert_eq!(output.status.code(), Some(case.code), "{seen}");
        assert_eq!(stdout, case.stdout, "{seen}");
        assert!(stderr.contains(case.stderr), "{:?} is not in stderr of {seen}", case.stderr);
    }
}

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// The JSON objects that a run printed.
fn objects(directory: &Path, args: &[&str]) -> Vec<Json> {
    let output = run(directory, args, b"");
    let stdout = text(&output.stdout);
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn exit_codes() {
    let here = directory();
    check(
        here.path(),
        &[
            ok("run", &["print(1+1)"], "2\n"),
            ok("run", &["1+1"], ""),
            fails("run", &["print('a'); 1/0"], 1, "ZeroDivisionError: division by zero")
                .prints("a\n"),
            fails("run", &["def f(:"], 1, "SyntaxError"),
            fails("run", &["import sys; sys.exit(7)"], 7, ""),
            fails("run", &["import sys; sys.exit(-1)"], 255, ""),
            ok("run", &["import sys; sys.exit(0)"], ""),
            fails("run", &["import os; os._exit(3)"], 3, "rolled back"),
            fails("run", &["import os; os.abort()"], 134, "rolled back"),
            ok("run", &["1/0", "print('on')"], "on\n").says("ZeroDivisionError"),
            ok("run", &["x = 1", "import os; os._exit(3)", "print(x)"], "1\n"),
            fails("run", &[], 2, "kaa: there is nothing to run: name a FILE"),
            fails("run missing.py", &[], 2, "kaa: FILE: reading missing.py: No such file"),
            fails(
                "run --image nope",
                &["1"],
                2,
                "kaa: --image: image `nope`: there is no such image",
            ),
            fails("frob", &[], 2, "unrecognized subcommand 'frob'"),
            fails("", &[], 2, "Usage: kaa <COMMAND>"),
        ],
    );
}

#[test]
fn limits_stop_the_cell_and_keep_the_session() {
    let here = directory();
    let forever = "while True: pass";
    let stubborn = "while True:\n  try:\n    while True: pass\n  except BaseException: pass";
    let sleep = "import time; time.sleep(100)";
    check(
        here.path(),
        &[
            fails(
                "run --fuel 50e6",
                &[forever],
                124,
                "kaa: the cell was stopped by the fuel limit; --fuel raises it",
            ),
            fails(
                "run --compute 200ms",
                &["x = 1", forever],
                124,
                "kaa: cell 2 was stopped by the compute limit",
            ),
            fails("run --wall 0.3", &[sleep], 124, "stopped by the wall limit"),
            ok("run --fuel 50e6", &["x = 5", forever, "print(x)"], "5\n")
                .says("cell 2 was stopped by the fuel limit"),
            ok("run --compute 200ms --grace 100ms", &["x = 6", stubborn, "print(x)"], "6\n")
                .says("kaa: the session is as it was before that cell"),
            ok("run --wall 300ms", &["x = 7", sleep, "print(x)"], "7\n").says("wall"),
            fails("run --memory 128M", &["bytearray(2**28)"], 1, "MemoryError"),
            ok("run --output 4", &["print('abcdef')"], "abcd")
                .says("stdout is cut, 4 of 7 bytes are shown; --output keeps more"),
            fails("run --disk 64K", &["open('/tmp/f', 'wb').write(bytes(1 << 20))"], 1, "OSError"),
            ok(
                "run --compute 200ms",
                &["try:\n  while True: pass\nexcept LimitReached: print('caught')"],
                "caught\n",
            )
            .says("kaa: the cell reached the compute limit and caught it"),
        ],
    );
}

#[test]
fn the_json_object_has_exactly_these_keys_in_this_order() {
    let here = directory();
    fs::write(here.path().join("lm.json"), r#"{"default": {"response": "four"}}"#).unwrap();
    let output = run(
        here.path(),
        &[
            "run",
            "--json",
            "--lm-script",
            "lm.json",
            "-c",
            "print('out'); x = 1; x + 1",
            "-c",
            "import sys; a = llm_query('2+2'); print(a, file=sys.stderr); answer['content'] = a; answer['ready'] = True",
            "-c",
            "1/0",
            "-c",
            "import sys; sys.exit(-3)",
        ],
        b"",
    );
    let numbers = Regex::new(r#""(fuel|\w+_ms|memory_bytes)":[0-9.]+"#).unwrap();
    let stdout = text(&output.stdout);
    let lines: Vec<_> = stdout.lines().map(|line| numbers.replace_all(line, r#""$1":N"#)).collect();
    let usage = r#""usage":{"fuel":N,"compute_ms":N,"wall_ms":N,"host_wait_ms":N,"memory_bytes":N,"lm_calls":"#;
    let traceback = r#"Traceback (most recent call last):\n  File \"<cell 3>\", line 1, in <module>\n    1/0\n    ~^~\nZeroDivisionError: division by zero\n"#;
    let expected = [
        format!(
            r#"{{"cell":1,"outcome":"completed","limit":null,"rolled_back":false,"poisoned":false,"exit_code":0,"stdout":"out\n","stderr":"","stdout_bytes":4,"stderr_bytes":0,"stdout_truncated":false,"stderr_truncated":false,"value":"2","exception":null,"variables":[{{"name":"x","type":"int","repr":"1"}}],"final_answer":null,"lm_calls":[],{usage}0}}}}"#
        ),
        format!(
            r#"{{"cell":2,"outcome":"completed","limit":null,"rolled_back":false,"poisoned":false,"exit_code":0,"stdout":"","stderr":"four\n","stdout_bytes":0,"stderr_bytes":5,"stdout_truncated":false,"stderr_truncated":false,"value":null,"exception":null,"variables":[{{"name":"sys","type":"module","repr":"<module 'sys' (built-in)>"}},{{"name":"a","type":"str","repr":"'four'"}}],"final_answer":"four","lm_calls":[{{"model":"scripted","prompt":"2+2","response":"four","usage":[{{"model":"scripted","calls":1,"input_tokens":1,"output_tokens":1,"cost":null}}],"execution_ms":N}}],{usage}1}}}}"#
        ),
        format!(
            r#"{{"cell":3,"outcome":"raised","limit":null,"rolled_back":false,"poisoned":false,"exit_code":1,"stdout":"","stderr":"{traceback}","stdout_bytes":0,"stderr_bytes":126,"stdout_truncated":false,"stderr_truncated":false,"value":null,"exception":{{"type":"ZeroDivisionError","message":"division by zero","traceback":"{traceback}"}},"variables":[],"final_answer":null,"lm_calls":[],{usage}0}}}}"#
        ),
    ];
    for (line, expected) in lines.iter().zip(&expected) {
        assert_eq!(line, expected);
    }
    assert_eq!(lines.len(), 4);
    assert!(lines[3].contains(
        r#""outcome":"exited","limit":null,"rolled_back":false,"poisoned":false,"exit_code":-3,"#
    ));
    assert_eq!(output.status.code(), Some(253));
    let limit =
        objects(here.path(), &["run", "--json", "--fuel", "50e6", "-c", "while True: pass"]);
    assert_eq!(limit[0]["outcome"], "limit");
    assert_eq!(limit[0]["limit"], "fuel");
    assert_eq!(limit[0]["exit_code"], 124);
    let bytes = objects(
        here.path(),
        &["run", "--json", "-c", "import sys; sys.stdout.buffer.write(b'\\xff')"],
    );
    assert_eq!((&bytes[0]["stdout"], &bytes[0]["stdout_bytes"]), (&json!("\u{fffd}"), &json!(1)));
}

#[test]
fn cells_come_from_files_stdin_and_flags() {
    let here = directory();
    let file = "x = 1\n# %% second\nprint(x)\n1/0\n#%%\nprint('third')\n";
    fs::write(here.path().join("cells.py"), file).unwrap();
    fs::write(here.path().join("marks.py"), "\u{feff}# %% only\r\nprint(1)\r\n").unwrap();
    fs::write(here.path().join("latin.py"), b"print('\xe9')").unwrap();
    check(
        here.path(),
        &[
            ok("run cells.py --cells", &[], "1\nthird\n").says("File \"<cell 2>\", line 2"),
            fails("run cells.py", &[], 1, "line 4").prints("1\n"),
            ok("run cells.py --cells", &["print('last')"], "1\nthird\nlast\n"),
            ok("run --cells marks.py", &[], "1\n"),
            fails("run latin.py", &[], 2, "latin.py is not UTF-8 at byte 7"),
            ok("run -", &[], "__main__\n").stdin("print(__name__)"),
            ok("run - --cells", &["print(y)"], "2\n").stdin("y=1\n# %%\ny+=1"),
            fails("run - --context -", &[], 2, "--context -: stdin is already the cell's code"),
            ok("run", &["-1"], ""),
            ok("run", &["print('bytes', end='')", "print('\\x1b[1m')"], "bytes\u{1b}[1m\n"),
        ],
    );
}

#[test]
fn contexts_arrive_exactly() {
    let here = directory();
    let line = "a\r\nb\0c\u{1f40d} \\ \"\"\"'''\t\u{feff}\n";
    let big = line.repeat(10_000_000 / line.len() + 1);
    let hash: String = Sha256::digest(&big).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(here.path().join("big.txt"), &big).unwrap();
    fs::write(here.path().join("wide.txt"), "\u{1f40d}".repeat(6_000_000)).unwrap();
    fs::write(here.path().join("bad.txt"), b"ab\xff").unwrap();
    fs::write(here.path().join("data.json"), r#"{"rows": [1, 2.5, null, "x"]}"#).unwrap();
    fs::write(here.path().join("bad.json"), "{").unwrap();
    let code = "import hashlib; print(hashlib.sha256(context.encode()).hexdigest(), len(context))";
    let expected = format!("{hash} {}\n", big.chars().count());
    check(
        here.path(),
        &[
            ok("run --context big.txt", &[code], &expected),
            ok("run --context -", &[code], &expected).stdin(&big),
            fails("run --context bad.txt", &["1"], 2, "kaa: --context:"),
            ok(
                "run --context-json data.json",
                &["print(context['rows'])"],
                "[1, 2.5, None, 'x']\n",
            ),
            fails("run --context-json bad.json", &["1"], 2, "kaa: --context-json:"),
            ok(
                "run --context - --context-json data.json",
                &["print(context_0, len(context_1))"],
                "text 1\n",
            )
            .stdin("text"),
            fails("run --context wide.txt --memory 64M", &["1"], 2, "--memory"),
        ],
    );
}

#[test]
fn variables_and_profiles() {
    let here = directory();
    check(
        here.path(),
        &[
            ok(
                "run --var n=5 --var s=\"a=b\" --var o={\"k\":[1,null,true]}",
                &["print(n, s, o)"],
                "5 a=b {'k': [1, None, True]}\n",
            ),
            ok(
                "run --var n=-123456789012345678901234567890",
                &["print(n + 1)"],
                "-123456789012345678901234567889\n",
            ),
            ok("run --profile openenv", &["1 + 1"], "2\n"),
            ok("run", &["answer['content'] = '42'; answer['ready'] = True", "pass"], "")
                .says("kaa: final answer: 42\n"),
            fails("run --allow-import math", &["import math", "import socket"], 1, "socket"),
        ],
    );
    let quiet = run(here.path(), &["run", "--quiet", "--output", "1", "-c", "print('abc')"], b"");
    assert_eq!(text(&quiet.stderr), "");
}

#[test]
fn mounts_reach_only_what_they_name() {
    let here = directory();
    let (inside, outside) = (here.path().join("inside"), here.path().join("outside"));
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(inside.join("file"), "read me").unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    symlink(&outside, inside.join("link")).unwrap();
    symlink("../outside/secret", inside.join("relative")).unwrap();
    let write = "open('/data/new', 'w').write('written')";
    let refused = "import os\nfor path in ['/data/../outside/secret', '/data/link/secret', '/data/relative', \
                   '/etc/passwd', os.path.realpath('/data') + '/../../etc/passwd']:\n  try: print(open(path).read())\n  \
                   except OSError: print('refused')";
    check(
        here.path(),
        &[
            ok("run --mount inside:/data", &["print(open('/data/file').read())"], "read me\n"),
            fails("run --mount inside:/data", &[write], 1, "Error"),
            fails("run --mount inside:/data", &["import os; os.remove('/data/file')"], 1, "Error"),
            ok(
                "run --mount inside:/data:rw",
                &[refused],
                "refused\nrefused\nrefused\nrefused\nrefused\n",
            ),
            fails("run", &["open('/data/file')"], 1, "FileNotFoundError"),
        ],
    );
    assert!(!inside.join("new").exists());
    check(here.path(), &[ok("run --mount inside:/data:rw", &[write], "")]);
    assert_eq!(fs::read_to_string(inside.join("new")).unwrap(), "written");
}

#[test]
fn the_environment_is_given_by_name() {
    let here = directory();
    let show = "import os; print(os.environ.get('A'), os.environ.get('KAA_CLI_TEST'), os.environ.get('PATH'))";
    check(
        here.path(),
        &[
            ok("run", &[show], "None None None\n"),
            ok("run --env A=x=y --env KAA_CLI_TEST", &[show], "x=y from the host None\n"),
            fails(
                "run --env KAA_CLI_TEST_UNSET",
                &[show],
                2,
                "--env KAA_CLI_TEST_UNSET: it is not set here",
            ),
        ],
    );
}

#[test]
fn a_seed_and_a_fixed_clock_make_runs_the_same() {
    let here = directory();
    let code = "import random, time, uuid, os; print(random.random(), time.time(), uuid.uuid4(), os.urandom(4))";
    let seen = |flags: &[&str]| {
        let args = [&["run", "--json", "-c", code], flags].concat();
        let object = objects(here.path(), &args).remove(0);
        (object["stdout"].clone(), object["usage"]["fuel"].clone())
    };
    let seeded = ["--seed", "7", "--fixed-clock", "1700000000"];
    let first = seen(&seeded);
    assert!(first.0.as_str().unwrap().contains(" 1700000000."), "{first:?}");
    assert_eq!(first, seen(&seeded));
    assert_ne!(first.0, seen(&["--seed", "8", "--fixed-clock", "1700000000"]).0);
    assert_ne!(seen(&[]).0, seen(&[]).0);
}

#[test]
fn a_script_or_a_handler_answers_queries() {
    let here = directory();
    let script = r#"{"rules": [
        {"regex": "capital of (?P<country>\\w+)", "response": "${country} has one"},
        {"contains": "overload", "error": "429: try later"}]}"#;
    fs::write(here.path().join("lm.json"), script).unwrap();
    fs::write(here.path().join("bad.json"), r#"{"rules": [{"response": "x"}]}"#).unwrap();
    let batch = "print(llm_query_batched(['capital of Peru', 'overload']))";
    let address = handler();
    check(
        here.path(),
        &[
            ok(
                "run --lm-script lm.json",
                &[batch],
                "['Peru has one', 'Error: llm() call failed - 429: try later']\n",
            ),
            ok(
                "run --lm-script lm.json --lm-calls 1",
                &["llm_query('capital of A')\nprint(llm_query('capital of B')[:6])"],
                "Error:\n",
            ),
            ok("run", &["print(llm_query('x'))"], "Error: No LM handler configured\n"),
            ok(&format!("run --lm {address}"), &["print(llm_query('ping'))"], "pong\n"),
            fails(
                "run --lm-script bad.json",
                &["1"],
                2,
                "--lm-script: bad.json: LM script, rule 1",
            ),
            fails(
                &format!("run --lm {address} --lm-script lm.json"),
                &["1"],
                2,
                "'--lm-script <FILE>'",
            ),
        ],
    );
}

/// An LM handler that answers one request with `pong`; its address.
fn handler() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut length = [0; 4];
        peer.read_exact(&mut length).unwrap();
        let mut request = vec![0; u32::from_be_bytes(length) as usize];
        peer.read_exact(&mut request).unwrap();
        assert!(text(&request).contains("ping"));
        let reply = br#"{"chat_completion": {"root_model": "m", "response": "pong"}}"#;
        peer.write_all(&(reply.len() as u32).to_be_bytes()).unwrap();
        peer.write_all(reply).unwrap();
    });
    address
}

#[test]
fn a_bad_value_is_refused_by_the_name_of_its_flag() {
    let here = directory();
    fs::write(here.path().join("file"), "x").unwrap();
    for (flag, values) in [
        ("--image", &["", "../x", "nope"][..]),
        ("--profile", &["", "smol"]),
        ("--context", &["missing"]),
        ("--context-json", &["missing", "-", "file"]),
        ("--var", &["n", "n=x", "1=1", "answer=1", "class=1"]),
        ("--mount", &["x", "missing:/x", "file:/x", ".:x", ".:/", ".:/tmp", ".:/a/../b", ":/x"]),
        ("--env", &["", "=x"]),
        ("--fuel", &["0", "-1", "x", "1e30"]),
        ("--compute", &["0", "-1s", "x", "9e9", "nan"]),
        ("--wall", &["0", "5 s"]),
        ("--grace", &["0ms"]),
        ("--memory", &["1M", "5G", "512MB", "x"]),
        ("--output", &["-1", "2G"]),
        ("--disk", &["x"]),
        ("--lm-calls", &["-1", "99999999999"]),
        ("--tool-calls", &["x"]),
        ("--seed", &["-1", "x"]),
        ("--fixed-clock", &["-1", "now", "18446744074"]),
        ("--lm", &["localhost", "host:x"]),
        ("--lm-script", &["missing", "file"]),
        ("--allow-import", &[""]),
        ("--wheel", &["missing"]),
    ] {
        for value in values {
            let flag_and_value = format!("{flag}={value}");
            let output = run(here.path(), &["run", "-c", "1", &flag_and_value], b"");
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{flag_and_value}: {stderr}");
            assert!(stderr.contains(flag), "{flag_and_value}: {stderr}");
            assert!(output.stdout.is_empty());
        }
    }
    check(
        here.path(),
        &[
            fails("run --cells", &["1"], 2, "<FILE|-"),
            fails("image build --import csv", &[], 2, "<NAME>"),
            fails("repl --context -", &[], 2, "stdin is already where cells are typed"),
        ],
    );
}

#[test]
fn nothing_is_left_behind_and_a_closed_pipe_is_no_error() {
    let here = directory();
    let mut child = start(here.path(), &["run", "-c", "print('x' * 1_000_000)"]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let child = start(here.path(), &["run", "-c", "open('/tmp/f', 'w').write('x')"]);
    let own = format!("{}-", child.id());
    assert!(child.wait_with_output().unwrap().status.success());
    let scratch = fs::read_dir(store().join("scratch")).unwrap();
    let left: Vec<_> = scratch.flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(&own)), "{left:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_can_not_be_written_is_an_error() {
    let here = directory();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = kaa(here.path()).args(["run", "-c", "print(1)"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).starts_with("kaa: writing to stdout: "));
}

#[test]
fn ctrl_c_stops_the_cell() {
    let here = directory();
    let interrupt = |child: &Child| {
        std::thread::sleep(Duration::from_millis(300));
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    };
    let mut child = start(
        here.path(),
        &["run", "-c", "print('on')", "-c", "while True: pass", "-c", "print('not')"],
    );
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    interrupt(&child);
    line.clear();
    stdout.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), line.as_str()), (Some(130), ""));
    assert!(text(&output.stderr).contains("KeyboardInterrupt"), "{}", text(&output.stderr));

    let mut child = start(here.path(), &["repl"]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin.write_all(b"x = 5; x\nwhile True: pass\n\n").unwrap();
    stdout.read_line(&mut line).unwrap();
    interrupt(&child);
    stdin.write_all(b"x + 1\n").unwrap();
    drop(stdin);
    stdout.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), line.as_str()), (Some(0), "5\n6\n"));
    assert!(text(&output.stderr).contains("kaa: the cell was interrupted"));
}

#[test]
fn a_repl_takes_cells_from_a_pipe() {
    let here = directory();
    let lines = |stdin, stdout, stderr| ok("repl", &[], stdout).says(stderr).stdin(stdin);
    check(
        here.path(),
        &[
            lines("x = 1\nx + 1\nNone\n'text'\n", "2\n'text'\n", ""),
            lines("def f(a):\n    b = a\n    return b * 2\n\nf(4)\n", "8\n", ""),
            lines("x = [1,\n\n2]\nx\n'''a\n\nb'''\n1 + \\\n2\n", "[1, 2]\n'a\\n\\nb'\n3\n", ""),
            lines(
                "for i in range(2):\n  if i:\n    print('odd')\n  else:\n    print('even')\n\n",
                "even\nodd\n",
                "",
            ),
            lines("def f():\n  return 1\nf()\n", "1\n", ""),
            lines("x = 1\n1/0\nx\n", "1\n", "ZeroDivisionError"),
            lines("x = 1\nimport os; os._exit(3)\nx\n", "1\n", "kaa: the cell exited with 3"),
            lines("x = 1\ny = 'a'\n:vars\n", "x: int = 1\ny: str = 'a'\n", ""),
            lines("x = 1\n:reset\nx\n", "", "NameError: name 'x' is not defined"),
            lines("1\n:quit\n2\n", "1\n", ""),
            lines(":frob\n", "", "kaa: there is no command `:frob`; see :help"),
            lines("print('a', end='')\n'b'\n", "a'b'\n", ""),
            lines("if True:\n  print('unfinished')", "unfinished\n", ""),
            ok("repl --var n=1", &[], "1\n").stdin("n += 1\n:reset\nn\n"),
            ok("repl --profile openenv", &[], "2\n").stdin("1 + 1\n"),
        ],
    );
    let usage = text(&run(here.path(), &["repl"], b":usage\n1\n:usage\n").stdout);
    assert!(usage.starts_with("session: 0 fuel"), "{usage}");
    assert!(usage.contains("last cell: ") && usage.contains(" MB of memory"), "{usage}");
    let help = text(&run(here.path(), &["repl"], b":help\n").stdout);
    for command in [":vars", ":usage", ":reset", ":help", ":quit"] {
        assert!(help.contains(command), "{help}");
    }
}

/// A wheel that holds one module.
fn write_wheel(path: &Path) {
    let mut wheel = zip::ZipWriter::new(fs::File::create(path).unwrap());
    wheel.start_file("wheeled.py", zip::write::SimpleFileOptions::default()).unwrap();
    wheel.write_all(b"origin = 'wheel'\n").unwrap();
    wheel.finish().unwrap();
}

#[test]
fn custom_images() {
    let here = directory();
    let name = format!("cli-test-{}", std::process::id());
    let at = |name: &str| here.path().join(name);
    fs::create_dir_all(at("lib/package")).unwrap();
    fs::write(at("lib/package/__init__.py"), "from .part import origin\n").unwrap();
    fs::write(at("lib/package/part.py"), "origin = 'directory'\n").unwrap();
    write_wheel(&at("wheeled-1-py3-none-any.whl"));
    // The image's key, and so its files, belong to this test alone.
    fs::write(at("setup.py"), format!("import package\nready = [package.origin, {:?}]\n", name))
        .unwrap();
    fs::write(at("broken.py"), "1/0\n").unwrap();

    let args = [
        "image",
        "build",
        &name,
        "--setup",
        "setup.py",
        "--path",
        "lib",
        "--pure-wheel",
        "wheeled-1-py3-none-any.whl",
        "--import",
        "xml.dom",
    ];
    let built = run(here.path(), &args, b"");
    assert_eq!(built.status.code(), Some(0), "{}", text(&built.stderr));
    assert!(text(&built.stderr).contains("kaa: boot … image"), "{}", text(&built.stderr));
    assert!(text(&built.stdout).starts_with(&name));

    let use_it = "import sys, wheeled; print(ready[0], wheeled.origin, 'xml.dom' in sys.modules)";
    check(here.path(), &[ok(&format!("run --image {name}"), &[use_it], "directory wheel True\n")]);
    let inspected = &objects(here.path(), &["image", "inspect", &name, "--json"])[0];
    assert_eq!(inspected["name"], name.as_str());
    assert_eq!(inspected["from"], "base");
    assert_eq!(inspected["files"], true);
    let listed = objects(here.path(), &["image", "list", "--json"]);
    assert!(listed.iter().any(|image| image["name"] == name.as_str()), "{listed:?}");
    assert!(text(&run(here.path(), &["image", "list"], b"").stdout).contains(&name));
    assert!(text(&run(here.path(), &["image", "inspect", &name], b"").stdout).contains("xml.dom"));
    let verified = run(here.path(), &["image", "verify", &name], b"");
    assert!(text(&verified.stdout).contains(" ok "), "{}", text(&verified.stderr));

    // One byte is enough for `verify`, a missing one for every start.
    let memory = store().join("images").join(inspected["key"].as_str().unwrap()).join("memory.bin");
    let mut bytes = fs::read(&memory).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&memory, &bytes).unwrap();
    let damaged = format!("{name:<16} damaged\n");
    check(
        here.path(),
        &[fails(&format!("image verify {name}"), &[], 125, "kaa: the file ").prints(&damaged)],
    );
    fs::write(&memory, &bytes[..last]).unwrap();
    check(
        here.path(),
        &[
            fails(
                &format!("run --image {name}"),
                &["1"],
                125,
                "memory.bin can't be used: expected",
            ),
            ok(&format!("image remove {name}"), &[], "").says("removed the image"),
            fails(&format!("image remove {name}"), &[], 2, "there is no such image"),
            fails(&format!("image inspect {name}"), &[], 2, "there is no such image"),
            fails(&format!("run --image {name}"), &["1"], 2, "there is no such image"),
            fails(
                &format!("image build {name} --setup missing.py"),
                &[],
                2,
                "--setup: missing.py: No such file",
            ),
            fails(
                &format!("image build {name} --path missing"),
                &[],
                2,
                "--path: missing: No such file",
            ),
            fails(&format!("image build {name} --setup broken.py"), &[], 2, "ZeroDivisionError"),
            fails(&format!("image build {name} --import no_such_module"), &[], 2, "no_such_module"),
            fails(&format!("image build {name} --from nope"), &[], 2, "there is no such image"),
            fails(
                "image build base --import csv",
                &[],
                2,
                "belongs to an image that comes with Kaa",
            ),
            fails("image build ../x", &[], 2, "use 1 to 64 letters"),
        ],
    );
    assert!(!memory.exists());
}

#[test]
fn doctor_says_what_works() {
    let here = directory();
    let output = run(here.path(), &["doctor"], b"");
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    for part in [
        "ok       guest           compiled",
        "ok       a cell ",
        "ok       backend wasm    ready",
        "ok       backend local   ready, without any isolation",
        "missing  backend modal   see above",
        "cpus",
        "cache",
        "checkpoints",
        "disk",
        "python with pip",
    ] {
        assert!(stdout.contains(part), "{part:?} is not in\n{stdout}");
    }
    let open = here.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    let output = kaa(here.path()).arg("doctor").env("KAA_CACHE", &open).output().unwrap();
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(125), "{stdout}");
    assert!(stdout.contains("close it with chmod go-rwx"), "{stdout}");
    let output =
        kaa(here.path()).args(["run", "-c", "1"]).env("KAA_CACHE", &open).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", text(&output.stderr));
}
