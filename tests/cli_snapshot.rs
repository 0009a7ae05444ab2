//! Snapshots on the command line: saving, going on in another process, looking into files, and the
//! commands of the REPL that go back and apart.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

/// What one run of the program must do. `stdout` is all of it, `stderr` a part.
#[derive(Clone, Copy)]
struct Case<'a> {
    args: &'a str,
    cells: &'a [&'a str],
    stdin: &'a str,
    code: i32,
    stdout: &'a str,
    stderr: &'a str,
}

fn ok<'a>(args: &'a str, cells: &'a [&'a str], stdout: &'a str) -> Case<'a> {
    Case { args, cells, stdin: "", code: 0, stdout, stderr: "" }
}

fn fails<'a>(args: &'a str, cells: &'a [&'a str], code: i32, stderr: &'a str) -> Case<'a> {
    Case { code, stderr, ..ok(args, cells, "") }
}

/// Lines into a REPL; what it complains of is in `stderr`.
fn repl<'a>(stdin: &'a str, stdout: &'a str, stderr: &'a str) -> Case<'a> {
    Case { stdin, stderr, ..ok("repl", &[], stdout) }
}

/// Runs the program and gives its exit code, stdout and stderr.
fn kaa(directory: &Path, case: &Case<'_>) -> (i32, String, String) {
    common::image("base");
    let mut child = Command::new(env!("CARGO_BIN_EXE_kaa"))
        .current_dir(directory)
        .env("KAA_CACHE", common::store_root())
        .args(case.args.split_whitespace())
        .args(case.cells.iter().flat_map(|cell| ["-c", cell]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Less than a pipe holds; a program that doesn't read closes it.
    let _ = child.stdin.take().unwrap().write_all(case.stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn check(directory: &Path, cases: &[Case<'_>]) {
    for case in cases {
        let (code, stdout, stderr) = kaa(directory, case);
        let Case { args, cells, stdin, .. } = case;
        let seen = format!("{args} {cells:?} {stdin}\nstdout: {stdout}\nstderr: {stderr}");
        assert_eq!(code, case.code, "{seen}");
        assert_eq!(stdout, case.stdout, "{seen}");
        assert!(stderr.contains(case.stderr), "{:?} is not in stderr of {seen}", case.stderr);
    }
}

#[test]
fn another_process_goes_on_where_one_has_ended() {
    let here = tempfile::tempdir().unwrap();
    let draw = "import random, os, time; print(random.random(), os.urandom(4).hex(), time.time())";
    let (_, both, _) = kaa(here.path(), &ok("run --seed 5 --fixed-clock 1000", &[draw, draw], ""));
    let (first, second) = both.split_at(both.find('\n').unwrap() + 1);
    let make = "x = [1]; g = iter('abc'); next(g); open('/tmp/f', 'w').write('kept')";
    check(
        here.path(),
        &[
            ok("run --seed 5 --fixed-clock 1000 --snapshot-out s", &[draw], first),
            ok("run --snapshot-in s", &[draw], second),
            ok("run --snapshot-in s --quiet", &[draw], second),
            Case { stderr: "saved the session to v, ", ..ok("run --snapshot-out v", &[make], "") },
            ok(
                "run --snapshot-in v --snapshot-out w",
                &["x.append(2); print(x, next(g), open('/tmp/f').read())"],
                "[1, 2] b kept\n",
            ),
            ok("run --snapshot-in w", &["print(x, next(g))"], "[1, 2] c\n"),
            ok("run --snapshot-in v", &["print(x, next(g))"], "[1] b\n"),
            ok("run --snapshot-in v --var x=5", &["print(x, next(g))"], "5 b\n"),
            ok("run --profile openenv --snapshot-out o", &["x = 7", "x"], "7\n7\n"),
            ok("run --snapshot-in o", &["x + 1"], "8\n"),
            fails("run --snapshot-out s", &["x = 1; raise KeyError(x)"], 1, "KeyError"),
            ok("run --snapshot-in s", &["print(x)"], "1\n"),
            Case {
                stdin: "print(x)\nx = 2\n",
                ..ok("repl --snapshot-in s --snapshot-out s", &[], "1\n")
            },
            ok("run --snapshot-in s", &["print(x)"], "2\n"),
        ],
    );
}

#[test]
fn what_cannot_be_used_is_refused_with_a_sentence() {
    let here = tempfile::tempdir().unwrap();
    let path = |name: &str| here.path().join(name);
    check(here.path(), &[ok("run --snapshot-out good", &["x = 1"], "")]);
    let good = fs::read(path("good")).unwrap();
    fs::write(path("text"), "print(1)").unwrap();
    fs::write(path("cut"), &good[..good.len() - 7]).unwrap();
    fs::write(path("short"), &good[..100]).unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::create_dir(path("dir")).unwrap();
    let other = |change: fn(&mut Json)| forge(&good, change);
    fs::write(path("other"), other(|header| header["image"]["key"] = "a".repeat(64).into()))
        .unwrap();
    fs::write(path("none"), other(|header| header["image"]["name"] = "nobody".into())).unwrap();
    fs::write(
        path("profile"),
        other(|header| header["session"]["told"]["profile"] = "\u{1b}x".into()),
    )
    .unwrap();
    let go_on = "--snapshot-in: the snapshot can't be used: expected ";
    let open = "f = open('/tmp/notes.txt', 'w')";
    check(
        here.path(),
        &[
            fails(
                "run --snapshot-in missing",
                &["1"],
                2,
                "kaa: --snapshot-in: opening the snapshot missing: No such file",
            ),
            fails("run --snapshot-in dir", &["1"], 2, "kaa: --snapshot-in: "),
            fails("run --snapshot-in text", &["1"], 2, go_on),
            fails("run --snapshot-in text", &["1"], 2, "a file of another kind; check the path"),
            fails("run --snapshot-in empty", &["1"], 2, go_on),
            fails("run --snapshot-in short", &["1"], 2, go_on),
            fails("run --snapshot-in cut", &["1"], 2, go_on),
            fails("run --snapshot-in other", &["1"], 2, "one of the image `base`"),
            fails(
                "run --snapshot-in none",
                &["1"],
                2,
                "kaa: --snapshot-in: image `nobody`: there is no such image",
            ),
            fails("run --snapshot-in profile", &["1"], 2, "the profile `\\u{1b}x`"),
            fails("repl --snapshot-in cut", &[], 2, go_on),
            fails("run --snapshot-in good --image base", &["1"], 2, "cannot be used with"),
            fails("run --snapshot-in good --profile rlm", &["1"], 2, "cannot be used with"),
            fails("run --snapshot-in good --memory 64M", &["bytearray(2**27)"], 1, "MemoryError"),
            fails(
                "run --snapshot-out no/s",
                &["print(1)"],
                2,
                "kaa: --snapshot-out: there is no directory no",
            ),
            fails(
                "run --snapshot-out dir",
                &["print(1)"],
                2,
                "kaa: --snapshot-out: dir is a directory",
            ),
            Case {
                stdout: "1\n",
                ..fails(
                    "run --snapshot-out s",
                    &[open, "print(1)"],
                    2,
                    "files open, which can't be saved: `/tmp/notes.txt`",
                )
            },
            fails("snapshot inspect missing", &[], 2, "kaa: missing: No such file"),
            fails(
                "snapshot inspect text",
                &[],
                2,
                "kaa: text: the snapshot can't be used: expected a file that Kaa saved",
            ),
            fails("snapshot inspect short", &[], 2, "kaa: short: the snapshot can't be used"),
            fails("snapshot inspect", &[], 2, "<FILE>"),
        ],
    );
    assert!(!path("s").exists(), "nothing is left of what could not be saved");
    assert_eq!(fs::read(path("good")).unwrap(), good);
}

/// A snapshot with another header, and nothing after it but what makes it look right.
fn forge(good: &[u8], change: fn(&mut Json)) -> Vec<u8> {
    let length = u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
    let mut header: Json = serde_json::from_slice(&good[16..16 + length]).unwrap();
    change(&mut header);
    let json = serde_json::to_vec(&header).unwrap();
    let mut bytes = good[..12].to_vec();
    bytes.extend((json.len() as u32).to_le_bytes());
    bytes.extend(json);
    bytes.extend(Sha256::digest(&bytes[..]));
    bytes.extend(&good[48 + length..good.len() - 32]);
    bytes.extend(Sha256::digest(&bytes[..]));
    bytes
}

#[test]
fn inspecting_shows_the_header_and_obeys_nothing_in_it() {
    let here = tempfile::tempdir().unwrap();
    let path = |name: &str| here.path().join(name);
    let inspect = |args: &str| kaa(here.path(), &ok(&format!("snapshot inspect {args}"), &[], ""));
    let make = ["x = 1", "open('/tmp/f', 'w').write('12345')"];
    let flags = "run --seed 5 --fixed-clock 1000 --env A=secret --snapshot-out s";
    check(here.path(), &[ok(flags, &make, "")]);
    let (code, text, stderr) = inspect("s");
    assert_eq!((code, stderr.as_str()), (0, ""));
    for line in [
        "image      base ",
        "python     3.",
        concat!("kaa        ", env!("CARGO_PKG_VERSION"), "\n"),
        "cells      2\n",
        "files      1 with ",
        "profile    rlm\n",
        "tools      none\n",
        "env        A\n",
        "seed       5\n",
        "clock      1000 s since 1970\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
    assert!(!text.contains("secret"));
    let (code, text, _) = inspect("s --json");
    let shown: Json = serde_json::from_str(&text).unwrap();
    assert_eq!((code, text.lines().count()), (0, 1));
    assert_eq!(
        (&shown["cells"], &shown["seed"], &shown["file_bytes"]),
        (&json!(2), &json!(5), &json!(5))
    );
    assert_eq!(shown["image"]["name"], "base");
    assert_eq!(shown["told"]["env"], json!(["A"]));

    let evil = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\nimage      base\u{202e}";
    let good = fs::read(path("s")).unwrap();
    let forged = forge(&good, |header| {
        let evil = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\nimage      base\u{202e}";
        for key in ["kaa", "python"] {
            header[key] = evil.into();
        }
        for key in ["name", "key", "memory_sha256"] {
            header["image"][key] = evil.into();
        }
        let session = &mut header["session"];
        session["clock"] = json!({ "start_ns": u64::MAX, "elapsed_ns": u64::MAX });
        session["cells"] = u64::MAX.into();
        let mut told =
            json!({ "lm": false, "env": {}, "allowed_imports": [evil], "tools": [evil] });
        told["profile"] = evil.into();
        told["env"][evil] = evil.into();
        session["told"] = told;
    });
    fs::write(path("evil"), forged).unwrap();
    let mut outputs = Vec::new();
    for args in ["evil", "evil --json"] {
        let (code, stdout, stderr) = inspect(args);
        assert_eq!((code, stderr.as_str()), (0, ""), "{args}");
        outputs.push(stdout);
    }
    for args in ["run --snapshot-in evil", "repl --snapshot-in evil"] {
        let (code, _, stderr) = kaa(here.path(), &Case { code: 2, ..ok(args, &[], "") });
        assert_eq!(code, 2, "{args}: {stderr}");
        outputs.push(stderr);
    }
    for output in outputs {
        // JSON has its own way to write a text, in which a reversed one is no danger.
        let json = output.starts_with('{');
        let control = |c: char| c.is_control() && c != '\n' || c == '\u{202e}' && !json;
        assert!(!output.contains(control), "{output:?}");
        assert!(
            !output.contains("\nimage      base\u{202e}") && !output.contains(evil),
            "{output:?}"
        );
    }
}

#[test]
fn the_repl_goes_back_and_apart() {
    let here = tempfile::tempdir().unwrap();
    let count: String = (0..80).map(|n| format!("x = {n}\n")).collect();
    let far = format!("{count}:rewind 80\n'x' in globals()\n:rewind\nx = 'a'\nx\n:rewind 2\n");
    let steps = format!("{count}:rewind 10\nx\n:rewind 60\nx\n:rewind 3\nx\n:rewind 99\nx\n");
    check(
        here.path(),
        &[
            repl("x = 1\nx = 2\nx\n:rewind 2\nx\n", "2\n1\n", ""),
            repl("x = 1\nx = 2\nx = 3\n:rewind 3\n'x' in globals()\n", "False\n", ""),
            repl(
                "open('/tmp/a', 'w').write('1')\n:rewind\nimport os; os.listdir('/tmp')\n",
                "1\n[]\n",
                "",
            ),
            repl("x = 1\n:rewind 99\nx\n", "1\n", "kaa: there is 1 cell to undo, not 99\n"),
            repl("x = 1\nx\n:rewind 0\n", "1\n", "kaa: there are 2 cells to undo, not 0\n"),
            repl(":rewind\n", "", "kaa: there is no cell to undo\n"),
            repl(":rewind x\n:rewind -1\n", "", "kaa: write a number after `:rewind`, not `-1`\n"),
            repl(
                "x = 1\n:reset\n:rewind\n'x' in globals()\n",
                "False\n",
                "kaa: there is no cell to undo\n",
            ),
            repl("x = 1\n1/0\n:rewind\nx\n", "1\n", "ZeroDivisionError"),
            repl(
                "f = open('/tmp/n', 'w')\nf.close()\n:rewind\n",
                "",
                "kaa: the state before that cell could not be saved",
            ),
            repl("x = 5\nf = open('/tmp/n', 'w')\nf.close()\n:rewind 2\nx\n", "5\n", ""),
            // The older ones have become files.
            repl(&far, "False\n'a'\n", ""),
            repl(&steps, "69\n10\n8\n8\n", "kaa: there are 10 cells to undo, not 99\n"),
            repl(
                "x = 1\n:fork\nx = 2\n:go 1\nx\n:go 2\nx\n",
                "1\n2\n",
                "session 2, a copy of session 1",
            ),
            repl(
                "x = 1\n:fork\n:rewind\n:go 1\n:rewind\n'x' in globals()\n",
                "False\n",
                "kaa: there is no cell to undo\n",
            ),
            repl("x = 1\n:fork\n:reset\n'x' in globals()\n:go 1\nx\n", "False\n1\n", ""),
            repl(":go 2\n", "", "kaa: there is no session 2, only 1; :fork makes another\n"),
            repl(":fork\n:go 3\n", "", "kaa: there is no session 3, only 1 to 2\n"),
            repl(":go\n", "", "kaa: write a number after `:go`\n"),
            repl(":go x\n", "", "kaa: write a number after `:go`, not `x`\n"),
            repl(":save\n", "", "kaa: write a file after `:save`\n"),
            repl(":frob\n", "", "kaa: there is no command `:frob`; see :help\n"),
            repl("x = 'saved'\n:save a b\nx = 2\n:save no/where\n", "", "no/where: No such file"),
            repl(
                "f = open('/tmp/n', 'w')\n:save n\n:fork\n1\n",
                "1\n",
                "files open, which can't be saved: `/tmp/n`",
            ),
        ],
    );
    assert!(here.path().join("a b").exists() && !here.path().join("n").exists());
    fs::rename(here.path().join("a b"), here.path().join("s")).unwrap();
    let again = "x\nx = 3\n:reset\nx\n:rewind\nx\n:fork\nx\n";
    let case = repl(again, "'saved'\n'saved'\n'saved'\n'saved'\n", "");
    check(
        here.path(),
        &[
            ok("run --snapshot-in s", &["print(x)"], "saved\n"),
            Case { args: "repl --snapshot-in s", ..case },
        ],
    );
}
