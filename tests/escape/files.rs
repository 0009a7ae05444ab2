//! Files of the host: nothing is reachable by default, and no more than what is granted.

use std::fs;

use kaa::{Environment, EnvironmentOptions, Error, Limits, Mount, Policy};
use serde_json::Value as Json;

use super::bait::{Bait, listing};
use super::common::{image, open, print, run, runtime, session, store_root};

/// Every function by every way: see the file.
const ATTEMPTS: &str = include_str!("files.py");
/// The guest's directories with their descriptors, each with the one to move and link from and to: such as
/// is charged alike, since between others that is refused before anybody looks at the path.
const ROOTS: &str = "[('/data', 6, '/output'), ('/output', 7, '/output'), ('/tmp', 4, '/tmp'), \
                     ('/usr/local/lib', 3, '/tmp'), ('/', 5, '/tmp')]";
/// A table that loses its rows would pass.
const TRIED_MIN: u64 = 50_000;
const CONTROLS_MIN: u64 = 200;

#[tokio::test]
async fn no_function_of_paths_leads_out() {
    let bait = Bait::new();
    let names = store_root().join("names");
    let before = (bait.untouchable(), listing(&names));
    // What is written to a mount is counted for good, also if it goes again.
    let limits = Limits { disk_bytes: 8 << 30, ..Limits::default() };
    let mut session = open(EnvironmentOptions { limits, ..bait.options() });
    let code = format!("HOST, ROOTS = {:?}, {ROOTS}\n{ATTEMPTS}", bait.host());
    let found: Json = serde_json::from_str(&print(&mut session, &code).await).unwrap();
    let number = |key: &str| found[key].as_u64().unwrap();
    assert_eq!(number("count"), 0, "{found:#}");
    assert!(number("tried") > TRIED_MIN && number("refused") > TRIED_MIN / 2, "{found:#}");
    // Each function does its work where it may, or is known to do none.
    assert_eq!(found["idle"], Json::Array(vec![]), "{found:#}");
    assert_eq!(found["uncovered"], Json::Array(vec![]), "{found:#}");
    assert!(number("controls") > CONTROLS_MIN, "{found:#}");
    let after = (bait.untouchable(), listing(&names));
    for (path, found) in &before.0 {
        assert_eq!(after.0.get(path), Some(found), "{}", path.display());
    }
    assert!(before == after, "something is new: {:?}", after.0.keys());
    assert_eq!(print(&mut session, "print(open('/data/plain').read())").await, "plain\n");
}

/// Files of a mount that is only to be read can't be changed by way of one that can be written, nor
/// through what is open.
#[tokio::test]
async fn what_is_only_to_be_read_stays_as_it_is() {
    let bait = Bait::new();
    let before = (bait.untouchable(), listing(&bait.at("read")));
    let mut session = open(bait.options());
    let code = r"
import os
done = []
def attempt(name, function):
    try:
        function()
        done.append(name)
    except OSError: pass
data = os.open('/data', os.O_RDONLY | os.O_DIRECTORY)
for path in ('/data/plain', '/usr/local/lib/python315.zip'):
    fd = os.open(path, os.O_RDONLY)
    attempt('write', lambda: os.write(fd, b'x'))
    attempt('pwrite', lambda: os.pwrite(fd, b'x', 0))
    attempt('ftruncate', lambda: os.ftruncate(fd, 0))
    attempt('futimes', lambda: os.utime(fd, (1, 1)))
    for to in ('/output/l', '/tmp/l', '/data/l'):
        attempt('link', lambda: os.link(path, to))
        attempt('rename', lambda: os.rename(path, to))
    for flags in (os.O_TRUNC, os.O_RDWR, os.O_CREAT, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
        attempt(f'open {flags}', lambda: os.open(path, flags))
attempt('futimes of a directory', lambda: os.utime(data, (1, 1)))
attempt('rename over', lambda: (open('/output/new', 'w').close(), os.rename('/output/new', '/data/plain')))
attempt('link over', lambda: os.link('/output/plain', '/data/new'))
attempt('mkdir', lambda: os.mkdir('new', dir_fd=data))
print(done)";
    assert_eq!(print(&mut session, code).await, "[]\n");
    assert!((bait.untouchable(), listing(&bait.at("read"))) == before);
}

#[tokio::test]
async fn nothing_is_reachable_by_default() {
    let mut session = session();
    let code = r"
import os
print(os.listdir('/'), os.listdir('/tmp'), os.listdir('/usr/local/lib'))
print([name for name in ('/etc', '/home', '/proc', '/dev', '/usr', '/usr/bin', '/root', '/var') if os.path.exists(name)])
def opens(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
print([fd for fd in range(3, 1000) if opens(fd)])
for path in ('/x', '/usr/x', '/usr/local/x', '/usr/local/lib/x'):
    try: print('made', path, open(path, 'w'))
    except OSError: pass
";
    assert_eq!(print(&mut session, code).await, "[] [] ['python315.zip']\n[]\n[3, 4, 5]\n");
}

#[tokio::test]
async fn mounts_are_read_only_unless_asked() {
    let bait = Bait::new();
    let mut options = bait.options();
    let deep = Mount { host: bait.at("read"), guest: "/output/deep".into(), writable: false };
    options.policy.mounts.push(deep);
    let mut session = open(options);
    let code = r"
import os, pathlib
print(open('/data/plain').read(), open('/output/deep/plain').read(), os.path.isdir('/data/sub'))
pathlib.Path('/output/new').write_text('made')
os.mkdir('/output/dir')
os.rename('/output/new', '/output/dir/new')
for path in ('/data/new', '/output/deep/new'):
    try: open(path, 'w')
    except PermissionError as error: print(error.strerror)";
    let refused = "Operation not permitted\n".repeat(2);
    assert_eq!(print(&mut session, code).await, format!("plain plain True\n{refused}"));
    assert_eq!(fs::read_to_string(bait.at("write/dir/new")).unwrap(), "made");
}

/// To open one of these is to wait for somebody else, where no limit reaches.
#[tokio::test]
async fn pipes_and_sockets_in_a_mount_are_not_opened() {
    let bait = Bait::new();
    let made = std::process::Command::new("mkfifo").arg(bait.at("write/pipe")).status().unwrap();
    assert!(made.success());
    let _socket = std::os::unix::net::UnixListener::bind(bait.at("write/socket")).unwrap();
    std::os::unix::fs::symlink("pipe", bait.at("write/to_pipe")).unwrap();
    let mut session = open(bait.options());
    let code = r"
import os
for name in ('pipe', 'to_pipe', 'socket'):
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        try: print('opened', name, os.open('/output/' + name, flags))
        except OSError: pass
os.rename('/output/pipe', '/output/moved')
print(sorted(os.listdir('/output')), os.stat('/output/moved').st_size)";
    let listed = "['abs', 'chain', 'chain2', 'dangling', 'loop', 'moved', 'plain', 'proc', 'rel', 'root', 'socket', 'sub', 'to_pipe', 'up'] 0\n";
    let cell = tokio::time::timeout(std::time::Duration::from_secs(60), print(&mut session, code));
    assert_eq!(cell.await.expect("nothing waits"), listed);
}

/// Holes cost no disk, but whoever reads a file with them has all of it in memory.
#[tokio::test]
async fn files_with_holes_are_not_read_whole() {
    let limits = Limits { disk_bytes: 1 << 20, ..Limits::default() };
    let mut session = open(EnvironmentOptions { limits, ..EnvironmentOptions::default() });
    let code = "f = open('/tmp/holes', 'wb'); f.seek((1 << 40) - 1); f.write(b'x'); f.close()
import os; print(os.stat('/tmp/holes').st_size)";
    assert_eq!(print(&mut session, code).await, format!("{}\n", 1_u64 << 40));
    let refused = |error: Error| {
        let words = "with `/tmp/holes` the session's files are longer than limits.disk_bytes";
        assert!(
            matches!(error, Error::Invalid { .. }) && error.to_string().contains(words),
            "{error}"
        );
    };
    refused(session.snapshot().await.unwrap_err());
    refused(session.hibernate().await.unwrap_err());
    refused(session.fork().await.err().unwrap());
    let code = "f = open('/tmp/holes', 'rb+'); f.truncate(1000); f.close(); print(open('/tmp/holes').read(2))";
    assert_eq!(print(&mut session, code).await, "\0\0\n");
    session.snapshot().await.unwrap();
}

#[tokio::test]
async fn descriptors_are_bounded_and_those_of_the_session_stay() {
    let mut session = session();
    let code = "
import os
held = []
try:
    for _ in range(10_000): held.append(open('/usr/local/lib/python315.zip', 'rb'))
except OSError as e: print(len(held) <= 256, e.errno == __import__('errno').EMFILE)
held.clear()
for fd in range(3, 20):
    try: os.close(fd)
    except OSError: pass
import wave, colorsys
print(open('/tmp/after', 'w').write('x'), os.path.exists('/tmp'), os.listdir('/tmp'))
";
    assert_eq!(print(&mut session, code).await, "True True\n1 True ['after']\n");
    // A removed file that's open still counts, and nothing moves out of the quota.
    let code = "
import os
f = open('/tmp/x', 'wb', 0)
os.unlink('/tmp/x')
n = 0
try:
    while n < 1000:
        f.write(bytes(1 << 20))
        n += 1
except OSError: print(n <= 64)
f.close()
print(open('/tmp/y', 'wb').write(bytes(60 << 20)))
";
    assert_eq!(print(&mut session, code).await, "True\n62914560\n");
}

#[tokio::test]
async fn a_first_look_at_files_works() {
    for code in
        ["print(os.path.exists('/tmp'))", "os.mkdir('/tmp/d'); print(os.path.isdir('/tmp/d'))"]
    {
        let mut session = session();
        assert_eq!(print(&mut session, &format!("import os\n{code}")).await, "True\n", "{code}");
    }
}

#[tokio::test]
async fn policies_that_cannot_be_are_refused_by_name() {
    let host = std::env::temp_dir();
    let mount = |guest: &str| Mount { host: host.clone(), guest: guest.into(), writable: false };
    let cases = [
        (Policy { mounts: vec![mount("relative")], ..Policy::default() }, "relative"),
        (Policy { mounts: vec![mount("/tmp")], ..Policy::default() }, "/tmp"),
        (Policy { mounts: vec![mount("/")], ..Policy::default() }, "mount at `/`"),
        (Policy { mounts: vec![mount("/a/../tmp")], ..Policy::default() }, "`..`"),
        (Policy { mounts: vec![mount("/a\0b")], ..Policy::default() }, "NUL"),
        // The session's own directories would hide these.
        (Policy { mounts: vec![mount("/tmp/x")], ..Policy::default() }, "mount at `/tmp/x`"),
        (Policy { mounts: vec![mount("/usr/local/lib/x/")], ..Policy::default() }, "outside of"),
        (Policy { mounts: vec![mount("/a//b")], ..Policy::default() }, "`//`"),
        (Policy { mounts: vec![mount("/a/./b")], ..Policy::default() }, "mount at `/a/./b`"),
        (Policy { mounts: vec![mount("/a"), mount("/a")], ..Policy::default() }, "two mounts"),
        (
            Policy {
                mounts: vec![Mount { host: "/no/such/dir".into(), ..mount("/a") }],
                ..Policy::default()
            },
            "/no/such/dir",
        ),
        (Policy { env: vec![("A=B".into(), String::new())], ..Policy::default() }, "A=B"),
    ];
    for (policy, word) in cases {
        let options = EnvironmentOptions { policy, ..EnvironmentOptions::default() };
        let error = runtime().environment(&image("base"), options).unwrap_err();
        assert!(
            matches!(error, Error::Invalid { .. }) && error.to_string().contains(word),
            "{error}"
        );
    }
}

/// The scratch of a session that is gone is gone too, whatever is in it.
#[tokio::test]
async fn scratch_goes_with_the_session() {
    let mark = format!("left-{}", std::process::id());
    let mut session = session();
    let code = format!(
        "import os\nd = '/tmp'\nfor n in range(200):\n    d += '/d'\n    os.mkdir(d)\nopen(d + '/{mark}', 'w').write('x')\nos.symlink('..', '/tmp/up')"
    );
    run(&mut session, &code).await;
    Box::new(session).close().await.unwrap();
    let scratch = store_root().join("scratch");
    let left = std::process::Command::new("find").arg(&scratch).args(["-name", &mark]).output();
    assert_eq!(String::from_utf8_lossy(&left.unwrap().stdout), "");
}
