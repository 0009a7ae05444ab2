//! The Wasm backend: CPython compiled to WASI, in wasmtime.
//!
//! [`Runtime`] holds what is shared: the engine, the store of images, compiled code. An [`Image`] is
//! the memory that sessions start from. A [`WasmEnvironment`] is one session: a private
//! copy-on-write view of an image (see `memory.rs`), one instance of the compiled guest, and a
//! checkpoint to go back to.

mod asleep;
mod backend;
mod boot;
mod budget;
mod clock;
mod dirty;
mod engine;
mod environment;
mod fetch;
mod files;
mod guest;
mod instrument;
mod memory;
mod meter;
mod module;
mod opening;
mod parking;
mod pins;
mod pool;
mod random;
mod recipe;
mod saved;
mod session;
mod stack;
mod state;
mod text;
mod wasi;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use wasmtime::{Engine, InstancePre, Linker};

pub use self::backend::WasmBackend;
use self::boot::Parent;
pub use self::dirty::{DirtyPages, dirty_pages_method};
pub use self::engine::Metering;
pub use self::environment::WasmEnvironment;
use self::guest::Guest;
use self::memory::MemoryImage;
use self::module::CompiledGuest;
use self::opening::{Origin, Shared};
pub use self::pool::{Pool, PoolPolicy, PoolStatus, PooledEnvironment};
pub use self::recipe::ImageSpec;
use self::recipe::Recipe;
use self::saved::{BACKEND, Saved, check_image};
use self::session::Start;
#[cfg(feature = "fuzzing")]
pub(crate) use self::text::collect as collect_pieces;
use crate::error::{Error, Result};
use crate::image::{GlobalRecord, ImageManifest, ProgressFn, Store};
use crate::limits::Limits;
use crate::snapshot::Snapshot;
use crate::tenant::{Quotas, Tenant, TenantUsage};

/// The rewriting of modules, for the tests that compare rewritten modules with their originals.
#[doc(hidden)]
pub mod rewrite {
    pub use super::instrument::*;
}

/// What all sessions of a process share: engine, compiled guest, images.
///
/// Opening one is cheap; the first [`image`](Self::image) on a machine downloads and compiles for
/// about two minutes, later ones map what is there.
///
/// ```no_run
/// # async fn example() -> kaa::Result<()> {
/// use kaa::{EnvironmentExt, EnvironmentOptions, Runtime, Store};
///
/// let runtime = Runtime::open(Store::open("/home/me/.cache/kaa")?)?;
/// let image = runtime.image("base", &|_| {})?;
/// let mut session = runtime.environment(&image, EnvironmentOptions::default())?;
/// let cell = session.execute("print(1 + 1)").await?;
/// assert_eq!(cell.stdout.text(), "2\n");
/// # Ok(())
/// # }
/// ```
pub struct Runtime {
    shared: Arc<Shared>,
    engine: Engine,
    metering: Metering,
    dirty_pages: DirtyPages,
    linker: Linker<Guest>,
    loaded: Mutex<Loaded>,
}

/// Whether an entry of the store has to be made anew, and not just read again: a machine that is out
/// of descriptors for a moment must not lose its images.
fn is_absent_or_unsound(error: &Error) -> bool {
    match error {
        Error::Incompatible { .. } => true,
        Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// What was loaded already.
#[derive(Default)]
struct Loaded {
    guest: Option<Arc<Guests>>,
    images: HashMap<String, Image>,
}

/// The compiled guest with its imports resolved.
struct Guests {
    compiled: CompiledGuest,
    pre: InstancePre<Guest>,
}

/// An image that sessions can be made from. Cheap to clone.
#[derive(Clone)]
pub struct Image(Arc<ImageInner>);

struct ImageInner {
    manifest: ImageManifest,
    start: Arc<Start>,
    guests: Arc<Guests>,
    /// What sessions of a template begin with, instead of the image itself.
    template: Option<Arc<Saved>>,
}

impl Image {
    /// What the image is.
    #[must_use]
    pub fn manifest(&self) -> &ImageManifest {
        &self.0.manifest
    }

    /// The image of the store, without what a template adds.
    fn base(&self) -> Self {
        self.0.template.as_ref().map_or_else(|| self.clone(), |saved| saved.image.clone())
    }

    fn origin(&self) -> Origin<'_> {
        self.0.template.as_ref().map_or(Origin::Image, |saved| Origin::Template(saved))
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Image").field(&self.0.manifest.name).finish()
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("store", self.store()).finish_non_exhaustive()
    }
}

impl Runtime {
    /// Starts the engine over a store. Scratch directories that dead processes left are removed.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when this machine can't run the engine.
    pub fn open(store: Store) -> Result<Self> {
        Self::with(store, Metering::default(), dirty_pages_method())
    }

    /// As [`open`](Self::open), with another metering than Kaa's. For measurements.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn with_metering(store: Store, metering: Metering) -> Result<Self> {
        Self::with(store, metering, dirty_pages_method())
    }

    /// As [`open`](Self::open), with another way to find written pages than the best of this machine.
    /// For measurements and tests.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn with_dirty_pages(store: Store, dirty_pages: DirtyPages) -> Result<Self> {
        Self::with(store, Metering::default(), dirty_pages)
    }

    fn with(store: Store, metering: Metering, dirty_pages: DirtyPages) -> Result<Self> {
        let engine = engine::engine(metering)?;
        let mut linker = Linker::new(&engine);
        wasi::add_to_linker(&mut linker)
            .and_then(|()| guest::add_to_linker(&mut linker))
            .map_err(|e| Error::Internal(format!("defining the guest's imports: {e:#}")))?;
        store.remove_old_drafts();
        let shared = Shared::new(store);
        Ok(Self { shared, engine, metering, dirty_pages, linker, loaded: Mutex::default() })
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Whether the compiled guest is in the store and sound, so that making an image takes seconds.
    #[must_use]
    pub fn is_set_up(&self) -> bool {
        module::load(self.store(), &self.engine, self.metering).is_ok()
    }

    /// The image of this name: from memory, from the store, or, for the images that come with Kaa
    /// (`base`, `sci`), made now. Blocks; on a machine's first use for minutes, otherwise for
    /// about ten milliseconds once per process.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when there is no such image, [`Error::Unavailable`] when it has to be made
    /// and the guest can't be downloaded.
    pub fn image(&self, name: &str, progress: ProgressFn<'_>) -> Result<Image> {
        self.image_from(name, None, progress)
    }

    /// As [`image`](Self::image), with the guest's wheel from a path if it has to be made.
    ///
    /// # Errors
    ///
    /// As [`image`](Self::image).
    pub fn image_from(
        &self,
        name: &str,
        wheel: Option<&Path>,
        progress: ProgressFn<'_>,
    ) -> Result<Image> {
        let guests = self.guests(wheel, progress)?;
        let Some(mut recipe) = Recipe::built_in(name) else {
            let manifest = self.store().manifest_by_name(name)?;
            return self.load(manifest, guests);
        };
        let parent = match &recipe.from {
            Some(from) => Some(self.image_from(from, wheel, progress)?),
            None => None,
        };
        recipe.name.push_str(self.metering.suffix());
        let parent_manifest = parent.as_ref().map(Image::manifest);
        let key = recipe.key(&guests.compiled.manifest.key, parent_manifest);
        match self.store().manifest(&key) {
            Ok(manifest) => {
                self.store().ensure_name(&recipe.name, &key);
                return self.load(manifest, guests);
            }
            Err(e) if !is_absent_or_unsound(&e) => return Err(e),
            Err(_) => {}
        }
        let _lock = self.store().lock()?;
        // Another process may have made it while this one waited.
        let manifest = match self.store().manifest(&key) {
            Ok(manifest) => manifest,
            Err(_) => self.make(&recipe, parent.as_ref(), &guests, progress)?,
        };
        self.load(manifest, guests)
    }

    /// Makes a custom image.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] naming the part of the recipe that can't be used: a file that isn't pure
    /// Python, an import that fails, setup code that raises (with its traceback).
    pub fn build(&self, spec: &ImageSpec, progress: ProgressFn<'_>) -> Result<Image> {
        let recipe = Recipe::read(spec)?;
        let parent = self.image(&spec.from, progress)?;
        let guests = self.guests(None, progress)?;
        let key = recipe.key(&guests.compiled.manifest.key, Some(parent.manifest()));
        let _lock = self.store().lock()?;
        let manifest = match self.store().manifest(&key) {
            Ok(manifest) => {
                self.store().name(&spec.name, &key)?;
                manifest
            }
            Err(_) => self.make(&recipe, Some(&parent), &guests, progress)?,
        };
        self.load(manifest, guests)
    }

    /// Removes what no named image needs: images and compiled guests of other versions of Kaa.
    /// Returns the bytes that are free again.
    ///
    /// Not while a process of another version runs sessions: they import from what goes away.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when a named image can't be read: remove it, or build it again, first.
    pub fn prune(&self) -> Result<u64> {
        self.store().prune(&module::module_key(&self.engine, self.metering))
    }

    /// A new session.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for options out of range, [`Error::Io`] when the system has no more address
    /// space, descriptors or disk for it.
    pub fn environment(
        &self,
        image: &Image,
        options: crate::environment::EnvironmentOptions,
    ) -> Result<WasmEnvironment> {
        WasmEnvironment::open(&self.shared, image, options)
    }

    /// A new tenant. Its sessions share the quotas and get as much of the processors as all those of
    /// any other tenant; see [`EnvironmentOptions::tenant`](crate::EnvironmentOptions::tenant).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a quota out of range, and for a name that is empty, too long or that of
    /// a living tenant.
    pub fn tenant(&self, name: &str, quotas: Quotas) -> Result<Tenant> {
        self.shared.tenants.tenant(name, quotas)
    }

    /// The tenant of sessions that were opened without one. Its quotas can be set.
    #[must_use]
    pub fn default_tenant(&self) -> Tenant {
        self.shared.tenants.default_tenant()
    }

    /// What every living tenant has and had, by name.
    #[must_use]
    pub fn usage(&self) -> Vec<TenantUsage> {
        self.shared.tenants.usage()
    }

    /// A session that goes on from a snapshot, of this process or read from a file.
    ///
    /// Its profile is the snapshot's; so are seed and clock unless the options have others: with the
    /// same options everything goes on as if it had never stopped. Limits, mounts, tools and language
    /// models are those of the options.
    ///
    /// # Errors
    ///
    /// As [`environment`](Self::environment); [`Error::Incompatible`] for a snapshot of another
    /// backend.
    pub fn resume(
        &self,
        snapshot: &Snapshot,
        options: crate::environment::EnvironmentOptions,
    ) -> Result<WasmEnvironment> {
        WasmEnvironment::resume(&self.shared, snapshot.data(BACKEND)?, options)
    }

    /// An image whose sessions begin with the state of a snapshot, such as one with a large context.
    /// They share its memory until they write to it. Unlike forks, they have random numbers and a
    /// clock of their own, and the profile of their options.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] for a snapshot of another backend.
    pub fn template(&self, snapshot: &Snapshot) -> Result<Image> {
        let saved = snapshot.data::<Saved>(BACKEND)?;
        saved.condensed()?;
        let ImageInner { manifest, start, guests, .. } = &*saved.image.0;
        Ok(Image(Arc::new(ImageInner {
            manifest: manifest.clone(),
            start: Arc::clone(start),
            guests: Arc::clone(guests),
            template: Some(Arc::new(saved.clone())),
        })))
    }

    /// Reads a snapshot file. Blocks.
    ///
    /// The limits are those of the sessions that are to go on from it: of memory and disk no more is
    /// allocated than they allow, whatever a small file says.
    ///
    /// A file that anyone may have written can harm nothing but the session that goes on from it:
    /// memory, globals and files in it are the guest's, and stay in the sandbox. What such a session
    /// does next is in the hands of whoever wrote the file.
    ///
    /// # Errors
    ///
    /// [`Error::Incompatible`] when the file isn't a snapshot, is damaged or of a newer format, or
    /// when its image isn't the one in the store; [`Error::Io`] when it can't be read.
    pub fn load_snapshot(&self, path: impl AsRef<Path>, limits: &Limits) -> Result<Snapshot> {
        let saved = Saved::load(path.as_ref(), limits, |header| {
            let name = &header.image.name;
            let found = match Recipe::built_in(name) {
                Some(_) => self.image(name, &|_| {}),
                None => self.image_by_key(&header.image.key),
            };
            let image = found.map_err(|error| Error::Incompatible {
                what: "the snapshot".into(),
                expected: "one of an image in the store".into(),
                found: format!("one of `{}` ({error})", name.escape_debug()),
            })?;
            check_image(image.manifest(), &header.image, &header.module)?;
            Ok(image)
        })?;
        Ok(Snapshot::new(saved))
    }

    fn image_by_key(&self, key: &str) -> Result<Image> {
        self.load(self.store().manifest_by_key(key)?, self.guests(None, &|_| {})?)
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The compiled guest, made when the store has none.
    fn guests(&self, wheel: Option<&Path>, progress: ProgressFn<'_>) -> Result<Arc<Guests>> {
        if let Some(guests) = &self.loaded().guest {
            return Ok(Arc::clone(guests));
        }
        let compiled = match module::load(self.store(), &self.engine, self.metering) {
            Ok(compiled) => compiled,
            Err(e) if !is_absent_or_unsound(&e) => return Err(e),
            Err(_) => {
                let _lock = self.store().lock()?;
                match module::load(self.store(), &self.engine, self.metering) {
                    Ok(compiled) => compiled,
                    Err(_) => {
                        module::build(self.store(), &self.engine, self.metering, wheel, progress)?;
                        module::load(self.store(), &self.engine, self.metering)?
                    }
                }
            }
        };
        let pre = self
            .linker
            .instantiate_pre(&compiled.module)
            .map_err(|e| Error::Internal(format!("linking the guest: {e:#}")))?;
        let guests = Arc::new(Guests { compiled, pre });
        self.loaded().guest = Some(Arc::clone(&guests));
        Ok(guests)
    }

    fn make(
        &self,
        recipe: &Recipe,
        parent: Option<&Image>,
        guests: &Arc<Guests>,
        progress: ProgressFn<'_>,
    ) -> Result<ImageManifest> {
        let parent = match parent {
            Some(parent) => Parent {
                start: Arc::clone(&parent.0.start),
                manifest: Some(parent.manifest().clone()),
            },
            None => {
                let manifest = &guests.compiled.manifest;
                let memory = guests.compiled.memory()?;
                let memory = Arc::new(MemoryImage::new(memory, manifest.memory_bytes as usize)?);
                Parent { start: self.start(guests, memory, &manifest.globals), manifest: None }
            }
        };
        boot::build(self.store(), &guests.compiled, &parent, recipe, progress)
    }

    /// What sessions of a memory start from.
    fn start(
        &self,
        guests: &Guests,
        memory: Arc<MemoryImage>,
        globals: &[GlobalRecord],
    ) -> Arc<Start> {
        Arc::new(Start::new(
            self.engine.clone(),
            guests.pre.clone(),
            memory,
            globals.to_vec(),
            guests.compiled.manifest.fixed_tables,
            self.dirty_pages,
        ))
    }

    fn load(&self, manifest: ImageManifest, guests: Arc<Guests>) -> Result<Image> {
        if let Some(image) = self.loaded().images.get(&manifest.key) {
            return Ok(image.clone());
        }
        if manifest.module != guests.compiled.manifest.key {
            return Err(Error::Incompatible {
                what: format!("the image `{}`", manifest.name),
                expected: "an image of this version of Kaa on this machine".into(),
                found: "one of another; build it again with `kaa image build`".into(),
            });
        }
        let memory = boot::open_memory(&self.store().image(&manifest.key), manifest.memory_bytes)?;
        let start = self.start(&guests, memory, &manifest.globals);
        let key = manifest.key.clone();
        let image = Image(Arc::new(ImageInner { manifest, start, guests, template: None }));
        self.loaded().images.insert(key, image.clone());
        Ok(image)
    }
}
