//! Snapshots by someone who means harm: files that are read without complaint, and hold whatever he
//! likes. Their sessions may do anything but hurt others.

mod common;
#[path = "hostile/files.rs"]
mod files;
#[path = "common/panics.rs"]
mod panics;

use files::{PAGE, Parts, bystander, check_others, options, suffer, victim};
use kaa::{EnvironmentOptions, Limits};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value as Json, json};

/// Files of random harm.
const MUTATIONS: u64 = 300;
/// Nothing of this size may appear in the host for a file of a megabyte.
const HOST_BYTES_MAX: u64 = 1 << 30;

/// The same harm on every run.
struct Random(StdRng);

impl Random {
    fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn below(&mut self, end: usize) -> usize {
        self.0.random_range(..end)
    }

    fn page(&mut self) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        self.0.fill(&mut page[..]);
        page
    }
}

/// The most memory that this process ever had, where the system tells.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// What is done to a good snapshot.
type Harm = Box<dyn Fn(&mut Parts)>;

fn harm(harm: impl Fn(&mut Parts) + 'static) -> Harm {
    Box::new(harm)
}

fn session_key(key: &'static str, value: Json) -> Harm {
    harm(move |parts| parts.header["session"][key] = value.clone())
}

fn file(kind: u8, path: &str, rest: &[u8]) -> (u8, String, Vec<u8>) {
    (kind, path.to_owned(), rest.to_vec())
}

fn tree_of(files: Vec<(u8, String, Vec<u8>)>) -> Harm {
    harm(move |parts| parts.files = files.clone())
}

/// A file's name, harm, and a part of the complaint if it has to be refused.
fn cases() -> Vec<(String, Harm, &'static str)> {
    let most = u64::MAX;
    let told = |profile: &str, tools: usize| {
        let tools: Vec<String> = (0..tools).map(|n| format!("tool{n}")).collect();
        json!({ "profile": profile, "lm": true, "env": {"A": "\0=\x1b[2J"}, "allowed_imports": [], "tools": tools })
    };
    let memory = |bytes: u64| harm(move |parts| parts.header["memory_bytes"] = bytes.into());
    let deep = |n: usize| vec!["d"; n].join("/");
    let mut tree: Vec<_> = (1..=64).map(|n| file(2, &deep(n), b"")).collect();
    tree.push(file(4, "up", b"d/d/d"));
    let mut cases = vec![
        ("all cells", session_key("cells", most.into()), ""),
        ("all random bytes", session_key("random_bytes", most.into()), ""),
        ("all bytes of mounts", session_key("mount_bytes", most.into()), ""),
        ("a late clock", session_key("clock", json!({"start_ns": most, "elapsed_ns": 0})), ""),
        ("an old clock", session_key("clock", json!({"start_ns": 0, "elapsed_ns": most})), ""),
        ("both", session_key("clock", json!({"start_ns": most, "elapsed_ns": most})), ""),
        ("another seed", session_key("seed", most.into()), ""),
        ("told nothing", session_key("told", Json::Null), ""),
        ("told of tools", session_key("told", told("rlm", 5000)), ""),
        ("the other profile", session_key("told", told("openenv", 1)), ""),
        ("no profile", session_key("told", told("\u{1b}[31m", 0)), "the profile `\\u{1b}[31m`"),
        ("odd memory", memory((50 << 20) + PAGE as u64), "a memory of at least"),
        ("small memory", memory(64 << 10), "the snapshot"),
        ("all memory", memory(4 << 30), "limits.memory_bytes"),
        ("too much memory", memory((4 << 30) + (64 << 10)), "4294967296 bytes of memory"),
        ("absurd memory", memory(most - most % PAGE as u64), "bytes of memory"),
        ("much disk", tree_of(vec![file(3, "big", &[b'x'; 1 << 20])]), ""),
        (
            "too much disk",
            tree_of([0, 1].map(|n| file(3, &n.to_string(), &[7; 1 << 20])).into()),
            "limits.disk_bytes",
        ),
        ("a deep tree", tree_of(tree), ""),
        ("long names", tree_of(vec![file(3, &"n".repeat(255), b"x")]), ""),
        ("odd names", tree_of(vec![file(3, "\u{1b}[2J\n*?-rf", b""), file(4, "-", b"-")]), ""),
        (
            "links in a circle",
            tree_of(vec![file(4, "a", b"b"), file(4, "b", b"a"), file(4, "f", b"f")]),
            "",
        ),
        ("a link in the way", tree_of(vec![file(2, "mine", b""), file(4, "f", b"mine/x")]), ""),
        ("no page", harm(|parts| parts.pages.clear()), ""),
        ("no globals", harm(|parts| parts.header["globals"] = json!([])), "globals of its image"),
        (
            "a reference",
            harm(|parts| parts.header["globals"][0]["type"] = "externref".into()),
            "globals of its image",
        ),
        (
            "an inode too many",
            tree_of(vec![file(3, "a/b", b"")]),
            "a directory before all that lies in it",
        ),
    ]
    .into_iter()
    .map(|(what, harm, refused)| (what.to_owned(), harm, refused))
    .collect::<Vec<_>>();
    for path in ["../x", "/etc/passwd", "a/../../x", "a//b", ".", "", "nul\0"] {
        cases.push((format!("path {path:?}"), tree_of(vec![file(3, path, b"x")]), "a path "));
    }
    for target in ["..", "/etc", "a/../..", ""] {
        let harm = tree_of(vec![file(4, "l", target.as_bytes())]);
        cases.push((format!("link to {target:?}"), harm, "a target of a link "));
    }
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_header_and_the_files_say_only_the_session_itself_suffers() {
    panics::count();
    let directory = tempfile::tempdir().unwrap();
    let (good, mut others, mut round) = (victim(directory.path()).await, bystander().await, 0);
    let path = directory.path().join("s");
    good.write(&path);
    assert_eq!(suffer("the good one", &path, options()).await, Ok(()));
    for (what, harm, refused) in cases() {
        let mut parts = good.clone();
        harm(&mut parts);
        parts.write(&path);
        match (suffer(&what, &path, options()).await, refused) {
            (Ok(()), "") => {}
            (Err(error), refused) if !refused.is_empty() && error.contains(refused) => {}
            (found, _) => panic!("{what}: {found:?}"),
        }
        check_others(&what, &mut others, &mut round).await;
    }
    // With limits that allow it, there is as much memory as there can be, and none of it is real.
    let mut parts = good.clone();
    parts.header["memory_bytes"] = ((4_u64 << 30) - (1 << 20)).into();
    parts.write(&path);
    let large = Limits { memory_bytes: 4 << 30, ..options().limits };
    let large = EnvironmentOptions { limits: large, ..options() };
    suffer("all memory, allowed", &path, large).await.unwrap();
    check_others("all memory", &mut others, &mut round).await;
    assert!(peak_bytes() < HOST_BYTES_MAX, "{} bytes", peak_bytes());
    assert_eq!(panics::counted(), 0);
}

/// Globals such as the stack pointer at the ends of the world.
#[tokio::test(flavor = "multi_thread")]
async fn globals_may_have_any_value() {
    panics::count();
    let directory = tempfile::tempdir().unwrap();
    let (good, mut others, mut round) = (victim(directory.path()).await, bystander().await, 0);
    let path = directory.path().join("s");
    let end = u64::from(good.memory_pages()) * PAGE as u64;
    for number in 0..good.header["globals"].as_array().unwrap().len() {
        for bits in
            [0, 1, 16, 0x7fff_ffff, 0x8000_0000, 0xffff_fff0, 0xffff_ffff, u64::MAX, end, end - 16]
        {
            let mut parts = good.clone();
            parts.global(number, bits);
            parts.write(&path);
            let what = format!("global {number} at {bits:#x}");
            let _ = suffer(&what, &path, options()).await;
        }
        check_others("globals", &mut others, &mut round).await;
    }
    assert_eq!(panics::counted(), 0);
}

/// One kind of random harm to a snapshot.
fn mutate(parts: &mut Parts, random: &mut Random) {
    let numbers: Vec<u32> = parts.pages.keys().copied().collect();
    let any = |random: &mut Random| numbers[random.below(numbers.len())];
    match random.below(7) {
        0 => {
            // Bits here and there, where the session has written: its heap and its stack.
            for _ in 0..=random.below(200) {
                let page = parts.pages.get_mut(&any(random)).unwrap();
                page[random.below(PAGE)] ^= 1 << random.below(8);
            }
        }
        1 => {
            for _ in 0..=random.below(20) {
                let garbage = random.page();
                parts.pages.insert(any(random), garbage);
            }
        }
        2 => {
            // Anywhere: static data, modules, the agent's own objects.
            for _ in 0..=random.below(50) {
                let number = random.below(parts.memory_pages() as usize) as u32;
                let page = match random.below(3) {
                    0 => random.page(),
                    1 => vec![0xff; PAGE],
                    _ => vec![0; PAGE],
                };
                parts.pages.insert(number, page);
            }
        }
        3 => {
            let (one, other) = (any(random), any(random));
            let page = parts.pages[&one].clone();
            parts.pages.insert(other, page);
        }
        4 => parts.pages.retain(|_, _| random.below(10) > 0),
        5 => {
            let (number, bits) = (random.below(16), random.0.random::<u64>() >> random.below(64));
            parts.global(number, bits);
        }
        _ => {
            // Pointers that lead elsewhere, one in every so many words.
            let every = 1 + random.below(60);
            let page = parts.pages.get_mut(&any(random)).unwrap();
            for word in page.chunks_exact_mut(4).step_by(every) {
                let address = random.below(50 << 20) as u32;
                word.copy_from_slice(&address.to_le_bytes());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_harm_stays_in_the_sandbox() {
    panics::count();
    let directory = tempfile::tempdir().unwrap();
    let (good, mut others, mut round) = (victim(directory.path()).await, bystander().await, 0);
    let path = directory.path().join("s");
    for seed in 0..MUTATIONS {
        let (mut parts, mut random) = (good.clone(), Random::new(seed));
        for _ in 0..=random.below(3) {
            mutate(&mut parts, &mut random);
        }
        parts.write(&path);
        let what = format!("mutation {seed}");
        let _ = suffer(&what, &path, options()).await;
        assert_eq!(panics::counted(), 0, "{what}");
        if seed % 20 == 0 {
            check_others(&what, &mut others, &mut round).await;
        }
    }
    check_others("all mutations", &mut others, &mut round).await;
    assert!(peak_bytes() < HOST_BYTES_MAX, "{} bytes", peak_bytes());
}
