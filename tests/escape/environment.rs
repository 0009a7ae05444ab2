//! What a guest can find out about its host: variables, paths, names of users and machines.

use std::io::Read;
use std::process::{Command, Stdio};

use kaa::{EnvironmentOptions, Policy};

use super::common::{open, print, session, store_root};
use super::parts::Parts;
use super::tenants::{find, image_memory};

/// Prints everything in the interpreter that is text: all objects that can be reached, and all modules'
/// tables. It runs the `repr` of nothing but texts.
const ALL_TEXTS: &str = r"
import gc, os, sys, platform, sysconfig, site, traceback, threading, locale, getpass, tempfile
def tell(name, function):
    try: print(name, function())
    except BaseException as error: print(name, type(error).__name__, error)
tell('uname', os.uname); tell('user', getpass.getuser); tell('home', lambda: os.path.expanduser('~')); tell('pid', os.getpid)
tell('platform', platform.platform); tell('node', platform.node); tell('paths', sysconfig.get_paths); tell('temp', tempfile.gettempdir)
tell('flags', lambda: sys.flags); tell('argv', lambda: (sys.argv, sys.orig_argv, sys.executable, sys.path, sys.prefix))
tell('environ', lambda: dict(os.environ)); tell('raw', lambda: __import__('posix').environ); tell('cwd', os.getcwd)
try: 1 / 0
except ZeroDivisionError: print(traceback.format_exc(), [frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)])
seen, pending = set(), [*gc.get_objects(), *sys.modules.values(), sys._getframe()]
print(len(pending), 'objects')
for one in pending:
    if id(one) in seen: continue
    seen.add(id(one))
    if type(one) in (str, bytes, bytearray):
        if 3 < len(one) < 100_000: print(repr(one))
    elif len(seen) < 2_000_000:
        pending.extend(gc.get_referents(one))
print(len(seen), 'seen')";

/// What a host process has that is nobody's business, and what of it is searched for.
const CANARY: (&str, &str) = ("KAA_ESCAPE_CANARY", "canary-7d1f0c2e94");

fn host_words() -> Vec<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut words = vec![
        CANARY.0.to_owned(),
        CANARY.1.to_owned(),
        store_root().display().to_string(),
        std::env::current_dir().unwrap().display().to_string(),
        std::env::current_exe().unwrap().display().to_string(),
        read("/proc/sys/kernel/osrelease"),
        read("/etc/machine-id"),
        read("/proc/sys/kernel/random/boot_id"),
    ];
    for variable in ["HOME", "PATH", "PWD", "CARGO_HOME", "CARGO_MANIFEST_DIR"] {
        words.extend(std::env::var(variable));
    }
    // A host's name may be one that Python's own texts have, such as `localhost`.
    // A short word is in any memory by chance, and the guest has a home of its own.
    words.retain(|word| word.len() > 4 && word != "/root");
    words
}

#[tokio::test]
async fn variables_are_what_was_granted_and_nothing_else() {
    let policy = Policy { env: vec![("TOKEN".into(), "t=1".into())], ..Policy::default() };
    let mut granted = open(EnvironmentOptions { policy, ..EnvironmentOptions::default() });
    let code = "import os\nprint(os.environ.get('TOKEN'), os.getenv('TOKEN'), sorted(os.environ))";
    let expected = "t=1 t=1 ['HOME', 'PYTHONTZPATH', 'TMPDIR', 'TOKEN']\n";
    assert_eq!(print(&mut granted, code).await, expected);
    let mut plain = session();
    let code = "import os\nprint(dict(os.environ))";
    let expected = "{'HOME': '/tmp', 'TMPDIR': '/tmp', 'PYTHONTZPATH': ''}\n";
    assert_eq!(print(&mut plain, code).await, expected);
}

/// In a process whose environment holds a canary: neither what the guest can reach has it, nor the
/// memory of the session as it lies in a snapshot.
#[tokio::test]
async fn nothing_of_the_host_is_in_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("session");
    let mut child = Command::new(env!("CARGO_BIN_EXE_kaa"))
        .args(["run", "--quiet", "--output", "64M", "-c", ALL_TEXTS, "--snapshot-out"])
        .arg(&file)
        .env(CANARY.0, CANARY.1)
        .env("KAA_CACHE", store_root())
        .current_dir(directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    // The look was a real one: it found the guest's own variables, and the agent's sources.
    assert!(text.contains("PYTHONTZPATH") && text.contains("/usr/local/lib/python315.zip"));
    assert!(text.len() > 1_000_000, "{} bytes of text", text.len());
    // What differs from the image, which was made without the canary, and the image.
    let mut memory = Parts::read(&file).pages.into_values().collect::<Vec<_>>().concat();
    memory.extend(image_memory("base"));
    let mut words = host_words();
    words.push(directory.path().display().to_string());
    assert!(words.len() > 6, "{words:?}");
    for word in words {
        assert!(!text.contains(&word), "a cell finds {word:?}");
        let at = find(&memory, word.as_bytes());
        assert_eq!(at, None, "{word:?} is in the session's memory");
    }
}
