//! The style of the tree, held by tests: layers, homes of dependencies, lengths, headers.

use std::fs;
use std::path::{Path, PathBuf};

/// `(module, modules it may import)`, lowest layer first.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &["environment"]),
    ("limits", &["error", "environment"]),
    ("policy", &["error"]),
    ("value", &[]),
    ("frame", &["error"]),
    ("protocol", &["error", "value"]),
    ("lm", &["error", "frame"]),
    ("broker", &["error", "lm"]),
    ("image", &["error"]),
    ("snapshot", &["error", "image"]),
    ("tenant", &["error", "lm"]),
    ("environment", &["error", "limits", "policy", "lm", "value", "snapshot", "tenant"]),
    ("capture", &["environment"]),
    (
        "agent",
        &[
            "error",
            "limits",
            "environment",
            "protocol",
            "lm",
            "value",
            "capture",
            "snapshot",
            "tenant",
        ],
    ),
    ("rlm", &["error", "environment", "limits", "lm", "value", "agent", "tenant"]),
    (
        "wasm",
        &[
            "error",
            "limits",
            "policy",
            "environment",
            "protocol",
            "lm",
            "image",
            "agent",
            "value",
            "capture",
            "snapshot",
            "tenant",
        ],
    ),
    (
        "process",
        &[
            "error",
            "limits",
            "policy",
            "environment",
            "protocol",
            "lm",
            "agent",
            "value",
            "capture",
            "snapshot",
            "tenant",
            "broker",
        ],
    ),
    ("local", &["error", "environment", "limits", "policy", "process", "snapshot"]),
    ("docker", &["error", "environment", "image", "limits", "policy", "process", "snapshot"]),
    (
        "modal",
        &[
            "error",
            "environment",
            "image",
            "limits",
            "policy",
            "process",
            "snapshot",
            "lm",
            "broker",
        ],
    ),
    ("conformance", &["error", "environment", "limits", "lm", "policy", "snapshot", "value"]),
    ("benchmark", &["error", "environment", "limits", "lm", "rlm"]),
    (
        "fuzzing",
        &[
            "error",
            "limits",
            "environment",
            "protocol",
            "lm",
            "agent",
            "value",
            "snapshot",
            "wasm",
            "process",
        ],
    ),
];

/// Files outside the layers: the crate's root, the program, and the command line over the public API.
const OUTSIDE: &[&str] = &["lib", "main", "cli"];

/// `(dependency, the only modules that may name it)`.
const HOMES: &[(&str, &[&str])] = &[
    ("wasmtime", &["wasm"]),
    ("wasmtime_wasi", &["wasm"]),
    ("wiggle", &["wasm"]),
    ("wasmparser", &["wasm"]),
    ("wasm_encoder", &["wasm"]),
    ("lz4_flex", &["snapshot"]),
    ("bollard", &["docker"]),
    ("tonic", &["modal"]),
    ("tonic_prost", &["modal"]),
    ("prost", &["modal"]),
    ("uuid", &["modal"]),
    ("tokio_util", &["docker"]),
    ("jiff", &["rlm"]),
    ("reqwest", &["lm", "broker"]),
    ("rustls", &["lm", "docker"]),
    ("rustls_platform_verifier", &["lm"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("plotters", &["benchmark"]),
    ("rustyline", &["cli"]),
];

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// Every file below `directory` with this ending.
fn files(directory: &str, ending: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pending = vec![root.join(directory)];
    let mut found = Vec::new();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("modal/proto") {
                pending.push(path);
            } else if path.extension().is_some_and(|found| found == ending) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty(), "no .{ending} below {directory:?}");
    found
}

fn module_of(path: &Path) -> String {
    let first = path.strip_prefix("src").unwrap().iter().next().unwrap().to_str().unwrap();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// The text without comments, so that docs may name what code may not.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn identifier(text: &str) -> &str {
    let text = text.trim_start();
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// Every module named by `crate::name`.
fn imports(text: &str) -> Vec<&str> {
    text.match_indices("crate::").map(|(at, _)| identifier(&text[at + 7..])).collect()
}

#[test]
fn modules_import_only_lower_layers() {
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        let module = module_of(&path);
        let text = code(&text);
        match LAYERS.iter().find(|(name, _)| *name == module) {
            None => assert!(OUTSIDE.contains(&module.as_str()), "{module} is in no layer"),
            Some((_, allowed)) => {
                for name in imports(&text) {
                    if !name.is_empty() && name != module && !allowed.contains(&name) {
                        wrong.push(format!(
                            "{}: `{module}` may not import `{name}`",
                            path.display()
                        ));
                    }
                }
            }
        }
        for (dependency, homes) in HOMES {
            let named = text.match_indices(&format!("{dependency}::")).any(|(at, _)| {
                !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
            });
            if named && !homes.contains(&module.as_str()) {
                wrong.push(format!("{}: only {homes:?} may name `{dependency}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn files_and_functions_have_a_readable_length_and_a_header() {
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > FILE_LINES_MAX {
            wrong.push(format!("{} has {} lines", path.display(), lines.len()));
        }
        if !text.starts_with("//!") {
            wrong.push(format!("{} does not begin with what it is", path.display()));
        }
        for (start, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let head = line.trim_start();
            let is_function = [
                "fn ",
                "pub fn ",
                "async fn ",
                "pub async fn ",
                "pub(crate) fn ",
                "pub(super) fn ",
                "pub(crate) async fn ",
            ]
            .iter()
            .any(|prefix| head.starts_with(prefix));
            if !is_function {
                continue;
            }
            // A declaration in a trait has no body.
            let head_ends = lines[start..].iter().find(|line| line.ends_with([';', '{', '}']));
            if head_ends.is_some_and(|line| line.ends_with(';')) {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| *line == end).unwrap_or(0) + 1;
            if length > FUNCTION_LINES_MAX {
                wrong.push(format!("{}:{} has {length} lines", path.display(), start + 1));
            }
        }
    }
    let others = ["tests", "benches", "fuzz/src", "fuzz/fuzz_targets"];
    for (path, text) in others.iter().flat_map(|directory| files(directory, "rs")) {
        assert!(text.starts_with("//!"), "{} does not begin with what it is", path.display());
    }
    for (path, text) in files("guest", "py") {
        if text.lines().count() > FILE_LINES_MAX || !text.starts_with("\"\"\"") {
            wrong.push(format!("{}: length or header", path.display()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_open() {
    // Put together here, so that this file doesn't find itself.
    let marks = ["TO", "FIX", "XX"].iter().zip(["DO", "ME", "X"]).map(|(a, b)| format!("{a}{b}"));
    let marks: Vec<String> =
        marks.chain(["todo!".to_owned(), "unimplemented!".to_owned()]).collect();
    for (path, text) in files("src", "rs").into_iter().chain(files("guest", "py")) {
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{}: {mark}", path.display());
        }
        assert!(
            !text.contains("rust,ignore"),
            "{}: an example that isn't compiled",
            path.display()
        );
    }
}

/// Every test that the README's tables of threats name is there: the file, and the functions after it.
#[test]
fn threats_have_the_tests_that_they_name() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let section = readme.split("\n## ").find(|part| part.starts_with("Threats\n")).unwrap();
    let (mut wrong, mut named) = (Vec::new(), 0);
    for row in section.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 3, "{row}");
        let mut text = String::new();
        for name in cells[2].split('`').skip(1).step_by(2) {
            if !name.contains('/') {
                if !text.contains(&format!("fn {name}(")) {
                    wrong.push(format!("{row}\nhas no function {name}"));
                }
                continue;
            }
            named += 1;
            match fs::read_to_string(root.join(name)) {
                Ok(found) => text = found,
                Err(_) => wrong.push(format!("{row}\nhas no file {name}")),
            }
        }
    }
    assert!(named > 40, "the tables name {named} files");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
