//! Opens sessions: everything that the host keeps about one is put together here.

use std::num::NonZero;
use std::sync::{Arc, OnceLock};

use rand::RngExt;
use wasmtime_wasi::p1::WasiP1Ctx;

use super::Image;
use super::boot::{SITE, site_mount};
use super::budget::Budget;
use super::clock::VirtualClock;
use super::files::{Files, Scratch, Scratches};
use super::guest::{Guest, MemoryLimit};
use super::random::SeededRandom;
use super::saved::{Saved, write_files};
use super::session::Session;
use super::wasi::{self, Directories, close_all};
use crate::agent::{Conversation, Signal, Streams};
use crate::environment::{EnvironmentOptions, Profile};
use crate::error::{Error, Result};
use crate::image::Store;
use crate::lm::Ledger;
use crate::policy::{Clock, Policy};
use crate::snapshot::SessionRecord;
use crate::tenant::{Seat, Tenants};

/// What all sessions of a runtime share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) tenants: Tenants,
    scratches: OnceLock<Arc<Scratches>>,
}

impl Shared {
    pub(crate) fn new(store: Store) -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let tenants = Tenants::new(processors);
        Arc::new(Self { store, tenants, scratches: OnceLock::new() })
    }

    /// Where this process keeps what belongs to sessions, made when the first one needs it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when it can't be made.
    pub(crate) fn scratches(&self) -> Result<&Arc<Scratches>> {
        if let Some(scratches) = self.scratches.get() {
            return Ok(scratches);
        }
        let scratches = Scratches::open(&self.store.scratch())?;
        Ok(self.scratches.get_or_init(|| scratches))
    }
}

/// What a session belongs to, and how it is reached from outside.
#[derive(Clone)]
pub(crate) struct Ties {
    pub(crate) seat: Arc<Seat>,
    pub(crate) signal: Arc<Signal>,
    /// What its calls of language models cost.
    pub(crate) ledger: Ledger,
}

/// What a new session begins with.
#[derive(Clone, Copy)]
pub(crate) enum Origin<'saved> {
    /// Its image.
    Image,
    /// The state of another, which it doesn't go on from: it has random numbers and a clock of its own.
    Template(&'saved Saved),
    /// The state of another, exactly.
    Saved(&'saved Saved),
}

/// Descriptors and scratch directory of a session that never used them, for the next one.
pub(crate) struct Kept {
    pub(crate) wasi: WasiP1Ctx,
    pub(crate) scratch: Scratch,
}

/// Opens a session.
///
/// # Errors
///
/// [`Error::Invalid`] for options out of range, [`Error::Io`] when the system has no more address
/// space, descriptors or disk for it.
pub(crate) fn open(
    shared: &Shared,
    image: &Image,
    options: &EnvironmentOptions,
    origin: Origin<'_>,
    ties: &Ties,
) -> Result<Session> {
    let start = Arc::clone(&image.0.start);
    let owner = ties.seat.owner();
    let make = |kept| guest(shared, image, options, origin, kept, ties);
    let (Origin::Template(saved) | Origin::Saved(saved)) = origin else {
        return Session::new(start, owner, make);
    };
    saved.check(&options.limits)?;
    let mut session = Session::in_state(start, owner, make, saved.condensed()?)?;
    write_scratch(session.guest_mut(), saved)?;
    if let Origin::Template(_) = origin {
        session.expect_siblings();
    }
    Ok(session)
}

/// Options for a session that goes on from `record`: what belongs to the state comes from there.
///
/// # Errors
///
/// [`Error::Incompatible`] for a profile that this version doesn't have.
pub(crate) fn resumed(
    mut options: EnvironmentOptions,
    record: &SessionRecord,
) -> Result<EnvironmentOptions> {
    if let Some(told) = &record.told {
        let known = [Profile::Rlm, Profile::OpenEnv];
        let profile = known.into_iter().find(|profile| profile.name() == told.profile);
        options.profile = profile.ok_or_else(|| Error::Incompatible {
            what: "the snapshot".into(),
            expected: "a profile that this version of Kaa has".into(),
            found: format!("the profile `{}`", told.profile.escape_debug()),
        })?;
    }
    if options.policy.seed.is_none() {
        options.policy.seed = record.seed;
    }
    if let (Clock::Real, Some(clock)) = (options.policy.clock, record.clock) {
        options.policy.clock = Clock::Fixed(clock.start_ns);
    }
    Ok(options)
}

/// Brings what the host keeps about a session to a saved state; its memory is brought there by
/// [`Session::restore`].
///
/// # Errors
///
/// [`Error::Io`] when a file of the scratch directory can't be removed or written.
pub(crate) fn restore(guest: &mut Guest, saved: &Saved) -> Result<()> {
    close_all(guest);
    guest.conversation.go_to(&saved.record);
    if let (Some(clock), Some(record)) = (&guest.clock, saved.record.clock) {
        clock.go_to(record.elapsed_ns);
    }
    if let Some(random) = &guest.random {
        random.go_to(saved.record.random_bytes);
    }
    if !guest.files.is_unused()
        && let Some(scratch) = &guest.scratch
    {
        scratch.clear()?;
    }
    write_scratch(guest, saved)
}

fn write_scratch(guest: &mut Guest, saved: &Saved) -> Result<()> {
    if let Some(scratch) = guest.scratch.as_ref().filter(|_| !saved.files.is_empty()) {
        write_files(scratch.path(), &saved.files)?;
    }
    if !saved.files.is_empty() || !guest.files.is_unused() {
        guest.files.resume(saved.record.mount_bytes);
    }
    Ok(())
}

/// Whether a session's descriptors and scratch are the same for everyone, before it uses them.
fn is_plain(policy: &Policy) -> bool {
    let Policy { mounts, env, clock, seed, allowed_imports: _ } = policy;
    mounts.is_empty() && env.is_empty() && *clock == Clock::Real && seed.is_none()
}

/// The data of a new session's store.
fn guest(
    shared: &Shared,
    image: &Image,
    options: &EnvironmentOptions,
    origin: Origin<'_>,
    kept: Option<Kept>,
    ties: &Ties,
) -> Result<Guest> {
    let manifest = image.manifest();
    let (store, limits) = (&shared.store, &options.limits);
    let record = match origin {
        Origin::Saved(saved) => Some(&saved.record),
        _ => None,
    };
    let clock = match record.and_then(|record| record.clock) {
        Some(record) if options.policy.clock == Clock::Fixed(record.start_ns) => {
            Some(VirtualClock::resume(record))
        }
        _ => VirtualClock::new(options.policy.clock),
    };
    let position = record.filter(|record| record.seed == options.policy.seed);
    let position = position.map_or(0, |record| record.random_bytes);
    let random = options.policy.seed.map(|seed| SeededRandom::new(seed, position));
    let mut mounts: Vec<_> = Vec::new();
    if manifest.site {
        mounts.push(site_mount(&store.image(&manifest.key).join(SITE)));
    }
    mounts.extend(options.policy.mounts.iter().cloned());
    let names: Vec<String> = mounts.iter().map(|mount| mount.guest.clone()).collect();
    let plain = is_plain(&options.policy);
    let (wasi, scratch) = match kept.filter(|_| plain) {
        Some(Kept { wasi, scratch }) => (wasi, scratch),
        None => {
            let scratch = Scratch::new(shared.scratches()?)?;
            let directories = Directories {
                stdlib: &image.0.guests.compiled.stdlib(),
                scratch: scratch.path(),
                root: &store.empty(),
            };
            let policy = Policy { mounts, ..options.policy.clone() };
            (wasi::context(&directories, &policy, clock.as_ref(), random.as_ref())?, scratch)
        }
    };
    let conversation = conversation(options, origin)?;
    Ok(Guest {
        wasi,
        files: Files::new(scratch.path(), limits.disk_bytes, &names, manifest.dot),
        scratch: Some(scratch),
        plain,
        clock,
        random,
        streams: Streams::default(),
        conversation,
        budget: Budget::start(limits.clone()),
        memory_limit: MemoryLimit::new(limits.memory_bytes, Arc::downgrade(&ties.seat)),
        leave: Arc::default(),
        signal: Arc::clone(&ties.signal),
        handles: None,
        fault: None,
        refused_bytes: None,
        running: false,
        mailbox: manifest.entry.mailbox,
    })
}

/// The host's side of the conversation with the guest's agent, and what the agent has to be told.
fn conversation(options: &EnvironmentOptions, origin: Origin<'_>) -> Result<Conversation> {
    let mut seed = [0; 16];
    match options.policy.seed {
        Some(value) => seed[..8].copy_from_slice(&value.to_le_bytes()),
        None => rand::rng().fill(&mut seed),
    }
    match origin {
        Origin::Image => Conversation::new(options, seed),
        Origin::Template(saved) => Conversation::resume(options, &saved.record, Some(seed)),
        Origin::Saved(saved) => {
            // A seed of its own that it's given now starts everything random anew.
            let other = options.policy.seed.is_some() && options.policy.seed != saved.record.seed;
            let seed = (other || saved.record.told.is_none()).then_some(seed);
            Conversation::resume(options, &saved.record, seed)
        }
    }
}
