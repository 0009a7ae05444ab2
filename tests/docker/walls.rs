//! What a guest in a container can't reach, as it sees it itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use async_trait::async_trait;
use kaa::docker::{DockerOptions, Network};
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, Prompt};
use kaa::{Backend, EnvironmentExt, EnvironmentOptions, Limits, Mount, Outcome, Policy, Status};

use crate::faults::build;
use crate::{Lab, block_on, open, print, run};

/// Tries things and prints what came of them, as a JSON object.
const FACTS: &str = r#"
import errno, glob, json, os, resource, socket, sys
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return line.split()[1]
def tried(f):
    try:
        f()
        return "done"
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
def write(path):
    return tried(lambda: open(path + "/kaa-test", "w").close())
facts = {
    "ids": [os.getuid(), os.geteuid(), os.getgid(), *os.getgroups()],
    "caps": [status(n) for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status("NoNewPrivs"),
    "written": {p: write(p) for p in ("/", "/usr", "/etc", "/root", "/var/tmp", "/tmp")},
    "chroot": tried(lambda: os.chroot("/tmp")),
    "setuid": tried(lambda: os.setuid(0)),
    "supervisor": tried(lambda: open("/proc/1/fd/1", "wb")),
    "memory": tried(lambda: open("/proc/1/mem", "r+b")),
    "kill": tried(lambda: os.kill(1, 9)),
    "sockets": glob.glob("/var/run/*.sock") + glob.glob("/run/*.sock"),
    "devices": sorted(set(os.listdir("/dev")) - {"core", "fd", "full", "mqueue", "null", "ptmx", "pts",
        "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"}),
    "hostname": socket.gethostname(),
    "where": os.getcwd(),
    "home": os.path.expanduser("~"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
    "swaps": "swap" in open("/proc/self/cgroup").read(),
}
print(json.dumps(facts))
"#;

pub(crate) fn identity_and_files(lab: &Lab) {
    block_on(async {
        let mut session = open(&lab.backend).await;
        let facts = print(&mut session, FACTS).await;
        let facts: serde_json::Value = serde_json::from_str(&facts).unwrap();
        for (name, expected) in [
            ("ids", r#"[65534, 65534, 65534]"#),
            ("no_new_privs", r#""1""#),
            ("chroot", r#""EPERM""#),
            ("setuid", r#""EPERM""#),
            ("supervisor", r#""EACCES""#),
            ("memory", r#""EACCES""#),
            ("sockets", "[]"),
            ("devices", "[]"),
            ("hostname", r#""kaa""#),
            ("where", r#""/tmp""#),
            ("home", r#""/tmp""#),
            ("files", "1024"),
            ("core", "0"),
        ] {
            let expected: serde_json::Value = serde_json::from_str(expected).unwrap();
            let mut found = facts[name].clone();
            if name == "ids" {
                // The group is among the groups, or not: engines differ.
                found.as_array_mut().unwrap().truncate(3);
            }
            assert_eq!(found, expected, "{name}");
        }
        for group in facts["ids"].as_array().unwrap() {
            assert_eq!(group, 65534, "a group that nobody gave it");
        }
        for caps in facts["caps"].as_array().unwrap() {
            assert_eq!(caps, "0000000000000000");
        }
        for (path, found) in facts["written"].as_object().unwrap() {
            let expected: &[&str] =
                if path == "/tmp" { &["done"] } else { &["EROFS", "EACCES", "ENOENT"] };
            assert!(expected.contains(&found.as_str().unwrap()), "{path}: {found}");
        }
        // The kernel takes the signal and the first process of a namespace doesn't: it lives.
        assert_eq!(print(&mut session, "print(1)").await, "1\n");
        session.close().await.unwrap();
    });
}

/// Sends every prompt back.
struct Echo;

#[async_trait]
impl LmHandler for Echo {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let Prompt::Text(text) = &request.prompt else { return Err(LmError::new("a text")) };
        Ok(LmCompletion { response: format!("heard {text}"), ..LmCompletion::default() })
    }
}

pub(crate) fn network(lab: &Lab) {
    block_on(async {
        let options = EnvironmentOptions { lm: Some(Arc::new(Echo)), ..Default::default() };
        let mut session = lab.backend.open(options).await.unwrap();
        let code = "import socket
print([name for _, name in socket.if_nameindex()])
for address in ('1.1.1.1', '172.17.0.1', '169.254.169.254'):
    try:
        socket.create_connection((address, 80), timeout=2)
        print('reached')
    except OSError as e:
        print(type(e).__name__, e.errno)
near = socket.create_server(('127.0.0.1', 0))
socket.create_connection(near.getsockname(), timeout=2).close()
print(llm_query('a'), llm_query_batched(['b', 'c']))";
        let printed = print(&mut session, code).await;
        let unreachable = "OSError 101\n".repeat(3);
        let expected = format!("['lo']\n{unreachable}heard a ['heard b', 'heard c']\n");
        assert_eq!(printed, expected);
        session.close().await.unwrap();
    });
}

pub(crate) fn bridge(lab: &Lab) {
    block_on(async {
        let options = DockerOptions { network: Network::Bridge, ..lab.options() };
        let mut session = open(&lab.connect(options).await).await;
        let code = "import socket; print(len(socket.if_nameindex()) > 1)";
        assert_eq!(print(&mut session, code).await, "True\n");
        session.close().await.unwrap();
        let options =
            DockerOptions { network: Network::Named("kaa-none-such".into()), ..lab.options() };
        let backend = lab.connect(options).await;
        let error = backend.open(EnvironmentOptions::default()).await.err().unwrap().to_string();
        assert!(error.contains("kaa-none-such"), "{error}");
    });
}

pub(crate) fn pids(lab: &Lab) {
    block_on(async {
        let options = DockerOptions { pids: 24, ..lab.options() };
        let mut session = open(&lab.connect(options).await).await;
        let code = "import os, signal, time
children = []
try:
    while len(children) < 100:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
except OSError as e:
    print(type(e).__name__, len(children) < 24)
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)";
        assert_eq!(print(&mut session, code).await, "BlockingIOError True\n");
        assert_eq!(print(&mut session, "print(os.getpid() > 1)").await, "True\n");
        session.close().await.unwrap();
    });
}

pub(crate) fn disk(lab: &Lab) {
    block_on(async {
        let limits = Limits { disk_bytes: 8 << 20, ..Limits::default() };
        let options = EnvironmentOptions { limits, ..EnvironmentOptions::default() };
        let mut session = lab.backend.open(options).await.unwrap();
        let code = "import errno, os
written = 0
try:
    for n in range(16):
        with open(f'/tmp/{n}', 'wb', buffering=0) as f:
            written += f.write(bytes(1 << 20))
except OSError as e:
    print(errno.errorcode[e.errno], written >> 20)
for n in range(9):
    os.path.exists(f'/tmp/{n}') and os.remove(f'/tmp/{n}')
open('/tmp/a', 'w').write('b')";
        assert_eq!(print(&mut session, code).await, "ENOSPC 8\n");
        session.close().await.unwrap();
    });
}

/// One process meets its own bound, as an exception; several together meet the container's, which
/// costs one of them, or the session, but never more.
pub(crate) fn memory(lab: &Lab) {
    block_on(async {
        let limits = Limits { memory_bytes: 96 << 20, disk_bytes: 1 << 20, ..Limits::default() };
        let options = || EnvironmentOptions { limits: limits.clone(), ..Default::default() };
        let mut session = lab.backend.open(options()).await.unwrap();
        let code = "try:\n    x = bytearray(200 << 20)\nexcept MemoryError:\n    print('no room')";
        assert_eq!(print(&mut session, code).await, "no room\n");

        let code = "import os, time
for _ in range(4):
    if os.fork() == 0:
        x = bytearray(70 << 20)
        time.sleep(60)
        os._exit(0)
ends = [os.waitpid(-1, 0)[1]]
print(ends)";
        match session.execute(code).await {
            Ok(execution) => {
                assert_eq!(execution.outcome, Outcome::Completed, "{execution:?}");
                assert_eq!(execution.stdout.text(), "[9]\n");
            }
            Err(error) => assert!(error.to_string().contains("limits.memory_bytes"), "{error}"),
        }
        if session.status() == Status::Poisoned {
            session.reset().await.unwrap();
        }
        assert_eq!(print(&mut session, "print(1)").await, "1\n");
        session.close().await.unwrap();
    });
}

pub(crate) fn neighbours(lab: &Lab) {
    block_on(async {
        let (mut one, mut other) = (open(&lab.backend).await, open(&lab.backend).await);
        let hide = "import os, sys
from multiprocessing import shared_memory
secret = 'only here'
open('/tmp/secret', 'w').write(secret)
block = shared_memory.SharedMemory('kaa_secret', create=True, size=16)
print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[0])";
        assert_eq!(print(&mut one, hide).await, "1\n");
        let seek = "import os
from multiprocessing import shared_memory
print(os.listdir('/tmp'), 'secret' in globals())
try:
    shared_memory.SharedMemory('kaa_secret')
except FileNotFoundError:
    print('no block')
def command(pid):
    try:
        return open(f'/proc/{pid}/cmdline').read()
    except OSError:
        return ''
print(len({p for p in os.listdir('/proc') if p.isdigit()}))";
        // Its supervisor and its worker, and nobody else.
        assert_eq!(print(&mut other, seek).await, "[] False\nno block\n2\n");
        one.close().await.unwrap();
        other.close().await.unwrap();
    });
}

pub(crate) fn mounts(lab: &Lab) {
    let root = tempfile::tempdir().unwrap();
    let [read, written, deep] = ["read", "written", "deep"].map(|name| root.path().join(name));
    for path in [&read, &written, &deep] {
        fs::create_dir(path).unwrap();
    }
    fs::write(read.join("a.txt"), "from outside").unwrap();
    for (path, mode) in [(root.path(), 0o755), (&read, 0o777), (&written, 0o777), (&deep, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let mount = |host: &std::path::Path, guest: &str, writable| Mount {
        host: host.to_owned(),
        guest: guest.into(),
        writable,
    };
    block_on(async {
        let policy = Policy {
            mounts: vec![
                mount(&read, "/data", false),
                mount(&written, "/out", true),
                mount(&deep, "/tmp/in/the/deep", true),
            ],
            env: vec![("GREETING".into(), "hello = hello".into())],
            ..Policy::default()
        };
        let setup = "ready = 'set up'".to_owned();
        let backend = lab.connect(DockerOptions { setup_code: Some(setup), ..lab.options() }).await;
        let options = EnvironmentOptions { policy, ..EnvironmentOptions::default() };
        let mut session = backend.open(options).await.unwrap();
        let code = "import os
print(open('/data/a.txt').read(), os.environ['GREETING'], ready)
try:
    open('/data/b.txt', 'w')
except OSError as e:
    print(e.errno)
open('/out/c.txt', 'w').write('from inside')";
        let printed = print(&mut session, code).await;
        assert_eq!(printed, "from outside hello = hello set up\n30\n");
        assert_eq!(fs::read_to_string(written.join("c.txt")).unwrap(), "from inside");
        // A reset empties scratch, and not what is mounted in it.
        print(
            &mut session,
            "open('/tmp/in/the/deep/d.txt', 'w').write('kept')\nopen('e.txt', 'w')",
        )
        .await;
        session.reset().await.unwrap();
        let left = print(
            &mut session,
            "import os\nprint(open('/tmp/in/the/deep/d.txt').read(), os.path.exists('e.txt'))",
        );
        assert_eq!(left.await, "kept False\n");
        assert_eq!(fs::read_to_string(deep.join("d.txt")).unwrap(), "kept");
        session.close().await.unwrap();

        let gone = root.path().join("none");
        let policy = Policy { mounts: vec![mount(&gone, "/data", false)], ..Policy::default() };
        let options = EnvironmentOptions { policy, ..EnvironmentOptions::default() };
        let error = backend.open(options).await.err().unwrap().to_string();
        assert!(error.contains("mount at `/data`") && error.contains("none"), "{error}");
    });
}

/// An image that would run as root, start something else, keep volumes and be looked after.
pub(crate) fn odd_image(lab: &Lab) {
    block_on(async {
        let dockerfile = "FROM python:3.11-slim\nUSER 0:0\nENTRYPOINT [\"/bin/false\"]\nCMD [\"x\"]\n\
             VOLUME /vol /tmp\nEXPOSE 8080\nWORKDIR /usr\nENV FROM_IMAGE=yes\n\
             HEALTHCHECK --interval=1s CMD touch /tmp/checked\n";
        build(lab, "odd", dockerfile, &[]).await;
        let options = DockerOptions { image: "kaa-test:odd".into(), ..lab.options() };
        let mut session = open(&lab.connect(options).await).await;
        let code = "import os, time
print(os.getuid(), os.getcwd(), os.environ['FROM_IMAGE'], os.path.exists('/tmp/checked'))
try:
    open('/vol/a', 'w')
except OSError as e:
    print(e.errno in (13, 30))
print([l.split()[2] for l in open('/proc/mounts') if l.split()[1] in ('/vol', '/tmp')])";
        let execution = run(&mut session, code).await;
        assert_eq!(
            execution.stdout.text(),
            "65534 /tmp yes False\nTrue\n['tmpfs', 'tmpfs']\n",
            "{}",
            execution.stderr.text()
        );
        session.close().await.unwrap();
    });
}

pub(crate) fn gvisor(lab: &Lab) {
    block_on(async {
        let info = lab.api.info().await.unwrap();
        if !info.runtimes.unwrap_or_default().contains_key("runsc") {
            let options = DockerOptions { runtime: Some("runsc".into()), ..lab.options() };
            let error = kaa::docker::DockerBackend::connect(options, &|_| {}).await.unwrap_err();
            assert!(error.to_string().contains("the runtime `runsc`"), "{error}");
            return;
        }
        let options = DockerOptions { runtime: Some("runsc".into()), ..lab.options() };
        let mut session = open(&lab.connect(options).await).await;
        let code = "import os; x = 41; print(os.uname().release)";
        let inside = print(&mut session, code).await;
        let outside = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        assert_ne!(inside, outside, "its kernel is the host's");
        assert_eq!(print(&mut session, "print(x + 1)").await, "42\n");
        session.close().await.unwrap();
    });
}
