//! Modal's control plane, as somebody with these credentials.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use super::channel;
use super::config::ModalConfig;
use super::fault::Fault;
use super::proto::client as wire;
use super::proto::client::modal_client_client::ModalClientClient;
use super::retry::{Attempt, Rules, persist};
use super::token::{Need, Tokens};
use crate::error::{Error, Result};

/// As whom Kaa speaks: the number of Modal's own client for Go, in the version of its protocol. Other
/// clients that Modal doesn't make do the same.
const CLIENT_TYPE: &str = "9";
const CLIENT_VERSION: &str = "1.0.0";
const LIBRARY_VERSION: &str = concat!("kaa-rs/", env!("CARGO_PKG_VERSION"));
/// How long asking for a token may take.
const TOKEN_TIME: Duration = Duration::from_secs(5);
/// Between two questions that Modal is to hold until there is an answer, from the one to the other.
pub(super) const ASK_PAUSE: Duration = Duration::from_secs(1);

pub(super) type Stub = ModalClientClient<Channel>;

/// Modal, as somebody with these credentials. Cheap to clone.
///
/// Needs a tokio runtime with time and I/O enabled.
///
/// ```no_run
/// use kaa::modal::{ModalClient, ModalConfig};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> kaa::Result<()> {
/// let config = ModalConfig::load(|name| std::env::var(name).ok())?;
/// let modal = ModalClient::connect(config).await?;
/// for sandbox in modal.sandboxes(None).await? {
///     println!("{} has lived since {:?}", sandbox.id, sandbox.created_at);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ModalClient {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for ModalClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModalClient").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

struct Inner {
    config: ModalConfig,
    /// The server that answered.
    url: String,
    channel: Channel,
    /// Certificates that are trusted beside the system's.
    roots: Option<Vec<u8>>,
    /// What every call has.
    identity: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    tokens: Tokens,
}

/// What a call is made with beside its message.
#[derive(Clone, Copy, Default)]
pub(super) struct Extra<'a> {
    /// What Modal gave with the sandbox that the call is about.
    pub(super) sandbox_token: Option<&'a str>,
    /// How long a try may take, if not as long as others.
    pub(super) attempt: Option<Duration>,
}

impl ModalClient {
    /// Connects to the first server that can be reached, and asks it for a token.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] when there is none, or the credentials are refused; [`Error::Invalid`] for
    /// credentials that nobody has, and addresses that they would be sent to in plain text; [`Error::Io`] for certificates that can't be read.
    pub async fn connect(config: ModalConfig) -> Result<Self> {
        let config = config.checked()?;
        let roots = match &config.root_certificates {
            Some(path) => Some(std::fs::read(path).map_err(|e| {
                Error::io(format!("reading the certificates {}", path.display()), e)
            })?),
            None => None,
        };
        let rules = Rules::control(None);
        let connected = persist(rules, |_| async {
            channel::connect(&config.server_urls, roots.as_deref())
                .await
                .map_err(|fault| Status::new(fault.code, fault.message))
        });
        let (channel, url) =
            connected.await.map_err(|fault| fault.about("Modal", &config.token_id))?;
        let identity = identity(&config, &url)?;
        let tokens = Tokens::default();
        let client =
            Self { inner: Arc::new(Inner { config, url, channel, roots, identity, tokens }) };
        client.token().await.map_err(|fault| client.explain(&fault, "Modal"))?;
        Ok(client)
    }

    /// What a fault means for whoever wanted `what`.
    pub(super) fn explain(&self, fault: &Fault, what: &str) -> Error {
        fault.about(what, &self.inner.config.token_id)
    }

    pub(super) fn config(&self) -> &ModalConfig {
        &self.inner.config
    }

    /// Whether Modal's server is this machine's own, which only a stand-in's is.
    pub(super) fn is_local(&self) -> bool {
        channel::is_loopback(&self.inner.url)
    }

    pub(super) fn roots(&self) -> Option<&[u8]> {
        self.inner.roots.as_deref()
    }

    pub(super) fn throttle(&self) -> Option<Duration> {
        self.inner.config.max_throttle_wait.map(Duration::from_secs)
    }

    pub(super) fn stub(&self) -> Stub {
        ModalClientClient::new(self.inner.channel.clone())
            .max_decoding_message_size(channel::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(channel::MESSAGE_BYTES_MAX)
    }

    /// A request with all that Modal wants to know, but for what tells tries apart.
    pub(super) fn request<Q>(&self, message: Q, token: &AsciiMetadataValue) -> Request<Q> {
        let mut request = Request::new(message);
        for (key, value) in &self.inner.identity {
            request.metadata_mut().insert(key.clone(), value.clone());
        }
        request.metadata_mut().insert("x-modal-auth-token", token.clone());
        request
    }

    /// Makes a call, again if it has to be.
    ///
    /// # Errors
    ///
    /// The last fault.
    pub(super) async fn call<Q, A, F>(
        &self,
        message: Q,
        extra: Extra<'_>,
        call: impl Fn(Stub, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let key = Uuid::new_v4().to_string();
        let mut rules = Rules::control(self.throttle());
        if let Some(attempt) = extra.attempt {
            rules = rules.attempt(attempt);
        }
        let token = self.token().await?;
        let made = |token: AsciiMetadataValue| {
            let (key, call, message) = (&key, &call, &message);
            persist(rules, move |attempt| {
                let mut request = self.request(message.clone(), &token);
                number(&mut request, key, attempt);
                if let Some(Ok(mut token)) = extra.sandbox_token.map(AsciiMetadataValue::try_from) {
                    token.set_sensitive(true);
                    request.metadata_mut().insert("x-modal-sandbox-token", token);
                }
                let answer = call(self.stub(), request);
                async { answer.await.map(Response::into_inner) }
            })
        };
        match made(token.clone()).await {
            Err(fault) if fault.code == Code::Unauthenticated => {
                made(self.other_token(&token).await?).await
            }
            done => done,
        }
    }

    /// The token of the moment.
    ///
    /// # Errors
    ///
    /// The fault of asking for one.
    pub(super) async fn token(&self) -> Result<AsciiMetadataValue, Fault> {
        self.inner.tokens.get(|need| self.new_token(need)).await
    }

    /// Another token than this one, which was refused: it may have ended before this machine's clock says
    /// so.
    ///
    /// # Errors
    ///
    /// The fault of asking for it.
    pub(super) async fn other_token(
        &self,
        refused: &AsciiMetadataValue,
    ) -> Result<AsciiMetadataValue, Fault> {
        self.inner.tokens.forget(refused);
        self.token().await
    }

    async fn new_token(&self, need: Need) -> Result<String, Fault> {
        let key = Uuid::new_v4().to_string();
        let rules = Rules::control(self.throttle()).attempt(TOKEN_TIME);
        let rules = match need {
            Need::Someday => rules.once(),
            Need::Now => rules,
        };
        let asked = persist(rules, |attempt| {
            let mut request = Request::new(wire::AuthTokenGetRequest {});
            for (key, value) in &self.inner.identity {
                request.metadata_mut().insert(key.clone(), value.clone());
            }
            number(&mut request, &key, attempt);
            let mut stub = self.stub();
            async move { stub.auth_token_get(request).await.map(Response::into_inner) }
        });
        asked.await.map(|answer| answer.token)
    }
}

/// Tells the tries of one call apart, and from those of another.
fn number<Q>(request: &mut Request<Q>, key: &str, attempt: Attempt) {
    let metadata = request.metadata_mut();
    let mut put = |name: &'static str, value: String| {
        if let Ok(value) = AsciiMetadataValue::try_from(value) {
            metadata.insert(name, value);
        }
    };
    put("x-idempotency-key", key.to_owned());
    put("x-retry-attempt", attempt.retries.to_string());
    put("x-throttle-retry-attempt", attempt.throttled.to_string());
    let since = format!("{:.3}", attempt.since.elapsed().as_secs_f64());
    if attempt.retries > 0 {
        put("x-retry-delay", since.clone());
    }
    if attempt.throttled > 0 {
        put("x-throttle-retry-delay", since);
    }
}

/// Who asks.
fn identity(
    config: &ModalConfig,
    url: &str,
) -> Result<Vec<(AsciiMetadataKey, AsciiMetadataValue)>> {
    let fields = [
        ("x-modal-client-type", CLIENT_TYPE, "client type"),
        ("x-modal-client-version", CLIENT_VERSION, "client version"),
        ("x-modal-libmodal-version", LIBRARY_VERSION, "library version"),
        ("x-modal-token-id", &config.token_id, "MODAL_TOKEN_ID"),
        ("x-modal-token-secret", &config.token_secret, "MODAL_TOKEN_SECRET"),
        ("x-modal-host", &channel::host(url), "MODAL_SERVER_URL"),
    ];
    let fields = fields.into_iter().map(|(name, value, what)| {
        let Ok(mut value) = AsciiMetadataValue::try_from(value) else {
            let reason = "it has characters that no such value has; copy it again";
            return Err(Error::invalid(what, reason));
        };
        value.set_sensitive(name == "x-modal-token-secret");
        Ok((AsciiMetadataKey::from_static(name), value))
    });
    fields.collect()
}
