//! Modal's control plane.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::BoxStream;
use tonic::{Request, Response, Status};

use super::proto::client::generic_result::GenericStatus;
use super::proto::client::modal_client_server::ModalClient;
use super::proto::client::network_access::NetworkAccessType;
use super::proto::client::sandbox_get_command_router_access_request::Target;
use super::proto::client::secret_source::Source;
use super::proto::client::*;
use super::sandbox::{Sandbox as Running, ports};
use super::world::World;

/// The sandboxes of one page of a list.
const PAGE: usize = 20;
/// What Modal lets a call wait.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// The service.
pub(crate) struct Control(pub(crate) Arc<World>);

type Answer<T> = Result<Response<T>, Status>;

fn seconds(value: f32) -> Duration {
    Duration::try_from_secs_f32(value).unwrap_or(Duration::ZERO).min(WAIT_MAX)
}

impl Control {
    /// How long a question is held.
    fn held(&self, timeout: f32) -> Duration {
        if self.0.options.holds { seconds(timeout) } else { Duration::ZERO }
    }

    fn create(&self, request: &SandboxCreateV2Request) -> Result<Arc<Running>, Status> {
        let world = &self.0;
        if !world.apps.lock().unwrap().values().any(|app| *app == request.app_id) {
            return Err(Status::not_found(format!("App {:?} not found", request.app_id)));
        }
        let definition = request.definition.clone().unwrap_or_default();
        check(&definition)?;
        if let Some(name) = &definition.name {
            let sandboxes = world.sandboxes.lock().unwrap();
            let has_name = |other: &&Arc<Running>| {
                other.is_running()
                    && other.app_id == request.app_id
                    && other.definition.name.as_ref() == Some(name)
            };
            if sandboxes.values().any(|other| has_name(&other)) {
                return Err(Status::already_exists(format!("a sandbox is named {name:?}")));
            }
        }
        let image = world.image(&definition.image_id)?;
        let success = i32::from(GenericStatus::Success);
        if image.result().is_none_or(|result| result.status != success) {
            return Err(Status::failed_precondition(format!("Image {} isn't built", image.id)));
        }
        let secrets = variables(world, &request.secret_sources)?;
        let sandbox = Arc::new(Running::new(world, request, image, secrets)?);
        let no_tunnel = |error| Status::internal(format!("no tunnel: {error}"));
        world.authority.open(&world.network, &sandbox).map_err(no_tunnel)?;
        world.sandboxes.lock().unwrap().insert(sandbox.id.clone(), sandbox.clone());
        sandbox.start_entrypoint();
        Ok(sandbox)
    }
}

fn check(definition: &Sandbox) -> Result<(), Status> {
    let invalid = |reason: &str| Err(Status::invalid_argument(reason.to_owned()));
    let ports = ports(definition);
    let access = definition.network_access.clone().unwrap_or_default();
    let network = access.network_access_type();
    if network == NetworkAccessType::Blocked && !ports.is_empty() {
        return invalid("a sandbox whose network is blocked can't open ports");
    }
    let has_addresses = !access.allowed_cidrs.is_empty() || !access.allowed_domains.is_empty();
    if network != NetworkAccessType::Allowlist && has_addresses {
        return invalid("only an allowlist has allowed addresses");
    }
    if ports.iter().any(|spec| !(1..=65_535).contains(&spec.port)) {
        return invalid("a port is 1 to 65535");
    }
    if definition.workdir.as_ref().is_some_and(|path| !path.starts_with('/')) {
        return invalid("workdir must be absolute");
    }
    let resources = definition.resources.unwrap_or_default();
    if resources.memory_mb_max > 0 && resources.memory_mb_max < resources.memory_mb {
        return invalid("the limit of memory is below the request");
    }
    if resources.milli_cpu_max > 0 && resources.milli_cpu_max < resources.milli_cpu {
        return invalid("the limit of processors is below the request");
    }
    Ok(())
}

fn tunnels(sandbox: &Running, is_for_create: bool) -> Vec<TunnelData> {
    let tunnels = sandbox.tunnels.lock().unwrap();
    // The ends of those without encryption are known later.
    let is_told = |tunnel: &&TunnelData| !is_for_create || tunnel.unencrypted_host.is_none();
    tunnels.iter().filter(is_told).cloned().collect()
}

fn info(sandbox: &Running) -> SandboxInfo {
    SandboxInfo {
        id: sandbox.id.clone(),
        created_at: sandbox.created_at,
        task_info: Some(TaskInfo {
            id: sandbox.task_id.clone(),
            started_at: sandbox.created_at,
            finished_at: 0.0,
            result: sandbox.result(),
        }),
        app_id: sandbox.app_id.clone(),
        tags: sandbox.tags.lock().unwrap().clone(),
        name: sandbox.definition.name.clone().unwrap_or_default(),
        image_id: sandbox.definition.image_id.clone(),
        timeout_secs: sandbox.definition.timeout_secs,
    }
}

#[tonic::async_trait]
impl ModalClient for Control {
    async fn app_get_or_create(
        &self,
        request: Request<AppGetOrCreateRequest>,
    ) -> Answer<AppGetOrCreateResponse> {
        let request = request.into_inner();
        let key = (request.environment_name, request.app_name);
        let mut apps = self.0.apps.lock().unwrap();
        let is_made =
            request.object_creation_type == i32::from(ObjectCreationType::CreateIfMissing);
        if !is_made && !apps.contains_key(&key) {
            return Err(Status::not_found(format!("App {:?} not found", key.1)));
        }
        let app_id = apps.entry(key).or_insert_with(|| self.0.id("ap", "")).clone();
        Ok(Response::new(AppGetOrCreateResponse { app_id }))
    }

    async fn auth_token_get(
        &self,
        _: Request<AuthTokenGetRequest>,
    ) -> Answer<AuthTokenGetResponse> {
        Ok(Response::new(AuthTokenGetResponse { token: self.0.tokens.give(None) }))
    }

    async fn environment_get_or_create(
        &self,
        request: Request<EnvironmentGetOrCreateRequest>,
    ) -> Answer<EnvironmentGetOrCreateResponse> {
        let name = request.into_inner().deployment_name;
        let image_builder_version = self.0.options.image_builder_version.clone();
        let settings = Some(EnvironmentSettings { image_builder_version });
        Ok(Response::new(EnvironmentGetOrCreateResponse {
            environment_id: "en-1".into(),
            metadata: Some(EnvironmentMetadata { name, settings }),
        }))
    }

    async fn image_get_or_create(
        &self,
        request: Request<ImageGetOrCreateRequest>,
    ) -> Answer<ImageGetOrCreateResponse> {
        let image = self.0.layer(request.into_inner())?;
        let result = image.result().unwrap_or_default();
        let image_id = image.id.clone();
        Ok(Response::new(ImageGetOrCreateResponse { image_id, result: Some(result) }))
    }

    type ImageJoinStreamingStream = BoxStream<'static, Result<ImageJoinStreamingResponse, Status>>;

    async fn image_join_streaming(
        &self,
        request: Request<ImageJoinStreamingRequest>,
    ) -> Answer<Self::ImageJoinStreamingStream> {
        let request = request.into_inner();
        let image = self.0.image(&request.image_id)?;
        let timeout = self.held(request.timeout);
        Ok(Response::new(image.join(&request.last_entry_id, timeout)))
    }

    async fn sandbox_create_v2(
        &self,
        request: Request<SandboxCreateV2Request>,
    ) -> Answer<SandboxCreateV2Response> {
        let key = request.metadata().get("x-idempotency-key");
        let key = key.and_then(|key| key.to_str().ok()).map(str::to_owned);
        let url = self.0.router_url(request.metadata());
        // One after the other, so that a call that comes again finds what the first made.
        let mut made = self.0.made.lock().await;
        let known = key.as_ref().and_then(|key| made.get(key));
        let sandbox = match known {
            Some(id) => self.0.sandbox(id)?,
            None => self.create(request.get_ref())?,
        };
        if let Some(key) = key {
            made.insert(key, sandbox.id.clone());
        }
        let jwt = self.0.tokens.give(Some(&sandbox.task_id));
        Ok(Response::new(SandboxCreateV2Response {
            sandbox_id: sandbox.id.clone(),
            tunnels: tunnels(&sandbox, true),
            task_id: sandbox.task_id.clone(),
            command_router_access: self
                .0
                .options
                .tells_router
                .then_some(CommandRouterAccess { jwt, url }),
            sandbox_token: format!("token-of-{}", sandbox.id),
        }))
    }

    async fn sandbox_get_command_router_access(
        &self,
        request: Request<SandboxGetCommandRouterAccessRequest>,
    ) -> Answer<SandboxGetCommandRouterAccessResponse> {
        let url = self.0.router_url(request.metadata());
        let sandbox = match &request.get_ref().target {
            Some(Target::SandboxId(id)) => self.0.sandbox(id)?,
            Some(Target::TaskId(id)) => self.0.task(id)?,
            None => return Err(Status::invalid_argument("neither sandbox_id nor task_id")),
        };
        if !sandbox.is_running() {
            return Err(Status::not_found(format!("Sandbox {} has finished", sandbox.id)));
        }
        let jwt = self.0.tokens.give(Some(&sandbox.task_id));
        Ok(Response::new(SandboxGetCommandRouterAccessResponse { jwt, url }))
    }

    async fn sandbox_get_task_id_v2(
        &self,
        request: Request<SandboxGetTaskIdRequest>,
    ) -> Answer<SandboxGetTaskIdResponse> {
        let sandbox = self.0.sandbox(&request.get_ref().sandbox_id)?;
        let task_id = Some(sandbox.task_id.clone());
        Ok(Response::new(SandboxGetTaskIdResponse { task_id, task_result: sandbox.result() }))
    }

    async fn sandbox_get_tunnels_v2(
        &self,
        request: Request<SandboxGetTunnelsRequest>,
    ) -> Answer<SandboxGetTunnelsResponse> {
        let sandbox = self.0.sandbox(&request.get_ref().sandbox_id)?;
        let result = sandbox.result();
        let tunnels = if result.is_none() { tunnels(&sandbox, false) } else { Vec::new() };
        Ok(Response::new(SandboxGetTunnelsResponse { result, tunnels }))
    }

    async fn sandbox_list_v2(
        &self,
        request: Request<SandboxListRequest>,
    ) -> Answer<SandboxListResponse> {
        let request = request.into_inner();
        let (before, sandboxes) = (request.before_timestamp, self.0.sandboxes.lock().unwrap());
        let is_listed = |sandbox: &&Arc<Running>| {
            (request.app_id.is_empty() || sandbox.app_id == request.app_id)
                && (request.include_finished || sandbox.is_running())
                && (before == 0.0 || sandbox.created_at < before)
                && {
                    let tags = sandbox.tags.lock().unwrap();
                    request.tags.iter().all(|tag| tags.contains(tag))
                }
        };
        let mut sandboxes: Vec<_> =
            sandboxes.values().filter(is_listed).map(|sandbox| info(sandbox)).collect();
        sandboxes.sort_by(|a, b| b.created_at.total_cmp(&a.created_at));
        sandboxes.truncate(PAGE);
        Ok(Response::new(SandboxListResponse { sandboxes }))
    }

    async fn sandbox_terminate_v2(
        &self,
        request: Request<SandboxTerminateRequest>,
    ) -> Answer<SandboxTerminateResponse> {
        let sandbox = self.0.sandbox(&request.get_ref().sandbox_id)?;
        let existing_result = sandbox.result();
        sandbox.end(GenericStatus::Terminated);
        Ok(Response::new(SandboxTerminateResponse { existing_result }))
    }

    async fn sandbox_wait_v2(
        &self,
        request: Request<SandboxWaitRequest>,
    ) -> Answer<SandboxWaitResponse> {
        let request = request.into_inner();
        let sandbox = self.0.sandbox(&request.sandbox_id)?;
        let mut result = sandbox.watch();
        let ended = result.wait_for(Option::is_some);
        let ended = tokio::time::timeout(self.held(request.timeout), ended).await;
        let result = ended.ok().and_then(Result::ok).and_then(|result| result.clone());
        Ok(Response::new(SandboxWaitResponse { result: Some(result.unwrap_or_default()) }))
    }

    async fn secret_get_or_create(
        &self,
        request: Request<SecretGetOrCreateRequest>,
    ) -> Answer<SecretGetOrCreateResponse> {
        let request = request.into_inner();
        let name = &request.deployment_name;
        let secrets: &BTreeMap<String, _> = &self.0.options.secrets;
        let Some(found) = secrets.get(name) else {
            let message = format!("Secret '{name}' not found in environment 'main'");
            return Err(Status::not_found(message));
        };
        if let Some(key) = request.required_keys.iter().find(|key| !found.contains_key(*key)) {
            let message = format!("Secret '{name}' is missing the key '{key}'");
            return Err(Status::failed_precondition(message));
        }
        Ok(Response::new(SecretGetOrCreateResponse { secret_id: format!("st-{name}") }))
    }
}

/// The variables that these sources give.
pub(crate) fn variables(
    world: &World,
    sources: &[SecretSource],
) -> Result<Vec<(String, String)>, Status> {
    let mut variables = Vec::new();
    for source in sources {
        match &source.source {
            Some(Source::Env(map)) => variables.extend(map.contents.clone()),
            Some(Source::SecretId(id)) => {
                let name = id.strip_prefix("st-").unwrap_or(id);
                let found = world.options.secrets.get(name);
                let unknown = || Status::not_found(format!("Secret {id:?} not found"));
                variables.extend(found.ok_or_else(unknown)?.clone());
            }
            None => return Err(Status::invalid_argument("a secret has no source")),
        }
    }
    Ok(variables)
}
