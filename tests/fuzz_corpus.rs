//! Every input that the fuzz targets have kept, through the targets' bodies: what was found once stays
//! found, on a stable toolchain and without a fuzzer. See `fuzz/README.md`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

/// Panics on any thread: a session may only report one as an error.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::AcqRel);
            before(info);
        }));
    });
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

/// The names in a folder, in their order; none if it isn't there.
fn names(folder: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(folder) else { return BTreeSet::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn run_all(target: &str) {
    count_panics();
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
    assert_eq!(PANICS.load(Ordering::Acquire), 0);
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
