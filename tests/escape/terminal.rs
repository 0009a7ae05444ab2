//! What a guest writes is orders to a terminal, and lines to a log: through the program neither comes to pass.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value as Json;

use super::common::{image, store_root};

/// Orders: to clear the screen, set the title, write to the clipboard, take the line back, ring, turn the
/// direction of writing, and the same in one byte (C1) and in no encoding.
const ORDERS: &str = r"'\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]52;c;AAAA\x1b\\ \x9b2J\x9d0;t\x9c\x90q\x9c a\rb\x08\x7f\x0b\x0c\x0e\x0f\x05\x85 \u202eright\u2066\u2069\u200f\u2028x\u061c'";

/// Runs a command on a terminal, and copies what it writes there. One that doesn't end loses its terminal,
/// and its runner dies of the alarm.
const ON_TERMINAL: &str = "import os, pty, signal, sys
signal.alarm(120)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:], lambda fd: os.read(fd, 65536), lambda fd: b'')))";

/// Types lines, each when nothing more comes; the alarm is as above.
const TYPED: &str = r"import os, pty, select, signal, sys
signal.alarm(120)
lines = sys.stdin.read().splitlines()
pid, fd = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
while True:
    if not select.select([fd], [], [], 0.3)[0]:
        if lines:
            os.write(fd, lines.pop(0).encode() + b'\r')
        continue
    try:
        part = os.read(fd, 65536)
    except OSError:
        break
    sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";

/// Name, and a cell that says the orders in its own way.
const CELLS: &[(&str, &str)] = &[
    ("stdout", "print(ORDERS)"),
    ("stderr", "import sys; print(ORDERS, file=sys.stderr)"),
    (
        "raw bytes",
        "import os\nos.write(1, bytes(range(256))); os.write(2, bytes(range(256)) + ORDERS.encode('latin-1', 'replace'))",
    ),
    (
        "half a character",
        "import os\nos.write(1, b'\\x1b'); os.write(1, b'[2J\\xc2'); os.write(1, b'\\x9b2J\\xe2\\x80'); os.write(1, b'\\xae')",
    ),
    ("message", "raise ValueError(ORDERS)"),
    ("type", "raise type(ORDERS, (Exception,), {})('x')"),
    ("exit", "raise SystemExit(ORDERS)"),
    ("syntax", "exec('x = ' + ORDERS)"),
    ("file name", "exec(compile('1/0', ORDERS, 'exec'))"),
    ("notes", "e = ValueError(1); e.add_note(ORDERS); raise e"),
    ("warning", "import warnings; warnings.warn(ORDERS)"),
    ("last value", "class A:\n    def __repr__(self): return ORDERS\nA()"),
    ("variable", "globals()[ORDERS] = type(ORDERS, (), {})()\nprint(SHOW_VARS())"),
    ("answer", "answer['content'] = ORDERS; answer['ready'] = True"),
    ("prompt", "print(llm_query(ORDERS))"),
    ("open file", "f = open('/tmp/\\x1b[2J\\x9b2J\\u202e', 'w')"),
    ("unsaved name", "open('/tmp/\\x1b[2J\\x9b2J\\u202e', 'w').close()"),
];

fn cell(code: &str) -> String {
    format!("ORDERS = {ORDERS}\n{code}")
}

fn kaa(directory: &Path, launcher: &[&str], args: &[&str]) -> Output {
    program(directory, launcher, args).stdin(Stdio::null()).output().unwrap()
}

fn program(directory: &Path, launcher: &[&str], args: &[&str]) -> Command {
    image("base");
    let mut line = launcher.iter().copied().chain([env!("CARGO_BIN_EXE_kaa")]);
    let mut command = Command::new(line.next().unwrap());
    command.args(line).args(args).current_dir(directory);
    command.env("KAA_CACHE", store_root()).env("TERM", "xterm");
    command
}

/// What of it a terminal would obey.
fn obeyed(written: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(written);
    // A terminal makes `\r\n` of the end of a line; the other is how Kaa takes its own progress back.
    let text = text.replace("\r\n", "\n").replace("\r\u{1b}[2K", "");
    let order = |c: char| match c {
        '\n' | '\t' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            true
        }
        c => c.is_control(),
    };
    text.find(order).map(|at| format!("{:?}", text[at..].chars().take(20).collect::<String>()))
}

#[test]
fn a_terminal_gets_no_orders_from_a_cell() {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"{"default": {"response": "\u001b[2J\u009b2J answer"}}"#;
    fs::write(directory.path().join("lm.json"), script).unwrap();
    let terminal = ["python3", "-c", ON_TERMINAL];
    let mut wrong = Vec::new();
    for (name, code) in CELLS {
        let code = cell(code);
        let args = ["run", "-c", &code, "--lm-script", "lm.json", "--snapshot-out", "s"];
        let output = kaa(directory.path(), &terminal, &args);
        if let Some(order) = obeyed(&output.stdout) {
            wrong.push(format!("{name}: {order}"));
        }
        // It is said, only not obeyed; an exit's text is nobody's output.
        assert!(!output.stdout.is_empty(), "{name}: {output:?}");
        assert!(output.status.code().is_some(), "{name} doesn't end: {output:?}");
    }
    // What files say about themselves.
    for args in [
        &["snapshot", "inspect", "s"][..],
        &["run", "--snapshot-in", "s", "-c", "SHOW_VARS()", "-c", "print(globals())"],
        &["snapshot", "inspect", "\x1b[2J\u{9b}2J"],
        &["run", "\x1b[2J\u{9b}2J\u{202e}.py"],
        &["image", "verify", "\x1b[2J"],
    ] {
        let output = kaa(directory.path(), &terminal, args);
        if let Some(order) = obeyed(&output.stdout) {
            wrong.push(format!("{args:?}: {order}"));
        }
        assert!(!output.stdout.is_empty(), "{args:?}");
        assert!(output.status.code().is_some(), "{args:?} doesn't end: {output:?}");
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    let seen = kaa(directory.path(), &terminal, &["run", "-c", &cell("print(ORDERS)")]);
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    assert!(seen.contains(r"^[[2J^[[31mred^[]0;title^G") && seen.contains(r"\u{202e}"), "{seen}");
}

/// The line editor has orders of its own for the terminal, which are none of these.
#[test]
fn a_terminal_gets_no_orders_from_a_session_that_is_typed_into() {
    let directory = tempfile::tempdir().unwrap();
    let lines = [
        &format!("O = {ORDERS}"),
        "import sys; print(O); print(O, file=sys.stderr)",
        "O + ''",
        "globals()[O] = type(O, (), {})()",
        "raise type(O, (Exception,), {})(O)",
        "f = open('/tmp/\\x1b[31m\\x9b2J', 'w')",
        ":vars",
        ":fork",
        ":quit",
    ];
    fs::write(directory.path().join("lines"), lines.join("\n")).unwrap();
    let typed = File::open(directory.path().join("lines")).unwrap();
    let launcher = ["python3", "-c", TYPED];
    let output = program(directory.path(), &launcher, &["repl"]).stdin(typed).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", output.status);
    for order in
        ["\x1b[31m", "\x1b[2J", "\x1b]", "\x05", "\x0e", "\u{9b}", "\u{9d}", "\u{202e}", "\u{2028}"]
    {
        assert!(!text.contains(order), "{order:?} in {text:?}");
    }
    // It came to everything: what is printed, values, exceptions, names, and a complaint.
    assert!(text.matches("^[[31mred").count() >= 4 && text.contains("files open"), "{text}");
}

#[test]
fn each_cell_is_one_line_of_json() {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"{"default": {"response": "\u001b[2J\n{\"cell\": 9}\n"}}"#;
    fs::write(directory.path().join("lm.json"), script).unwrap();
    let codes: Vec<String> = CELLS.iter().map(|(_, code)| cell(code)).collect();
    let mut args = vec!["run", "--json", "--lm-script", "lm.json"];
    args.extend(codes.iter().flat_map(|code| ["-c", code.as_str()]));
    let output = kaa(directory.path(), &[], &args);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), CELLS.len());
    for (at, line) in lines.iter().enumerate() {
        let record: Json = serde_json::from_str(line).unwrap();
        assert_eq!(record["cell"], at as u64 + 1, "{line}");
        assert!(!line.contains('\x1b'), "{line}");
    }
}

/// The log of a run, which its reader takes line by line.
#[test]
fn each_record_of_a_log_is_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let script = serde_json::json!({
        "rules": [{"contains": "said so", "response": "FINAL(\u{1b}[2J\ndone\r\n{\"type\": \"forged\"})"}],
        "default": {"response": format!(
            "```repl\nORDERS = {ORDERS}\nprint(ORDERS + '\\n{{\"type\": \"forged\"}}\\n')\nprint('said so')\nraise type(ORDERS, (Exception,), {{}})(ORDERS)\n```"
        )},
    });
    fs::write(at("lm.json"), script.to_string()).unwrap();
    fs::write(at("context"), "a\x1b[2J\n{\"type\": \"forged\"}\nb").unwrap();
    let args =
        ["complete", "--context", "context", "--lm-script", "lm.json", "--log-dir", "log", "-v"];
    let terminal = ["python3", "-c", ON_TERMINAL];
    let output = kaa(directory.path(), &terminal, &[&args[..], &["what \x1b[2J is it?"]].concat());
    assert_eq!(obeyed(&output.stdout), None, "{}", String::from_utf8_lossy(&output.stdout));
    let logs: Vec<_> = fs::read_dir(at("log")).unwrap().collect();
    assert_eq!(logs.len(), 1, "{}", String::from_utf8_lossy(&output.stdout));
    let text = fs::read_to_string(logs[0].as_ref().unwrap().path()).unwrap();
    let mut kinds = Vec::new();
    for line in text.lines() {
        let record: Json = serde_json::from_str(line).unwrap();
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
        kinds.push(record["type"].as_str().unwrap_or_default().to_owned());
    }
    assert!(kinds.len() > 1 && !kinds.contains(&"forged".to_owned()), "{kinds:?}");
}
