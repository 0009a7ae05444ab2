//! Every input that the fuzz targets have kept, through the targets' bodies: what was found once stays
//! found, on a stable toolchain and without a fuzzer. See `fuzz/README.md`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "common/panics.rs"]
mod panics;
#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

/// The names in a folder, in their order; none if it isn't there.
fn names(folder: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(folder) else { return BTreeSet::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn run_all(target: &str) {
    panics::count();
    let (mut inputs, mut good) = (0, 0);
    for kind in ["corpus", "crashes"] {
        let folder = folder(kind).join(target);
        for name in names(&folder) {
            let input = fs::read(folder.join(&name)).unwrap();
            // Shown if it fails.
            println!("{kind}/{target}/{name}");
            good += usize::from(targets::run(target, &input));
            inputs += 1;
        }
    }
    // Where all are refused, or none, most of the code isn't reached.
    assert!(0 < good && good < inputs, "{good} of {inputs} inputs are good");
    assert_eq!(panics::counted(), 0);
}

macro_rules! targets {
    ($($target:ident),+) => {
        $(#[test]
        fn $target() {
            run_all(stringify!($target));
        })+

        const TESTED: &[&str] = &[$(stringify!($target)),+];
    };
}

targets!(cell, frames, lm_wire, resume, rewrite, snapshot, supervisor);

#[test]
fn every_target_is_fuzzed_tested_and_has_a_corpus() {
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
    let targets: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(set(TESTED), set(&targets));
    assert_eq!(names(&folder("corpus")), set(&targets));
    // Not every target has crashed; but one of another name would never be run.
    let crashed = names(&folder("crashes"));
    assert!(!crashed.is_empty() && crashed.is_subset(&set(&targets)), "{crashed:?}");
    let files = targets.iter().map(|name| format!("{name}.rs")).collect();
    assert_eq!(names(&folder("fuzz_targets")), files);
}

/// Compiled guests are of one version of the engine: with another the fuzzer would compile its own.
#[test]
fn the_fuzzer_is_locked_to_the_same_dependencies() {
    let lock = |path: &Path| {
        let text = fs::read_to_string(path.join("Cargo.lock")).unwrap();
        let lock: toml::Table = toml::from_str(&text).unwrap();
        let packages = lock["package"].as_array().unwrap();
        let of = |package: &toml::Value, key: &str| package[key].as_str().unwrap().to_owned();
        packages.iter().map(|one| (of(one, "name"), of(one, "version"))).collect::<BTreeSet<_>>()
    };
    let main = lock(Path::new(env!("CARGO_MANIFEST_DIR")));
    let known: BTreeSet<&String> = main.iter().map(|(name, _)| name).collect();
    let fuzz = lock(&folder(""));
    let other: Vec<_> = fuzz.difference(&main).filter(|(name, _)| known.contains(name)).collect();
    assert!(other.is_empty(), "update fuzz/Cargo.lock: {other:?}");
}
