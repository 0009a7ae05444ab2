//! Hostile modules in a mount: nothing of it is imported by itself, and what a cell imports from there is no
//! more than a cell.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use kaa::{EnvironmentExt, ExecuteOptions, Limit, Limits, Mount, Outcome};

use super::bait::{Bait, MARK};
use super::common::{open, print, run, session};

/// Names that Python, the agent, or a cell's first lines import.
const NAMES: &[&str] = &[
    "json",
    "site",
    "sitecustomize",
    "usercustomize",
    "encodings",
    "codecs",
    "io",
    "_io",
    "os",
    "re",
    "sys",
    "random",
    "traceback",
    "linecache",
    "warnings",
    "kaa_agent",
    "math",
    "csv",
    "typing",
    "builtins",
    "__main__",
    "_host",
    "posix",
    "numpy",
    "pip",
];

fn write(directory: &Path, name: &str, bytes: &[u8]) {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A mount with a module, a package, and cached code of each name that say that they were imported.
fn traps(bait: &Bait) {
    let directory = bait.at("write");
    let says = b"import sys\nsys.stdout.write('TRAPPED')\nopen('/output/trapped', 'w').close()\n";
    for name in NAMES {
        write(&directory, &format!("{name}.py"), says);
        write(&directory, &format!("{name}.pyc"), b"garbage");
        write(&directory, &format!("pkg/{name}/__init__.py"), says);
    }
    for name in ["pyvenv.cfg", "python315._pth", "x.pth", "pybuilddir.txt", "._pth"] {
        write(&directory, name, b"import os; os._exit(9)\nhome = /output\n");
    }
}

#[tokio::test]
async fn nothing_of_a_mount_is_imported_by_itself() {
    let bait = Bait::new();
    traps(&bait);
    // Where a Python of its own would look.
    for guest in ["/output", "/usr/lib/python3.15", "/usr/lib/python315.zip"] {
        let mut options = bait.options();
        options.policy.mounts =
            vec![Mount { host: bait.at("write"), guest: guest.into(), writable: true }];
        let mut session = open(options);
        let code = format!(
            "import os, sys\nos.chdir('{guest}')\nprint(os.path.exists('json.py'), [p for p in sys.path if p in ('', '.', os.getcwd())])"
        );
        assert_eq!(print(&mut session, &code).await, "True []\n", "{guest}");
        let code = "import importlib, sys\nfor name in ('json', 'csv', 'random', 'site', 'wave', 'encodings.idna', 'typing'):\n    importlib.reload(importlib.import_module(name))\ntry: import sitecustomize\nexcept ImportError: print('none')\n1/0";
        let execution = run(&mut session, code).await;
        assert_eq!(execution.stdout.text(), "none\n", "{guest}: {}", execution.stderr.text());
        assert_eq!(execution.exception.unwrap().type_name, "ZeroDivisionError");
    }
    assert!(!bait.at("write/trapped").exists());
}

/// What a cell asks for: name, files, and a cell.
type Import = (&'static str, &'static [(&'static str, &'static str)], &'static str);

/// Whatever comes of these stays in the session.
const IMPORTS: &[Import] = &[
    ("loop at import", &[("m.py", "while True: pass")], "import m"),
    (
        "stubborn loop",
        &[(
            "m.py",
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        )],
        "import m",
    ),
    ("imports itself", &[("m.py", "import sys; sys.modules.pop('m'); import m")], "import m"),
    (
        "recursive package",
        &[
            ("p/__init__.py", "from . import q"),
            ("p/q.py", "import sys; sys.modules.pop('p'); sys.modules.pop('p.q'); import p.q"),
        ],
        "import p",
    ),
    ("exit", &[("m.py", "import os; os._exit(3)")], "import m"),
    (
        "replaces itself",
        &[("m.py", "import sys; sys.modules['m'] = None; sys.modules['json'] = 5")],
        "import m",
    ),
    ("no text", &[("m.py", "\u{0}\u{1b}[2J")], "import m"),
    ("unknown encoding", &[("m.py", "# coding: rot13\nvzcbeg bf")], "import m"),
    (
        "deep source",
        &[(
            "m.py",
            "((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
        )],
        "import m",
    ),
    (
        "shadowed library",
        &[("json.py", "raise SystemExit(4)"), ("traceback.py", "raise SystemExit(5)")],
        "import sys; sys.modules.pop('json'); sys.path.insert(0, '/output'); import json",
    ),
    (
        "shadowed agent",
        &[("kaa_agent/__init__.py", "1/0"), ("kaa_agent/agent.py", "1/0")],
        "import sys\nfor n in list(sys.modules):\n    if 'kaa' in n: del sys.modules[n]\nimport kaa_agent.agent",
    ),
    (
        "hook on the path",
        &[(
            "m.py",
            "import sys\nclass F:\n    def find_spec(self, *a):\n        while True: pass\nsys.meta_path.insert(0, F())",
        )],
        "import m; import anything",
    ),
    ("linked out", &[], "import linked; print(vars(linked))"),
    ("directory linked out", &[], "import up.secret"),
    ("garbage in the cache", &[("m.py", "x = 1")], "import m; print(m.x)"),
    ("garbage without a source", &[], "import n"),
];

#[tokio::test]
async fn what_is_imported_from_a_mount_is_no_more_than_a_cell() {
    let mut neighbour = session();
    run(&mut neighbour, "keep = 'neighbour'").await;
    for (name, files, code) in IMPORTS {
        let bait = Bait::new();
        let directory = bait.at("write");
        for (file, text) in *files {
            write(&directory, file, text.as_bytes());
        }
        fs::write(bait.at("bait/secret.py"), format!("found = '{MARK}'")).unwrap();
        symlink("../bait/secret.py", directory.join("linked.py")).unwrap();
        let garbage: Vec<u8> = (0..4096).map(|n| (n * 7 % 251) as u8).collect();
        // The magic number of a Python that isn't this one, and code that is none.
        write(&directory, "__pycache__/m.cpython-315.pyc", &garbage);
        write(&directory, "n.pyc", &[&b"\x00\x00\r\n"[..], &garbage].concat());
        let before = bait.untouchable();
        let limits = Limits {
            compute: Duration::from_millis(300),
            grace: Duration::from_millis(100),
            ..Limits::default()
        };
        let mut session = open(bait.options());
        run(&mut session, "keep = 41; import sys; sys.path.append('/output')").await;
        let options = ExecuteOptions { limits: Some(limits) };
        let cell = kaa::Environment::execute_opts(&mut session, code, options).await.unwrap();
        assert!(!cell.stdout.text().contains(MARK), "{name}: {}", cell.stdout.text());
        if name.contains("loop") || name.contains("hook") {
            assert_eq!(cell.limit, Some(Limit::Compute), "{name}: {cell:?}");
        }
        if name.contains("linked") {
            assert_eq!(cell.outcome, Outcome::Raised, "{name}: {cell:?}");
        }
        if *name == "garbage in the cache" {
            assert_eq!(cell.stdout.text(), "1\n");
        }
        for (who, session, kept) in
            [("session", &mut session, "41\n"), ("neighbour", &mut neighbour, "neighbour\n")]
        {
            let after = session.execute("print(keep)").await.unwrap();
            assert_eq!(after.stdout.text(), kept, "{name}: the {who}, {}", after.stderr.text());
        }
        assert!(bait.untouchable() == before, "{name}");
    }
}
