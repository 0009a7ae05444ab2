//! What a guest can reach: nothing by default, and no more than what is granted.

mod common;

use common::{open, print, run, session};
use kaa::{EnvironmentOptions, Error, Mount, Policy};

#[tokio::test]
async fn nothing_is_reachable_by_default() {
    let mut session = session();
    let code = r#"
import os
print(sorted(os.environ) == ['HOME', 'PYTHONTZPATH', 'TMPDIR'], os.environ.get('PATH'))
for path in ['/etc/passwd', '/proc/self/environ', '/usr/bin', '/root', '/home', '../etc/passwd', '/tmp/../etc/passwd', '/usr/local/lib/../../bin']:
    try:
        open(path).read()
        print('open', path)
    except OSError: pass
    try:
        os.listdir(path)
        print('list', path)
    except OSError: pass
print(os.listdir('/'), os.listdir('/tmp'), os.listdir('/usr/local/lib'))
for path in ['/usr/local/lib/python315.zip', '/x', '/usr/local/lib/x', '/usr/local/x']:
    try:
        open(path, 'w')
        print('write', path)
    except OSError: pass
try:
    os.remove('/usr/local/lib/python315.zip')
    print('removed')
except OSError: pass
"#;
    assert_eq!(print(&mut session, code).await, "True None\n[] [] ['python315.zip']\n");
}

#[tokio::test]
async fn mounts_are_read_only_unless_asked_and_have_no_way_out() {
    let host = tempfile::tempdir().unwrap();
    let (inside, outside) = (host.path().join("in"), host.path().join("out"));
    std::fs::create_dir_all(inside.join("sub")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(inside.join("a.txt"), "inside").unwrap();
    std::fs::write(inside.join("sub/b.txt"), "deeper").unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink(outside.join("secret"), inside.join("link")).unwrap();
    std::os::unix::fs::symlink("../out", inside.join("up")).unwrap();
    let mount =
        |guest: &str, writable| Mount { host: inside.clone(), guest: guest.into(), writable };
    let mounts = vec![mount("/data", false), mount("/output", true), mount("/output/deep", false)];
    let policy = Policy { mounts, ..Policy::default() };
    let mut session = open(EnvironmentOptions { policy, ..EnvironmentOptions::default() });
    let code = r#"
import os, pathlib
print(open('/data/a.txt').read(), open('/data/sub/b.txt').read(), sorted(os.listdir('/data')))
print(open('/output/deep/a.txt').read(), os.path.isdir('/data'), os.path.exists('/data/none'))
def refused(f):
    try:
        f()
        return False
    except OSError:
        return True
print([refused(lambda p=p: open(p).read()) for p in ['/data/link', '/data/up/secret', '/data/../out/secret', '/output/../out/secret', '/data/sub/../../out/secret', 'data/link']])
print(refused(lambda: open('/data/new', 'w')), refused(lambda: os.remove('/data/a.txt')), refused(lambda: os.rename('/data/a.txt', '/output/x')))
pathlib.Path('/output/new.txt').write_text('made')
os.mkdir('/output/dir')
os.rename('/output/new.txt', '/output/dir/new.txt')
print(refused(lambda: os.symlink('/etc/passwd', '/output/abs') or open('/output/abs').read()))
print(refused(lambda: (os.symlink('../../out/secret', '/output/dir/rel'), open('/output/dir/rel').read())))
"#;
    let expected = "inside deeper ['a.txt', 'link', 'sub', 'up']\ninside True False\n[True, True, True, True, True, True]\nTrue True True\nTrue\nTrue\n";
    assert_eq!(print(&mut session, code).await, expected);
    assert_eq!(std::fs::read_to_string(inside.join("dir/new.txt")).unwrap(), "made");
    assert_eq!(std::fs::read_to_string(inside.join("a.txt")).unwrap(), "inside");
}

#[tokio::test]
async fn environment_variables_are_what_was_granted() {
    let policy = Policy { env: vec![("TOKEN".into(), "t=1".into())], ..Policy::default() };
    let mut session = open(EnvironmentOptions { policy, ..EnvironmentOptions::default() });
    // The interpreter's own environment was read when the image was booted: granted names are new.
    let code = "import os\nprint(os.environ.get('TOKEN'), os.getenv('TOKEN'))";
    assert_eq!(print(&mut session, code).await, "t=1 t=1\n");
}

#[tokio::test]
async fn policies_that_cannot_be_are_refused_by_name() {
    let host = std::env::temp_dir();
    let mount = |guest: &str| Mount { host: host.clone(), guest: guest.into(), writable: false };
    let cases = [
        (Policy { mounts: vec![mount("relative")], ..Policy::default() }, "relative"),
        (Policy { mounts: vec![mount("/tmp")], ..Policy::default() }, "/tmp"),
        (Policy { mounts: vec![mount("/")], ..Policy::default() }, "mount at `/`"),
        (Policy { mounts: vec![mount("/a/../b")], ..Policy::default() }, ".."),
        (Policy { mounts: vec![mount("/a"), mount("/a")], ..Policy::default() }, "two mounts"),
        (
            Policy {
                mounts: vec![Mount {
                    host: "/no/such/dir".into(),
                    guest: "/a".into(),
                    writable: false,
                }],
                ..Policy::default()
            },
            "/no/such/dir",
        ),
        (Policy { env: vec![("A=B".into(), String::new())], ..Policy::default() }, "A=B"),
    ];
    for (policy, word) in cases {
        let options = EnvironmentOptions { policy, ..EnvironmentOptions::default() };
        let error = common::runtime().environment(&common::image("base"), options).unwrap_err();
        assert!(
            matches!(error, Error::Invalid { .. }) && error.to_string().contains(word),
            "{error}"
        );
    }
}

#[tokio::test]
async fn sessions_do_not_see_each_other() {
    let mut one = session();
    let mut two = session();
    run(
        &mut one,
        "secret = 'mine'\nopen('/tmp/secret', 'w').write('mine')\nimport json\njson.marker = 1",
    )
    .await;
    let code = "import os, json\nprint('secret' in globals(), os.listdir('/tmp'), hasattr(json, 'marker'))";
    assert_eq!(print(&mut two, code).await, "False [] False\n");
    drop(one);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let mut reused = session();
    assert_eq!(print(&mut reused, code).await, "False [] False\n");
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
async fn what_an_image_holds_is_immortal() {
    let mut session = session();
    let code = "
import gc, json, sys, __main__
held = [json, json.loads, json.loads.__code__, json.loads.__code__.co_consts, __main__, llm_query, {}.get, list]
print([sys._is_immortal(value) for value in held], sys._is_immortal(held))
gc.unfreeze(), gc.collect(), gc.collect()
print(json.loads('[1]'), llm_query)
";
    let seen = print(&mut session, code).await;
    let expected = "[True, True, True, True, True, True, False, True] False\n[1] <function ";
    assert!(seen.starts_with(expected), "{seen}");
    assert_eq!(print(&mut session, "print(json.dumps(dict(a=1)))").await, "{\"a\": 1}\n");
}
