//! An image as a source of sessions.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use super::{Image, Runtime, WasmEnvironment};
use crate::environment::{Backend, Capabilities, Context, Environment, EnvironmentOptions};
use crate::error::Result;
use crate::tenant::Tenant;

/// Sessions of one image of a runtime.
///
/// ```no_run
/// use std::sync::Arc;
/// use kaa::{Backend, EnvironmentExt, EnvironmentOptions, Runtime, Store, WasmBackend};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let runtime = Arc::new(Runtime::open(Store::open("/var/lib/my-app/kaa")?)?);
/// let image = runtime.image("base", &|_| {})?;
/// let backend = WasmBackend::new(runtime, image);
/// let mut session = backend.open(EnvironmentOptions::default()).await?;
/// session.execute("x = 1").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct WasmBackend {
    runtime: Arc<Runtime>,
    image: Image,
}

impl WasmBackend {
    /// What sessions in WebAssembly can do.
    pub const CAPABILITIES: Capabilities = WasmEnvironment::CAPABILITIES;

    /// Sessions of `image`, which is one of `runtime`.
    #[must_use]
    pub fn new(runtime: Arc<Runtime>, image: Image) -> Self {
        Self { runtime, image }
    }
}

impl fmt::Debug for WasmBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = &self.image.manifest().name;
        f.debug_struct("WasmBackend").field("image", image).finish_non_exhaustive()
    }
}

#[async_trait]
impl Backend for WasmBackend {
    fn capabilities(&self) -> Capabilities {
        Self::CAPABILITIES
    }

    fn default_tenant(&self) -> Option<Tenant> {
        Some(self.runtime.default_tenant())
    }

    async fn open(&self, options: EnvironmentOptions) -> Result<Box<dyn Environment>> {
        Ok(Box::new(self.runtime.environment(&self.image, options)?))
    }

    /// A template: its sessions share the pages of the contexts.
    async fn with_contexts(
        &self,
        contexts: &[(u32, Context)],
        options: &EnvironmentOptions,
    ) -> Result<Option<Arc<dyn Backend>>> {
        // Policy, tools and models are given to each session anew.
        let options = EnvironmentOptions {
            limits: options.limits.clone(),
            tenant: options.tenant.clone(),
            profile: options.profile,
            ..EnvironmentOptions::default()
        };
        let mut session = self.runtime.environment(&self.image, options)?;
        for (index, context) in contexts {
            session.add_context(context.clone(), Some(*index)).await?;
        }
        let image = self.runtime.template(&session.snapshot().await?)?;
        Ok(Some(Arc::new(Self { runtime: Arc::clone(&self.runtime), image })))
    }
}
