//! Makes an image: starts a guest, lets it import and set up, and saves its memory.
//!
//! The guest boots with a fixed clock and a fixed seed, so that what its code can compute, string hashes
//! included, is the same in every image of a recipe. The bytes are not: numbers of host files that it
//! looked at (inodes, times) stay behind in unused memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::clock::VirtualClock;
use super::fetch::megabytes;
use super::files::{Files, Scratch, Scratches};
use super::guest::{Guest, write_u32};
use super::memory::MemoryImage;
use super::module::CompiledGuest;
use super::pins::pins;
use super::random::SeededRandom;
use super::recipe::Recipe;
use super::session::{Session, Start, Turn, TurnEnd};
use super::text::{LAYOUT, SAMPLES, is_as_expected};
use super::wasi::{self, Directories};
use crate::agent::{BOOTSTRAP, Conversation, Streams, TURN, agent_sources};
use crate::capture::Capture;
use crate::environment::EnvironmentOptions;
use crate::error::{Error, Result};
use crate::image::{
    Entry, FORMAT, FileRecord, ImageManifest, MEMORY, Progress, ProgressFn, Store, create_private,
};
use crate::limits::Limits;
use crate::lm::ScriptedHandler;
use crate::policy::{Clock, Mount, Policy};
use crate::protocol::Message;
use crate::tenant::Owner;
use serde_json::json;

/// Files that an image brings, and where its sessions see them.
pub(crate) const SITE: &str = "site";
pub(crate) const SITE_GUEST: &str = "/usr/local/site";
/// 2026-01-01, the time at which every image is booted.
const BOOT_TIME_NS: u64 = 1_767_225_600_000_000_000;
const BOOT_SEED: u64 = 0;
/// What a failing setup may show of its own output.
const OUTPUT_BYTES: usize = 64 << 10;

/// Bumped when what is done here changes what comes out of it.
pub(crate) const BOOT_VERSION: u32 = 2;
/// The count of references of an immortal object (`_Py_IMMORTAL_INITIAL_REFCNT` of CPython 3.14 and
/// later where a pointer has 32 bits).
const IMMORTAL: u32 = 5 << 28;

/// Cells that warm the agent up before its memory is saved: what they touch first is then in every
/// session already, and the interpreter has fitted the agent's code to what it does.
const WARM_UP: &[&str] = &[
    "print(1+1)",
    "pass",
    "x = [1, 2, 3]\ny = {'a': x}\nx",
    "x.append(4)\ntext = 'a b' * 300\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(10))",
    "1/0",
    "print(SHOW_VARS(), llm_query('warm'))",
    "a = llm_query(text)\nb = llm_query_batched(['warm', text])",
    "del x, y, text, f, a, b",
];
/// The same for libraries that an image imports, what sessions do most first. Such an image may have
/// variables already: these cells leave none.
const PRACTICE: &[(&str, &str)] = &[
    ("numpy", "exec('import numpy as np; np.array([1, 2]).sum()', {})"),
    ("pandas", "exec('import pandas as pd; pd.DataFrame({\"a\": [1, 2]})[\"a\"].sum()', {})"),
    ("pandas", include_str!("../../wasm/practice_pandas.py")),
    ("numpy", include_str!("../../wasm/practice_numpy.py")),
];
/// How often the cells run. The interpreter counts to a few dozens before it changes code for good.
const ROUNDS: usize = 24;

/// What a new image starts from.
pub(crate) struct Parent {
    pub(crate) start: Arc<Start>,
    /// `None` when nothing has run yet: the compiled guest's own memory.
    pub(crate) manifest: Option<ImageManifest>,
}

/// Boots, sets up, and puts the image into the store, which must be locked.
///
/// # Errors
///
/// [`Error::Invalid`] when an import or the setup code fails, with its traceback.
pub(crate) fn build(
    store: &Store,
    compiled: &CompiledGuest,
    parent: &Parent,
    recipe: &Recipe,
    progress: ProgressFn<'_>,
) -> Result<ImageManifest> {
    let started = Instant::now();
    progress(Progress::Begin { step: "boot", bytes: None });
    let draft = store.draft()?;
    let site = recipe.write_site(store, parent.manifest.as_ref(), &draft.path().join(SITE))?;
    let Booted { mut session, dot, entry } =
        start(store, compiled, parent, recipe, site.then(|| draft.path().join(SITE)))?;
    let (memory, globals) = session.state();
    let memory_bytes = memory.len() as u64;
    write_memory(&draft.path().join(MEMORY), memory)?;
    let globals = parent
        .start
        .globals
        .iter()
        .zip(globals)
        .map(|(record, bits)| crate::image::GlobalRecord { bits, ..record.clone() });
    let globals = globals.collect();
    let mut files = vec![FileRecord::of(draft.path(), MEMORY)?];
    if site {
        record_files(draft.path(), Path::new(SITE), &mut files)?;
    }
    let key = recipe.key(&compiled.manifest.key, parent.manifest.as_ref());
    let mut imports = parent.manifest.as_ref().map_or(Vec::new(), |parent| parent.imports.clone());
    imports.extend(recipe.imports.iter().cloned());
    let manifest = ImageManifest {
        format: FORMAT,
        key: key.clone(),
        name: recipe.name.clone(),
        module: compiled.manifest.key.clone(),
        parent: parent.manifest.as_ref().map(|parent| parent.key.clone()),
        imports,
        python: pins().guest.python.clone(),
        memory_bytes,
        site,
        globals,
        entry,
        dot,
        files,
    };
    Store::write_manifest(draft.path(), &manifest)?;
    store.publish(draft, &store.image(&key))?;
    store.name(&recipe.name, &key)?;
    let detail = format!("image `{}`, {} of memory", recipe.name, megabytes(memory_bytes));
    progress(Progress::End { detail, elapsed: started.elapsed() });
    Ok(manifest)
}

/// Starts a guest on the parent's memory and runs what the recipe says.
fn start(
    store: &Store,
    compiled: &CompiledGuest,
    parent: &Parent,
    recipe: &Recipe,
    site: Option<PathBuf>,
) -> Result<Booted> {
    let work = store.draft()?;
    let scratch = Scratch::new(&Scratches::open(work.path())?)?;
    let mut policy =
        Policy { clock: Clock::Fixed(BOOT_TIME_NS), seed: Some(BOOT_SEED), ..Policy::default() };
    if let Some(site) = &site {
        policy.mounts.push(site_mount(site));
    }
    let directories =
        Directories { stdlib: &compiled.stdlib(), scratch: scratch.path(), root: &store.empty() };
    let dot = parent.manifest.as_ref().map_or(0, |manifest| manifest.dot);
    let guest = boot_guest(&directories, &policy, dot)?;
    let session = Session::new(Arc::clone(&parent.start), Owner::default(), |_| Ok(guest))?;
    let entry = parent.manifest.as_ref().map(|manifest| manifest.entry);
    // The boot is asynchronous like every use of a guest; a thread of its own lets this function be
    // called from anywhere.
    std::thread::scope(|scope| {
        let boot = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            let runtime = runtime.map_err(|e| Error::io("starting a runtime for the boot", e))?;
            runtime.block_on(boot(session, entry, dot, recipe, site.is_some()))
        });
        boot.join().unwrap_or_else(|_| Err(Error::Internal("the boot panicked".into())))
    })
}

/// The mount by which sessions see the files of their image.
pub(crate) fn site_mount(host: &Path) -> Mount {
    Mount { host: host.to_owned(), guest: SITE_GUEST.to_owned(), writable: false }
}

fn boot_guest(directories: &Directories<'_>, policy: &Policy, dot: u32) -> Result<Guest> {
    let clock = VirtualClock::new(policy.clock);
    let random = policy.seed.map(|seed| SeededRandom::new(seed, 0));
    let limits = Limits::unlimited();
    // Sessions usually have models: so the image is made for them.
    let options = EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        ..EnvironmentOptions::default()
    };
    let mounts: Vec<String> = policy.mounts.iter().map(|mount| mount.guest.clone()).collect();
    Ok(Guest {
        wasi: wasi::context(directories, policy, clock.as_ref(), random.as_ref())?,
        files: Files::new(directories.scratch, limits.disk_bytes, &mounts, dot),
        scratch: None,
        plain: false,
        clock,
        random,
        streams: Streams::default(),
        conversation: Conversation::new(&options, [0; 16])?,
        budget: super::budget::Budget::start(limits),
        memory_limit: super::guest::MemoryLimit::new(4 << 30, Weak::new()),
        leave: Arc::default(),
        signal: Arc::default(),
        handles: None,
        fault: None,
        refused_bytes: None,
        running: false,
        mailbox: None,
    })
}

/// A guest that is ready to be saved.
struct Booted {
    session: Session,
    dot: u32,
    entry: Entry,
}

/// Everything that runs in the guest, in order.
async fn boot(
    mut session: Session,
    parent: Option<Entry>,
    mut dot: u32,
    recipe: &Recipe,
    site: bool,
) -> Result<Booted> {
    if parent.is_none() {
        session
            .call_initialize()
            .await
            .map_err(|e| Error::Internal(format!("starting the guest: {e:#}")))?;
        let placed = session.place(b".").await;
        dot = placed.map_err(|e| Error::Internal(format!("placing a name: {e:#}")))?;
        session.guest_mut().conversation.offer_sources(agent_sources());
        turn(&mut session, Turn::Source(BOOTSTRAP), None).await?;
    }
    if site {
        let source = format!("__import__('sys').path.append({SITE_GUEST:?})");
        setup(&mut session, "<kaa>/site.py", &source).await?;
    }
    if !recipe.imports.is_empty() {
        let request = Message::new(json!({ "op": "preload", "imports": recipe.imports }));
        let reply = ask(&mut session, request).await?;
        let failed =
            reply.header.get("failed").and_then(|failed| failed.as_array()?.first().cloned());
        if let Some(failed) = failed {
            return Err(Error::invalid("import", format!("the guest can't import {failed}")));
        }
    }
    if parent.is_none() {
        warm_up(&mut session, WARM_UP).await?;
        ask(&mut session, Message::new(json!({ "op": "reset" }))).await?;
    }
    let imported = |name: &str| recipe.imports.iter().any(|import| import == name);
    let practice: Vec<&str> =
        PRACTICE.iter().filter(|(name, _)| imported(name)).map(|(_, cell)| *cell).collect();
    if !practice.is_empty() {
        warm_up(&mut session, &practice).await?;
    }
    if let Some((path, source)) = &recipe.setup {
        setup(&mut session, path, source).await?;
    }
    immortalize(&mut session).await?;
    // What the first leaves in disorder at its own end, the second finds; it comes the way on which
    // nothing is compiled.
    let entry = freeze(&mut session, Turn::Source(TURN), false).await?;
    let is_known = entry.mailbox.is_some();
    let entry = freeze(&mut session, Turn::Entry(entry), is_known).await?;
    Ok(Booted { session, dot, entry })
}

/// The last thing that runs in the guest.
async fn freeze(session: &mut Session, line: Turn, is_known: bool) -> Result<Entry> {
    #[derive(serde::Deserialize)]
    struct Addresses {
        code: u32,
        names: u32,
        mailbox: u32,
        samples: Vec<u32>,
    }
    let layout = is_known.then_some(LAYOUT);
    let request = Message::new(json!({ "op": "freeze", "samples": SAMPLES, "layout": layout }));
    let (found, _) = turn(session, line, Some(request)).await?.parse::<Addresses>()?;
    let known = is_as_expected(session.memory_mut(), &found.samples);
    let mailbox = known.then_some(found.mailbox);
    Ok(Entry { code: found.code, names: found.names, mailbox })
}

/// Runs cells until the interpreter has fitted the code that they use to what they do. That code is
/// put side by side before: its counters are written whenever it runs.
async fn warm_up(session: &mut Session, cells: &[&str]) -> Result<()> {
    ask(session, Message::new(json!({ "op": "gather" }))).await?;
    // What the first cells run gets the first places: every other cell runs it too.
    for cell in cells {
        run(session, cell).await?;
        ask(session, Message::new(json!({ "op": "gather", "settle": true }))).await?;
    }
    for _ in 0..ROUNDS {
        for cell in cells {
            run(session, cell).await?;
        }
    }
    Ok(())
}

async fn run(session: &mut Session, cell: &str) -> Result<()> {
    let mut request = Message::new(json!({ "op": "exec", "cell": 0 }));
    request.body = cell.as_bytes().to_vec();
    ask(session, request).await.map(drop)
}

/// Sets the count of references of everything that the guest holds to one that CPython leaves alone.
/// Else using an object is writing to its page, which a session then has to copy.
async fn immortalize(session: &mut Session) -> Result<()> {
    loop {
        let reply = ask(session, Message::new(json!({ "op": "survey" }))).await?;
        if reply.body.is_empty() {
            return Ok(());
        }
        let memory = session.memory_mut();
        for address in reply.body.chunks_exact(4) {
            let address = u32::from_le_bytes(address.try_into().expect("four bytes"));
            // The count is an object's first word. An address that isn't one is the agent's mistake,
            // and only its own memory is at stake.
            if address.is_multiple_of(4) {
                let _ = write_u32(memory, address, IMMORTAL);
            }
        }
    }
}

async fn setup(session: &mut Session, path: &str, source: &str) -> Result<()> {
    let mut request = Message::new(json!({ "op": "setup", "filename": path }));
    request.body = source.as_bytes().to_vec();
    let reply = ask(session, request).await?;
    if reply.text("outcome") == Some("completed") {
        return Ok(());
    }
    let exception = reply.header.get("exception").and_then(|exception| exception.get("traceback"));
    let traceback = exception.and_then(|text| text.as_str()).unwrap_or("it ended the interpreter");
    Err(Error::invalid(format!("setup code {path}"), traceback.to_owned()))
}

async fn ask(session: &mut Session, request: Message) -> Result<Message> {
    turn(session, Turn::Source(TURN), Some(request)).await
}

async fn turn(session: &mut Session, line: Turn, request: Option<Message>) -> Result<Message> {
    let limits = Limits::unlimited();
    let expects_reply = request.is_some();
    let guest = session.guest_mut();
    guest.streams =
        Streams { stdout: Capture::new(OUTPUT_BYTES), stderr: Capture::new(OUTPUT_BYTES) };
    guest.conversation.begin(request, &limits);
    let (end, _) = session.turn(line, &limits).await;
    let guest = session.guest_mut();
    let what = match end {
        TurnEnd::Returned if !expects_reply => {
            let words = std::mem::take(&mut guest.streams.stderr).into_output(None);
            if words.total_bytes == 0 {
                return Ok(Message::default());
            }
            words.text().into_owned()
        }
        TurnEnd::Returned => return guest.conversation.take_reply(),
        TurnEnd::Exited(code) => format!("it exited with {code}"),
        TurnEnd::Halted(halt) => {
            guest.fault.take().map_or_else(|| halt.to_string(), |fault| fault.to_string())
        }
        TurnEnd::Trapped(trap) => trap,
    };
    let words = std::mem::take(&mut guest.streams.stderr).into_output(None);
    Err(Error::invalid("image", format!("the guest did not boot: {what} {}", words.text())))
}

/// Writes a memory, leaving holes for zeros.
fn write_memory(path: &Path, memory: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;

    const CHUNK: usize = 64 << 10;
    let context = || format!("writing {}", path.display());
    let file = create_private(path).map_err(|e| Error::io(context(), e))?;
    let write = || {
        file.set_len(memory.len() as u64)?;
        for (at, chunk) in memory.chunks(CHUNK).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                file.write_all_at(chunk, (at * CHUNK) as u64)?;
            }
        }
        Ok(())
    };
    write().map_err(|e| Error::io(context(), e))
}

/// Records every file below `directory`, which is relative to `place`, in a fixed order.
fn record_files(place: &Path, directory: &Path, files: &mut Vec<FileRecord>) -> Result<()> {
    let full = place.join(directory);
    let context = || format!("reading {}", full.display());
    let entries = fs::read_dir(&full).map_err(|e| Error::io(context(), e))?;
    let mut paths: Vec<PathBuf> =
        entries.flatten().map(|entry| directory.join(entry.file_name())).collect();
    paths.sort();
    for path in paths {
        if place.join(&path).is_dir() {
            record_files(place, &path, files)?;
        } else {
            files.push(FileRecord::of(place, &path.to_string_lossy())?);
        }
    }
    Ok(())
}

/// The memory of an image in the store.
pub(crate) fn open_memory(place: &Path, bytes: u64) -> Result<Arc<MemoryImage>> {
    let path = place.join(MEMORY);
    let file =
        File::open(&path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    Ok(Arc::new(MemoryImage::new(file, bytes as usize)?))
}
