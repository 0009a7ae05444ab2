//! Hostile images: a store that somebody has tampered with, and setup code that means harm.
//!
//! Snapshots have a file of their own, `tests/hostile.rs`; what the store checks, one by one, is tested in
//! `src/image.rs`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kaa::{EnvironmentExt, EnvironmentOptions, ImageSpec, Runtime, Store};

use super::common::{image, store_root};

/// A store with the module and the image `base`, of its own. What is large is shared with the user's own
/// store until it's replaced: files of a store are never changed in place.
struct Copied {
    root: tempfile::TempDir,
}

impl Copied {
    fn new() -> Self {
        let key = image("base").manifest().key.clone();
        let module = image("base").manifest().module.clone();
        // Next to the store, so that files can be linked.
        let root = tempfile::tempdir_in(store_root().join("tmp")).unwrap();
        let copied = Self { root };
        drop(copied.open());
        for entry in [format!("modules/{module}"), format!("images/{key}")] {
            link_all(&store_root().join(&entry), &copied.at(&entry));
        }
        fs::write(copied.at("names/base"), &key).unwrap();
        fs::set_permissions(copied.at("names/base"), fs::Permissions::from_mode(0o600)).unwrap();
        copied
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join("store").join(path)
    }

    fn open(&self) -> kaa::Result<Store> {
        Store::open(self.root.path().join("store"))
    }

    /// The one entry of a directory.
    fn only(&self, directory: &str) -> PathBuf {
        let mut entries = fs::read_dir(self.at(directory)).unwrap();
        entries.next().unwrap().unwrap().path()
    }
}

fn link_all(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => link_all(&path, &target),
            false => fs::hard_link(&path, target).unwrap(),
        }
    }
}

/// Puts other bytes in a file's place, with its mode.
fn replace(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The file is another one by way of a link.
fn link_away(path: &Path) {
    let aside = path.with_extension("aside");
    fs::rename(path, &aside).unwrap();
    symlink(aside, path).unwrap();
}

fn in_manifest(path: &Path, from: &str, to: &str) {
    replace(path, |bytes| {
        let text = String::from_utf8(std::mem::take(bytes)).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        *bytes = text.replacen(from, to, 1).into_bytes();
    });
}

/// What is done to the directory of an image, and whether a start sees it; `verify` sees all.
type Harm = (&'static str, fn(&Path), bool);

const HARM: &[Harm] = &[
    ("memory cut", |path| replace(&path.join("memory.bin"), |bytes| bytes.truncate(4096)), true),
    (
        "memory longer",
        |path| replace(&path.join("memory.bin"), |bytes| bytes.extend([0; 4096])),
        true,
    ),
    ("memory gone", |path| fs::remove_file(path.join("memory.bin")).unwrap(), true),
    ("memory linked", |path| link_away(&path.join("memory.bin")), true),
    ("memory open to all", |path| open_to_all(&path.join("memory.bin")), true),
    (
        "memory of other bytes",
        |path| replace(&path.join("memory.bin"), |bytes| bytes[5000] ^= 1),
        false,
    ),
    ("no manifest", |path| fs::remove_file(path.join("image.json")).unwrap(), true),
    (
        "manifest of garbage",
        |path| replace(&path.join("image.json"), |bytes| bytes.fill(0xff)),
        true,
    ),
    (
        "manifest too large",
        |path| replace(&path.join("image.json"), |bytes| bytes.resize(5 << 20, b'x')),
        true,
    ),
    (
        "manifest of another",
        |path| in_manifest(&path.join("image.json"), "\"key\"", "\"key\":\"00\",\"kay\""),
        true,
    ),
    (
        "manifest of another time",
        |path| in_manifest(&path.join("image.json"), "\"format\"", "\"format\":99,\"farmat\""),
        true,
    ),
    (
        "file of elsewhere",
        |path| in_manifest(&path.join("image.json"), "memory.bin", "../../../../../../etc/passwd"),
        true,
    ),
    ("manifest linked", |path| link_away(&path.join("image.json")), true),
    ("directory open to all", |path| open_to_all(path), true),
];

fn open_to_all(path: &Path) {
    // A copy: what is shared with another store must keep its mode.
    if path.is_file() {
        replace(path, |_| ());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
}

#[tokio::test]
async fn an_image_that_was_tampered_with_is_refused_or_made_anew() {
    for (what, harm, at_start) in HARM {
        let copied = Copied::new();
        harm(&copied.only("images"));
        let store = copied.open().unwrap();
        if *at_start {
            assert!(store.manifest_by_name("base").is_err(), "{what}: it is taken for an image");
        }
        let error = store.verify("base").expect_err(what);
        assert!(!error.to_string().contains('\n'), "{what}: {error}");
    }
    // Made anew, it's a good one.
    let copied = Copied::new();
    replace(&copied.only("images").join("memory.bin"), |bytes| bytes.truncate(4096));
    let runtime = Runtime::open(copied.open().unwrap()).unwrap();
    let image = runtime.image("base", &|_| {}).unwrap();
    let mut session = runtime.environment(&image, EnvironmentOptions::default()).unwrap();
    assert_eq!(session.execute("6 * 7").await.unwrap().value.as_deref(), Some("42"));
    copied.open().unwrap().verify("base").unwrap();
}

/// What is done to the directory of the compiled guest.
type CodeHarm = (&'static str, fn(&Path));

const CODE_HARM: &[CodeHarm] = &[
    ("cut", |path| replace(&path.join("python.cwasm"), |bytes| bytes.truncate(1 << 20))),
    ("linked", |path| link_away(&path.join("python.cwasm"))),
    ("open to all", |path| open_to_all(path)),
    ("library linked", |path| link_away(&path.join("lib/python315.zip"))),
    ("library gone", |path| fs::remove_file(path.join("lib/python315.zip")).unwrap()),
    ("manifest", |path| {
        in_manifest(&path.join("module.json"), "\"key\"", "\"key\":\"00\",\"kay\"")
    }),
    ("path", |path| in_manifest(&path.join("module.json"), "python.cwasm", "../python.cwasm")),
    ("no artifact", |path| {
        replace(&path.join("python.cwasm"), |bytes| bytes[..64].fill(0x90));
    }),
];

/// An artifact is native code: nothing but what the store's own rules allow is ever loaded.
#[test]
fn code_that_was_tampered_with_is_not_loaded() {
    for (what, harm) in CODE_HARM {
        let copied = Copied::new();
        assert!(Runtime::open(copied.open().unwrap()).unwrap().is_set_up(), "before: {what}");
        harm(&copied.only("modules"));
        assert!(!Runtime::open(copied.open().unwrap()).unwrap().is_set_up(), "{what}");
    }
}

#[test]
fn a_store_that_others_can_write_is_none() {
    for (what, path) in [("the root", ""), ("modules", "modules"), ("images", "images")] {
        let copied = Copied::new();
        fs::set_permissions(copied.at(path), fs::Permissions::from_mode(0o777)).unwrap();
        let error = copied.open().expect_err(what);
        let words = "expected no access for others, found mode 777";
        assert!(error.to_string().contains(words), "{what}: {error}");
    }
    let copied = Copied::new();
    let elsewhere = copied.root.path().join("elsewhere");
    fs::rename(copied.at("modules"), &elsewhere).unwrap();
    symlink(&elsewhere, copied.at("modules")).unwrap();
    assert!(copied.open().is_err(), "a directory by way of a link");
}

/// Setup code, and words of what is said of it; `None`: it makes an image.
const SETUPS: &[(&str, &str, Option<&str>)] = &[
    ("raises", "raise ValueError('\\x1b[2J' + 'x' * 10 ** 7)", Some("ValueError")),
    ("exits", "import os; os._exit(3)", Some("it exited with 3")),
    ("aborts", "import os; os.abort()", Some("wasm trap: wasm `unreachable`")),
    ("system exit", "raise SystemExit('gone')", Some("it ended the interpreter")),
    ("syntax", "x = (", Some("SyntaxError")),
    ("prints", "for n in range(100): print('x' * 10 ** 6)", None),
    ("hostile repr", "class A:\n    def __repr__(self): raise SystemExit\na = A()", None),
    (
        "looks around",
        "import os\nassert not os.path.exists('/etc/passwd') and not os.listdir('/tmp')",
        None,
    ),
];

#[tokio::test]
async fn setup_code_makes_an_image_or_an_error() {
    let copied = Copied::new();
    let runtime = Arc::new(Runtime::open(copied.open().unwrap()).unwrap());
    let names = || fs::read_dir(copied.at("names")).unwrap().count();
    for (number, (what, code, refused)) in SETUPS.iter().enumerate() {
        let setup = copied.root.path().join("setup.py");
        fs::write(&setup, code).unwrap();
        let spec = ImageSpec { setup: Some(setup), ..ImageSpec::new(format!("hostile-{number}")) };
        let (before, runtime) = (names(), Arc::clone(&runtime));
        let built = tokio::task::spawn_blocking(move || {
            runtime.build(&spec, &|_| {}).map(|image| (runtime, image))
        });
        match (built.await.unwrap(), refused) {
            (Ok((runtime, image)), None) => {
                let mut session =
                    runtime.environment(&image, EnvironmentOptions::default()).unwrap();
                let cell = session.execute("6 * 7").await.unwrap();
                assert_eq!(cell.value.as_deref(), Some("42"), "{what}");
            }
            (Err(error), Some(words)) => {
                let text = error.to_string();
                assert!(text.contains(words) && text.len() < 256 << 10, "{what}: {text:.300}");
                assert_eq!(names(), before, "{what}: it has a name");
            }
            (built, _) => panic!("{what}: {:?}", built.err()),
        }
        assert_eq!(fs::read_dir(copied.at("tmp")).unwrap().count(), 0, "{what}: a draft is left");
    }
}
